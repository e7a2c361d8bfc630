import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from vqgan import prices, vae


def mean_kl(means, log_vars, m, C):
    """In bits, by torch.distributions, which take full covariances."""
    q = MultivariateNormal(means.double(), torch.diag_embed(log_vars.double().exp()))
    p = MultivariateNormal(m.double(), C.double())
    return kl_divergence(q, p).mean().item() / math.log(2)


@pytest.fixture
def latents():
    """Means that depend on each other, and variances that differ."""
    mixed = torch.randn(40, 5) @ torch.randn(5, 5) + torch.arange(5.0)
    return mixed, torch.randn(40, 5) - 1


def test_frequencies_by_hand():
    """Position 0 has code 0 three times and code 1 once; at position 1 it is the other way."""
    train = torch.tensor([[[0, 1]], [[0, 1]], [[0, 1]], [[1, 0]]])  # (4, 1, 2)
    often, rare = (3 + 1) / (4 + 3), (1 + 1) / (4 + 3)  # of K = 3 codes, each counted once more
    unseen = 1 / (4 + 3)
    test = torch.tensor([[[0, 0]], [[1, 2]]])
    expected = -(math.log2(often) + 2 * math.log2(rare) + math.log2(unseen)) / 2
    assert prices.frequency_bits(train, test, 3) == pytest.approx(expected)


def test_uniform_codes_cost_their_fixed_length_and_certain_ones_nothing():
    K, copies = 16, 100
    train = torch.arange(K).view(K, 1, 1).expand(K, 3, 5).repeat(copies, 1, 1)
    test = torch.randint(K, (7, 3, 5))
    assert prices.frequency_bits(train, test, K) == pytest.approx(3 * 5 * math.log2(K))
    # Each position always has the same code, and the positions have different ones.
    certain = torch.randperm(15).view(1, 3, 5).expand(100_000, 3, 5)
    assert prices.frequency_bits(certain, certain[:2], K) < 0.01


def test_a_fitted_gaussian_has_the_moments_of_samples(latents):
    m, C = prices.fit_gaussian(*latents)
    means, log_vars = (part.double() for part in latents)
    z = vae.reparameterize(means.repeat(5000, 1), log_vars.repeat(5000, 1))
    scale = C.diagonal().sqrt()
    assert ((z.mean(dim=0) - m) / scale).abs().max() < 0.02
    assert ((z.T.cov() - C) / (scale * scale[:, None])).abs().max() < 0.03


def test_a_fitted_gaussian_by_hand():
    """Means 1 and 3 have variance 1; the variances 1/4 and 3/4 have mean 1/2."""
    m, C = prices.fit_gaussian(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.25], [0.75]]).log())
    assert m.item() == pytest.approx(2) and C.item() == pytest.approx(1.5)


def test_gaussian_bits_are_those_of_torch_distributions(latents):
    m, root = torch.randn(5), torch.randn(5, 5)
    C = root @ root.T + torch.eye(5)
    assert prices.gaussian_bits(*latents, m, C) == pytest.approx(mean_kl(*latents, m, C))


def test_three_prices_of_a_gaussian_are_those_of_torch_distributions(latents):
    test = latents[0][:7] + 0.1, latents[1][:7]
    found = prices.gaussian_prices(latents, test)
    m, C = latents[0].mean(dim=0), latents[0].T.cov(correction=0)
    C = C + latents[1].exp().mean(dim=0).diag()
    assert found["fixed"] == pytest.approx(mean_kl(*test, torch.zeros(5), torch.eye(5)), rel=1e-5)
    assert found["fixed"] == pytest.approx(vae.kl_divergence(*test).mean().item() / math.log(2))
    assert found["fitted"] == pytest.approx(mean_kl(*test, m, C.diagonal().diag()), rel=1e-4)
    assert found["context"] == pytest.approx(mean_kl(*test, m, C), rel=1e-4)


def test_a_prior_that_knows_more_costs_fewer_bits_and_none_of_its_kind_costs_fewer(latents):
    """Of the images that it was fitted to."""
    found = prices.gaussian_prices(latents, latents)
    assert found["context"] < found["fitted"] < found["fixed"]
    m, C = prices.fit_gaussian(*latents)
    direction = torch.randn(5, 5, dtype=torch.float64)
    for other in (0.95 * C, 1.05 * C, C + 0.05 * direction @ direction.T):
        assert prices.gaussian_bits(*latents, m, other) > found["context"]
    assert prices.gaussian_bits(*latents, m + 0.1, C) > found["context"]


def test_independent_latents_of_a_standard_normal_gain_nothing():
    """The prior that training assumes is right, so no prior is better, but for noise."""
    means = 0.8 * torch.randn(20_000, 3)
    log_vars = torch.full((20_000, 3), math.log(1 - 0.8**2))
    found = prices.gaussian_prices((means, log_vars), (means, log_vars))
    bits = -0.5 * 3 * math.log2(1 - 0.8**2)  # the information of a Gaussian channel
    assert [*found.values()] == pytest.approx([bits] * 3, rel=0.02)
