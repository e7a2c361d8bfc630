import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from priors import CONDITIONS, CPU, GRID, K, N, data, large, make, samplers, seeded
from torch import nn

from vqgan.sampling import (
    KeyValueCache,
    check_sampling,
    classifier_free_guidance,
    describe_sampling,
    eval_mode,
    filter_top_k_top_p,
    sample_sliding_window,
    sample_token,
    uniform_numbers,
)
from vqgan.transformer import GPT

CONDITION = torch.zeros(2, 1, dtype=torch.int64)


# --- drawing a token ----------------------------------------------------------------------------


def likely_plainly(logits, top_k, top_p):
    """Which codes of one row are kept, by a sorted list."""
    codes = sorted(range(len(logits)), key=lambda code: -logits[code])
    if top_k is not None:
        codes = codes[:top_k]
    if top_p is not None:
        total = sum(math.exp(logits[code]) for code in codes)
        kept, mass = [], 0.0
        for code in codes:
            kept.append(code)
            mass += math.exp(logits[code]) / total
            if mass >= top_p:
                break
        codes = kept
    return set(codes)


@pytest.mark.parametrize("top_k", [None, 1, 4, 30])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.35, 0.8, 1.0])
def test_the_likely_codes_by_a_sorted_list(top_k, top_p):
    logits = 2 * torch.randn(2, 10, 30, dtype=torch.float64)
    kept = filter_top_k_top_p(logits, top_k, top_p)
    assert kept.shape == logits.shape
    for row, kept_row in zip(logits.flatten(0, 1), kept.flatten(0, 1), strict=True):
        expected = likely_plainly(row.tolist(), top_k, top_p)
        assert set(kept_row.isfinite().nonzero().flatten().tolist()) == expected
        assert all(kept_row[code] == row[code] for code in expected)


def test_of_ties_as_many_are_kept_as_are_needed():
    logits = torch.zeros(1, 8)
    assert filter_top_k_top_p(logits, 3, None).isfinite().sum() == 3
    assert filter_top_k_top_p(logits, None, 0.5).isfinite().sum() == 4
    assert filter_top_k_top_p(logits, 4, 0.5).isfinite().sum() == 2  # half of the four
    logits[0, 5] = 1.0
    assert filter_top_k_top_p(logits, 2, None).isfinite()[0, 5]


def test_codes_are_drawn_as_often_as_the_softmax_says():
    logits, n = torch.randn(K, dtype=torch.float64), 200_000
    for temperature in (1.0, 0.5):
        uniform = uniform_numbers(n, 1, seeded(), CPU).flatten()
        codes = sample_token(logits.expand(n, K), uniform, temperature, None, None)
        p = (logits / temperature).softmax(dim=0)
        share = codes.bincount(minlength=K) / n
        assert ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_each_code_has_its_stretch_of_the_line():
    logits = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    for u, code in ((0.01, 0), (0.199, 0), (0.201, 1), (0.699, 1), (0.701, 2), (1.0, 2)):
        assert sample_token(logits[None], torch.tensor([u]), 1.0, None, None).item() == code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_impossible_code_is_never_drawn(dtype):
    """Neither the first nor the last on the line, at either end of what is drawn."""
    logits = torch.full((2, 300), -math.inf, dtype=dtype)
    logits[:, [7, 8, 200]] = torch.tensor([0.1, 0.7, 0.3], dtype=dtype)
    codes = sample_token(logits, torch.tensor([2.0**-24, 1.0]), 1.0, None, None)
    assert codes.tolist() == [7, 200]


def test_what_is_impossible_is_not_drawn_where_sums_are_rounded_up():
    """As a parallel sum may be: stretches of codes of probability 0 are not empty then."""
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]])
    rounded = torch.tensor([[0.26, 0.28, 0.99, 1.0]])
    with mock.patch.object(torch.Tensor, "cumsum", lambda *args, **kwargs: rounded):
        codes = [
            sample_token(logits, torch.tensor([u]), 1.0, None, None).item() for u in (0.27, 1.0)
        ]
    assert codes == [2, 2]


def test_a_temperature_that_float32_cannot_divide_by_is_greedy():
    logits = torch.randn(5, K)
    for temperature in (1e-7, 1e-40, 1e-300):
        codes = sample_token(logits, torch.full((5,), 0.5), temperature, None, None)
        assert torch.equal(codes, logits.argmax(dim=-1))


def test_half_precision_logits_are_drawn_from_in_float32():
    """In bfloat16 the line of 2,000 equally likely codes would have a few hundred stretches."""
    logits, uniform = torch.zeros(500, 2000, dtype=torch.bfloat16), torch.rand(500)
    codes = sample_token(logits, uniform, 1.0, None, 0.999)
    assert torch.equal(codes, sample_token(logits.float(), uniform, 1.0, None, 0.999))


def test_uniform_numbers_leave_out_zero_and_have_one():
    zeros = mock.Mock(return_value=torch.zeros(3, 2))
    with mock.patch("vqgan.sampling.torch.rand", zeros):
        assert (uniform_numbers(2, 3, seeded(), CPU) == 1).all()
    uniform = uniform_numbers(1000, 100, seeded(), CPU)
    assert uniform.min() > 0 and uniform.max() <= 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.005)


def test_the_first_sequences_have_the_same_numbers_for_any_count_and_in_chunks():
    whole, generator = uniform_numbers(N, 8, seeded(), CPU), seeded()
    assert whole.shape == (N, 8)
    for count in (1, 4):
        assert torch.equal(uniform_numbers(N, count, seeded(), CPU), whole[:, :count])
    chunks = [uniform_numbers(N, count, generator, CPU) for count in (3, 4, 1)]
    assert torch.equal(torch.cat(chunks, dim=1), whole)


def test_greedy_by_temperature_top_k_and_top_p():
    logits, uniform = torch.randn(50, K), torch.rand(50)
    likeliest = logits.argmax(dim=-1)
    assert torch.equal(sample_token(logits, uniform, 0, None, None), likeliest)
    assert torch.equal(sample_token(logits, uniform, 1.0, 1, None), likeliest)
    assert torch.equal(sample_token(logits, uniform, 1.0, None, 1e-6), likeliest)
    assert torch.equal(sample_token(logits, uniform, 1e-4, None, None), likeliest)
    assert not torch.equal(sample_token(logits, uniform, 1.0, None, None), likeliest)


def test_the_temperature_comes_before_top_p():
    """At 0.5 the probabilities 0.6, 0.4 become 0.69, 0.31: one code has 0.65 of them."""
    logits = torch.tensor([[0.6, 0.4]]).log()
    assert sample_token(logits, torch.ones(1), 1.0, None, 0.65).item() == 1
    assert sample_token(logits, torch.ones(1), 0.5, None, 0.65).item() == 0


# --- parts -------------------------------------------------------------------------------------


def test_guidance_by_hand():
    told, untold = torch.randn(2, 3, K)
    logits = torch.cat([told, untold])
    assert torch.allclose(classifier_free_guidance(logits, 3.0), 3 * told - 2 * untold, atol=1e-5)
    assert torch.equal(classifier_free_guidance(logits, 0.0), untold)
    assert classifier_free_guidance(told, 1.0) is told  # of the conditioned alone


def test_a_cache_gives_back_all_that_was_taken_in():
    k, v = torch.randn(2, 3, 2, 5, 4)
    cache = KeyValueCache(3, 2, 5, 4, like=k)
    for start, end in ((0, 2), (2, 3), (3, 5)):
        keys, values = cache.append(k[:, :, start:end], v[:, :, start:end])
        assert torch.equal(keys, k[:, :, :end]) and torch.equal(values, v[:, :, :end])
        assert cache.length == end


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_is_left_as_it_was_found(training):
    model = nn.Dropout().train(training)
    with pytest.raises(KeyboardInterrupt), eval_mode(model):
        assert not model.training
        raise KeyboardInterrupt
    assert model.training == training


def test_a_setting_is_described_by_what_is_not_left_out():
    setting = {"guidance": 2.0, "temperature": 1.0, "top_k": 100, "top_p": None}
    assert describe_sampling(setting) == "guidance 2, temperature 1, top-k 100"
    assert "greedy" in describe_sampling(setting | {"temperature": 0.0})


# --- larger grids ------------------------------------------------------------------------------


def test_a_large_grid_of_the_blocks_size_is_that_of_sample():
    model, (condition, _) = make(3), data(3)
    for filters in ({}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9}):
        grid = large(model, condition, *GRID, generator=seeded(), **filters)
        plain = model.sample(condition, generator=seeded(), **filters)
        assert torch.equal(grid.flatten(1), plain)


def test_each_code_of_a_large_grid_is_drawn_with_its_own_number():
    """Of a model to which all codes are equally likely, code k has the stretch k/K to (k + 1)/K."""
    model, (condition, _) = make(), data()
    nn.init.zeros_(model.head.weight)
    grid = large(model, condition, 5, 6, generator=seeded())
    uniform = uniform_numbers(30, 3, seeded(), CPU).T.reshape(3, 5, 6)
    assert torch.equal(grid, (uniform * K).ceil().long() - 1)


@pytest.mark.parametrize(("height", "width"), [(7, 9), (3, 6), (5, 4)])
def test_each_code_is_predicted_in_a_window_around_it(height, width):
    """Every code that is written is told apart by where it stands; K has to be large enough."""
    (h, w), model = GRID, GPT(100, N, CONDITIONS, 1, n_layer=1, n_head=1, n_embd=8)
    seen = []

    def read(condition, indices):
        code = len(seen)  # raster order
        seen.append(indices[0].clone())
        return F.one_hot(torch.tensor(code), 100).float().expand(1, indices.shape[1], 100)

    condition = torch.zeros(1, 1, dtype=torch.int64)
    model.head = nn.Identity()
    with mock.patch.object(model, "forward_features", read):
        grid = large(model, condition, height, width, temperature=0)
    assert torch.equal(grid, torch.arange(height * width).view(1, height, width))
    for code, window in enumerate(seen):
        row, column = divmod(code, width)
        tops = [top for top in range(height - h + 1) if top <= row < top + h]
        lefts = [left for left in range(width - w + 1) if left <= column < left + w]
        top = min(tops, key=lambda top: abs(row - top - h // 2))  # as near to its middle as it goes
        left = min(lefts, key=lambda left: abs(column - left - w // 2))
        place = (row - top) * w + column - left
        expected = grid[0, top : top + h, left : left + w].flatten()[:place]
        assert len(window) == place + 1  # its last is the code itself, not written yet
        assert torch.equal(window[:-1], expected)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: give"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0: give 1 to 11"),
        ({"top_k": K + 1}, "top_k=12"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"guidance": -1.0}, "guidance=-1.0"),
        ({"guidance": math.nan}, "guidance=nan"),
        ({"guidance": math.inf}, "guidance=inf"),
        ({"guidance": 1e39}, "guidance=1e\\+39.* 100"),
    ],
)
def test_settings_out_of_range_are_named(setting, expected):
    for sample in samplers(make(), CONDITION):
        with pytest.raises(ValueError, match=expected):
            sample(**setting)


@pytest.mark.parametrize(("height", "width"), [(2, 40), (30, 3)])
def test_a_large_grid_smaller_than_the_window_is_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} tokens are smaller than .* 3x4"):
        large(make(), CONDITION, height, width)


def test_a_sliding_window_takes_one_grid():
    tokenizer = SimpleNamespace(grids=[(4, 4), (8, 8)])
    with pytest.raises(ValueError, match="takes one grid, and there are 2"):
        sample_sliding_window(make(), tokenizer, CONDITION, 16, 16)


def test_settings_at_their_limits_are_taken():
    for setting in ({}, {"temperature": 0.0, "top_k": K, "top_p": 1.0, "guidance": 100.0}):
        defaults = {"temperature": 1.0, "top_k": 1, "top_p": 1e-9, "guidance": 0.0}
        check_sampling(K, **defaults | setting)
