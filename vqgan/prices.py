"""What the latents of a trained model cost, in bits per image, under three priors.

A prior p over latents makes them a message. Indices s cost -log2 p(s) bits, and a sample of q(z|x)
costs KL(q(z|x) || p) / ln 2 bits on average. So an autoencoder has no price of its own but one for
each prior, and two of them are compared fairly only under priors that know about as much:

    prior      indices (h, w)                           Gaussian latent z (Z,)
    fixed      uniform: h w log2 K                      N(0, I)
    fitted     frequencies of codes at each position    N(m, v), a mean and variance per dimension
    context    a transformer (`transformer.py`)         N(m, C), with all covariances

Priors are fitted to the training images, and the price is that of test images. What sends the
prior itself is not counted, as the decoder is not.
"""

import torch
from torch import Tensor

from vqgan.metrics import nats_to_bits


def frequency_bits(train: Tensor, test: Tensor, num_embeddings: int) -> float:
    """Cross-entropy of test indices under the training frequencies at each position, in bits.

    With n_i(k), how often code k is at position i of N training images, and the mean over test
    images s (each code counts once more than it was seen, so that none is impossible):

        -mean sum_i log2 p_i(s_i),    p_i(k) = (n_i(k) + 1) / (N + K)

    Args:
        train, test: (N, h, w) int64, 0 to K - 1; N may differ.
    """
    K, positions = num_embeddings, test[0].numel()
    first = K * torch.arange(positions)  # code k at position i is number i K + k
    counts = torch.bincount((train.flatten(1) + first).flatten(), minlength=positions * K)
    log2_p = ((counts.double() + 1) / (len(train) + K)).log2()  # (h w K,)
    return -log2_p[test.flatten(1) + first].sum(dim=1).mean().item()


def fit_gaussian(means: Tensor, log_vars: Tensor) -> tuple[Tensor, Tensor]:
    """Mean m (Z,) and covariance C (Z, Z) of latents z ~ q(z|x) over a set of images x, in float64.

    By the law of total covariance, C = cov(means) + diag(mean of variances). Of all Gaussians,
    N(m, C) gives these images the smallest mean KL, and N(m, diag C) of all those without
    covariances.

    Args:
        means, log_vars: (N, Z), of q(z|x) for each image.
    """
    means, variances = means.double(), log_vars.double().exp()
    return means.mean(dim=0), means.T.cov(correction=0) + variances.mean(dim=0).diag()


def gaussian_bits(means: Tensor, log_vars: Tensor, m: Tensor, C: Tensor) -> float:
    """Mean KL(q(z|x) || N(m, C)) over images, in bits. With q(z|x) = N(m_x, S), S diagonal:

        1/2 (tr(C^-1 S) + (m_x - m)^T C^-1 (m_x - m) - Z + log det C - log det S)

    Args:
        means, log_vars: (N, Z), m_x and the logarithms of the diagonals of S.
        m, C: mean (Z,) and covariance (Z, Z) of the prior.
    """
    means, log_vars, C = means.double(), log_vars.double(), C.double()
    L = torch.linalg.cholesky(C)  # C = L L^T, so d^T C^-1 d = |L^-1 d|^2
    scaled = torch.linalg.solve_triangular(L, (means - m).T, upper=False)  # (Z, N)
    trace = log_vars.exp() @ torch.cholesky_inverse(L).diagonal()  # (N,)
    log_det = 2 * L.diagonal().log().sum()
    Z = means.shape[1]
    kl = 0.5 * (trace + scaled.square().sum(dim=0) - Z + log_det - log_vars.sum(dim=1))  # (N,)
    return nats_to_bits(kl.mean().item())


def gaussian_prices(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The three prices of Gaussian latents, in bits per image.

    Args:
        train, test: means and log_vars of q(z|x), (N, Z) each; N may differ.
    """
    m, C = fit_gaussian(*train)
    return {
        "fixed": gaussian_bits(*test, torch.zeros_like(m), torch.eye(len(m))),
        "fitted": gaussian_bits(*test, m, C.diagonal().diag()),
        "context": gaussian_bits(*test, m, C),
    }
