import copy
import math
from unittest import mock

import pytest
import torch
from priors import (
    CONDITIONS,
    GRID,
    K,
    N,
    data,
    from_forward,
    large,
    make,
    sample_plainly,
    samplers,
    seeded,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from vqgan.transformer import GPT

# --- the network -------------------------------------------------------------------------------


def by_hand(model, condition, indices):
    """The whole forward of one grid, place by place and head by head, from the weights alone."""
    w = {name: value.detach() for name, value in model.named_parameters()}

    def norm(x, name):
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    rows = [w["cond_emb.weight"][c] for c in condition]
    rows += [w["tok_emb.weight"][s] for s in indices[:-1]]
    places = [row + w["pos_emb"][t] for t, row in enumerate(rows)]
    size = len(places[0]) // model.n_head
    for layer in range(len(model.blocks)):
        block = f"blocks.{layer}"
        qkv = [linear(norm(x, f"{block}.norm1"), f"{block}.attention.qkv") for x in places]
        for t in range(len(places)):
            heads = []
            for head in range(model.n_head):
                q, k, v = (
                    [x.chunk(3)[part][head * size : (head + 1) * size] for x in qkv]
                    for part in range(3)
                )
                scores = torch.stack([q[t] @ k[s] / math.sqrt(size) for s in range(t + 1)])
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(weights[s] * v[s] for s in range(t + 1)))
            places[t] = places[t] + linear(torch.cat(heads), f"{block}.attention.proj")
        for t, x in enumerate(places):
            hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.0")
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            places[t] = x + linear(hidden, f"{block}.mlp.2")
    last_of_the_condition = len(condition) - 1
    return torch.stack([w["head.weight"] @ norm(x, "norm") for x in places[last_of_the_condition:]])


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("N", [1, 5])
def test_forward_by_hand(C, N):
    model, (condition, indices) = make(C), data(C, N=N)
    logits = model(condition, indices)
    assert logits.shape == (3, N, K)
    for b in range(3):
        assert torch.allclose(logits[b], by_hand(model, condition[b], indices[b]), atol=1e-10)


def test_same_logits_as_gpt2_of_transformers():
    config = GPT2Config(
        vocab_size=K, n_positions=12, n_embd=16, n_layer=2, n_head=2, activation_function="gelu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    ours = GPT(K, N, K, 1, n_layer=2, n_head=2, n_embd=16).eval()
    body = theirs.transformer
    norms, pairs = [(ours.norm, body.ln_f)], []
    for block, h in zip(ours.blocks, body.h, strict=True):
        norms += [(block.norm1, h.ln_1), (block.norm2, h.ln_2)]
        pairs += [(block.attention.qkv, h.attn.c_attn), (block.attention.proj, h.attn.c_proj)]
        pairs += [(block.mlp[0], h.mlp.c_fc), (block.mlp[2], h.mlp.c_proj)]
    with torch.no_grad():
        for mine, other in norms + pairs:
            other.bias.normal_()
            mine.bias.copy_(other.bias)
        for mine, other in norms:
            mine.weight.copy_(other.weight.normal_())
        for mine, other in pairs:
            mine.weight.copy_(other.weight.T)  # theirs is (in, out)
        ours.pos_emb.copy_(body.wpe.weight)
        for table in (ours.tok_emb.weight, ours.cond_emb.weight[:K], ours.head.weight):
            table.copy_(body.wte.weight)
        tokens = torch.randint(K, (3, 12))
        unread = torch.zeros(3, 1, dtype=torch.int64)
        logits = ours(tokens[:, :1], torch.cat([tokens[:, 1:], unread], dim=1))
        assert torch.allclose(logits, theirs(tokens).logits, atol=1e-4)


@pytest.mark.parametrize("C", [1, 3])
def test_a_code_changes_the_logits_of_later_codes_only(C):
    model, (condition, indices) = make(C), data(C)
    logits = model(condition, indices)
    for j in range(12):
        changed = indices.clone()
        changed[:, j] = (changed[:, j] + 1) % K
        difference = (model(condition, changed) - logits).abs().amax(dim=(0, 2))
        assert (difference[: j + 1] == 0).all()
        assert (difference[j + 1 :] > 1e-6).all()  # of the last code: none


@pytest.mark.parametrize("place", [0, 2])
def test_every_token_of_the_condition_reaches_every_code(place):
    model, (condition, indices) = make(3), data(3)
    changed = condition.clone()
    changed[:, place] = (changed[:, place] + 1) % CONDITIONS
    difference = (model(changed, indices) - model(condition, indices)).abs().amax(dim=(0, 2))
    assert (difference > 1e-6).all()


def test_the_loss_is_the_mean_of_minus_log_probabilities():
    model, (condition, indices) = make(), data()
    log_probabilities = model(condition, indices).float().log_softmax(dim=-1)
    total = 0.0
    for b in range(3):
        for i in range(12):
            total -= log_probabilities[b, i, indices[b, i]].item()
    assert model.loss(condition, indices).item() == pytest.approx(total / 36, rel=1e-5)


def test_tokens_attention_and_branches_are_dropped_in_training_only():
    for part in ("tokens", "attention", "branches"):
        model, (condition, indices) = make(dropout=0.0), data()
        expected = model(condition, indices)
        if part == "attention":
            model.blocks[0].attention.dropout = 0.5
        else:
            (model if part == "tokens" else model.blocks[0]).dropout.p = 0.5
        assert torch.equal(model(condition, indices), expected), part
        model.train()
        assert not torch.allclose(model(condition, indices), expected), part
    model = GPT(K, N, CONDITIONS, 1, n_layer=1, dropout=0.3)
    block = model.blocks[0]
    assert model.dropout.p == block.dropout.p == block.attention.dropout == 0.3


def test_it_starts_as_gpt2():
    model = GPT(64, 64, 64, 1, n_layer=8, n_head=4, n_embd=64)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            ends_a_branch = name.endswith(("proj.weight", "mlp.2.weight"))
            std = 0.02 / 4 if ends_a_branch else 0.02  # 4 = sqrt(2 * 8 layers)
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(parameter.mean().item()) < 0.1 * std, name


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = make()
    decaying, others = model.parameter_groups(0.1)
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert len(decaying["params"]) + len(others["params"]) == len(names)
    assert set(decaying["params"]) | set(others["params"]) == names.keys()
    expected = {"head.weight"} | {
        f"blocks.{i}.{layer}.weight"
        for i in range(2)
        for layer in ("attention.qkv", "attention.proj", "mlp.0", "mlp.2")
    }
    assert {names[parameter] for parameter in decaying["params"]} == expected


def test_a_copy_is_independent_of_the_original():
    model, (condition, _) = make(), data()
    twin = copy.deepcopy(model)
    before = model.sample(condition, generator=seeded())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert (twin.sample(condition, temperature=0) == 0).all()
    assert torch.equal(model.sample(condition, generator=seeded()), before)


def test_the_head_has_the_codes_alone():
    model = GPT(4, N, 1000, 2, n_layer=1, n_head=1, n_embd=8)
    assert model.head.weight.shape == (4, 8) and model.head.bias is None
    indices = model.sample(torch.randint(1000, (200, 2)), temperature=5.0, generator=seeded())
    assert indices.unique().tolist() == [0, 1, 2, 3]


# --- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [1, 3])
def test_logits_with_the_cache_are_those_without(C):
    model, (condition, indices) = make(C, dtype=torch.float32), data(C)
    caches, x = model._new_caches(3), model.cond_emb(condition)
    with torch.no_grad():
        expected = model(condition, indices)
        for i in range(12):
            logits = model._next_logits(x, caches)
            assert torch.allclose(logits, expected[:, i], atol=1e-4)
            x = model.tok_emb(indices[:, i : i + 1])
    assert caches[0].length == len(model.pos_emb) == C + 11


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0}, {"temperature": 0.5, "top_k": 4}, {"temperature": 1.5, "top_p": 0.7}],
)
def test_sampling_with_the_cache_draws_what_a_plain_loop_draws(C, filters):
    model, (condition, _) = make(C), data(C)
    indices = model.sample(condition, generator=seeded(), **filters)
    assert indices.shape == (3, N) and indices.dtype == torch.int64
    plain = sample_plainly(condition, from_forward(model, condition), **filters)
    assert torch.equal(indices, plain)


def test_given_tokens_are_kept_and_the_others_written_around_them():
    model, (condition, indices) = make(), data()
    given = torch.where(torch.rand(3, N) < 0.5, indices, -1)
    written = model.sample(condition, given=given, generator=seeded())
    assert torch.equal(written[given >= 0], given[given >= 0])
    assert (written >= 0).all()
    plain = sample_plainly(condition, from_forward(model, condition), given=given)
    assert torch.equal(written, plain)


def test_what_is_given_does_not_shift_what_is_drawn():
    model, (condition, _) = make(), data()
    plain = model.sample(condition, generator=seeded())
    nothing_given = torch.full((3, N), -1)
    assert torch.equal(model.sample(condition, given=nothing_given, generator=seeded()), plain)
    top = nothing_given.clone()
    top[:, :4] = plain[:, :4]
    assert torch.equal(model.sample(condition, given=top, generator=seeded()), plain)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("which", [0, 1])
def test_a_seed_gives_the_same_first_sequences_for_any_count_and_in_chunks(which, guidance):
    """In double precision, since sums over another batch may be rounded otherwise."""
    model, (condition, _) = make(), data(B=8)

    def sample(condition, generator):
        return samplers(model, condition)[which](generator=generator, guidance=guidance)

    whole, generator = sample(condition, seeded()), seeded()
    for count in (1, 4):
        assert torch.equal(sample(condition[:count], seeded()), whole[:count])
    chunks = [sample(chunk, generator) for chunk in condition.split(3)]
    assert torch.equal(torch.cat(chunks), whole)


def test_guidance_1_is_none_and_0_leaves_the_condition_out():
    model, (condition, _) = make(3), data(3)
    nothing = torch.full_like(condition, model.null_token)
    for sample in (model.sample, lambda *args, **kwargs: large(model, *args, 3, 5, **kwargs)):
        plain = sample(condition, generator=seeded())
        without = sample(nothing, generator=seeded())
        assert torch.equal(sample(condition, guidance=1.0, generator=seeded()), plain)
        assert torch.equal(sample(condition, guidance=0.0, generator=seeded()), without)
        assert not torch.equal(plain, without)


def test_guidance_goes_beyond_the_condition():
    """3 l(condition) - 2 l(nothing), for g = 3."""
    model, (condition, _) = make(), data()
    told = from_forward(model, condition)
    untold = from_forward(model, torch.full_like(condition, model.null_token))
    plain = sample_plainly(condition, lambda s: 3 * told(s) - 2 * untold(s), top_k=5)
    settings = {"guidance": 3.0, "top_k": 5}
    assert torch.equal(model.sample(condition, generator=seeded(), **settings), plain)
    grid = large(model, condition, *GRID, generator=seeded(), **settings)
    assert torch.equal(grid.flatten(1), plain)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_the_mode_and_the_global_random_state_are_left_alone(which, training):
    model, (condition, _) = make(dropout=0.5), data()
    sample = samplers(model, condition)[which]
    expected = sample(generator=seeded())
    model.train(training)
    state = torch.get_rng_state()
    assert torch.equal(sample(generator=seeded()), expected)  # without dropout
    assert not torch.equal(sample(), sample())  # a generator of its own

    def stop(_):
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(progress=stop)
    assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_is_called_after_every_code():
    model, (condition, _) = make(), data()
    for sample, codes in zip(samplers(model, condition), (12, 16), strict=True):
        progress = mock.Mock()
        sample(progress=progress)
        assert progress.mock_calls == codes * [mock.call(len(condition))]


def test_a_sequence_fills_token_by_token():
    model, (condition, tokens) = make(), data()
    given = tokens.clone()
    given[:, 2:] = -1
    given[0, 7] = 3
    steps = [
        t.clone() for t in model.sample_progressive(condition, given=given, generator=seeded())
    ]
    for i, step in enumerate(steps):
        assert (step[:, : i + 1] >= 0).all() and torch.equal(step[:, i + 1 :], given[:, i + 1 :])
        assert torch.equal(step[:, : i + 1], steps[-1][:, : i + 1])
    assert len(steps) == N
    assert torch.equal(steps[-1], model.sample(condition, given=given, generator=seeded()))


def test_an_overfitted_transformer_writes_its_grids_back():
    condition = torch.tensor([[0], [1]])
    grids = torch.randint(K, (2, 12))
    model = GPT(K, N, 2, 1, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.01), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = model.loss(condition, grids)
        loss.backward()
        optimizer.step()
    assert loss < 0.003  # four times what it is, of other seeds too
    for settings in ({"temperature": 0}, {"generator": seeded()}):
        assert torch.equal(model.sample(condition, **settings), grids)


# --- bad input ---------------------------------------------------------------------------------

CONDITION, INDICES = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.int64)


def filled(tensor, value, shape=None):
    return torch.full(shape or tensor.shape, value)


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        (filled(INDICES, K), "tokens must lie in 0 to 10, but reach 11 to 11"),
        (filled(INDICES, -1), "tokens must lie in 0 to 10, but reach -1 to -1"),
        (filled(INDICES, 0, (2, 13)), "13 tokens were given: give 1 to 12"),
        (filled(INDICES, 0, (2, 0)), "0 tokens were given"),
        (filled(INDICES, 0, (3, 12)), r"tokens must be \(2, T\), not \(3, 12\)"),
        (filled(INDICES, 0, (2, 3, 4)), r"tokens must be \(2, T\), not \(2, 3, 4\)"),
    ],
)
def test_indices_that_do_not_fit_are_refused(indices, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        make()(CONDITION, indices)
    assert caught.type is ValueError  # a fault of the program, not of its user


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (filled(CONDITION, 0, (2, 2)), r"condition must be \(B, 1\), not \(2, 2\)"),
        (filled(CONDITION, 0, (2,)), r"condition must be \(B, 1\), not \(2,\)"),
        (filled(CONDITION, 6), "tokens of a condition must lie in 0 to 5, but reach 6 to 6"),
        (filled(CONDITION, -1), "tokens of a condition must lie in 0 to 5, but reach -1 to -1"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(condition, expected):
    model = make()
    for call in (lambda: model(condition, INDICES), *samplers(model, condition)):
        with pytest.raises(ValueError, match=expected):
            call()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (filled(INDICES, 0, (2, 3, 4)), r"given must be \(2, 12\), not \(2, 3, 4\)"),
        (filled(INDICES, 0, (1, 12)), r"given must be \(2, 12\), not \(1, 12\)"),
        (filled(INDICES, -2), "given tokens must lie in -1 to 10, but reach -2 to -2"),
        (filled(INDICES, K), "given tokens must lie in -1 to 10, but reach 11 to 11"),
    ],
)
def test_given_tokens_that_do_not_fit_are_refused(given, expected):
    with pytest.raises(ValueError, match=expected):
        make().sample(CONDITION, given=given)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_embeddings": 0}, "num_embeddings must be at least 1, not 0"),
        ({"seq_len": 0}, "seq_len must be at least 1, not 0"),
        ({"condition_vocabulary": 0}, "condition_vocabulary must"),
        ({"condition_length": 0}, "condition_length must"),
        ({"n_layer": 0}, "n_layer must"),
        ({"n_head": 0}, "n_head must"),
        ({"n_embd": 0}, "n_embd must"),
        ({"n_embd": 18}, "n_head=4 must divide n_embd=18"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), not 1.0"),
        ({"dropout": math.nan}, "dropout must lie in"),
    ],
)
def test_sizes_that_make_no_transformer_are_named(change, expected):
    sizes = {"num_embeddings": 8, "seq_len": 12, "condition_vocabulary": 2, "n_layer": 1}
    sizes |= {"condition_length": 1, "n_head": 4, "n_embd": 16, "dropout": 0.0}
    assert isinstance(GPT(**sizes), nn.Module)
    with pytest.raises(ValueError, match=expected):
        GPT(**sizes | change)
