"""VQGAN: the bottleneck of the VQ-VAE in a network of residual blocks and attention.

Esser, Rombach, Ommer, "Taming Transformers for High-Resolution Image Synthesis", 2021, arXiv
2012.09841, section 3.1, with the encoder and decoder of the authors' code (table 7). With
`norm_groups=32` they are mathematically identical to theirs, so `compvis.py` can load their
checkpoints.

The training makes it a VQGAN: see `perceptual.py`, `discriminator.py` and the loop in
`train_vqgan.py`.

Data flow, for 32 pixels and three levels:

    x (B, 3, 32, 32) -> encoder -> z_e (B, D, 8, 8)
    z_e -> quantizer -> z_q (B, D, 8, 8), indices (B, 8, 8)
    z_q (B, D, 8, 8) -> decoder -> reconstruction (B, 3, 32, 32)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan.codebooks import code_dimensions, make_quantizer
from vqgan.vqvae import VQAutoencoder

# Networks by name, as in `VQGAN(**NETWORKS["f16"])`. Compression counts 24 bits per pixel.
NETWORKS: dict[str, dict[str, Any]] = {
    # For 32 pixels, 8x8 codes: the defaults of `VQGAN`. 1.08 M parameters, 38 times fewer bits.
    "small": {},
    # The paper's for 256 pixels, 16x16 codes. 71.9 M parameters, 439 times fewer bits.
    "f16": {
        "resolution": 256,
        "channels": 128,
        "channel_multipliers": [1, 1, 2, 2, 4],
        "num_residual_blocks": 2,
        "attention_resolutions": [16],
        "latent_channels": 256,
        "embedding_dim": 256,
        "num_embeddings": 16384,
    },
}


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32, also under autocast as on CUDA; the output has the type of the input.

    (On a CPU this is faster too, because torch's bfloat16 kernel is slow with channels last.)
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def group_norm(channels: int, num_groups: int) -> GroupNorm:
    """A `GroupNorm` with the authors' settings. Raises `ValueError` for uneven groups."""
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{channels} channels cannot be split into {num_groups} groups")
    # 1e-6 as in the authors' code (torch's default is 1e-5), with which their models were trained.
    return GroupNorm(num_groups, channels, eps=1e-6)


class ResNetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), (B, C, h, w) -> (B, C', h, w).

    Where the number of channels changes, a 1x1 convolution brings x to the new one.
    """

    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = group_norm(out_channels, num_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # swish and SiLU are two names of x sigmoid(x)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """x + single-head attention, in which every position sees every other: (B, C, h, w)."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = group_norm(channels, num_groups)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        normed = self.norm(x)
        projections = (self.q(normed), self.k(normed), self.v(normed))  # (B, C, h, w)
        q, k, v = (y.flatten(2).transpose(1, 2) for y in projections)  # (B, h w, C)
        # softmax(q k^T / sqrt(C)) v, written out, which is faster than torch's fused one on a CPU.
        attention = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(C), dim=-1)  # (B, h w, h w)
        attended = (attention @ v).transpose(1, 2).unflatten(2, (h, w))  # (B, C, h, w)
        return x + self.proj_out(attended)


class Downsample(nn.Module):
    """Halve the side by a strided convolution, padded on the right and below only, as theirs is."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # left, right, top, bottom


class Upsample(nn.Module):
    """Double the side by nearest neighbors, then convolve.

    A transposed convolution overlaps its own output unevenly, and prints checkerboards.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def resolution_levels(
    in_channels: int,
    widths: Sequence[int],
    sides: Sequence[int],
    attention_resolutions: Sequence[int],
    num_blocks: int,
    num_groups: int,
    between: type[nn.Module],
) -> list[nn.Module]:
    """Residual blocks of each resolution, with attention at some, and `between` two resolutions."""
    layers: list[nn.Module] = []
    for width, side in zip(widths, sides, strict=True):
        for _ in range(num_blocks):
            layers.append(ResNetBlock(in_channels, width, num_groups))
            if side in attention_resolutions:
                layers.append(AttentionBlock(width, num_groups))
            in_channels = width
        if side != sides[-1]:
            layers.append(between(width))
    return layers


def middle(width: int, num_groups: int) -> list[nn.Module]:
    """A block, attention and a block at the smallest resolution."""
    return [
        ResNetBlock(width, width, num_groups),
        AttentionBlock(width, num_groups),
        ResNetBlock(width, width, num_groups),
    ]


class VQGAN(VQAutoencoder):
    """The paper's encoder and decoder around a quantizer.

    `encode`, `decode` and `forward` are those of `VQAutoencoder`, in vqvae.py.

    With the defaults, a 32x32 image (24,576 bits) becomes 8x8 of 1,024 codes (640 bits, 38 times
    fewer), and the model has 1.08 M parameters (without the EMA codebook, which is a buffer).
    `NETWORKS["f16"]` is the paper's for 256 pixels: 16x16 of 16,384 codes (3,584 instead of
    1,572,864 bits, 439 times fewer), 71.9 M parameters and a codebook of 4.2 M numbers.

    Args:
        resolution: the side of the images in pixels, from which the side of each level follows.
            (The network is convolutional and takes any side that 2^(levels - 1) divides.)
        channels: the width of the first level.
        channel_multipliers: the width of each level in `channels`; the side halves between levels.
        num_residual_blocks: how many a level of the encoder has; one of the decoder has one more.
        attention_resolutions: the sides at which attention follows every residual block. None
            takes the smallest. (The middle, which has the same side, always has attention.)
        latent_channels: the channels between the 3x3 and the 1x1 convolution on both sides of the
            quantizer.
        quantizer: one of `codebooks.QUANTIZERS`, whose arguments are all that are not named here.
        norm_groups: the groups of every GroupNorm. None takes channels / 4, which is 32 at the
            paper's width of 128. (With their 32 groups at width 32, each group would be a single
            channel. That is instance normalization, which erases brightness and contrast.)
        in_channels: C, the channels of an image: 3 for RGB, 1 for gray.

    Raises:
        ValueError: sizes do not fit each other.
    """

    def __init__(
        self,
        resolution: int = 32,
        channels: int = 32,
        channel_multipliers: Sequence[int] = (1, 2, 2),
        num_residual_blocks: int = 1,
        attention_resolutions: Sequence[int] | None = None,
        latent_channels: int = 64,
        embedding_dim: int = 32,
        num_embeddings: int = 1024,
        quantizer: str = "ema",
        beta: float = 0.25,
        norm_groups: int | None = None,
        in_channels: int = 3,
        data_init: bool = True,
        restart_dead_codes: bool = True,
        cosine: bool = False,
        gradient_estimator: str = "straight-through",
        levels: Sequence[int] | None = None,
        num_rounds: int | None = None,
    ):
        super().__init__(resolution, len(channel_multipliers) - 1, in_channels)
        sides = [resolution // 2**level for level in range(len(channel_multipliers))]
        if attention_resolutions is None:
            attention_resolutions = tuple(sides[-1:])
        for side in attention_resolutions:
            if side not in sides:
                raise ValueError(f"attention_resolutions={side} never occurs: choose from {sides}")
        self.resolution, self.attention_resolutions = resolution, tuple(attention_resolutions)
        self.num_residual_blocks = num_residual_blocks
        self.norm_groups = groups = norm_groups or max(1, channels // 4)
        widths = [channels * multiplier for multiplier in channel_multipliers]
        D = code_dimensions(quantizer, num_embeddings, embedding_dim, levels)

        blocks = (attention_resolutions, num_residual_blocks, groups)
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, channels, kernel_size=3, padding=1),
            *resolution_levels(channels, widths, sides, *blocks, Downsample),
            *middle(widths[-1], groups),
            group_norm(widths[-1], groups),
            nn.SiLU(),
            nn.Conv2d(widths[-1], latent_channels, kernel_size=3, padding=1),
            nn.Conv2d(latent_channels, D, kernel_size=1),  # to the codebook's space
        )

        options: dict[str, Any] = {"beta": beta, "data_init": data_init}
        options |= {"restart_dead_codes": restart_dead_codes, "cosine": cosine}
        options |= {"gradient_estimator": gradient_estimator}
        options |= {"levels": levels, "num_rounds": num_rounds}
        self.quantizer = make_quantizer(quantizer, num_embeddings, embedding_dim, **options)

        blocks = (attention_resolutions, num_residual_blocks + 1, groups)
        up = resolution_levels(widths[-1], widths[::-1], sides[::-1], *blocks, Upsample)
        self.decoder = nn.Sequential(
            nn.Conv2d(D, latent_channels, kernel_size=1),
            nn.Conv2d(latent_channels, widths[-1], kernel_size=3, padding=1),
            *middle(widths[-1], groups),
            *up,
            group_norm(widths[0], groups),
            nn.SiLU(),
            nn.Conv2d(widths[0], in_channels, kernel_size=3, padding=1),
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """Weights of the last convolution, where the adaptive weight compares gradients (eq. 7)."""
        return self.decoder[-1].weight
