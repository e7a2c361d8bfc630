"""How good a reconstruction is, and what it costs.

Images come as float (B, 3, H, W) in [0, 1] (`data.to_unit`); anything outside is refused, since a
range given wrongly changes every number without a sign.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # Wang et al. 2004, section III.C
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 with L = 1, the range of the data


def _require_unit_range(*images: Tensor) -> None:
    if images[0].shape != images[1].shape or images[0].dim() != 4:
        shapes = " and ".join(str(tuple(x.shape)) for x in images)
        raise ValueError(
            f"two batches of images (B, C, H, W) of one shape are needed, not {shapes}"
        )
    for x in images:
        low, high = x.min().item(), x.max().item()
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise ValueError(
                f"images must lie in [0, 1], but these reach from {low:.3g} to {high:.3g}: "
                "map them with vqgan.data.to_unit"
            )


def normalised_mse(x: Tensor, reconstruction: Tensor, variance: float) -> Tensor:
    """MSE of raw model outputs by the variance of the training pixels, per image: (B,).

    Any range, as long as all three are in the same. 1 is the error of answering with one
    mean grey. (The `nmse` of van den Oord et al. 2017's code.)
    """
    return (x - reconstruction).double().square().mean(dim=(1, 2, 3)) / variance


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image: -10 log10 MSE for images in [0, 1]. (B,).

    Equal images give infinity.
    """
    _require_unit_range(x, y)
    return -10 * torch.log10((x - y).double().square().mean(dim=(1, 2, 3)))


def gaussian_mean(images: Tensor) -> Tensor:
    """Mean in an 11x11 Gaussian window around every pixel that has a whole window.

    (B, C, H, W) float64 -> (B, C, (H - 10) (W - 10)).
    """
    offsets = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window = window / window.sum()  # (11,)
    planes = images.flatten(0, 1)[:, None]  # (B C, 1, H, W)
    # The two-dimensional window is a product of two: first down the columns, then along the rows.
    planes = F.conv2d(planes, window.view(1, 1, -1, 1))
    return F.conv2d(planes, window.view(1, 1, 1, -1)).view(*images.shape[:2], -1)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity per image, (B,) float64; 1 for equal images.

    Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", 2004, eq. 13, computed in an 11x11 Gaussian window around every pixel that has a
    whole window, and averaged over pixels and channels:

        (2 mx my + C1)(2 sxy + C2) / ((mx^2 + my^2 + C1)(sx^2 + sy^2 + C2))

    In float64: the variances are small differences of large squares.
    """
    _require_unit_range(x, y)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW} pixels a side (its window), "
            f"not {x.shape[-2]}x{x.shape[-1]}"
        )
    return _ssim_formula(x, y, gaussian_mean)


def ssim_whole_image(x: Tensor, y: Tensor) -> Tensor:
    """SSIM with one window, the whole image of a channel, every pixel weighing alike. (B,) float64.

    Not the standard definition: it compares mean, contrast and correlation of whole images, which
    a blurred copy mostly keeps, while it loses those of small windows. See docs/ssim.md.
    """
    _require_unit_range(x, y)
    return _ssim_formula(x, y, lambda images: images.flatten(2).mean(dim=2, keepdim=True))


def _ssim_formula(x: Tensor, y: Tensor, mean) -> Tensor:
    """Eq. 13 of Wang et al. with `mean` (B, C, H, W) -> (B, C, windows), averaged to (B,)."""
    x, y = x.double(), y.double()
    mx, my = mean(x), mean(y)
    sx2 = mean(x * x) - mx * mx  # variances and covariance: E[xy] - E[x]E[y]
    sy2 = mean(y * y) - my * my
    sxy = mean(x * y) - mx * my
    index = (2 * mx * my + SSIM_C1) * (2 * sxy + SSIM_C2)
    index = index / ((mx * mx + my * my + SSIM_C1) * (sx2 + sy2 + SSIM_C2))
    return index.mean(dim=(1, 2))


class CodebookUsage:
    """How often each of K codes is chosen over a whole set of images.

    (The perplexity of a single batch depends on the batch's size; that of a set does not.)
    """

    def __init__(self, num_embeddings: int):
        self.counts = torch.zeros(num_embeddings, dtype=torch.int64)  # (K,)

    def update(self, indices: Tensor) -> None:
        """Count indices of any shape, 0 to K - 1."""
        self.counts += torch.bincount(indices.flatten().cpu(), minlength=len(self.counts))

    @property
    def codes_used(self) -> int:
        """Codes that were chosen at least once."""
        return int((self.counts > 0).sum())

    @property
    def entropy(self) -> float:
        """Of the frequencies p_k, in bits a code: -sum p_k log2 p_k, at most log2 K."""
        p = self.counts.double() / self.counts.sum()
        return -(p * p.clamp(min=1e-300).log2()).sum().item()  # the clamp makes 0 log 0 zero

    @property
    def perplexity(self) -> float:
        """2^entropy: as many equally frequent codes would have this entropy. 1 to K."""
        return 2**self.entropy


def code_bits(height: int, width: int, num_embeddings: int) -> float:
    """Bits of a grid of codes sent as plain numbers: h w log2 K."""
    return height * width * math.log2(num_embeddings)


def nats_to_bits(nats: float) -> float:
    """A KL divergence in nats is the length of a message in bits after division by ln 2."""
    return nats / math.log(2)
