"""SimVQ: a codebook that one matrix moves as a whole, so that no code is left behind.

Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer",
2024, arXiv 2411.02038. A code of a `VectorQuantizer` moves only when a vector chooses it; a code
that is never chosen stays where it is, and the encoder moves away from it. SimVQ keeps the codes
c_k fixed at random and learns a matrix W that is applied to all of them:

    e_k = W c_k

The gradient of any chosen code changes W, and with it every code.

Data flow: encoder -> z_e (B, D, h, w) -> quantizer -> z_q (B, D, h, w), indices (B, h, w).
"""

import torch
from torch import Tensor, nn

from vqgan.quantizer import VectorQuantizer, exact_float32_matmul


class SimVQ(VectorQuantizer):
    """The forward pass and the loss of `VectorQuantizer`, with codes W c_k.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the dimensions of a code.
        beta: the weight of the commitment.
        gradient_estimator: "straight-through" or "rotation", see `gradient_estimators.py`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        beta: float = 0.25,
        gradient_estimator: str = "straight-through",
    ):
        super().__init__(
            num_embeddings, embedding_dim, beta, False, gradient_estimator=gradient_estimator
        )
        del self.codebook  # a parameter there, and here a buffer, which no optimizer moves
        # Deviation 1/sqrt(D) as in the authors' code: the length of c_k is about 1. (Their linear
        # layer also has a bias.)
        frozen = torch.randn(num_embeddings, embedding_dim) / embedding_dim**0.5
        self.register_buffer("codebook", frozen)
        self.linear = nn.Linear(embedding_dim, embedding_dim, bias=False)  # W

    def embeddings(self) -> Tensor:
        device = self.codebook.device.type
        with torch.autocast(device_type=device, enabled=False), exact_float32_matmul():
            return self.codebook.float() @ self.linear.weight.float().T  # e_k = W c_k, (K, D)
