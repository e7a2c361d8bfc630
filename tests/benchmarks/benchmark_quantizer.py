"""Each quantizer's training step, forward and backward, against vector-quantize-pytorch's own.

    python tests/benchmarks/benchmark_quantizer.py

8,192 vectors (a batch of 128 grids of 8x8) on the CPU in float32: the learned codebooks at K = 512
and 4,096 with 64 dimensions, FSQ and LFQ with codebooks of about these sizes. Then peak memory at
K = 65,536 with 2,048 vectors, where a matrix of all distances would hold 512 MiB. The peer also in
its leaner setting: no time is ours to compare if it computes more.
"""

import functools
import importlib.metadata
from collections.abc import Callable

import torch
from timing import environment, median_seconds, peak_extra_mebibytes

from vqgan.codebooks import make_quantizer
from vqgan.quantizer import Quantized

DIMENSIONS = 64
BATCH_SIZE, SIDE = 128, 8  # 8,192 vectors
LEARNED = ("ema", "gradient", "simvq", "residual")
KINDS = (*LEARNED, "fsq", "lfq")
LEVELS = {
    512: (8, 8, 8), 4096: (8, 8, 8, 8), 16_384: (16, 16, 8, 8), 65_536: (16, 16, 16, 16)
}  # fmt: skip
ROUNDS = 2  # of residual quantization


def build_ours(kind: str, num_embeddings: int) -> torch.nn.Module:
    options: dict = {"data_init": False} if kind in ("ema", "gradient", "residual") else {}
    options |= {"num_rounds": ROUNDS} if kind == "residual" else {}
    options |= {"levels": LEVELS[num_embeddings]} if kind == "fsq" else {}
    return make_quantizer(kind, num_embeddings, DIMENSIONS, **options)


def build_peer(kind: str, num_embeddings: int) -> torch.nn.Module:
    import vector_quantize_pytorch as peer

    ema = {"decay": 0.99, "commitment_weight": 0.25, "threshold_ema_dead_code": 1}
    sizes = {"dim": DIMENSIONS, "codebook_size": num_embeddings}
    if kind == "fsq":
        return peer.FSQ(list(LEVELS[num_embeddings]))
    if kind == "lfq":
        return peer.LFQ(codebook_size=num_embeddings, commitment_loss_weight=0.25)
    if kind == "simvq":
        return peer.SimVQ(**sizes, channel_first=True, rotation_trick=False)
    if kind == "residual":
        return peer.ResidualVQ(**sizes, shared_codebook=True, num_quantizers=ROUNDS, **ema)
    learnable = {"learnable_codebook": True, "ema_update": False}
    return peer.VectorQuantize(
        **sizes, accept_image_fmap=True, **(ema if kind == "ema" else learnable)
    )


def prepare(
    name: str,
    num_embeddings: int,
    kind: str = "ema",
    device: str = "cpu",
    batch_size: int = BATCH_SIZE,
) -> Callable[[], None]:
    """A call that quantizes one batch, and computes the gradient of its vectors."""
    torch.manual_seed(0)
    build = build_ours if name == "ours" else build_peer
    quantizer = build(kind, num_embeddings).to(device).train()
    D = DIMENSIONS
    if kind in ("fsq", "lfq"):
        D = build_ours(kind, num_embeddings).embedding_dim
    size = (batch_size, D, SIDE, SIDE)
    z_e = torch.randn(size, device=device, requires_grad=True)
    is_sequence = name == "peer" and kind == "residual"  # whose shared codebook takes no grids

    def call() -> None:
        out = quantizer(z_e.flatten(2).transpose(1, 2) if is_sequence else z_e)
        loss = out[0].square().mean()
        if isinstance(out, Quantized):
            loss = loss + out.loss
        elif kind != "fsq":  # the peer's returns none
            loss = loss + out[-1].sum()
        loss.backward()

    return call


def main() -> None:
    version = importlib.metadata.version("vector-quantize-pytorch")
    print(f"{environment()}; peer: vector-quantize-pytorch {version}")
    names = ("ours", "peer")
    print(f"{'':10} {'K':>6} {'ours/ms':>9} {'peer/ms':>9} {'peer/ours':>9}")
    for kind in KINDS:
        for num_embeddings, rounds in ((512, 15), (4096, 7)):
            calls = {name: prepare(name, num_embeddings, kind) for name in names}
            times = median_seconds(calls, rounds)
            ours, peer = (times[name] for name in names)
            row = f"{1000 * ours:>9.2f} {1000 * peer:>9.2f} {peer / ours:>8.1f}x"
            print(f"{kind:10} {num_embeddings:>6} {row}", flush=True)
    print(f"{'':10} {'K':>6} {'ours/MiB':>9} {'peer/MiB':>9}")
    for kind in KINDS:
        sizes = {"kind": kind, "num_embeddings": 65_536, "batch_size": 32}  # 2,048 vectors
        extra = [peak_extra_mebibytes(functools.partial(prepare, **sizes), name) for name in names]
        print(f"{kind:10} {65_536:>6} {extra[0]:>9.0f} {extra[1]:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
