"""How good a reconstruction is, and what it costs.

Images come as float (B, 3, H, W) in [0, 1] (`images.to_unit`); anything outside is refused, since a
range given wrongly changes every number without a sign.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgan.images import to_unit

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # Wang et al. 2004, section III.C
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 with L = 1, the range of the data


def _require_unit_range(*images: Tensor) -> None:
    """Raise ValueError unless both batches are (B, C, H, W) of one shape, in [0, 1]."""
    if images[0].shape != images[1].shape or images[0].dim() != 4:
        shapes = " and ".join(str(tuple(x.shape)) for x in images)
        raise ValueError(f"two batches (B, C, H, W) of one shape are needed, not {shapes}")
    for x in images:
        low, high = x.min().item(), x.max().item()
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise ValueError(f"images must lie in [0, 1], but reach from {low:.3g} to {high:.3g}")


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
    whole window, and averaged over pixels and channels. With means m, variances s^2 and covariance:

        (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2))

    In float64: the variances are small differences of large squares.
    """
    _require_unit_range(x, y)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs {SSIM_WINDOW} pixels per side, not {tuple(x.shape[-2:])}")
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
    m_x, m_y = mean(x), mean(y)
    s_x2 = mean(x * x) - m_x * m_x  # variances and covariance: E[xy] - E[x]E[y]
    s_y2 = mean(y * y) - m_y * m_y
    s_xy = mean(x * y) - m_x * m_y
    index = (2 * m_x * m_y + SSIM_C1) * (2 * s_xy + SSIM_C2)
    index = index / ((m_x * m_x + m_y * m_y + SSIM_C1) * (s_x2 + s_y2 + SSIM_C2))
    return index.mean(dim=(1, 2))


def reconstruction_quality(x: Tensor, reconstruction: Tensor, variance: float) -> dict[str, Tensor]:
    """The four measures of a reconstruction, each (B,); both images as models give them.

    Args:
        x, reconstruction: (B, 3, H, W), in and about [-1, 1].
        variance: of the training pixels, in the same range.
    """
    x, reconstruction = x.cpu(), reconstruction.cpu()  # float64, which not every device has
    original, unit = to_unit(x), to_unit(reconstruction)
    return {
        "nmse": normalised_mse(x, reconstruction, variance),
        "psnr": psnr(original, unit),
        "ssim": ssim(original, unit),
        "ssim_whole_image": ssim_whole_image(original, unit),
    }


def frechet_distance(features_x: Tensor, features_y: Tensor) -> float:
    """Frechet distance between two sets of features (N, F), (M, F), each taken as a Gaussian.

    Heusel et al. 2017 (arXiv 1706.08500), eq. 6, with means m and covariances C:

        |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))

    In the features of Inception this is FID. In those of another network it is not, and compares
    with nothing but itself. In float64, on the CPU.
    """
    if min(len(features_x), len(features_y)) < 2 or features_x.shape[1:] != features_y.shape[1:]:
        shapes = f"{tuple(features_x.shape)} and {tuple(features_y.shape)}"
        raise ValueError(f"two sets (N, F) and (M, F) of two or more are needed, not {shapes}")
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


def codes_in_batch(indices: Tensor, num_embeddings: int) -> Tensor:
    """How many different codes a batch uses, (), without waiting for the GPU."""
    chosen = torch.zeros(num_embeddings, device=indices.device)
    return chosen.index_fill_(0, indices.flatten(), 1.0).sum()


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


# The frequencies of single codes count for as many observations after a code. A code that was seen
# less often than this is followed by what is frequent anywhere, rather than by what it happened to
# be followed by.
BACKOFF = 100


def code_baselines(train: Tensor, test: Tensor, num_embeddings: int) -> dict[str, float]:
    """What three simple models of grids need for a code, in nats: a transformer must need less.

        uniform   ln K: every code alike
        single    -mean log p(s), by how often each code occurs
        left      -mean log p(s | l), by how often it occurs to the right of code l

    The frequencies are those of the training grids, the mean is over the test grids: like a
    transformer's validation loss, it charges for what was not seen. (Frequencies p(s) count every
    code once more than it was seen; p(s | l) counts BACKOFF more, shared as p(s). The first code of
    a row has none to its left, and costs -log p(s).)

    Args:
        train, test: (N, h, w) int64, 0 to K - 1.
    """
    K = num_embeddings
    counts = torch.bincount(train.flatten(), minlength=K).double() + 1
    single = counts / counts.sum()  # p(s), (K,)
    # Pairs that occur are few of the K^2: they are counted as numbers l K + s.
    pairs, pair_counts = (train[..., :-1] * K + train[..., 1:]).unique(return_counts=True)
    left_counts = torch.bincount(train[..., :-1].flatten(), minlength=K)
    left, code = test[..., :-1].flatten(), test[..., 1:].flatten()
    wanted = left * K + code
    place = torch.searchsorted(pairs, wanted).clamp(max=max(len(pairs) - 1, 0))
    seen = torch.zeros_like(wanted)
    if len(pairs):
        seen = torch.where(pairs[place] == wanted, pair_counts[place], 0)
    given_left = (seen + BACKOFF * single[code]) / (left_counts[left] + BACKOFF)  # p(s | l)
    first = single[test[..., 0].flatten()]  # of a row
    nats = {"uniform": math.log(K), "single": -single[test].log().mean().item()}
    return nats | {"left": -torch.cat([given_left, first]).log().mean().item()}


def code_bits(seq_len: int, num_embeddings: int) -> float:
    """Bits of N tokens sent as plain numbers: N log2 K."""
    return seq_len * math.log2(num_embeddings)


def nats_to_bits(nats: float) -> float:
    """A KL divergence or a negative log-likelihood in nats, as the length of a message in bits."""
    return nats / math.log(2)
