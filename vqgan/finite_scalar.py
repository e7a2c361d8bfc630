"""Codebooks that are not learned: FSQ rounds each number of a vector, LFQ takes its sign.

Their codes are all points of a fixed grid in a space of few dimensions. No code can die for want of
a gradient, there is no table to search, and the index of a code is a number whose digits are those
of its coordinates.

FSQ is from Mentzer, Minnen, Agustsson, Tschannen, "Finite Scalar Quantization: VQ-VAE Made Simple",
2023, arXiv 2309.15505, and LFQ from Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to
Visual Generation", 2023, arXiv 2310.05737 (MAGVIT-2).

Data flow: encoder -> z_e (B, D, h, w) -> quantizer -> z_q (B, D, h, w), indices (B, h, w).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgan import distributed
from vqgan.gradient_estimators import straight_through
from vqgan.quantizer import Quantized, Quantizer, check_range

# Indices are counted, and predicted, in tables with K rows.
MAX_EMBEDDINGS = 2**24

# Levels for a codebook of about so many codes, as the paper recommends (table 1). It has no row for
# 64 and 512, which are products of 8.
FSQ_LEVELS = {
    64: (8, 8),
    256: (8, 6, 5),
    512: (8, 8, 8),
    1024: (8, 5, 5, 5),
    4096: (7, 5, 5, 5, 5),
    16384: (8, 8, 8, 6, 5),
}


class FSQ(Quantizer):
    """Finite scalar quantization: number i of a vector is rounded to one of L_i levels.

    The number is first bounded, so that rounding gives L_i integers (section 3.1; for even L as in
    the code of the paper's appendix):

        f(z) = (L - 1)/2 tanh(z + s) - o,      o = 1/2 for even L and 0 for odd L

    where the shift s makes f(0) = 0. The codes are the integers divided by half the levels. Each
    combination of levels is a code, so K is the product of L_1 to L_D. Rounding passes the gradient
    straight through, and no loss is needed, because the grid does not move.

    Args:
        levels: L_1 to L_D, each from 2 to 1,000 (with more, `epsilon` would add a level). The paper
            recommends at least 5.
    """

    levels: Tensor  # (D,)
    basis: Tensor  # (D,) int64: the index is the sum of digits times 1, L_1, L_1 L_2, ...

    # Widens the bound a little, as vector-quantize-pytorch does, because tanh comes near its limits
    # only for large z. (The paper's code narrows it by as much.)
    epsilon = 1e-3

    def __init__(self, levels: Sequence[int]):
        if not levels or min(levels) < 2 or max(levels) > 1000:
            raise ValueError(f"levels={list(levels)}: give one or more numbers from 2 to 1000")
        if math.prod(levels) > MAX_EMBEDDINGS:
            raise ValueError(f"levels={list(levels)}: give a product of at most {MAX_EMBEDDINGS:,}")
        super().__init__(math.prod(levels), len(levels))
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32))
        self.register_buffer("basis", torch.tensor([1, *levels[:-1]]).cumprod(dim=0))

    def forward(self, z_e: Tensor) -> Quantized:
        """Quantize z_e (B, D, h, w) of any float type, in float32. The loss is zero."""
        with torch.autocast(device_type=z_e.device.type, enabled=False):
            z, L = self.as_vectors(z_e), self.levels.float()  # (N, D), (D,)
            B, D, h, w = z_e.shape
            half = (L - 1) * (1 + self.epsilon) / 2
            offset = torch.where(L % 2 == 0, 0.5, 0.0)
            shift = torch.atanh(offset / half)  # (the paper's code has tan, where f(0) is not 0)
            bounded = half * torch.tanh(z + shift) - offset  # f(z), (N, D)
            rounded = bounded.round()  # -(L // 2) to (L - 1) // 2
            z_q = straight_through(bounded, rounded) / (L // 2)  # within [-1, 1]
            # 0 to L - 1; a NaN, which the training will report, must be an index too.
            digits = (rounded.nan_to_num() + L // 2).long()
            indices = (digits * self.basis).sum(dim=1)  # (N,)
            z_q = z_q.view(B, h, w, D).permute(0, 3, 1, 2).to(self.levels.dtype)
            return Quantized(z_q, indices.view(B, h, w), z.new_zeros(()))

    def lookup(self, indices: Tensor) -> Tensor:
        check_range(indices.cpu(), 0, self.num_embeddings - 1, "indices")
        levels = self.levels.long()
        digits = indices[..., None] // self.basis % levels  # (B, h, w, D)
        codes = (digits - levels // 2) / (levels // 2)
        return codes.to(self.levels.dtype).permute(0, 3, 1, 2)


class LFQ(Quantizer):
    """Lookup-free quantization: a vector becomes the signs of its D numbers, and K = 2^D.

        z_q = sign(z_e),    index = sum_i 2^i [z_i > 0]                             (eq. 3 and 4)

    With the gradient passed straight through, the loss has the commitment and two entropies of
    p(c|z) = softmax(-|z - c|^2 / temperature) over the codes c (eq. 5):

        beta |z_e - sg[z_q]|^2 + entropy_weight (mean of H[p(c|z)] - H[mean of p(c|z)])

    The first entropy is low when each vector is close to one code, the second is high when the
    batch uses all codes equally. Distances to signs are sums over numbers, so p(c|z) is a product
    of bits with p(+1|z) = sigmoid(4 z / temperature). The first entropy is therefore a sum over
    bits. The mean over the batch is not, but it is the product of two small matrices, which have a
    row for each vector and a column for each pattern of one half of the bits. So it is exact for
    any K, and no N x K matrix is built. (Zhao, Xiong, Kraehenbuehl 2024, arXiv 2406.07548,
    approximate the second entropy by a sum over bits, which is never smaller.)

    Args:
        num_embeddings: K, a power of two.
        beta: the weight of the commitment.
    """

    signs: Tensor  # (2,): the value of a bit that is 0, and of one that is 1

    entropy_weight = 0.1
    # How sharply p(c|z) prefers the nearest code: only numbers of about this size get a gradient
    # from the entropies.
    temperature = 0.1

    def __init__(self, num_embeddings: int, beta: float = 0.25):
        bits = num_embeddings.bit_length() - 1
        if num_embeddings != 2**bits or not 1 < num_embeddings <= MAX_EMBEDDINGS:
            raise ValueError(
                f"num_embeddings={num_embeddings}: LFQ takes a power of two, from 2 to 2^24"
            )
        super().__init__(num_embeddings, bits)
        self.beta = beta
        self.register_buffer("signs", torch.tensor([-1.0, 1.0]))

    def forward(self, z_e: Tensor) -> Quantized:
        """Quantize z_e (B, D, h, w) of any float type, in float32."""
        with torch.autocast(device_type=z_e.device.type, enabled=False):
            z = self.as_vectors(z_e)  # (N, D)
            B, D, h, w = z_e.shape
            bits = (z > 0).long()
            quantized = self.signs.float()[bits]  # (N, D)                              eq. 3
            indices = (bits << torch.arange(D, device=z.device)).sum(dim=1)  # (N,)     eq. 4

            commitment = F.mse_loss(z, quantized)
            logits = 4 * z / self.temperature
            p = logits.sigmoid()  # p(+1|z) of each bit
            # H = -p log p - (1 - p) log(1 - p) of each bit, also where p is rounded to 0 or 1.
            entropy = (F.softplus(logits) - logits * p).sum(dim=1).mean()
            high, low = _products(p[:, D // 2 :]), _products(p[:, : D // 2])
            # p(c) over the batch, K entries
            mean = distributed.mean(high.T @ low / len(z)).clamp(min=1e-20)
            mean_entropy = -(mean * mean.log()).sum()
            loss = self.beta * commitment + self.entropy_weight * (entropy - mean_entropy)  # eq. 5

            z_q = straight_through(z, quantized).view(B, h, w, D).permute(0, 3, 1, 2)
            return Quantized(z_q.to(self.signs.dtype), indices.view(B, h, w), loss)

    def lookup(self, indices: Tensor) -> Tensor:
        check_range(indices.cpu(), 0, self.num_embeddings - 1, "indices")
        bits = torch.arange(self.embedding_dim, device=indices.device)
        return self.signs[indices[..., None] >> bits & 1].permute(0, 3, 1, 2)


def _products(p: Tensor) -> Tensor:
    """Probabilities of d bits (N, d) -> of their 2^d patterns (N, 2^d), the lowest bit first."""
    patterns = p.new_ones(len(p), 1)
    for bit in p.T[:, :, None]:  # (N, 1)
        patterns = torch.cat([patterns * (1 - bit), patterns * bit], dim=1)
    return patterns
