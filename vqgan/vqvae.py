"""VQ-VAE: an encoder and a decoder around a codebook.

van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, arXiv
1711.00937, section 4.1, with the sizes of the authors' published example for CIFAR-10.

    L = |x - x_hat|^2 / variance + |sg[z_e] - e|^2 + beta |z_e - sg[e]|^2          (eq. 3)

Each term is a mean over all its elements. The script computes the first, which needs the variance
of the data; `quantizer.py` computes the other two.

Data flow, for 32 pixels and two downsamplings:

    x (B, 3, 32, 32) -> encoder -> z_e (B, 64, 8, 8)
    z_e -> quantizer -> z_q (B, 64, 8, 8), indices (B, 8, 8)
    z_q (B, 64, 8, 8) -> decoder -> reconstruction (B, 3, 32, 32)
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan.codebooks import code_dimensions, make_quantizer
from vqgan.images import check_channels, check_multiple
from vqgan.quantizer import Quantized, Quantizer


class AutoencoderOutput(NamedTuple):
    """What a VQ-VAE or a VQGAN returns for images (B, C, H, W)."""

    reconstruction: Tensor  # (B, C, H, W), about [-1, 1]
    indices: Tensor  # (B, h, w) int64
    loss: Tensor  # (), of the quantizer: every term but the reconstruction


class Autoencoder(nn.Module):
    """What every model with an encoder and a decoder shares: the images that it takes.

    Args:
        image_size: the side in pixels of the images that are generated. (Networks that are
            convolutional take any size that halves evenly.)
        num_downsamples: how often the encoder halves the side.
        in_channels: C, the channels of an image.
    """

    encoder: nn.Module
    decoder: Any  # a Sequential

    def __init__(self, image_size: int, num_downsamples: int, in_channels: int):
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, not {in_channels}")
        self.image_size, self.num_downsamples = image_size, num_downsamples
        self.in_channels = in_channels
        self.check_resolution(image_size, image_size)

    def check_resolution(self, height: int, width: int) -> None:
        """Raise `ValueError` unless 2^num_downsamples divides both sides, in pixels."""
        check_multiple(height, width, 2**self.num_downsamples)


class VQAutoencoder(Autoencoder):
    """The data flow that VQ-VAE and VQGAN share. A subclass builds the three networks.

    A prior knows this model as a tokenizer: `tokens`, `decode_tokens`, `grids`, `num_embeddings`.
    A sequence of tokens stands for an image of `image_size`.
    """

    quantizer: Quantizer

    def encode(self, x: Tensor) -> Quantized:
        """x (B, C, H, W) in [-1, 1] -> z_q (B, D, h, w), indices (B, h, w), loss ().

        Raises `ValueError` for another number of channels, and for sides that do not halve evenly.
        """
        check_channels(x, self.in_channels)
        self.check_resolution(*x.shape[-2:])
        return self.quantizer(self.encoder(x))

    def decode(self, z_q: Tensor) -> Tensor:
        """z_q (B, D, h, w) -> images (B, C, H, W), about [-1, 1]."""
        return self.decoder(z_q)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """indices (B, h, w) int64, 0 to K - 1 -> images (B, C, H, W), about [-1, 1].

        (Several rounds of residual quantization are (B, M, h, w).)
        """
        return self.decode(self.quantizer.lookup(indices))

    def forward(self, x: Tensor) -> AutoencoderOutput:
        """x (B, C, H, W) in [-1, 1] -> reconstruction, indices, quantizer's loss."""
        z_q, indices, loss = self.encode(x)
        return AutoencoderOutput(self.decode(z_q), indices, loss)

    # --- as a tokenizer ---------------------------------------------------------------------------

    @property
    def num_embeddings(self) -> int:
        """K, the number of different tokens."""
        return self.quantizer.num_embeddings

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The grids (h, w) of a sequence, each in raster order: one for each round of codes."""
        side = self.image_size // 2**self.num_downsamples
        return [(side, side)] * self.quantizer.num_rounds

    @property
    def seq_len(self) -> int:
        """N, the number of tokens of an image."""
        return sum(h * w for h, w in self.grids)

    def split_tokens(self, tokens: Tensor) -> list[Tensor]:
        """tokens (B, N) -> the grids that they consist of, (B, h, w) each."""
        if tokens.shape[1:] != (self.seq_len,):
            raise ValueError(f"tokens must be (B, {self.seq_len}), not {tuple(tokens.shape)}")
        levels = tokens.split([h * w for h, w in self.grids], dim=1)
        return [level.unflatten(1, grid) for level, grid in zip(levels, self.grids, strict=True)]

    def tokens(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) in [-1, 1] -> tokens (B, N) int64, grid after grid."""
        return self.encode(x).indices.flatten(1)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) int64, 0 to K - 1 -> images (B, C, H, W), about [-1, 1]."""
        grids = self.split_tokens(tokens)
        return self.decode_indices(grids[0] if len(grids) == 1 else torch.stack(grids, dim=1))


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), (B, C, h, w) -> the same.

    The first ReLU is not in place, because it would also change the x that is added.
    """

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.conv3x3 = nn.Conv2d(channels, hidden_channels, kernel_size=3, padding=1)
        self.conv1x1 = nn.Conv2d(hidden_channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1x1(F.relu(self.conv3x3(F.relu(x))))


def residual_stack(channels: int, hidden_channels: int, num_layers: int) -> nn.Sequential:
    """Residual blocks, each with separate weights, and a last ReLU."""
    blocks = [ResidualBlock(channels, hidden_channels) for _ in range(num_layers)]
    return nn.Sequential(*blocks, nn.ReLU())


def strided_layers(layer: type[nn.Module], channels: list[int]) -> list[nn.Module]:
    """A convolution from each of these numbers of channels to the next, each with a ReLU.

    Kernels of 4 with stride 2 and padding 1 halve the side exactly; transposed, they double it.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [layer(before, after, kernel_size=4, stride=2, padding=1), nn.ReLU()]
    return layers


def build_encoder(
    in_channels: int,
    out_channels: int,
    num_hiddens: int,
    num_residual_hiddens: int,
    num_residual_layers: int,
    num_downsamples: int,
) -> nn.Sequential:
    """The encoder, images (B, in_channels, H, W) -> (B, out_channels, h, w)."""
    if num_downsamples < 1:
        raise ValueError(f"num_downsamples must be at least 1, not {num_downsamples}")
    # Channels after each downsampling: half the width first, as in the authors' example.
    widths = [num_hiddens // 2] + [num_hiddens] * (num_downsamples - 1)
    return nn.Sequential(
        *strided_layers(nn.Conv2d, [in_channels, *widths]),
        nn.Conv2d(widths[-1], num_hiddens, kernel_size=3, padding=1),
        residual_stack(num_hiddens, num_residual_hiddens, num_residual_layers),
        nn.Conv2d(num_hiddens, out_channels, kernel_size=1),  # to the dimensions of the latent
    )


def build_decoder(
    in_channels: int,
    out_channels: int,
    num_hiddens: int,
    num_residual_hiddens: int,
    num_residual_layers: int,
    num_downsamples: int,
) -> nn.Sequential:
    """The encoder's mirror image, (B, in_channels, h, w) -> images (B, out_channels, H, W)."""
    widths = [num_hiddens // 2] + [num_hiddens] * (num_downsamples - 1)
    channels = [num_hiddens, *reversed(widths[:-1])]  # before each upsampling
    layers = strided_layers(nn.ConvTranspose2d, channels)
    return nn.Sequential(
        nn.Conv2d(in_channels, num_hiddens, kernel_size=3, padding=1),
        residual_stack(num_hiddens, num_residual_hiddens, num_residual_layers),
        *layers,
        nn.ConvTranspose2d(channels[-1], out_channels, kernel_size=4, stride=2, padding=1),
    )


class VQVAE(VQAutoencoder):
    """The network of the authors' published example for CIFAR-10.

    `encode`, `decode` and `forward` are above, in `VQAutoencoder`.

    With the defaults, a 32x32 image (24,576 bits) becomes 8x8 of 512 codes (576 bits), and the
    model has 0.66 M parameters (without the EMA codebook, which is a buffer).

    Args:
        image_size: the side of the training images in pixels. It changes no weight, see
            `VQAutoencoder`.
        num_hiddens: the width of the network.
        num_residual_hiddens: the channels inside a residual block.
        num_residual_layers: the number of residual blocks in the encoder, and in the decoder.
        num_downsamples: how often the side is halved; 1 gives a 16x16 grid, four times the bits.
        in_channels: C, the channels of an image: 3 for RGB, 1 for gray.
        quantizer: one of `codebooks.QUANTIZERS`, whose arguments are all others.
    """

    def __init__(
        self,
        image_size: int = 32,
        num_hiddens: int = 128,
        num_residual_hiddens: int = 32,
        num_residual_layers: int = 2,
        embedding_dim: int = 64,
        num_embeddings: int = 512,
        num_downsamples: int = 2,
        quantizer: str = "ema",
        beta: float = 0.25,
        data_init: bool = True,
        restart_dead_codes: bool = True,
        in_channels: int = 3,
        cosine: bool = False,
        gradient_estimator: str = "straight-through",
        levels: Sequence[int] | None = None,
        num_rounds: int | None = None,
    ):
        super().__init__(image_size, num_downsamples, in_channels)
        network = (num_hiddens, num_residual_hiddens, num_residual_layers, num_downsamples)
        D = code_dimensions(quantizer, num_embeddings, embedding_dim, levels)
        self.encoder = build_encoder(in_channels, D, *network)
        options: dict[str, Any] = {"beta": beta, "data_init": data_init}
        options |= {"restart_dead_codes": restart_dead_codes, "cosine": cosine}
        options |= {"gradient_estimator": gradient_estimator}
        options |= {"levels": levels, "num_rounds": num_rounds}
        self.quantizer = make_quantizer(quantizer, num_embeddings, embedding_dim, **options)
        self.decoder = build_decoder(D, in_channels, *network)
