"""Residual quantization: a vector is the sum of M codes, each chosen for what the others left.

Lee et al., "Autoregressive Image Generation using Residual Quantization", 2022, arXiv 2203.01941,
section 3.1. With r_0 = z_e, round m chooses the code that is nearest to the residual:

    k_m = argmin_j |r_(m-1) - e_j|^2,    r_m = r_(m-1) - e_(k_m)                    (eq. 3)
    z_q = e_(k_1) + ... + e_(k_M)                                                   (eq. 4)

M rounds of K codes distinguish K^M vectors with a table of K. All rounds share one codebook.

Data flow: encoder -> z_e (B, D, h, w) -> quantizer -> z_q (B, D, h, w), indices (B, M, h, w).
"""

import torch
from torch import Tensor

from vqgan.gradient_estimators import GRADIENT_ESTIMATORS
from vqgan.quantizer import EMAVectorQuantizer, Quantized, Quantizer


class ResidualVQ(Quantizer):
    """M rounds of an `EMAVectorQuantizer`, whose averages follow the residuals of all rounds.

    The commitment is summed over the rounds (eq. 7), and the gradient passes the sum of the codes
    as if it were one.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the dimensions of a code.
        num_rounds: M, the codes of each position.
        beta: the weight of the commitment.
        data_init, restart_dead_codes, gradient_estimator: see `quantizer.py`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_rounds: int,
        beta: float = 0.25,
        data_init: bool = True,
        restart_dead_codes: bool = True,
        gradient_estimator: str = "straight-through",
    ):
        if num_rounds < 2:
            raise ValueError(f"{num_rounds=}: give 2 or more (one round is an EMA codebook)")
        super().__init__(num_embeddings, embedding_dim)
        self.num_rounds = num_rounds
        self.quantizer = EMAVectorQuantizer(
            num_embeddings,
            embedding_dim,
            beta,
            data_init=data_init,
            restart_dead_codes=restart_dead_codes,
            gradient_estimator=gradient_estimator,
        )

    def forward(self, z_e: Tensor) -> Quantized:
        """Quantize z_e (B, D, h, w) of any float type, in float32; indices are (B, M, h, w)."""
        with torch.autocast(device_type=z_e.device.type, enabled=False):
            vectors = self.as_vectors(z_e)  # (N, D)
            B, D, h, w = z_e.shape
            residual, total, indices, losses = z_e.float(), torch.zeros_like(vectors), [], []
            for _ in range(self.num_rounds):
                codes, index, loss = self.quantizer(residual)
                residual = residual - codes.detach()
                total = total + self.as_vectors(codes.detach())
                indices.append(index)
                losses.append(loss)
            estimator = GRADIENT_ESTIMATORS[self.quantizer.gradient_estimator]
            z_q = estimator(vectors, total).view(B, h, w, D).permute(0, 3, 1, 2)
            z_q = z_q.to(self.quantizer.codebook.dtype)
            return Quantized(z_q, torch.stack(indices, dim=1), torch.stack(losses).sum())

    def lookup(self, indices: Tensor) -> Tensor:
        """Sum the codes of all rounds: indices (B, M, h, w) int64 -> z_q (B, D, h, w)."""
        codes = self.quantizer.lookup(indices.flatten(0, 1))  # (B M, D, h, w)
        return codes.unflatten(0, (-1, self.num_rounds)).sum(dim=1)
