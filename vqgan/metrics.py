"""How good a reconstruction is, and what it costs.

Images come as float (B, 3, H, W) in [0, 1] (`images.to_unit`); values outside raise ValueError,
since a wrong range would silently change every number.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgan import distributed
from vqgan.images import to_unit

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # Wang et al. 2004, section III.C
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 with L = 1, the range of the data


def _require_unit_range(*images: Tensor) -> None:
    """Raise ValueError unless both batches are (B, C, H, W) of one shape, in [0, 1]."""
    if images[0].shape != images[1].shape or images[0].dim() != 4:
        shapes = " and ".join(str(tuple(x.shape)) for x in images)
        raise ValueError(f"give two batches (B, C, H, W) of one shape, not {shapes}")
    for x in images:
        low, high = x.min().item(), x.max().item()
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise ValueError(f"give images in [0, 1] (images.to_unit), not {low:.3g} to {high:.3g}")


def normalized_mse(x: Tensor, reconstruction: Tensor, variance: float) -> Tensor:
    """MSE of raw model outputs over the variance of the training pixels, per image: (B,).

    All three must be in the same range. Predicting the mean of all pixels gives 1. (The code of van
    den Oord et al. 2017 calls it `nmse`.)
    """
    return (x - reconstruction).double().square().mean(dim=(1, 2, 3)) / variance


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image: -10 log10 MSE for images in [0, 1], (B,).

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
    # The two-dimensional window is a product of two, one along the columns, one along the rows.
    planes = F.conv2d(planes, window.view(1, 1, -1, 1))
    return F.conv2d(planes, window.view(1, 1, 1, -1)).view(*images.shape[:2], -1)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity per image, (B,) float64; 1 for equal images.

    Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", 2004, eq. 13, computed in an 11x11 Gaussian window around every pixel that has a
    whole window, and averaged over pixels and channels. With means m, variances s^2 and covariance:

        (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2))

    It is computed in float64, because the variances are small differences of large squares.
    """
    _require_unit_range(x, y)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs {SSIM_WINDOW} pixels per side, not {tuple(x.shape[-2:])}")
    return _ssim_formula(x, y, gaussian_mean)


def ssim_global(x: Tensor, y: Tensor) -> Tensor:
    """SSIM with one window, the whole of each channel, and uniform weights: (B,) float64.

    This is not the standard definition. It compares mean, contrast and correlation of whole images,
    which a blurred copy mostly keeps, while it loses those of small windows. See docs/ssim.md.
    """
    _require_unit_range(x, y)
    return _ssim_formula(x, y, lambda images: images.flatten(2).mean(dim=2, keepdim=True))


def _ssim_formula(x: Tensor, y: Tensor, mean) -> Tensor:
    """Eq. 13 of Wang et al. with `mean` (B, C, H, W) -> (B, C, windows), averaged to (B,)."""
    x, y = x.double(), y.double()
    m_x, m_y = mean(x), mean(y)
    s_x2 = mean(x * x) - m_x * m_x  # variances and covariance: E[xy] - E[x]E[y]
    s_y2 = mean(y * y) - m_y * m_y
    s_xy = mean(x * y) - m_x * m_y
    index = (2 * m_x * m_y + SSIM_C1) * (2 * s_xy + SSIM_C2)
    index = index / ((m_x * m_x + m_y * m_y + SSIM_C1) * (s_x2 + s_y2 + SSIM_C2))
    return index.mean(dim=(1, 2))


def reconstruction_quality(x: Tensor, reconstruction: Tensor, variance: float) -> dict[str, Tensor]:
    """Compute the four measures of reconstructions, each (B,), from images in the models' range.

    Args:
        x, reconstruction: (B, 3, H, W), in and about [-1, 1].
        variance: of the training pixels, in the same range.
    """
    x, reconstruction = x.cpu(), reconstruction.cpu()  # for float64, which not every device has
    original, unit = to_unit(x), to_unit(reconstruction)
    return {
        "nmse": normalized_mse(x, reconstruction, variance),
        "psnr": psnr(original, unit),
        "ssim": ssim(original, unit),
        "ssim_global": ssim_global(original, unit),
    }


def frechet_distance(features_x: Tensor, features_y: Tensor) -> float:
    """Fréchet distance between two sets of features (N, F), (M, F), each taken as a Gaussian.

    Heusel et al. 2017 (arXiv 1706.08500), eq. 6, with means m and covariances C:

        |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))

    In the features of Inception this is FID. In those of another network it is not, and
    values compare only within that network. It is computed in float64 on the CPU.
    """
    if min(len(features_x), len(features_y)) < 2 or features_x.shape[1:] != features_y.shape[1:]:
        shapes = f"{tuple(features_x.shape)} and {tuple(features_y.shape)}"
        raise ValueError(f"give two sets (N, F) and (M, F) of two or more, not {shapes}")
    x, y = features_x.double().cpu(), features_y.double().cpu()
    mean_term = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    covariance_x, covariance_y = torch.cov(x.T), torch.cov(y.T)  # (F, F)
    # C_x C_y is similar to S C_y S with S = C_x^(1/2): the same eigenvalues, and symmetric, so they
    # are real and at least 0 (rounding aside). The trace of the root is the sum of their roots.
    eigenvalues, vectors = torch.linalg.eigh(covariance_x)
    root = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T  # S
    eigenvalues = torch.linalg.eigvalsh(root @ covariance_y @ root)
    root_trace = eigenvalues.clamp(min=0).sqrt().sum()
    return (mean_term + covariance_x.trace() + covariance_y.trace() - 2 * root_trace).item()


def codes_used(indices: Tensor, num_embeddings: int) -> Tensor:
    """How many different codes a batch uses, (), without waiting for the GPU."""
    chosen = torch.zeros(num_embeddings, device=indices.device)
    chosen.index_fill_(0, indices.flatten(), 1.0)
    return distributed.total(chosen).clamp(max=1).sum()


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
        """Entropy of the frequencies p_k, in bits per code: -sum p_k log2 p_k, at most log2 K."""
        p = self.counts.double() / self.counts.sum()
        return -(p * p.clamp(min=1e-300).log2()).sum().item()  # the clamp makes 0 log 0 zero

    @property
    def perplexity(self) -> float:
        """2^entropy, 1 to K: the number of equally frequent codes that have this entropy."""
        return 2**self.entropy


# The bigram model adds this many observations, distributed like single tokens, to those after each
# token. So after a token that was seen less often, it predicts mostly what is frequent anywhere.
SMOOTHING = 100


def token_baselines(
    train: Sequence[Tensor], test: Sequence[Tensor], num_embeddings: int
) -> dict[str, float]:
    """Losses of three simple models of tokens, in nats per token, which a transformer must beat.

        uniform   ln K
        unigram   -mean log p(s), from how often token s occurs
        bigram    -mean log p(s | l), from how often s occurs to the right of token l

    The frequencies are those of the training grids, and the mean is over the test grids, so tokens
    that were not seen are penalized as in a transformer's validation loss. (p(s) counts every token
    once more than it was seen, and p(s | l) adds SMOOTHING tokens distributed as p(s). The first
    token of a row has none to its left, and costs -log p(s).)

    Args:
        train, test: the grids of a sequence, (images, h, w) int64 each, 0 to K - 1. Each grid has
            frequencies of its own.
    """
    sizes = [grid[0].numel() for grid in test]
    levels = [grid_baselines(*grids, num_embeddings) for grids in zip(train, test, strict=True)]
    return {
        name: sum(n * nats[name] for n, nats in zip(sizes, levels, strict=True)) / sum(sizes)
        for name in levels[0]
    }


def grid_baselines(train: Tensor, test: Tensor, num_embeddings: int) -> dict[str, float]:
    """`token_baselines` of a single grid, (images, h, w)."""
    K = num_embeddings
    counts = torch.bincount(train.flatten(), minlength=K).double() + 1
    unigram = counts / counts.sum()  # p(s), (K,)
    # Few of the K^2 pairs occur, so they are counted as numbers l K + s.
    pairs, pair_counts = (train[..., :-1] * K + train[..., 1:]).unique(return_counts=True)
    left_counts = torch.bincount(train[..., :-1].flatten(), minlength=K)
    left, token = test[..., :-1].flatten(), test[..., 1:].flatten()
    test_pairs = left * K + token
    position = torch.searchsorted(pairs, test_pairs).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[position] == test_pairs, pair_counts[position], 0)
    given_left = (seen + SMOOTHING * unigram[token]) / (left_counts[left] + SMOOTHING)  # p(s | l)
    first = unigram[test[..., 0].flatten()]  # of every row
    nats = {"uniform": math.log(K), "unigram": -unigram[test].log().mean().item()}
    return nats | {"bigram": -torch.cat([given_left, first]).log().mean().item()}


def fixed_length_bits(seq_len: int, num_embeddings: int) -> float:
    """Bits of N tokens with a fixed number of bits each: N log2 K."""
    return seq_len * math.log2(num_embeddings)


def nats_to_bits(nats: float) -> float:
    """Convert a KL divergence or negative log-likelihood to the length of a message in bits."""
    return nats / math.log(2)
