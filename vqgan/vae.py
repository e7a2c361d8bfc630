"""The baseline: variational autoencoders, with one Gaussian latent or one at each position.

Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, arXiv 1312.6114. The encoder gives a
normal distribution q(z|x) for each image, the decoder a distribution p(x|z) for each z, and
training minimizes the negative bound on log p(x) (eq. 2 and 3):

    L = -log p(x|z) + kl_weight * KL(q(z|x) || N(0, I)),   z ~ q(z|x)

in nats (bits times ln 2). Both terms are summed over pixels or latent dimensions and averaged over
the batch, as the bound demands. An average over pixels would change the weight of the KL by a
factor of 3,072, for RGB images of 32 pixels.

Data flow:

    x (B, C, H, W) -> encoder -> mean, log_var (B, 128) -> z (B, 128)         VAE
                                 mean, log_var (B, 16, 8, 8) -> z (B, 16, 8, 8)   SpatialVAE
    z -> decoder -> reconstruction (B, C, H, W)
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan import distributed
from vqgan.images import check_channels, to_unit
from vqgan.vqvae import Autoencoder, build_decoder, build_encoder, strided_layers

LIKELIHOODS = ("optimal", "learned", "fixed", "bernoulli")

# An 8-bit image is known only up to its rounding error, a uniform distribution one level (2/255 in
# [-1, 1]) wide, whose standard deviation is width / sqrt(12). No likelihood is sharper than that.
MIN_SCALE = 2 / 255 / math.sqrt(12)


class VAEOutput(NamedTuple):
    """What a VAE returns: loss = negative_log_likelihood + kl_weight * mean of kl."""

    reconstruction: Tensor  # (B, C, H, W) float32, about [-1, 1]: the mean of p(x|z)
    loss: Tensor  # (), nats per image: the negative bound, if z was sampled (in training)
    negative_log_likelihood: Tensor  # (), nats per image; below 0 where the density is above 1
    kl: Tensor  # (B,), nats


def kl_divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, I)) in nats: (B, Z), (B, Z) -> (B,).

    In closed form, with means m_j and variances s_j^2 (arXiv 1312.6114, appendix B). The sum is
    over all of Z, also where Z is D, h, w:

        -1/2 sum_j (1 + log s_j^2 - m_j^2 - s_j^2)
    """
    return -0.5 * (1 + log_var - mean.square() - log_var.exp()).flatten(1).sum(dim=1)


def reparameterize(mean: Tensor, log_var: Tensor, noise: Tensor | None = None) -> Tensor:
    """Sample z = mean + s * noise, noise ~ N(0, I), with gradients to both: (B, Z)."""
    if noise is None:
        noise = distributed.part(torch.randn_like(distributed.whole(mean)))
    return mean + (0.5 * log_var).exp() * noise


def gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log N(x; mean, s^2) in nats, summed over pixels, averaged over the batch: ().

    With one scale s for all M = CHW values of an image, log_scale = log s:

        |x - mean|^2 / (2 s^2) + M log s + M/2 log 2 pi
    """
    M = x[0].numel()
    squared_error = (x - mean).square().sum() / len(x)
    log_normalizer = M * (log_scale + 0.5 * math.log(2 * math.pi))
    return squared_error / (2 * (2 * log_scale).exp()) + log_normalizer


class GaussianAutoencoder(Autoencoder):
    """The bound, samples and interpolations that both VAEs share. A subclass builds the networks.

    Below, Z stands for the latent's shape: a number Z for `VAE`, and D, h, w for `SpatialVAE`.

    Args:
        image_size, num_downsamples, in_channels: see `Autoencoder`.
        latent_shape: Z, of the latent of an image.
        likelihood: what p(x|z) is, and so how many nats of KL an error in a pixel costs:
            "optimal": a Gaussian whose scale is, for each batch, the one that makes the data most
                likely, s^2 = MSE (the optimal sigma-VAE of Rybkin et al. 2021, arXiv 2006.13202).
                No weight has to be guessed: as s falls in training, an error costs more nats.
            "learned": a Gaussian with one scale that is a parameter (their shared sigma).
            "fixed": a Gaussian with s = sqrt(2) in [-1, 1], which makes -log p(x|z) the squared
                error in units of [0, 1] plus a constant. This is the loss of many tutorials.
            "bernoulli": the cross-entropy with each pixel in [0, 1] taken as a probability. It is
                widely used, but no density of gray values, so its nats compare with no others.
        kl_weight: beta of a beta-VAE; 1 gives the bound.
    """

    def __init__(
        self,
        image_size: int,
        num_downsamples: int,
        latent_shape: tuple[int, ...],
        likelihood: str,
        kl_weight: float,
        in_channels: int,
    ):
        super().__init__(image_size, num_downsamples, in_channels)
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {LIKELIHOODS}, not {likelihood!r}")
        self.latent_shape, self.likelihood, self.kl_weight = latent_shape, likelihood, kl_weight
        if likelihood == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))  # s = 1 at first

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) in [-1, 1] -> mean, log_var of q(z|x), each (B, Z) float32.

        Raises `ValueError` for channels and sizes that the networks do not take.
        """
        check_channels(x, self.in_channels)
        self.check_resolution(*x.shape[-2:])
        mean, log_var = self.encoder(x).float().chunk(2, dim=1)
        return mean, log_var

    def decode(self, z: Tensor) -> Tensor:
        """z (B, Z) -> images (B, C, H, W), about [-1, 1]: the mean of p(x|z)."""
        return self._mean(self._decode_raw(z))

    def _decode_raw(self, z: Tensor) -> Tensor:
        """The decoder's output in float32. The weights, and so z, may be of half precision."""
        return self.decoder(z.to(self.decoder[0].weight.dtype)).float()

    def _mean(self, decoded: Tensor) -> Tensor:
        """Map the decoder's output to an image.

        The Bernoulli decoder outputs logits l. Their mean sigmoid(l) in [0, 1], mapped to [-1, 1],
        is 2 sigmoid(l) - 1 = tanh(l / 2).
        """
        return torch.tanh(decoded / 2) if self.likelihood == "bernoulli" else decoded

    def negative_log_likelihood(self, x: Tensor, decoded: Tensor) -> Tensor:
        """-log p(x|z) in nats: x and the decoder's raw output, both (B, C, H, W) -> ()."""
        if self.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(decoded, to_unit(x), reduction="sum") / len(x)
        if self.likelihood == "optimal":
            # The s at which gaussian_nll is smallest. There its derivative by s is zero, so s may
            # be a constant. With or without a gradient through s, `decoded` gets the same gradient.
            mse = F.mse_loss(decoded.detach(), x)
            mse = distributed.mean(mse) if self.training else mse
            log_scale = 0.5 * mse.clamp(min=MIN_SCALE**2).log()
        elif self.likelihood == "learned":
            log_scale = self.log_scale.float().clamp(min=math.log(MIN_SCALE))
        else:
            log_scale = x.new_full((), 0.5 * math.log(2))  # s = sqrt(2)
        return gaussian_nll(x, decoded, log_scale)

    def forward(self, x: Tensor) -> VAEOutput:
        """x (B, C, H, W) in [-1, 1] -> reconstruction and the terms of the bound.

        In training z is sampled. In evaluation it is the mean, which gives the smallest error.
        """
        mean, log_var = self.encode(x)
        z = reparameterize(mean, log_var) if self.training else mean
        decoded = self._decode_raw(z)
        nll = self.negative_log_likelihood(x.float(), decoded)
        kl = kl_divergence(mean, log_var)
        return VAEOutput(self._mean(decoded), nll + self.kl_weight * kl.mean(), nll, kl)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample n images (n, C, H, W), about [-1, 1]: z ~ N(0, I), decoded.

        The generator is one of the CPU, so that a seed gives the same z on every device.
        """
        # Row by row, so that the first images of a seed are the same for every n.
        z = torch.stack([torch.randn(self.latent_shape, generator=generator) for _ in range(n)])
        return self.decode(z.to(next(self.parameters()).device))

    @torch.no_grad()
    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """Decode along the line between two latents: (B, C, H, W) twice -> (B, steps, C, H, W).

        The first and the last images are the reconstructions of x0 and x1.
        """
        z0, z1 = self.encode(x0)[0], self.encode(x1)[0]  # (B, Z)
        t = torch.linspace(0, 1, steps, device=z0.device)
        t = t.view(steps, *[1] * len(self.latent_shape))  # broadcasts over Z
        z = (1 - t) * z0[:, None] + t * z1[:, None]  # (B, steps, Z)
        return self.decode(z.flatten(0, 1)).unflatten(0, (len(x0), steps))


class VAE(GaussianAutoencoder):
    """Four strided convolutions, a Gaussian latent, four transposed convolutions.

    With the defaults it has 1.8 M parameters. Kernels of 4 with stride 2 halve and double the side
    exactly. It has no normalization layer, like the VQ-VAE that it is compared with.

    Args:
        image_size: the side of the images, a multiple of 16. The linear layers take no other.
        latent_dim: Z, the dimensions of the latent.
        num_hiddens: the channels after the first convolution; each further one doubles them.
        likelihood, kl_weight, in_channels: see `GaussianAutoencoder`.
    """

    def __init__(
        self,
        image_size: int = 32,
        latent_dim: int = 128,
        num_hiddens: int = 32,
        likelihood: str = "optimal",
        kl_weight: float = 1.0,
        in_channels: int = 3,
    ):
        if image_size % 16:
            raise ValueError(f"image_size must be a multiple of 16, not {image_size}")
        # It halves the side four times.
        super().__init__(image_size, 4, (latent_dim,), likelihood, kl_weight, in_channels)
        widths = [num_hiddens, 2 * num_hiddens, 4 * num_hiddens, 8 * num_hiddens]
        side = image_size // 16  # of the grid after four halvings
        features = widths[-1] * side**2

        layers = strided_layers(nn.Conv2d, [in_channels, *widths])
        self.encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 2 * latent_dim))

        grid = nn.Unflatten(1, (widths[-1], side, side))
        layers = [nn.Linear(latent_dim, features), nn.ReLU(), grid]
        layers += strided_layers(nn.ConvTranspose2d, widths[::-1])
        last = nn.ConvTranspose2d(num_hiddens, in_channels, kernel_size=4, stride=2, padding=1)
        self.decoder = nn.Sequential(*layers, last)

    def check_resolution(self, height: int, width: int) -> None:
        """Raise `ValueError` for any size but `image_size`, because of the linear layers."""
        if (height, width) != (self.image_size, self.image_size):
            size = f"{height}x{width} pixels"
            raise ValueError(f"{size}: this VAE takes image_size={self.image_size} only")


class SpatialVAE(GaussianAutoencoder):
    """The VQ-VAE's networks with a Gaussian of D channels at each position.

    It is the control of a comparison, since it differs from `VQVAE` in the bottleneck only: the
    encoder's last layer gives the mean and log-variance of each channel, and the decoder's first
    layer reads D channels. Latent diffusion calls such a model a KL autoencoder (Rombach et al.
    2022, arXiv 2112.10752).

    With the defaults, a 32x32 image becomes 16x8x8 = 1,024 dimensions, and the model has 0.60 M
    parameters.

    Args:
        image_size: the side of the images that `sample` generates. It changes no weight, because
            the networks take any size that halves evenly.
        latent_channels: D. The bits of the VQ-VAE, 9 per position, are half a bit per channel of
            16, so D does not limit what a position can hold. The KL and its weight do, and they
            leave unused what an image does not need.
        num_hiddens, num_residual_hiddens, num_residual_layers, num_downsamples: see `VQVAE`.
        likelihood, kl_weight, in_channels: see `GaussianAutoencoder`.
    """

    def __init__(
        self,
        image_size: int = 32,
        num_hiddens: int = 128,
        num_residual_hiddens: int = 32,
        num_residual_layers: int = 2,
        latent_channels: int = 16,
        num_downsamples: int = 2,
        likelihood: str = "optimal",
        kl_weight: float = 1.0,
        in_channels: int = 3,
    ):
        side = image_size // 2**num_downsamples
        shape = (latent_channels, side, side)
        super().__init__(image_size, num_downsamples, shape, likelihood, kl_weight, in_channels)
        network = (num_hiddens, num_residual_hiddens, num_residual_layers, num_downsamples)
        self.encoder = build_encoder(in_channels, 2 * latent_channels, *network)
        self.decoder = build_decoder(latent_channels, in_channels, *network)
