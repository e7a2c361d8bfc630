"""Codebooks: continuous vectors in, the nearest of K learned vectors out.

van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, arXiv
1711.00937. An encoder gives a vector z_e at each place of a grid; the quantizer replaces it by

    z_q = e_k   with   k = argmin_j |z_e - e_j|^2                                  (eq. 1 and 2)

The argmin has no gradient, so the decoder's is handed to the encoder unchanged (straight-through),
and the loss pulls codes and vectors together (eq. 3, last two terms; sg[.] stops the gradient):

    |sg[z_e] - e|^2          codebook: moves the codes to the vectors      (VectorQuantizer)
    beta |z_e - sg[e]|^2     commitment: moves the vectors to the codes    (both quantizers)

Without the commitment nothing would hold the encoder's vectors near their codes: they could grow,
and jump from code to code, faster than the codes follow. Both terms are means over all elements
(the paper's norms are sums over D), as is the reconstruction that stands beside them.

`EMAVectorQuantizer` moves the codes by moving averages instead of a gradient (appendix A.1).

Way of the data: encoder -> z_e (B, D, h, w) -> quantizer -> z_q (B, D, h, w), indices (B, h, w).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan.errors import InputError

# Distances held at once. 2^22 floats are 16 MiB, in reach of a CPU's cache; a GPU wants more work
# in a kernel, and has room for 64 MiB.
DISTANCES_AT_ONCE_CPU, DISTANCES_AT_ONCE_GPU = 2**22, 2**24


class Quantized(NamedTuple):
    """What a quantizer makes of vectors z_e (B, D, h, w): codes in their places, and their loss."""

    z_q: Tensor  # (B, D, h, w), straight-through: its gradient is that of z_e
    indices: Tensor  # (B, h, w) int64, 0 to K - 1
    loss: Tensor  # (), every term but the reconstruction


@contextmanager
def exact_float32_products() -> Iterator[None]:
    """Switch off TF32 and the like, which a script may have allowed: they choose wrong codes."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
    else:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


@torch.compiler.disable  # the switch of the precision cannot be compiled
@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code for each vector: (N, D), (K, D) -> (N,) int64.

    The squared distance is

        |z - e|^2 = |z|^2 - 2 z.e + |e|^2

    and |z|^2 is the same for every code, so it is left out. Of codes at the same distance, the
    first is taken. Chunks of vectors bound the memory; no matrix of N x K is ever held.
    """
    on_cpu = vectors.device.type == "cpu"
    chunk = max(1, (DISTANCES_AT_ONCE_CPU if on_cpu else DISTANCES_AT_ONCE_GPU) // len(codebook))
    squared_norms = codebook.square().sum(dim=1)  # (K,)
    # One buffer for all chunks: a new one for each can fragment memory and pile up to N x K.
    buffer = vectors.new_empty(min(chunk, len(vectors)), len(codebook))
    indices = []
    with exact_float32_products():
        for part in vectors.split(chunk):
            distances = buffer[: len(part)]  # (chunk, K)
            torch.addmm(squared_norms, part, codebook.T, alpha=-2, out=distances)
            indices.append(distances.argmin(dim=1))  # (chunk,)
    return torch.cat(indices)


def straight_through(z_e: Tensor, z_q: Tensor) -> Tensor:
    """Forward z_q, backward to z_e: its value is z_q, its gradient is the identity on z_e."""
    return z_e + (z_q - z_e).detach()


class Quantizer(nn.Module):
    """What both quantizers share: the search, the start from data, and the lookup.

    A subclass owns `codebook` (K, D) and defines `codebook_loss` and `update`.
    """

    codebook: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, beta: float, data_start: bool):
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(
                f"a codebook needs at least one code of one dimension, "
                f"not num_embeddings={num_embeddings} of embedding_dim={embedding_dim}"
            )
        self.num_embeddings, self.embedding_dim, self.beta = num_embeddings, embedding_dim, beta
        # A Python bool, so that asking for it does not wait for the GPU at every step.
        self.waits_for_data = data_start

    def forward(self, z_e: Tensor) -> Quantized:
        """z_e (B, D, h, w), any float type; computed in float32, also under autocast."""
        if z_e.dim() != 4 or z_e.shape[1] != self.embedding_dim:
            raise ValueError(
                f"the quantizer takes (B, D, h, w) with D = embedding_dim = {self.embedding_dim}, "
                f"not {tuple(z_e.shape)}"
            )
        B, D, h, w = z_e.shape
        # Half-precision distances choose wrong codes, so autocast is off in here.
        with torch.autocast(device_type=z_e.device.type, enabled=False):
            z_e = z_e.float()
            vectors = z_e.permute(0, 2, 3, 1).reshape(-1, D)  # (N, D), N = B h w
            if self.training and self.waits_for_data:
                self.start_from(vectors.detach())
            indices = nearest_codes(vectors, self.codebook)  # (N,)
            codes = F.embedding(indices, self.codebook)  # (N, D)

            # Taken before the straight-through step, which would cut one of the two gradients.
            commitment = F.mse_loss(vectors, codes.detach())
            loss = self.codebook_loss(vectors, codes) + self.beta * commitment
            if self.training:
                self.update(vectors.detach(), indices)

            z_q = codes.view(B, h, w, D).permute(0, 3, 1, 2)  # (B, D, h, w)
            return Quantized(straight_through(z_e, z_q), indices.view(B, h, w), loss)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of a grid: indices (B, h, w) int64 -> z_q (B, D, h, w).

        Raises ValueError for indices outside of 0 to K - 1.
        """
        low, high = indices.min().item(), indices.max().item()
        if low < 0 or high >= self.num_embeddings:
            raise ValueError(
                f"indices from {low} to {high} were given, but the codebook has "
                f"{self.num_embeddings} codes: give 0 to {self.num_embeddings - 1}"
            )
        return F.embedding(indices, self.codebook).permute(0, 3, 1, 2)

    @torch.no_grad()
    def start_from(self, vectors: Tensor) -> None:
        """Take the codes from the first batch's vectors (N, D).

        With codes of random noise, one code is nearest to all that an untrained encoder puts out,
        it alone learns, and the codebook has collapsed before it began.
        """
        N, K = len(vectors), self.num_embeddings
        if N >= K:
            chosen = torch.randperm(N, device=vectors.device)[:K]
            codes = vectors[chosen]
        else:
            warnings.warn(
                f"{K} codes start from {N} vectors, the first batch: drawn with replacement, "
                "with a little noise to tell copies apart",
                stacklevel=2,
            )
            chosen = torch.randint(N, (K,), device=vectors.device)
            noise = 0.01 * vectors.std(dim=0, unbiased=False)  # 1% of each dimension's deviation
            codes = vectors[chosen] + noise * torch.randn_like(vectors[chosen])
        self.codebook.copy_(codes)
        self.waits_for_data = False

    def codebook_loss(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """The term of the loss that moves the codes."""
        raise NotImplementedError

    def update(self, vectors: Tensor, indices: Tensor) -> None:
        """What moves the codes without a gradient, once a training step."""
        raise NotImplementedError

    def get_extra_state(self) -> dict:
        """`waits_for_data`, for the state dict: or a resumed run would start its codebook again."""
        return {"waits_for_data": self.waits_for_data}

    def set_extra_state(self, state: dict) -> None:
        """Take back what `get_extra_state` gave."""
        self.waits_for_data = state["waits_for_data"]


class VectorQuantizer(Quantizer):
    """Codes moved by the gradient of the codebook term: the paper's equation 3.

    They move at the optimizer's learning rate. An encoder that moves faster leaves codes behind,
    and one that nobody chooses gets no gradient: on drawn shapes 10 of 512 stay in use
    (docs/codebook.md). `EMAVectorQuantizer` keeps up, and restarts the dead.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, their dimensions.
        beta: weight of the commitment; the paper saw no difference from 0.1 to 2.0.
        data_start: take the codes from the first training batch.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, beta: float = 0.25, data_start: bool = True
    ):
        super().__init__(num_embeddings, embedding_dim, beta, data_start)
        codes = torch.empty(num_embeddings, embedding_dim)  # small at first, as in their example
        self.codebook = nn.Parameter(codes.uniform_(-1 / num_embeddings, 1 / num_embeddings))

    def codebook_loss(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """|sg[z_e] - e|^2, a mean over all elements: vectors and their codes (N, D) -> ()."""
        return F.mse_loss(codes, vectors.detach())

    def update(self, vectors: Tensor, indices: Tensor) -> None:
        """Nothing: the optimizer moves the codes."""


class EMAVectorQuantizer(Quantizer):
    """Codes that follow the mean of the vectors that chose them: the paper's appendix A.1.

    With n_i vectors choosing code i in a batch, and gamma the decay:

        N_i = gamma N_i + (1 - gamma) n_i                    counts     (eq. 6)
        m_i = gamma m_i + (1 - gamma) sum of those vectors   sums       (eq. 7)
        e_i = m_i / N_i                                      codes      (eq. 8)

    where N_i is smoothed before it divides, so that a code nobody chose stays finite (Laplace):

        (N_i + epsilon) / (S + K epsilon) * S,   S = sum of all N_i

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, their dimensions.
        beta: weight of the commitment, which is the whole loss here.
        decay: gamma; 0.99 averages over the last hundred batches.
        epsilon: of the smoothing.
        data_start: take the codes from the first training batch.
        restart_dead: put a code that is hardly chosen any more on a vector of the current batch.
    """

    DEAD_BELOW = 0.1  # of the average count: 230 steps after its last choice, at decay 0.99

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        beta: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        data_start: bool = True,
        restart_dead: bool = True,
    ):
        super().__init__(num_embeddings, embedding_dim, beta, data_start)
        self.decay, self.epsilon, self.restart_dead = decay, epsilon, restart_dead
        # Buffers, not parameters: no optimizer may move them.
        codes = torch.randn(num_embeddings, embedding_dim)  # as in the authors' example
        self.register_buffer("codebook", codes)
        # Counts start at one and sums at the codes, so that m / N is the code from the first step.
        # Counts from zero beside these sums would divide by nearly nothing, and codes fly away.
        self.register_buffer("ema_counts", torch.ones(num_embeddings))
        self.register_buffer("ema_sums", codes.clone())

    def start_from(self, vectors: Tensor) -> None:
        """Also set the averages: they hold one batch so far, with the weight (1 - gamma) of one.

        Such light averages let the codes keep up with an encoder that moves far in its first steps,
        and a code that nobody chooses then falls behind the others soon, and is restarted.
        """
        super().start_from(vectors)
        one_batch = (1 - self.decay) * len(vectors) / self.num_embeddings
        self.ema_counts.fill_(one_batch)
        self.ema_sums.copy_(self.codebook * one_batch)

    def codebook_loss(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """Zero: `update` moves the codes, no gradient does."""
        return vectors.new_zeros(())

    def batch_statistics(self, vectors: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Counts n_i (K,) and sums (K, D) of the vectors that chose each code.

        Processes that train together must add these two up before the averages take them (and
        share the vectors that `start_from` and `_restart_dead` draw), or their codebooks drift
        apart.
        """
        counts = torch.zeros_like(self.ema_counts)
        counts.index_add_(0, indices, torch.ones_like(indices, dtype=counts.dtype))
        sums = torch.zeros_like(self.ema_sums).index_add_(0, indices, vectors)
        return counts, sums

    @torch.no_grad()
    def update(self, vectors: Tensor, indices: Tensor) -> None:
        """Eq. 6 to 8, with the restart between: vectors (N, D), and the codes they chose (N,)."""
        counts, sums = self.batch_statistics(vectors, indices)
        self.ema_counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)  # N_i
        self.ema_sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)  # m_i
        if self.restart_dead:
            self._restart_dead(vectors)
        total = self.ema_counts.sum()  # S
        smoothed = (
            (self.ema_counts + self.epsilon) / (total + self.num_embeddings * self.epsilon) * total
        )  # a temporary: written back, the averages would drift
        self.codebook.copy_(self.ema_sums / smoothed[:, None])  # e_i

    def _restart_dead(self, vectors: Tensor) -> None:
        """Move dead codes onto random vectors of the batch: code, sum and count together.

        The count becomes the average one, as if the code had been chosen as often as the others.
        (Without count and sum, the old average would overwrite the new code in the same step.)
        A candidate is drawn for every code, dead or not: to ask how many are dead, a GPU would have
        to be waited for.
        """
        average = self.ema_counts.mean()
        chosen = torch.randint(len(vectors), (self.num_embeddings,), device=vectors.device)
        dead = self.ema_counts < self.DEAD_BELOW * average  # (K,)
        self.ema_counts.copy_(torch.where(dead, average, self.ema_counts))
        self.ema_sums.copy_(torch.where(dead[:, None], average * vectors[chosen], self.ema_sums))


def make_quantizer(
    kind: str,
    num_embeddings: int,
    embedding_dim: int,
    *,
    beta: float = 0.25,
    data_start: bool = True,
    restart_dead: bool = True,
) -> Quantizer:
    """The quantizer that a model names: "ema" or "gradient". Only the first restarts codes."""
    if kind == "ema":
        return EMAVectorQuantizer(
            num_embeddings,
            embedding_dim,
            beta=beta,
            data_start=data_start,
            restart_dead=restart_dead,
        )
    if kind == "gradient":
        return VectorQuantizer(num_embeddings, embedding_dim, beta=beta, data_start=data_start)
    raise InputError(f"quantizer must be 'ema' or 'gradient', not {kind!r}")
