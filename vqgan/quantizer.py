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

Data flow: encoder -> z_e (B, D, h, w) -> quantizer -> z_q (B, D, h, w), indices (B, h, w).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Distances held at once. 2^22 floats are 16 MiB, in reach of a CPU's cache; a GPU wants more work
# in a kernel, and has room for 64 MiB.
DISTANCES_AT_ONCE_CPU, DISTANCES_AT_ONCE_GPU = 2**22, 2**24


class Quantized(NamedTuple):
    """What a quantizer makes of vectors z_e (B, D, h, w): codes in their places, and their loss."""

    z_q: Tensor  # (B, D, h, w), straight-through: its gradient is that of z_e
    indices: Tensor  # (B, h, w) int64, 0 to K - 1
    loss: Tensor  # (), every term but the reconstruction


# An operator of its own, since torch.compile cannot look into the switch of the precision.
@torch.library.custom_op("vqgan::nearest_codes", mutates_args=())
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
    with exact_float32_matmul():
        for part in vectors.split(chunk):
            distances = buffer[: len(part)]  # (chunk, K)
            torch.addmm(squared_norms, part, codebook.T, alpha=-2, out=distances)
            indices.append(distances.argmin(dim=1))  # (chunk,)
    return torch.cat(indices)


@nearest_codes.register_fake
def _(vectors: Tensor, codebook: Tensor) -> Tensor:
    return vectors.new_empty(len(vectors), dtype=torch.int64)  # what torch.compile has to know


def straight_through(z_e: Tensor, z_q: Tensor) -> Tensor:
    """Forward z_q, backward to z_e: its value is z_q, its gradient is the identity on z_e."""
    return z_e + (z_q - z_e).detach()


def as_vectors(z_e: Tensor, embedding_dim: int) -> Tensor:
    """The vectors at every position: z_e (B, D, h, w) -> (N, D), N = B h w."""
    if z_e.dim() != 4 or z_e.shape[1] != embedding_dim:
        raise ValueError(f"z_e must be (B, {embedding_dim}, h, w), not {tuple(z_e.shape)}")
    return z_e.permute(0, 2, 3, 1).reshape(-1, embedding_dim)


def vectors_to_start_from(vectors: Tensor, num_embeddings: int) -> Tensor:
    """K of the first batch's vectors, to start a codebook from: (N, D) -> (K, D).

    With codes of random noise, one code is nearest to all that an untrained encoder puts out, it
    alone learns, and the codebook has collapsed before it began.
    """
    N, K = len(vectors), num_embeddings
    if N >= K:
        return vectors[torch.randperm(N, device=vectors.device)[:K]]
    message = f"{K} codes start from {N} vectors, the first batch: with copies, and a little noise"
    warnings.warn(message, stacklevel=2)
    chosen = vectors[torch.randint(N, (K,), device=vectors.device)]
    noise = 0.01 * vectors.std(dim=0, unbiased=False)  # 1% of each dimension's deviation
    return chosen + noise * torch.randn_like(chosen)


def lookup(indices: Tensor, codebook: Tensor) -> Tensor:
    """The codes of a grid: indices (B, h, w) int64, 0 to K - 1, and (K, D) -> z_q (B, D, h, w)."""
    low, high, K = indices.min().item(), indices.max().item(), len(codebook)
    if low < 0 or high >= K:
        raise ValueError(f"indices must lie in 0 to {K - 1}, but reach from {low} to {high}")
    return F.embedding(indices, codebook).permute(0, 3, 1, 2)


class VectorQuantizer(nn.Module):
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
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.beta = num_embeddings, embedding_dim, beta
        # A Python bool, so that asking for it does not wait for the GPU at every step.
        self.waits_for_data = data_start
        codes = torch.empty(num_embeddings, embedding_dim)  # small at first, as in their example
        self.codebook = nn.Parameter(codes.uniform_(-1 / num_embeddings, 1 / num_embeddings))

    def forward(self, z_e: Tensor) -> Quantized:
        """z_e (B, D, h, w), any float type; computed in float32, also under autocast."""
        # Half-precision distances choose wrong codes, so autocast is off in here.
        with torch.autocast(device_type=z_e.device.type, enabled=False):
            z_e = z_e.float()
            vectors = as_vectors(z_e, self.embedding_dim)  # (N, D), N = B h w
            B, D, h, w = z_e.shape
            if self.training and self.waits_for_data:
                self.start_from(vectors)
            indices = nearest_codes(vectors, self.codebook)  # (N,)                   eq. 1, 2
            codes = F.embedding(indices, self.codebook)  # (N, D)

            # Eq. 3, taken before the straight-through step, which would cut one of the gradients.
            codebook_loss = F.mse_loss(codes, vectors.detach())
            commitment = F.mse_loss(vectors, codes.detach())
            loss = codebook_loss + self.beta * commitment

            z_q = codes.view(B, h, w, D).permute(0, 3, 1, 2)  # (B, D, h, w)
            return Quantized(straight_through(z_e, z_q), indices.view(B, h, w), loss)

    @torch.no_grad()
    def start_from(self, vectors: Tensor) -> None:
        """Take the codes from the first batch's vectors (N, D)."""
        self.codebook.copy_(vectors_to_start_from(vectors, self.num_embeddings))
        self.waits_for_data = False

    def lookup(self, indices: Tensor) -> Tensor:
        """indices (B, h, w) int64 -> z_q (B, D, h, w); `ValueError` outside of 0 to K - 1."""
        return lookup(indices, self.codebook)

    def get_extra_state(self) -> dict:
        """`waits_for_data`, for the state dict: or a resumed run would start its codebook again."""
        return {"waits_for_data": self.waits_for_data}

    def set_extra_state(self, state: dict) -> None:
        """Take back what `get_extra_state` gave."""
        self.waits_for_data = state["waits_for_data"]


class EMAVectorQuantizer(nn.Module):
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

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
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
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.beta = num_embeddings, embedding_dim, beta
        self.decay, self.epsilon, self.restart_dead = decay, epsilon, restart_dead
        self.waits_for_data = data_start  # a Python bool: no step waits for the GPU to read it
        # Buffers, not parameters: no optimizer may move them.
        codes = torch.randn(num_embeddings, embedding_dim)  # as in the authors' example
        self.register_buffer("codebook", codes)
        # Counts start at one and sums at the codes, so that m / N is the code from the first step.
        # Counts from zero beside these sums would divide by nearly nothing, and codes fly away.
        self.register_buffer("ema_counts", torch.ones(num_embeddings))
        self.register_buffer("ema_sums", codes.clone())

    def forward(self, z_e: Tensor) -> Quantized:
        """z_e (B, D, h, w), any float type; computed in float32, also under autocast."""
        # Half-precision distances choose wrong codes, so autocast is off in here.
        with torch.autocast(device_type=z_e.device.type, enabled=False):
            z_e = z_e.float()
            vectors = as_vectors(z_e, self.embedding_dim)  # (N, D), N = B h w
            B, D, h, w = z_e.shape
            if self.training and self.waits_for_data:
                self.start_from(vectors)
            indices = nearest_codes(vectors, self.codebook)  # (N,)                   eq. 1, 2
            codes = F.embedding(indices, self.codebook)  # (N, D)

            # The commitment alone: averages move the codes, no gradient does.
            loss = self.beta * F.mse_loss(vectors, codes)

            if self.training:
                with torch.no_grad():
                    # Processes that train together must add up these two, and share the vectors
                    # that codes start from, or their codebooks drift apart.
                    ones = torch.ones_like(indices, dtype=torch.float32)
                    counts = torch.zeros_like(self.ema_counts).index_add_(0, indices, ones)  # n_i
                    sums = torch.zeros_like(self.ema_sums).index_add_(0, indices, vectors)

                    gamma = self.decay
                    self.ema_counts.mul_(gamma).add_(counts, alpha=1 - gamma)  # N_i, eq. 6
                    self.ema_sums.mul_(gamma).add_(sums, alpha=1 - gamma)  # m_i, eq. 7
                    if self.restart_dead:
                        self._restart_dead(vectors)
                    self.codebook.copy_(self.ema_sums / self._smoothed_counts()[:, None])  # eq. 8

            z_q = codes.view(B, h, w, D).permute(0, 3, 1, 2)  # (B, D, h, w)
            return Quantized(straight_through(z_e, z_q), indices.view(B, h, w), loss)

    def _smoothed_counts(self) -> Tensor:
        """N_i as it divides in eq. 8, (K,): a temporary, since written back it would drift."""
        total = self.ema_counts.sum()  # S
        share = (self.ema_counts + self.epsilon) / (total + self.num_embeddings * self.epsilon)
        return share * total

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

    @torch.no_grad()
    def start_from(self, vectors: Tensor) -> None:
        """Take codes and averages from the first batch's vectors (N, D).

        The averages hold one batch so far, with the weight (1 - gamma) that a batch has. Such light
        averages let the codes keep up with an encoder that moves far in its first steps, and a code
        that nobody chooses then falls behind the others soon, and is restarted.
        """
        self.codebook.copy_(vectors_to_start_from(vectors, self.num_embeddings))
        one_batch = (1 - self.decay) * len(vectors) / self.num_embeddings
        self.ema_counts.fill_(one_batch)
        self.ema_sums.copy_(self.codebook * one_batch)
        self.waits_for_data = False

    def lookup(self, indices: Tensor) -> Tensor:
        """indices (B, h, w) int64 -> z_q (B, D, h, w); `ValueError` outside of 0 to K - 1."""
        return lookup(indices, self.codebook)

    def get_extra_state(self) -> dict:
        """`waits_for_data`, for the state dict: or a resumed run would start its codebook again."""
        return {"waits_for_data": self.waits_for_data}

    def set_extra_state(self, state: dict) -> None:
        """Take back what `get_extra_state` gave."""
        self.waits_for_data = state["waits_for_data"]


Quantizer = VectorQuantizer | EMAVectorQuantizer


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
    if num_embeddings < 1 or embedding_dim < 1:
        raise ValueError("num_embeddings and embedding_dim must be at least 1")
    shared: dict[str, Any] = {"beta": beta, "data_start": data_start}
    if kind == "ema":
        shared["restart_dead"] = restart_dead
        return EMAVectorQuantizer(num_embeddings, embedding_dim, **shared)
    if kind == "gradient":
        return VectorQuantizer(num_embeddings, embedding_dim, **shared)
    raise ValueError(f"quantizer must be 'ema' or 'gradient', not {kind!r}")


# --- precision of the search ---------------------------------------------------------------------


@contextmanager
def exact_float32_matmul() -> Iterator[None]:
    """Switch off TF32 and the like, which a script may have allowed: they choose wrong codes."""
    backends: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
