import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from vqgan import vae
from vqgan.vae import LIKELIHOODS, MIN_SCALE, VAE, SpatialVAE
from vqgan.vqvae import VQVAE

BOTH = pytest.mark.parametrize("kind", [VAE, SpatialVAE])


@pytest.fixture
def x(shape_images):
    return shape_images * 2 - 1


def test_kl_is_that_of_torch_distributions():
    mean, log_var = torch.randn(7, 5), torch.randn(7, 5)
    q = Independent(Normal(mean, (0.5 * log_var).exp()), 1)
    p = Independent(Normal(torch.zeros(5), torch.ones(5)), 1)
    assert torch.allclose(vae.kl_divergence(mean, log_var), kl_divergence(q, p), atol=1e-5)


@torch.no_grad()
def test_kl_of_the_spatial_vae_is_that_of_torch_distributions(x):
    """All channels and positions of an image count."""
    model = SpatialVAE(num_hiddens=8, latent_channels=3).eval()
    mean, log_var = model.encode(x)
    assert mean.shape == log_var.shape == (16, 3, 8, 8)
    q = Independent(Normal(mean, (0.5 * log_var).exp()), 3)
    p = Independent(Normal(torch.zeros(3, 8, 8), torch.ones(3, 8, 8)), 3)
    assert torch.allclose(model(x).kl, kl_divergence(q, p), rtol=1e-4)


def test_reparameterised_samples_have_the_moments_and_the_gradients():
    mean = torch.tensor([[1.0, -2.0]], requires_grad=True)
    log_var = torch.tensor([[0.0, -3.0]], requires_grad=True)
    z = vae.reparameterize(mean.expand(100_000, 2), log_var.expand(100_000, 2))
    assert torch.allclose(z.mean(dim=0), mean[0], atol=0.02)
    assert torch.allclose(z.std(dim=0), (0.5 * log_var[0]).exp(), rtol=0.02)
    z.mean(dim=0).sum().backward()
    assert torch.allclose(mean.grad, torch.ones(1, 2))
    # dz/dlog_var = s/2 * noise, which averages to nothing but is there.
    assert log_var.grad.abs().max() > 0


@pytest.mark.parametrize("likelihood", ["optimal", "learned", "fixed"])
def test_gaussian_likelihoods_are_those_of_torch_distributions(x, likelihood):
    model = VAE(likelihood=likelihood)
    decoded = x + 0.3 * torch.randn_like(x)
    scale = {
        "optimal": (decoded - x).square().mean().sqrt(),
        "learned": torch.tensor(1.0),
        "fixed": torch.tensor(math.sqrt(2)),
    }[likelihood]
    expected = -Independent(Normal(decoded, scale), 3).log_prob(x).mean()
    assert torch.allclose(model.negative_log_likelihood(x, decoded), expected, rtol=1e-5)


def test_fixed_likelihood_is_the_squared_error_in_unit_range_and_a_constant(x):
    model, decoded = VAE(likelihood="fixed"), x + 0.3 * torch.randn_like(x)
    error = ((decoded - x) / 2).square().sum() / len(x)
    constant = model.negative_log_likelihood(x, x)
    nll = model.negative_log_likelihood(x, decoded)
    assert torch.allclose(nll - constant, error, rtol=1e-4)


def test_bernoulli_likelihood_is_that_of_torch_distributions(x):
    logits = torch.randn_like(x)
    coin = Independent(Bernoulli(logits=logits, validate_args=False), 3)
    expected = -coin.log_prob((x + 1) / 2).mean()
    model = VAE(likelihood="bernoulli")
    assert torch.allclose(model.negative_log_likelihood(x, logits), expected, rtol=1e-5)
    assert torch.allclose(model._mean(logits), 2 * torch.sigmoid(logits) - 1, atol=1e-6)


def test_the_optimal_scale_is_optimal_and_needs_no_gradient(x):
    """No other scale gives a smaller loss; the gradient is the same with s differentiated too."""
    model = VAE(likelihood="optimal")
    decoded = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    nll = model.negative_log_likelihood(x, decoded)
    for factor in (0.9, 1.1):
        other = 0.5 * ((decoded - x).square().mean() * factor**2).log()
        assert vae.gaussian_nll(x, decoded, other) > nll
    (gradient,) = torch.autograd.grad(nll, decoded)
    through_scale = vae.gaussian_nll(x, decoded, 0.5 * (decoded - x).square().mean().log())
    assert torch.allclose(gradient, torch.autograd.grad(through_scale, decoded)[0], atol=1e-6)


@pytest.mark.parametrize("likelihood", ["optimal", "learned"])
def test_a_perfect_reconstruction_keeps_a_finite_likelihood(x, likelihood):
    model = VAE(likelihood=likelihood)
    if likelihood == "learned":
        model.log_scale.data.fill_(-50)
    nll = model.negative_log_likelihood(x, x.clone())
    D = x[0].numel()
    assert nll.item() == pytest.approx(
        D * (math.log(MIN_SCALE) + 0.5 * math.log(2 * math.pi)), rel=1e-4
    )


@BOTH
def test_the_loss_sums_dimensions_and_averages_the_batch(x, kind):
    """Twice the same images: the same loss. The KL is weighted, and is no mean over dimensions."""
    model = kind(likelihood="fixed", kl_weight=3.0).eval()
    once, twice = model(x), model(torch.cat([x, x]))
    assert torch.allclose(once.loss, twice.loss, rtol=1e-5)
    assert torch.allclose(once.loss, once.negative_log_likelihood + 3 * once.kl.mean())
    mean, log_var = model.encode(x)
    assert torch.allclose(once.kl, vae.kl_divergence(mean, log_var))


@BOTH
def test_training_samples_and_evaluation_takes_the_mean(x, kind):
    model = kind()
    assert not torch.equal(model(x).reconstruction, model(x).reconstruction)
    model.eval()
    assert torch.equal(model(x).reconstruction, model.decode(model.encode(x)[0]))


@BOTH
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_weight_gets_a_gradient(x, likelihood, kind):
    model = kind(likelihood=likelihood)
    model(x).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_parameters_counted_by_hand():
    widths = [3, 32, 64, 128, 256]
    convolutions = sum(a * b * 16 + b for a, b in pairwise(widths))
    transposed = sum(a * b * 16 + a for a, b in pairwise(widths))
    linear = (256 * 4 * 256 + 256) + (128 * 1024 + 1024)
    count = sum(p.numel() for p in VAE().parameters())
    assert count == convolutions + transposed + linear == 1_774_531


@pytest.mark.parametrize("num_downsamples", [1, 2, 3])
def test_the_spatial_vae_is_the_vqvae_but_for_its_bottleneck(num_downsamples):
    """Also the encoder's and the decoder's numbers of layers: the names have them."""
    sizes = {"num_downsamples": num_downsamples, "num_residual_layers": 3, "num_hiddens": 16}
    model = SpatialVAE(latent_channels=5, likelihood="optimal", **sizes)
    vqvae = VQVAE(embedding_dim=7, quantizer="gradient", **sizes)
    shapes, vq_shapes = (
        {name: tuple(parameter.shape) for name, parameter in m.named_parameters()}
        for m in (model, vqvae)
    )
    assert shapes.keys() == vq_shapes.keys() - {"quantizer.codebook"}
    first, last = "decoder.0", f"encoder.{len(model.encoder) - 1}"
    differing = {name for name in shapes if shapes[name] != vq_shapes[name]}
    assert differing == {f"{last}.weight", f"{last}.bias", f"{first}.weight"}
    assert shapes[f"{last}.weight"] == (10, 16, 1, 1)  # mean and log-variance of five channels
    assert shapes[f"{first}.weight"] == (16, 5, 3, 3)
    assert [type(layer) for layer in model.encoder] == [type(layer) for layer in vqvae.encoder]
    assert [type(layer) for layer in model.decoder] == [type(layer) for layer in vqvae.decoder]


def test_the_spatial_vae_takes_any_size_that_halves_evenly():
    model = SpatialVAE(image_size=48, num_hiddens=8).eval()
    assert model.sample(2).shape == (2, 3, 48, 48)
    x = torch.rand(2, 3, 64, 32)
    assert model.encode(x)[0].shape == (2, 16, 16, 8)
    assert model(x).reconstruction.shape == x.shape
    assert model.interpolate(x[:1], x[1:], 3).shape == (1, 3, 3, 64, 32)
    with pytest.raises(ValueError, match="30x32 pixels: give multiples of 4"):
        model(torch.rand(2, 3, 30, 32))
    with pytest.raises(ValueError, match="30x30 pixels: give multiples of 4"):
        SpatialVAE(image_size=30)


@pytest.mark.parametrize("latent_dim", [2, 20, 128])
def test_a_seed_gives_the_same_first_images_for_any_number(latent_dim):
    """torch draws normal numbers sixteen at a time, which shows where 16 does not divide them."""
    model = VAE(num_hiddens=2, latent_dim=latent_dim).eval()
    seen = []
    model.decode = lambda z: seen.append(z)
    for n in (3, 8):
        model.sample(n, generator=torch.Generator().manual_seed(0))
    assert seen[0].shape == (3, latent_dim) and torch.equal(seen[0], seen[1][:3])


@BOTH
def test_samples_come_from_the_generator_given(kind):
    model = kind().eval()
    before = torch.get_rng_state()
    first, again = (model.sample(5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (5, 3, 32, 32) and torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)


@BOTH
def test_interpolation_ends_at_the_reconstructions(x, kind):
    model = kind().eval()
    images = model.interpolate(x[:2], x[2:4], steps=5)
    assert images.shape == (2, 5, 3, 32, 32)
    assert torch.allclose(images[:, 0], model(x[:2]).reconstruction, atol=1e-5)
    assert torch.allclose(images[:, -1], model(x[2:4]).reconstruction, atol=1e-5)
    z0, z1 = model.encode(x[:2])[0], model.encode(x[2:4])[0]
    assert torch.allclose(images[:, 1], model.decode(0.75 * z0 + 0.25 * z1), atol=1e-5)


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.half, 1e-3), (torch.bfloat16, 1e-2), (torch.double, 1e-6)]
)
def test_weights_of_another_precision_give_about_the_same_in_float32(
    x, likelihood, dtype, tolerance, kind
):
    model = kind(likelihood=likelihood).eval()
    z = torch.randn(4, *model.latent_shape)
    expected, images = model(x), model.decode(z)
    model.to(dtype)
    output = model(x.to(dtype))
    assert {value.dtype for value in output} == {torch.float32}
    error = (output.reconstruction - expected.reconstruction).abs().max()
    assert error < tolerance and (model.decode(z) - images).abs().max() < tolerance
    nll = output.negative_log_likelihood
    assert nll.item() == pytest.approx(expected.negative_log_likelihood.item(), rel=tolerance)
    assert torch.allclose(output.kl, expected.kl, rtol=10 * tolerance, atol=tolerance)
    assert model.sample(2).dtype == model.interpolate(*x.to(dtype)[:2, None], 3).dtype


def test_a_learned_scale_of_half_precision_keeps_a_finite_likelihood():
    """Of images whose M log s is no number of half precision, which ends at 65,504."""
    model, x = VAE(likelihood="learned"), torch.zeros(1, 3, 128, 128)
    model.log_scale.data.fill_(-4)
    expected = model.negative_log_likelihood(x, x).item()
    assert expected < -65504
    assert model.half().negative_log_likelihood(x, x).item() == pytest.approx(expected, rel=1e-4)


@BOTH
def test_images_of_other_channels(x, kind):
    model = kind(in_channels=1).eval()
    gray = x.mean(dim=1, keepdim=True)
    output = model(gray)
    assert output.reconstruction.shape == gray.shape
    assert model.sample(2).shape == (2, 1, 32, 32)
    scale = (output.reconstruction - gray).square().mean().sqrt()
    expected = -Independent(Normal(output.reconstruction, scale), 3).log_prob(gray).mean()
    assert torch.allclose(output.negative_log_likelihood, expected, rtol=1e-5)


def test_images_that_do_not_fit_are_named(x):
    model = VAE()
    for height, width in ((64, 64), (28, 28), (40, 40), (64, 32), (32, 64)):
        with pytest.raises(ValueError, match=f"{height}x{width} pixels: .*image_size=32 only"):
            model.encode(torch.zeros(2, 3, height, width))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) .*\(16, 1, 32, 32\); x.expand"):
        model(x[:, :1])
    assert model(x[:, :1].expand(-1, 3, -1, -1)).reconstruction.shape == x.shape
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\) .*\(16, 3, 32, 32\)$"):
        VAE(in_channels=1)(x)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="multiple of 16"):
        VAE(image_size=40)
    with pytest.raises(ValueError, match="'poisson'"):
        VAE(likelihood="poisson")
    with pytest.raises(ValueError, match="num_downsamples must be at least 1, not 0"):
        SpatialVAE(num_downsamples=0)
