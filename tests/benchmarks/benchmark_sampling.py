"""Sampling grids of codes: with and without a cache, and against transformers' GPT-2.

    pip install -e '.[benchmark]'
    python tests/benchmarks/benchmark_sampling.py

First, 16 grids of 16x16 codes by the same network with the same weights in three ways, in float32:
`GPT.sample`, a loop without a cache (the whole prefix is read again for every code, as minGPT's
`generate` does), and transformers' `GPT2LMHeadModel.generate` with its cache. Wanted: 20 times as
fast as without a cache, 1.5 times as fast as `generate`.

Second, `GPT.sample` on grids of 64 to 1024 codes: the time of a code should hardly grow with them.
"""

import importlib.metadata
import math
import statistics
import time

import torch
from timing import environment, median_seconds, synchronize

from vqgan.device import choose_device
from vqgan.transformer import GPT

BATCH_SIZE = 16
NUM_EMBEDDINGS = 1024
N_LAYER, N_HEAD, N_EMBD = 6, 8, 256
SIDES = (8, 16, 24, 32)
WANTED = {"without a cache": 20, "transformers": 1.5}


def new_model(side, device, model_class=GPT):
    """Ours, with one token of condition."""
    sizes = {"n_layer": N_LAYER, "n_head": N_HEAD, "n_embd": N_EMBD}
    return model_class(NUM_EMBEDDINGS, side * side, 1, 1, **sizes).to(device).eval()


def new_peer(side, device):
    """transformers' GPT-2 of the same sizes; its condition is a code, the first of the prompt."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=NUM_EMBEDDINGS,
        n_positions=side * side,
        n_embd=N_EMBD,
        n_layer=N_LAYER,
        n_head=N_HEAD,
        activation_function="gelu",  # the exact one
        tie_word_embeddings=False,  # a head of its own, as ours
        bos_token_id=None,
        eos_token_id=None,  # nothing stops it early
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).to(device).eval()


@torch.no_grad()
def copy_weights(model, peer):
    """Those of `peer`, whose matrices are (in, out), to `model`; token 0 becomes the condition."""
    theirs = peer.transformer
    model.tok_emb.weight.copy_(theirs.wte.weight)
    model.cond_emb.weight.copy_(theirs.wte.weight[:1].expand(2, -1))
    model.pos_emb.copy_(theirs.wpe.weight)
    model.head.weight.copy_(peer.lm_head.weight)
    pairs = [(model.norm, theirs.ln_f)]
    for block, other in zip(model.blocks, theirs.h, strict=True):
        pairs += [(block.norm1, other.ln_1), (block.norm2, other.ln_2)]
        pairs += [(block.attention.qkv, other.attn.c_attn), (block.mlp[0], other.mlp.c_fc)]
        pairs += [(block.attention.proj, other.attn.c_proj), (block.mlp[2], other.mlp.c_proj)]
    for layer, other in pairs:
        is_matrix = other.weight.dim() == 2
        layer.weight.copy_(other.weight.T if is_matrix else other.weight)
        layer.bias.copy_(other.bias)


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def check_equal(model, peer):
    """As many parameters, and the same logits."""
    in_blocks = num_parameters(model.blocks), num_parameters(peer.transformer.h)
    assert in_blocks[0] == in_blocks[1], f"not the same network: {in_blocks}"
    totals = num_parameters(model), num_parameters(peer)
    extra = model.cond_emb.weight.numel()  # which the peer does not have
    assert totals[0] - extra == totals[1], f"not the same network: {totals}"
    prompt = torch.randint(NUM_EMBEDDINGS, (2, model.seq_len), device=model.head.weight.device)
    prompt[:, 0] = 0
    indices = torch.cat([prompt[:, 1:], prompt[:, :1]], dim=1)  # the last is not read
    logits = peer(prompt, attention_mask=torch.ones_like(prompt)).logits
    torch.testing.assert_close(model(prompt[:, :1], indices), logits, atol=1e-4, rtol=1e-4)
    print(
        f"blocks: {in_blocks[0]} parameters in both; in all: {totals[0]} (ours, of which {extra} "
        f"in the table of conditions), {totals[1]} (transformers); the same logits"
    )


@torch.no_grad()
def sample_uncached(model, condition):
    """The whole prefix through the network for every code; only the last logits are used."""
    codes = torch.empty(len(condition), 0, dtype=torch.int64, device=condition.device)
    for _ in range(model.seq_len):
        seen = torch.cat([codes, torch.zeros_like(condition)], dim=1)  # the last is not read
        probabilities = model(condition, seen)[:, -1].softmax(dim=-1)
        codes = torch.cat([codes, torch.multinomial(probabilities, 1)], dim=1)
    return codes


def generate(peer, condition, seq_len):
    """transformers' own; the condition is the prompt."""
    sequences = peer.generate(
        condition,
        attention_mask=torch.ones_like(condition),
        use_cache=True,
        do_sample=True,
        top_k=0,
        min_new_tokens=seq_len,
        max_new_tokens=seq_len,
        pad_token_id=0,
    )
    assert sequences.shape == (len(condition), 1 + seq_len)


def prepare(name, model, batch_size=BATCH_SIZE, **settings):
    """A call that samples grids in one of three ways. (The peer's weights become the model's.)

    `settings` are arguments of our `sample`.
    """
    device = model.head.weight.device
    condition = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
    if name == "ours":
        return lambda: model.sample(condition, **settings)
    if name == "without a cache":
        return lambda: sample_uncached(model, condition)
    peer = new_peer(math.isqrt(model.seq_len), device)
    copy_weights(model, peer)
    check_equal(model, peer)
    return lambda: generate(peer, condition, model.seq_len)


def compare(device):
    model = new_model(16, device)
    contestants = {name: prepare(name, model) for name in ("transformers", "ours")}
    times = median_seconds(contestants, rounds=5)
    sample_plainly = prepare("without a cache", model)
    slow = []
    for _ in range(3):  # the first warms up; too slow for more, and for taking turns
        start = time.perf_counter()
        sample_plainly()
        synchronize()
        slow.append(time.perf_counter() - start)
    times["without a cache"] = statistics.median(slow[1:])
    print(f"{BATCH_SIZE} grids of {model.seq_len} codes")
    for name, seconds in times.items():
        line = f"{name:>15} {seconds:>8.2f} s"
        if name in WANTED:
            line += f"   ours is {seconds / times['ours']:>5.2f}x as fast (wanted {WANTED[name]}x)"
        print(line)


def grow(device):
    contestants = {}
    for side in SIDES:
        model = new_model(side, device)
        for batch_size in (1, BATCH_SIZE):
            condition = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
            contestants[side, batch_size] = lambda m=model, c=condition: m.sample(c)
    times = median_seconds(contestants, rounds=3)
    print("milliseconds a code, and seconds in all, of GPT.sample")
    print(f"{'codes':>6} " + " ".join(f"{f'batch {size}':>20}" for size in (1, BATCH_SIZE)))
    for side in SIDES:
        line = f"{side * side:>6}"
        for batch_size in (1, BATCH_SIZE):
            seconds = times[side, batch_size]
            line += f" {1e3 * seconds / side**2:>9.2f} ms {seconds:>6.2f} s"
        print(line)


def main() -> None:
    torch.manual_seed(0)
    device = choose_device("auto")
    version = importlib.metadata.version("transformers")
    print(
        f"{environment()}, transformers {version}, {device}, float32, {N_LAYER} layers of "
        f"width {N_EMBD}, {N_HEAD} heads, K = {NUM_EMBEDDINGS}"
    )
    compare(device)
    grow(device)


if __name__ == "__main__":
    main()
