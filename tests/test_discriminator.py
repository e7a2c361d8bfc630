import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqgan.discriminator import (
    GAN_LOSSES,
    PatchDiscriminator,
    adaptive_weight,
    choose_depth,
    discriminator_loss,
    generator_loss,
    receptive_field,
)


def seen_by_the_middle_logit(size, **kwargs):
    """Side of the square of pixels that change a logit, by its gradient. Without padding's help."""
    model = PatchDiscriminator(size, channels=4, norm="none", **kwargs)
    for layer in model.modules():  # positive weights and slopes: nothing cancels
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 0.1)
    x = torch.rand(1, 3, size, size, requires_grad=True)
    logits = model(x)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    rows = x.grad[0].abs().sum(dim=(0, 2)).nonzero()
    return (rows.max() - rows.min() + 1).item(), logits.shape[-1]


@pytest.mark.parametrize(
    ("size", "patch", "logits"), [(16, 7, 14), (32, 16, 14), (64, 34, 14), (128, 70, 14)]
)
def test_a_logit_sees_a_patch_and_not_the_image(size, patch, logits):
    assert receptive_field(choose_depth(size)) == patch <= 2 / 3 * size
    assert seen_by_the_middle_logit(size) == (patch, logits)


def test_depth_stops_at_the_papers_three():
    assert choose_depth(256) == choose_depth(1024) == 3 and receptive_field(3) == 70


def test_spectral_norm_bounds_the_slope():
    """After some steps of the power iteration, no weight stretches a vector by more than one."""
    model = PatchDiscriminator(32, channels=8, norm="spectral")
    for _ in range(50):
        model(torch.randn(2, 3, 32, 32))
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(weights) == 3
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("norm", ["spectral", "group", "none"])
def test_originals_and_reconstructions_are_judged_apart(norm):
    """No batch statistics: an image's logits do not depend on its neighbours in the batch."""
    model = PatchDiscriminator(32, channels=16, norm=norm).eval()
    a, b = torch.randn(2, 2, 3, 32, 32)
    assert torch.allclose(model(torch.cat([a, b]))[:2], model(a), atol=1e-5)


def test_bad_sizes_and_norms_are_named():
    with pytest.raises(ValueError, match="'batch'"):
        PatchDiscriminator(32, norm="batch")
    with pytest.raises(ValueError, match="image_size.* 4"):
        PatchDiscriminator(4)


# --- losses ------------------------------------------------------------------------------------


def logits():
    return 2 * torch.randn(5, 1, 3, 3), 2 * torch.randn(5, 1, 3, 3)


@pytest.mark.parametrize("kind", ["vanilla", "non-saturating"])
def test_the_discriminators_cross_entropy_is_torchs(kind):
    """Originals are labelled 1: arguments the other way round would give a negative loss."""
    real, fake = logits()
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    expected = F.binary_cross_entropy_with_logits(real, ones)
    expected = 0.5 * (expected + F.binary_cross_entropy_with_logits(fake, zeros))
    assert torch.allclose(discriminator_loss(real, fake, kind), expected)


def test_the_generators_losses_are_torchs():
    _, fake = logits()
    ones, zeros = torch.ones_like(fake), torch.zeros_like(fake)
    expected = F.binary_cross_entropy_with_logits(fake, ones)
    assert torch.allclose(generator_loss(fake, "non-saturating"), expected)
    # Equation 5 itself: log(1 - D(x_hat)), minimised.
    assert torch.allclose(
        generator_loss(fake, "vanilla"), -F.binary_cross_entropy_with_logits(fake, zeros)
    )
    assert torch.allclose(generator_loss(fake, "hinge"), -fake.mean())


def test_hinge_is_torchs_and_takes_logits():
    """Logits, not probabilities: D gains up to a margin of 1 on either side, and no further."""
    real, fake = logits()
    margin = nn.HingeEmbeddingLoss(margin=1.0)  # with target -1: max(0, 1 - x)
    expected = 0.5 * (margin(real, -torch.ones_like(real)) + margin(-fake, -torch.ones_like(fake)))
    assert torch.allclose(discriminator_loss(real, fake, "hinge"), expected)
    sure = torch.full((4,), 1.5, requires_grad=True)
    discriminator_loss(sure, -sure, "hinge").backward()
    assert sure.grad.abs().sum() == 0


@pytest.mark.parametrize("kind", GAN_LOSSES)
def test_losses_of_a_discriminator_that_knows_nothing_and_signs(kind):
    zero = torch.zeros(3, requires_grad=True)
    expected = 1 if kind == "hinge" else math.log(2)
    assert discriminator_loss(zero, zero, kind).item() == pytest.approx(expected)
    generator_loss(zero, kind).backward()
    assert (zero.grad < 0).all()  # the generator wants higher logits
    real, fake = torch.zeros(2, 3).requires_grad_()
    gradients = torch.autograd.grad(discriminator_loss(real, fake, kind), (real, fake))
    assert (gradients[0] < 0).all() and (gradients[1] > 0).all()


def test_an_unknown_loss_is_named_by_both():
    with pytest.raises(ValueError, match="'hinged'"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), "hinged")
    with pytest.raises(ValueError, match="'hinged'"):
        generator_loss(torch.zeros(1), "hinged")


@pytest.mark.parametrize("kind", GAN_LOSSES)
def test_losses_are_computed_in_float32(kind):
    real, fake = (t.bfloat16() for t in logits())
    assert discriminator_loss(real, fake, kind).dtype == torch.float32
    assert generator_loss(fake, kind).dtype == torch.float32


# --- the adaptive weight -----------------------------------------------------------------------


def linear_losses():
    """Losses of a last layer w with gradients that are known: 3 and 4 (norm 5), 0.5 and 0."""
    w = torch.tensor([1.0, 1.0], requires_grad=True)
    return 3 * w[0] + 4 * w[1], 0.5 * w[0], w


def test_lambda_is_the_ratio_computed_by_hand():
    reconstruction, adversarial, w = linear_losses()
    weight = adaptive_weight(reconstruction, adversarial, w, maximum=100.0)
    assert weight.item() == pytest.approx(5 / (0.5 + 1e-6))
    assert not weight.requires_grad and w.grad is None
    (reconstruction + weight * adversarial).backward()  # the graph is still there
    assert torch.allclose(w.grad, torch.tensor([3 + 0.5 * weight, 4]))


def test_lambda_is_clamped_where_the_discriminator_has_no_gradient():
    reconstruction, adversarial, w = linear_losses()
    assert adaptive_weight(reconstruction, adversarial, w, maximum=5.0).item() == 5
    no_gradient = adaptive_weight(reconstruction, 0 * adversarial, w, maximum=1e9)
    assert no_gradient.item() == pytest.approx(5e6)  # by delta, and finite


def test_lambda_is_float32_where_the_layer_is_half_precision():
    """Norms of half-precision gradients overflow: 300^2 is beyond float16."""
    w = torch.ones(8, dtype=torch.float16, requires_grad=True)
    weight = adaptive_weight((300 * w).sum().float(), (w / 10).sum().float(), w, maximum=1e9)
    assert weight.dtype == torch.float32
    assert weight.item() == pytest.approx(3000, rel=1e-2)
