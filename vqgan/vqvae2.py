"""VQ-VAE-2: a coarse grid of codes for the layout, and a fine grid that knows it for the details.

Razavi, van den Oord, Vinyals, "Generating Diverse High-Fidelity Images with VQ-VAE-2", 2019, arXiv
1906.00446, section 3.1, with two levels. (The paper's are 32x32 and 64x64 for 256 pixels.)

Data flow, for 32 pixels:

    x (B, 3, 32, 32) -> encoder -> features (B, 128, 16, 16)
    features -> coarse_encoder -> quantizer -> coarse z_q (B, 64, 8, 8), indices (B, 8, 8)
    features and coarse_decoder(coarse z_q) -> quantizer -> fine z_q (B, 64, 16, 16), indices
    upsampled coarse z_q and fine z_q, z_q (B, 128, 16, 16) -> decoder -> reconstruction

The fine grid is quantized after the coarse one has been decoded, so it can leave out what that
already says. A sequence has the coarse tokens first, so one transformer generates the layout and
then the details. (The paper trains a prior for each level. Attention over a single sequence costs
more: its length is the sum of both, here 320.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqgan.codebooks import code_dimensions, make_quantizer
from vqgan.images import check_channels, check_multiple
from vqgan.quantizer import Quantized, Quantizer
from vqgan.vqvae import VQAutoencoder, build_decoder, build_encoder


class VQVAE2(VQAutoencoder):
    """Two levels of codes, with the layers of `VQVAE` on both. Each has a codebook of K codes.

    Args:
        num_downsamples: how often the side is halved for the fine grid; the coarse grid has half
            its side. 1 gives 16x16 and 8x8 for 32 pixels.
        quantizer: one of `codebooks.QUANTIZERS` but "residual".
        All others are those of `VQVAE`.

    Raises:
        ValueError: sizes do not fit each other, or the quantizer is residual.
    """

    def __init__(
        self,
        image_size: int = 32,
        num_hiddens: int = 128,
        num_residual_hiddens: int = 32,
        num_residual_layers: int = 2,
        embedding_dim: int = 64,
        num_embeddings: int = 512,
        num_downsamples: int = 1,
        quantizer: str = "ema",
        beta: float = 0.25,
        data_init: bool = True,
        restart_dead_codes: bool = True,
        in_channels: int = 3,
        cosine: bool = False,
        gradient_estimator: str = "straight-through",
        levels: Sequence[int] | None = None,
    ):
        if quantizer == "residual":
            raise ValueError("quantizer=residual has grids of its own: choose another for VQVAE2")
        super().__init__(image_size, num_downsamples, in_channels)
        options: dict[str, Any] = {"beta": beta, "data_init": data_init}
        options |= {"restart_dead_codes": restart_dead_codes, "cosine": cosine}
        options |= {"gradient_estimator": gradient_estimator, "levels": levels}
        quantizer_args = (quantizer, num_embeddings, embedding_dim)
        D = code_dimensions(*quantizer_args, levels)
        C, layers = num_hiddens, (num_hiddens, num_residual_hiddens, num_residual_layers)

        self.encoder = build_encoder(in_channels, C, *layers, num_downsamples)
        self.coarse_encoder = build_encoder(C, D, *layers, 1)
        self.coarse_quantizer: Quantizer = make_quantizer(*quantizer_args, **options)
        self.coarse_decoder = build_decoder(D, C, *layers, 1)
        self.to_fine = nn.Conv2d(2 * C, D, kernel_size=1)  # of the features and the coarse level
        self.quantizer = make_quantizer(*quantizer_args, **options)
        self.upsample = nn.ConvTranspose2d(D, D, kernel_size=4, stride=2, padding=1)
        self.decoder = build_decoder(2 * D, in_channels, *layers, num_downsamples)

    def check_resolution(self, height: int, width: int) -> None:
        """Raise `ValueError` unless both sides can be halved once more than for the fine grid."""
        check_multiple(height, width, 2 ** (self.num_downsamples + 1))

    def encode(self, x: Tensor) -> Quantized:
        """x (B, C, H, W) in [-1, 1] -> z_q (B, 2 D, h, w), indices (B, N), loss ().

        N = h/2 w/2 + h w: the coarse grid comes first. The loss is the sum of both quantizers'.
        """
        check_channels(x, self.in_channels)
        self.check_resolution(*x.shape[-2:])
        features = self.encoder(x)  # (B, C, h, w)
        coarse, coarse_indices, coarse_loss = self.coarse_quantizer(self.coarse_encoder(features))
        seen = torch.cat([features, self.coarse_decoder(coarse)], dim=1)  # (B, 2 C, h, w)
        fine, fine_indices, fine_loss = self.quantizer(self.to_fine(seen))
        indices = torch.cat([coarse_indices.flatten(1), fine_indices.flatten(1)], dim=1)
        return Quantized(self.join(coarse, fine), indices, coarse_loss + fine_loss)

    def join(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """z_q of both levels, (B, D, h/2, w/2) and (B, D, h, w) -> what `decode` takes."""
        return torch.cat([self.upsample(coarse), fine], dim=1)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The coarse and the fine grid, (h, w) each."""
        side = self.image_size // 2**self.num_downsamples
        return [(side // 2, side // 2), (side, side)]

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) int64, 0 to K - 1 -> images (B, C, H, W), about [-1, 1]."""
        coarse, fine = self.split_tokens(tokens)
        z_q = self.join(self.coarse_quantizer.lookup(coarse), self.quantizer.lookup(fine))
        return self.decode(z_q)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """The same, because the indices of two grids are a sequence already, of `image_size`."""
        return self.decode_tokens(indices)

    def decode_coarse(self, tokens: Tensor) -> Tensor:
        """The images of the coarse tokens alone: every fine code is replaced by the mean of all."""
        coarse, _ = self.split_tokens(tokens)  # (B, h/2, w/2)
        codes = torch.arange(self.num_embeddings, device=tokens.device).view(1, 1, -1)
        mean = self.quantizer.lookup(codes).mean(dim=3, keepdim=True)  # (1, D, 1, 1)
        fine = mean.expand(len(tokens), -1, *self.grids[1])
        return self.decode(self.join(self.coarse_quantizer.lookup(coarse), fine))
