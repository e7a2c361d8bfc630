import math

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vqgan import metrics
from vqgan.metrics import (
    SMOOTHING,
    CodebookUsage,
    codes_used,
    fixed_length_bits,
    grid_baselines,
    nats_to_bits,
    normalized_mse,
    psnr,
    ssim,
    ssim_global,
    token_baselines,
)


def natural_images():
    """Crops of a photograph, float (6, 3, 48, 40) in [0, 1]."""
    photo = torch.from_numpy(astronaut()).permute(2, 0, 1).float() / 255  # (3, 512, 512)
    return torch.stack([photo[:, 60 * i : 60 * i + 48, 50 * i : 50 * i + 40] for i in range(6)])


def degraded(x, how):
    if how == "noise":
        return (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    if how == "blur":
        return torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2)
    if how == "darker":
        return 0.7 * x
    return torch.rand_like(x)


@pytest.mark.parametrize("how", ["noise", "blur", "darker", "random"])
@pytest.mark.parametrize("x", [natural_images(), torch.rand(3, 3, 11, 30)], ids=["photo", "random"])
def test_ssim_is_scikit_images(x, how):
    y = degraded(x, how)
    ours = ssim(x, y)
    assert ours.shape == (len(x),) and ours.dtype == torch.float64
    for a, b, value in zip(x.numpy(), y.numpy(), ours.tolist(), strict=True):
        theirs = structural_similarity(
            a, b, channel_axis=0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=1,
        )  # fmt: skip
        assert value == pytest.approx(theirs, abs=1e-4)


def test_ssim_of_equal_images_is_one_and_it_is_symmetric():
    x = natural_images()
    y = degraded(x, "noise")
    assert torch.allclose(ssim(x, x), torch.ones(6, dtype=torch.float64))
    assert torch.allclose(ssim(x, y), ssim(y, x))


def test_whole_image_ssim_by_hand():
    x, y = natural_images(), degraded(natural_images(), "blur")
    values = ssim_global(x, y).tolist()
    for a, b, value in zip(x.double().numpy(), y.double().numpy(), values, strict=True):
        by_channel = []
        for p, q in zip(a.reshape(3, -1), b.reshape(3, -1), strict=True):
            covariance = np.cov(p, q, bias=True)
            top = (2 * p.mean() * q.mean() + 0.01**2) * (2 * covariance[0, 1] + 0.03**2)
            bottom = (p.mean() ** 2 + q.mean() ** 2 + 0.01**2) * (p.var() + q.var() + 0.03**2)
            by_channel.append(top / bottom)
        assert value == pytest.approx(np.mean(by_channel), abs=1e-9)


def test_psnr_is_scikit_images():
    x, y = natural_images(), degraded(natural_images(), "noise")
    for a, b, value in zip(x.numpy(), y.numpy(), psnr(x, y).tolist(), strict=True):
        assert value == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-6)
    assert psnr(x, x).isinf().all()


def test_normalised_mse_is_the_same_number_in_any_range():
    x, y = natural_images(), degraded(natural_images(), "noise")
    variance = x.var().item()
    in_unit = normalized_mse(x, y, variance)
    in_model_range = normalized_mse(2 * x - 1, 2 * y - 1, 4 * variance)
    assert torch.allclose(in_unit, in_model_range, atol=1e-6)
    constant = torch.full_like(x, x.mean().item())
    assert normalized_mse(x, constant, x.var(unbiased=False).item()).mean() == pytest.approx(1)


@pytest.mark.parametrize("metric", [psnr, ssim, ssim_global])
def test_images_out_of_range_or_of_other_shapes_are_refused(metric):
    x = torch.rand(2, 3, 32, 32)
    for bad in (x * 2 - 1, x * 1.1 + 0.05, torch.full_like(x, math.nan)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            metric(x, bad)
    with pytest.raises(ValueError, match="one shape"):
        metric(x, x[:, :, :16])


def test_images_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(torch.rand(1, 3, 10, 32), torch.rand(1, 3, 10, 32))


def test_perplexity_of_known_frequencies():
    usage = CodebookUsage(8)
    usage.update(torch.tensor([[0, 1], [2, 3]]))
    assert usage.codes_used == 4 and usage.perplexity == pytest.approx(4)
    usage.update(torch.zeros(1000, dtype=torch.int64))
    assert usage.codes_used == 4 and 1 < usage.perplexity < 1.1
    p = np.array([1001, 1, 1, 1]) / 1004
    assert usage.entropy == pytest.approx(-(p * np.log2(p)).sum())


def test_perplexity_of_a_set_does_not_depend_on_the_batches():
    indices = torch.randint(0, 100, (40, 8, 8))
    whole, parts = CodebookUsage(100), CodebookUsage(100)
    whole.update(indices)
    for part in indices.split(3):
        parts.update(part)
    assert whole.perplexity == parts.perplexity


def test_codes_in_a_batch_are_counted_once():
    indices = torch.tensor([[[0, 3], [3, 3]], [[7, 0], [0, 1]]])
    assert codes_used(indices, 8).item() == 4


def test_bits():
    assert fixed_length_bits(64, 512) == 576
    assert nats_to_bits(math.log(8)) == pytest.approx(3)


# --- simple models of codes --------------------------------------------------------------------


def baselines_by_loops(train, test, K):
    """The same from plain lists, with the whole table of p(s | l): (unigram, bigram)."""
    seen, after = [1] * K, [[0] * K for _ in range(K)]
    for row in train.flatten(0, 1).tolist():
        for place, code in enumerate(row):
            seen[code] += 1
            if place > 0:
                after[row[place - 1]][code] += 1
    p = [count / sum(seen) for count in seen]
    p_after = [
        [(n + SMOOTHING * p[s]) / (sum(a) + SMOOTHING) for s, n in enumerate(a)] for a in after
    ]
    assert all(sum(row) == pytest.approx(1) for row in p_after)
    unigram, bigram = [], []
    for row in test.flatten(0, 1).tolist():
        for place, code in enumerate(row):
            unigram.append(-math.log(p[code]))
            bigram.append(-math.log(p_after[row[place - 1]][code] if place else p[code]))
    return np.mean(unigram), np.mean(bigram)


def successors(n, K):
    """Grids (n, 4, 6) in which each code is the one before it and 1."""
    return (torch.randint(0, K, (n, 4, 1)) + torch.arange(6)) % K


def test_uniform_codes_cost_ln_k():
    grids = torch.randint(0, 7, (3, 2, 2))
    assert grid_baselines(grids, grids, 7)["uniform"] == pytest.approx(math.log(7))


def test_a_single_codes_cost_by_hand():
    """Of K = 3 codes, seen 0, 3 and 1 times, each counts once more: 1/7, 4/7, 2/7."""
    train, test = torch.tensor([[[1, 1], [2, 1]]]), torch.tensor([[[0, 1], [2, 2]]])
    expected = -(math.log(1 / 7) + math.log(4 / 7) + 2 * math.log(2 / 7)) / 4
    assert grid_baselines(train, test, 3)["unigram"] == pytest.approx(expected)


@pytest.mark.parametrize("K", [5, 50])
@pytest.mark.parametrize("width", [1, 2, 6])
def test_baselines_are_those_of_plain_loops(K, width):
    """Where most pairs were seen, where most were not, and where a row is a single code."""
    skewed = torch.rand(60, 4, 6).square().mul(K).long()
    skewed[:, 1:3] = successors(60, K)[:, 1:3]
    skewed = skewed[..., :width]
    train, test = skewed[:40], skewed[40:]
    unigram, bigram = baselines_by_loops(train, test, K)
    found = grid_baselines(train, test, K)
    assert found["unigram"] == pytest.approx(unigram) and found["bigram"] == pytest.approx(bigram)


def test_a_code_that_follows_from_the_one_to_its_left_costs_little():
    K = 8
    found = grid_baselines(successors(2000, K), successors(100, K), K)
    assert found["unigram"] == pytest.approx(math.log(K), rel=0.01)
    # Nothing but the first of the six codes of a row, and what the smoothing takes.
    assert math.log(K) / 6 < found["bigram"] < math.log(K) / 6 + 0.1


def test_each_grid_of_a_sequence_has_frequencies_of_its_own():
    """Of K = 8 codes the coarse grid has only 3, and the fine one 5: the mean over all tokens."""
    coarse, fine = torch.full((200, 2, 2), 3), torch.randint(0, 5, (200, 4, 4))
    found = token_baselines([coarse, fine], [coarse, fine], 8)
    for name in ("uniform", "unigram", "bigram"):
        alone = [grid_baselines(grid, grid, 8)[name] for grid in (coarse, fine)]
        assert found[name] == pytest.approx((4 * alone[0] + 16 * alone[1]) / 20)
    assert found["unigram"] == pytest.approx(0.8 * math.log(5), abs=0.03)


def test_independent_codes_cost_their_entropy_also_given_the_one_to_the_left():
    K = 16
    train, test = torch.randint(0, K, (1000, 8, 8)), torch.randint(0, K, (500, 8, 8))
    found = grid_baselines(train, test, K)
    assert found["unigram"] == pytest.approx(math.log(K), abs=0.01)
    assert -0.003 < found["bigram"] - math.log(K) < 0.01  # unseen codes: nothing to be had for free


# --- Fréchet distance --------------------------------------------------------------------------


def gaussians():
    """Features with correlations, of two Gaussians."""
    mix_x, mix_y = torch.randn(2, 6, 6, dtype=torch.float64)
    x = torch.randn(500, 6, dtype=torch.float64) @ mix_x
    return x, torch.randn(400, 6, dtype=torch.float64) @ mix_y + 1


def test_frechet_distance_is_that_of_scipys_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    x, y = gaussians()
    cx, cy = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = linalg.sqrtm(cx @ cy).real
    expected = np.square(x.numpy().mean(0) - y.numpy().mean(0)).sum()
    expected += np.trace(cx + cy - 2 * root)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_independent_gaussians_in_closed_form():
    """Diagonal covariances: sum of (m - m')^2 + (s - s')^2, here made exact by whitening."""

    def exactly(mean, deviation):
        z = torch.randn(300, 2, dtype=torch.float64)
        z = z - z.mean(dim=0)
        z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T  # covariance 1
        return z * torch.tensor(deviation) + torch.tensor(mean)

    x, y = exactly([0.0, 1.0], [1.0, 2.0]), exactly([3.0, 1.0], [2.0, 5.0])
    assert metrics.frechet_distance(x, y) == pytest.approx(9 + 1 + 9)


def test_frechet_distance_of_a_set_to_itself_its_symmetry_and_fewer_images_than_features():
    x, y = gaussians()
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(x, y) == pytest.approx(metrics.frechet_distance(y, x))
    assert metrics.frechet_distance(x[:3], x[:3]) == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match=r"\(1, 6\)"):
        metrics.frechet_distance(x[:1], y)


def test_reconstruction_quality_has_each_measure_of_each_image(shape_images):
    x = shape_images * 2 - 1
    y = (x + 0.1 * torch.randn_like(x)) * 1.1  # beyond the range, as decoders may
    quality = metrics.reconstruction_quality(x, y, 0.3)
    unit = ((y + 1) / 2).clamp(0, 1)
    assert torch.equal(quality["nmse"], metrics.normalized_mse(x, y, 0.3))
    for name in ("psnr", "ssim", "ssim_global"):
        expected = getattr(metrics, name)((x + 1) / 2, unit)
        assert torch.allclose(quality[name], expected), name
