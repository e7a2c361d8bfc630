"""A patch discriminator, the losses of the adversarial game, and the weight that balances them.

Esser, Rombach, Ommer, 2021, arXiv 2012.09841, eq. 5 to 7. A discriminator D tells originals x from
reconstructions x_hat, patch by patch, and the autoencoder learns to deceive it:

    L_GAN = log D(x) + log(1 - D(x_hat))                                            (eq. 5)
    min over the autoencoder, max over D:  L_VQ + lambda L_GAN                      (eq. 6)
    lambda = |grad_L L_rec| / (|grad_L L_GAN| + delta),  L the decoder's last layer (eq. 7)

D's output here is a logit, D(x) = sigmoid(logit) in eq. 5. The default loss is not eq. 5 but its
hinge form, as in the authors' code (Lim, Ye, "Geometric GAN", 2017, arXiv 1705.02894):

    D minimizes              max(0, 1 - logit(x)) / 2 + max(0, 1 + logit(x_hat)) / 2
    the autoencoder          -logit(x_hat)                        (each a mean over patches)

The squared error is smallest for the average over everything that could have been there, and such
averages look blurred. No blurred patch passes as an original, so D penalizes it wherever texture is
lost.

Data flow: x and x_hat (B, 3, H, W) -> PatchDiscriminator -> logits (B, 1, h', w').
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from vqgan import distributed

NORMS = ("spectral", "group", "none")
# Added to the divisor of eq. 7, as the paper states. (The authors' code has 1e-4.)
DELTA = 1e-6


def receptive_field(depth: int) -> int:
    """The side in pixels of the patch that one logit sees.

    From the output back to the input, a convolution of kernel k and stride s widens a patch of r to
    (r - 1) s + k. All kernels are 4; the last two layers have stride 1, and the `depth` layers
    before them stride 2. Depth 0 sees 7 pixels, 1 sees 16, 2 sees 34, and 3 the 70 of the paper.
    """
    side = 1
    for stride in [1, 1] + [2] * depth:
        side = (side - 1) * stride + 4
    return side


def choose_depth(image_size: int) -> int:
    """The largest depth up to the paper's 3 whose patch is at most two thirds of the image's side.

    That is 16 of 32 pixels, 34 of 64, and 70 of 128 and more. With the usual depth of 3, every
    logit would see the whole of a small image, and no patch would be left.
    """
    fitting = (depth for depth in (1, 2, 3) if receptive_field(depth) <= 2 / 3 * image_size)
    return max(fitting, default=0)


class PatchDiscriminator(nn.Module):
    """PatchGAN: every logit scores a patch (Isola, Zhu, Zhou, Efros, 2017, arXiv 1611.07004).

    At 32 pixels the depth is 1, and each of 14x14 logits sees 16x16 pixels. There is no BatchNorm,
    through which the originals and reconstructions of a batch would give each other away.

    Args:
        image_size: the side of the images in pixels, from which the depth follows.
        channels: those of the first layer; they double with every layer, up to eight times.
        norm: "spectral" divides weights by their largest singular value, which bounds D's slope and
            so its gradient (Miyato et al. 2018, arXiv 1802.05957); or "group", or "none".

    Raises:
        ValueError: the norm is unknown, or an image is smaller than a patch.
    """

    def __init__(self, image_size: int, channels: int = 64, norm: str = "spectral"):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"the discriminator's norm is one of {', '.join(NORMS)}, not {norm!r}")
        depth = choose_depth(image_size)
        if image_size < (smallest := receptive_field(depth)):
            raise ValueError(f"image_size must be {smallest} or more, not {image_size}")

        def conv(in_channels: int, out_channels: int, stride: int) -> nn.Module:
            layer = nn.Conv2d(in_channels, out_channels, kernel_size=4, stride=stride, padding=1)
            return spectral_norm(layer) if norm == "spectral" else layer

        layers, width = [], 3
        for i, stride in enumerate([2] * depth + [1]):
            next_width = channels * min(2**i, 8)
            layers.append(conv(width, next_width, stride))
            if norm == "group" and i > 0:  # as in PatchGAN, the first layer has none
                layers.append(nn.GroupNorm(max(1, next_width // 16), next_width))
            layers.append(nn.LeakyReLU(0.2))
            width = next_width
        self.layers = nn.Sequential(*layers, conv(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in about [-1, 1] -> logits (B, 1, h', w'), high for originals."""
        with parametrize.cached():
            # Spectral norms come first, in float32, because CUDA's autocast would round them.
            with torch.autocast(device_type=x.device.type, enabled=False):
                for layer in self.layers:
                    getattr(layer, "weight", None)
            return self.layers(x)


# --- losses ------------------------------------------------------------------------------------

GAN_LOSSES = ("hinge", "vanilla", "non-saturating")


def _check_kind(kind: str) -> None:
    """Raise ValueError for a loss that is not one of `GAN_LOSSES`."""
    if kind not in GAN_LOSSES:
        raise ValueError(f"the GAN loss is one of {', '.join(GAN_LOSSES)}, not {kind!r}")


def discriminator_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """The loss of D: logits of originals and of reconstructions, any shape -> ().

    It is half the sum of the two means, as in the authors' code, so an untrained D has a loss of 1
    (hinge) or ln 2 (the others).
    """
    _check_kind(kind)
    real, fake = real.float(), fake.float()
    if kind == "hinge":  # nothing more to gain from logits beyond 1 and -1
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    # -L_GAN of eq. 5, D = sigmoid(logit): -log D(x) = softplus(-real),
    # -log(1 - D(x_hat)) = softplus(fake)
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: str) -> Tensor:
    """The adversarial loss of the autoencoder: logits of reconstructions -> ()."""
    _check_kind(kind)
    fake = fake.float()
    if kind == "hinge":
        return -fake.mean()
    if kind == "vanilla":  # log(1 - D(x_hat)), eq. 5: flat where D is sure that it is fake
        return -F.softplus(fake).mean()
    # -log D(x_hat): the same fixed point, and steepest where D is sure (Goodfellow et al. 2014)
    return F.softplus(-fake).mean()


# --- the adaptive weight -----------------------------------------------------------------------


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor, *, maximum: float
) -> Tensor:
    """Lambda of eq. 7, with which both losses pull equally hard at the decoder's last layer.

    It is computed in float32, because squares of half-precision gradients overflow or vanish. It is
    clamped to `maximum`, because the gradient of a D that stops learning vanishes, and a lambda
    that divides by it grows without bound (68 was seen, with images like posters). The authors'
    clamp of 10,000 does not prevent that.
    """

    def norm(loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        return distributed.mean(gradient.float()).norm()

    ratio = norm(reconstruction_loss) / (norm(generator_loss) + DELTA)
    return ratio.clamp(max=maximum)  # (), no gradient: autograd.grad gives none of its own
