"""Vector quantization: each continuous vector is replaced by the nearest of K learned codes.

van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, arXiv
1711.00937. An encoder gives a vector z_e at each position of a grid; the quantizer replaces it by

    z_q = e_k   with   k = argmin_j |z_e - e_j|^2                                  (eq. 1 and 2)

The argmin has no gradient, so the decoder's gradient is passed on to the encoder unchanged
(straight-through), and the loss pulls codes and vectors together (eq. 3, the last two terms, where
sg[.] stops the gradient):

    |sg[z_e] - e|^2          codebook: moves the codes to the vectors      (VectorQuantizer)
    beta |z_e - sg[e]|^2     commitment: moves the vectors to the codes    (both quantizers)

Without the commitment nothing would hold the encoder's vectors near their codes. They could grow,
and jump from code to code, faster than the codes follow. Both terms are means over all elements
(the paper's norms are sums over D), and so is the reconstruction term that they are added to.

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

from vqgan import distributed
from vqgan.gradient_estimators import GRADIENT_ESTIMATORS

# Distances held at once. 2^22 floats are 16 MiB, in reach of a CPU's cache; a GPU wants more work
# in a kernel, and has room for 64 MiB.
MAX_DISTANCES_CPU, MAX_DISTANCES_GPU = 2**22, 2**24


class Quantized(NamedTuple):
    """What a quantizer returns for z_e (B, D, h, w): the codes at each position, and the loss."""

    z_q: Tensor  # (B, D, h, w); by the straight-through step its gradient is that of z_e
    indices: Tensor  # (B, h, w) int64, 0 to K - 1
    loss: Tensor  # (), every term but the reconstruction


# A custom operator, because torch.compile cannot trace the switch of the precision.
@torch.library.custom_op("vqgan::nearest_indices", mutates_args=())
def nearest_indices(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest code for each vector: (N, D), (K, D) -> (N,) int64.

    The squared distance is

        |z - e|^2 = |z|^2 - 2 z.e + |e|^2

    and |z|^2 is the same for every code, so it is left out. Of codes at the same distance, the
    first is taken. Chunks of vectors bound the memory; no matrix of N x K is ever held.
    """
    on_cpu = vectors.device.type == "cpu"
    chunk = max(1, (MAX_DISTANCES_CPU if on_cpu else MAX_DISTANCES_GPU) // len(codebook))
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


# torch.compile and torch.export trace a model with tensors that have a shape but no values, where
# this stands in for the search. (`len` would fix the number of vectors, `shape` leaves it free.)
@nearest_indices.register_fake
def _(vectors: Tensor, codebook: Tensor) -> Tensor:
    return vectors.new_empty(vectors.shape[0], dtype=torch.int64)


def init_vectors(vectors: Tensor, num_embeddings: int) -> Tensor:
    """Choose K of the first batch's vectors as the first codebook: (N, D) -> (K, D).

    If the codes were random noise, one of them would be nearest to all outputs of an untrained
    encoder. It alone would learn, and the codebook would have collapsed before it began.
    """
    N, K = distributed.num_processes() * len(vectors), num_embeddings
    if N >= K:
        return distributed.rows(vectors, torch.randperm(N, device=vectors.device)[:K])
    message = f"the first batch has {N} vectors for {K} codes: some are copied, with a little noise"
    warnings.warn(message, stacklevel=2)
    chosen = distributed.rows(vectors, torch.randint(N, (K,), device=vectors.device))
    noise = 0.01 * chosen.std(dim=0, unbiased=False)  # 1% of each dimension's deviation
    return chosen + noise * torch.randn_like(chosen)


def check_range(ids: Tensor, lowest: int, highest: int, what: str) -> None:
    """Raise `ValueError` for ids outside of lowest to highest, if they are on the CPU.

    (While torch.compile or torch.export trace a model, ids have no values yet.)
    """
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = ids.min().item(), ids.max().item()
    if low < lowest or high > highest:
        raise ValueError(f"{what} must lie in {lowest} to {highest}, but reach {low} to {high}")


class Quantizer(nn.Module):
    """What an autoencoder and a prior know of any quantizer. A subclass has `forward` too.

        z_q, indices, loss = quantizer(z_e)        `Quantized`; z_e (B, D, h, w) of any float type

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the dimensions of a code.
    """

    num_rounds = 1  # indices for each position; only `ResidualVQ` has more

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(f"{num_embeddings=}, {embedding_dim=}: give 1 or more")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def as_vectors(self, z_e: Tensor) -> Tensor:
        """One row for each position: z_e (B, D, h, w) -> vectors (N, D) float32, N = B h w."""
        if z_e.dim() != 4 or z_e.shape[1] != self.embedding_dim:
            shape = tuple(z_e.shape)
            raise ValueError(f"z_e must be (B, {self.embedding_dim}, h, w), not {shape}")
        return z_e.float().permute(0, 2, 3, 1).reshape(-1, self.embedding_dim)

    def lookup(self, indices: Tensor) -> Tensor:
        """Look up a grid of codes: indices (B, h, w) int64, 0 to K - 1 -> z_q (B, D, h, w).

        Raises:
            ValueError: an index is outside 0 to K - 1.
        """
        raise NotImplementedError


class Codebook(Quantizer):
    """What quantizers with a table of codes share: the lookup, and whether codes are initialized.

    Args:
        beta: the weight of the commitment.
        data_init: whether the codes are initialized from the first training batch.
        cosine: whether vectors and codes are brought to unit length before they are compared (Yu
            et al. 2021, ViT-VQGAN, arXiv 2110.04627, section 3.2, with D of 8 to 32). The nearest
            code is then the one at the smallest angle, and no code is too long or too short to be
            chosen.
        gradient_estimator: "straight-through" or "rotation", see `gradient_estimators.py`.
    """

    codebook: Tensor  # (K, D)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        beta: float,
        data_init: bool,
        cosine: bool,
        gradient_estimator: str,
    ):
        super().__init__(num_embeddings, embedding_dim)
        if gradient_estimator not in GRADIENT_ESTIMATORS:
            names = ", ".join(GRADIENT_ESTIMATORS)
            raise ValueError(f"gradient_estimator must be one of {names}, not {gradient_estimator}")
        self.beta, self.cosine, self.gradient_estimator = beta, cosine, gradient_estimator
        # A Python bool, so that no step has to wait for the GPU to read it.
        self.initialized = not data_init

    def embeddings(self) -> Tensor:
        """The codes as vectors are compared with them, (K, D) float32."""
        codebook = self.codebook.float()  # the same tensor, unless the model is .half()
        return F.normalize(codebook, dim=1) if self.cosine else codebook

    def as_vectors(self, z_e: Tensor) -> Tensor:
        vectors = super().as_vectors(z_e)
        return F.normalize(vectors, dim=1) if self.cosine else vectors

    def lookup(self, indices: Tensor) -> Tensor:
        check_range(indices.cpu(), 0, self.num_embeddings - 1, "indices")
        codes = F.embedding(indices, self.embeddings())  # (B, h, w, D)
        return codes.to(self.codebook.dtype).permute(0, 3, 1, 2)

    @torch.no_grad()
    def init_from_batch(self, vectors: Tensor) -> None:
        """Initialize the codes from the first batch's vectors (N, D)."""
        self.codebook.copy_(init_vectors(vectors, self.num_embeddings))
        self.initialized = True

    def get_extra_state(self) -> Tensor:
        """Put `initialized` into the state dict, or a resumed run would initialize again.

        It is a tensor because other programs expect nothing else there, and on the CPU because
        reading it must not wait for the GPU.
        """
        return torch.tensor(self.initialized, device="cpu")

    def set_extra_state(self, state: Tensor | dict) -> None:
        """Restore `initialized`, which earlier versions saved in a dict."""
        self.initialized = bool(state["initialized"] if isinstance(state, dict) else state)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """A codebook that is loaded is initialized, even if its file lacks the entry that says so.

        Otherwise the first training batch would replace all codes. (torch gives each module a
        state dict of its own, so the caller's is not changed.)
        """
        if prefix + "codebook" in state_dict:
            state_dict.setdefault(prefix + "_extra_state", torch.tensor(True))
        super()._load_from_state_dict(state_dict, prefix, *args)


class VectorQuantizer(Codebook):
    """A codebook that the gradient of the codebook term moves (eq. 3 of the paper).

    The codes move at the optimizer's learning rate. An encoder that moves faster leaves codes
    behind, and a code that no vector chooses gets no gradient. On drawn shapes 10 of 512 stay in
    use (docs/codebook.md). `EMAVectorQuantizer` keeps up, and restarts dead codes.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the dimensions of a code.
        beta: the weight of the commitment; the paper saw no difference from 0.1 to 2.0.
        data_init, cosine, gradient_estimator: see `Codebook`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        beta: float = 0.25,
        data_init: bool = True,
        cosine: bool = False,
        gradient_estimator: str = "straight-through",
    ):
        super().__init__(num_embeddings, embedding_dim, beta, data_init, cosine, gradient_estimator)
        embeddings = torch.empty(num_embeddings, embedding_dim)
        # The range of zalandoresearch/pytorch-vq-vae; `init_from_batch` soon replaces these.
        self.codebook = nn.Parameter(embeddings.uniform_(-1 / num_embeddings, 1 / num_embeddings))

    def forward(self, z_e: Tensor) -> Quantized:
        """Quantize z_e (B, D, h, w) of any float type, in float32; z_q has the codebook's type."""
        # Distances in half precision choose wrong codes, so autocast is switched off here.
        with torch.autocast(device_type=z_e.device.type, enabled=False):
            vectors = self.as_vectors(z_e)  # (N, D), N = B h w
            B, D, h, w = z_e.shape
            if self.training and not self.initialized:
                self.init_from_batch(vectors)
            codebook = self.embeddings()  # (K, D)
            indices = nearest_indices(vectors, codebook)  # (N,)                        eq. 1, 2
            quantized = F.embedding(indices, codebook)  # (N, D)

            # Eq. 3, of the codes themselves. What the straight-through step returns has the same
            # value but no gradient for the codes, which would then never move.
            codebook_loss = F.mse_loss(quantized, vectors.detach())
            commitment = F.mse_loss(vectors, quantized.detach())
            loss = codebook_loss + self.beta * commitment

            estimator = GRADIENT_ESTIMATORS[self.gradient_estimator]
            z_q = estimator(vectors, quantized).view(B, h, w, D).permute(0, 3, 1, 2)
            return Quantized(z_q.to(self.codebook.dtype), indices.view(B, h, w), loss)


class EMAVectorQuantizer(Codebook):
    """A codebook whose codes follow the mean of the vectors that chose them (appendix A.1).

    With gamma the decay, and n_i the number of vectors that choose code i in a batch:

        N_i = gamma N_i + (1 - gamma) n_i                    counts     (eq. 6)
        m_i = gamma m_i + (1 - gamma) sum of those vectors   sums       (eq. 7)
        e_i = m_i / N_i                                      codes      (eq. 8)

    N_i is smoothed before it divides (Laplace), so that a code that no vector chose stays finite:

        (N_i + epsilon) / (S + K epsilon) * S,   S = sum of all N_i

    Every forward pass in training mode updates the averages. Gradient checkpointing, which runs a
    pass twice, is therefore for the encoder and the decoder, and not for the quantizer.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the dimensions of a code.
        beta: the weight of the commitment, which is the whole loss here.
        decay: gamma; 0.99 averages over the last hundred batches.
        epsilon: the constant of the smoothing.
        restart_dead_codes: whether a code that is hardly chosen any more is moved onto a vector of
            the current batch.
        data_init, cosine, gradient_estimator: see `Codebook`.
    """

    ema_counts: Tensor
    ema_sums: Tensor
    # A fraction of the average count, low because a rare code is not dead. At a decay of 0.99, an
    # average code that is never chosen again falls below it after 230 steps: 0.99^230 = 0.1.
    dead_code_threshold = 0.1

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        beta: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        data_init: bool = True,
        restart_dead_codes: bool = True,
        cosine: bool = False,
        gradient_estimator: str = "straight-through",
    ):
        super().__init__(num_embeddings, embedding_dim, beta, data_init, cosine, gradient_estimator)
        self.decay, self.epsilon, self.restart_dead_codes = decay, epsilon, restart_dead_codes
        # These are buffers and not parameters, because no optimizer may move them.
        embeddings = torch.randn(num_embeddings, embedding_dim)  # as in the paper's authors' code
        self.register_buffer("codebook", embeddings)
        # Counts start at one and sums at the codes, so that m / N is the code from the first step.
        # With counts that start at zero, these sums would be divided by almost nothing.
        self.register_buffer("ema_counts", torch.ones(num_embeddings))
        self.register_buffer("ema_sums", embeddings.clone())

    def forward(self, z_e: Tensor) -> Quantized:
        """Quantize z_e (B, D, h, w) of any float type, in float32; z_q has the codebook's type."""
        # Distances in half precision choose wrong codes, so autocast is switched off here.
        with torch.autocast(device_type=z_e.device.type, enabled=False):
            vectors = self.as_vectors(z_e)  # (N, D), N = B h w
            B, D, h, w = z_e.shape
            if self.training and not self.initialized:
                self.init_from_batch(vectors)
            codebook = self.embeddings()  # (K, D)
            indices = nearest_indices(vectors, codebook)  # (N,)                        eq. 1, 2
            quantized = F.embedding(indices, codebook)  # (N, D)

            # The commitment alone, because averages move the codes and no gradient does.
            loss = self.beta * F.mse_loss(vectors, quantized)

            if self.training:
                with torch.no_grad():
                    ones = torch.ones_like(indices, dtype=torch.float32)
                    counts = torch.zeros_like(self.ema_counts).index_add_(0, indices, ones)  # n_i
                    sums = torch.zeros_like(self.ema_sums).index_add_(0, indices, vectors)
                    distributed.total(counts)
                    distributed.total(sums)

                    gamma = self.decay
                    self.ema_counts.mul_(gamma).add_(counts, alpha=1 - gamma)  # N_i, eq. 6
                    self.ema_sums.mul_(gamma).add_(sums, alpha=1 - gamma)  # m_i, eq. 7
                    if self.restart_dead_codes:
                        self._restart_dead_codes(vectors)
                    self.codebook.copy_(self.ema_sums / self._smoothed_counts()[:, None])  # eq. 8

            estimator = GRADIENT_ESTIMATORS[self.gradient_estimator]
            z_q = estimator(vectors, quantized).view(B, h, w, D).permute(0, 3, 1, 2)
            return Quantized(z_q.to(self.codebook.dtype), indices.view(B, h, w), loss)

    def _smoothed_counts(self) -> Tensor:
        """N_i of eq. 8, (K,). It is a temporary: written back, the counts would drift."""
        total = self.ema_counts.sum()  # S
        fraction = (self.ema_counts + self.epsilon) / (total + self.num_embeddings * self.epsilon)
        return fraction * total

    def _restart_dead_codes(self, vectors: Tensor) -> None:
        """Move dead codes onto random vectors of the batch, together with their sums and counts.

        The count becomes the average count, as if the code had been chosen as often as the others.
        (Without count and sum, the old average would overwrite the new code in the same step.)
        A candidate is drawn for every code, dead or not, because counting the dead ones would make
        the step wait for the GPU.
        """
        average = self.ema_counts.mean()
        N = distributed.num_processes() * len(vectors)
        chosen = torch.randint(N, (self.num_embeddings,), device=vectors.device)
        candidates = distributed.rows(vectors, chosen)  # (K, D)
        dead = self.ema_counts < self.dead_code_threshold * average  # (K,)
        self.ema_counts.copy_(torch.where(dead, average, self.ema_counts))
        self.ema_sums.copy_(torch.where(dead[:, None], average * candidates, self.ema_sums))

    @torch.no_grad()
    def init_from_batch(self, vectors: Tensor) -> None:
        """Initialize codes and averages from the first batch's vectors (N, D).

        Counts and sums are set as if each code had been chosen N / K times in one batch, and never
        before: N_i = (1 - gamma) N / K by eq. 6, a hundredth of what it grows to. With so little
        behind them the codes keep up with an encoder that moves far in its first steps, and after
        about ten steps a code that no vector chooses falls below the threshold and is restarted.
        """
        super().init_from_batch(vectors)
        N = distributed.num_processes() * len(vectors)
        one_batch = (1 - self.decay) * N / self.num_embeddings
        self.ema_counts.fill_(one_batch)
        self.ema_sums.copy_(self.codebook * one_batch)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """A codebook that comes without averages gets those of a new one, or a step would undo it.

        It may come from a `VectorQuantizer`, with strict=False.
        """
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "codebook" in state_dict and prefix + "ema_sums" not in state_dict:
            self.ema_counts.fill_(1.0)
            self.ema_sums.copy_(self.codebook)


# --- precision of the search ---------------------------------------------------------------------


@contextmanager
def exact_float32_matmul() -> Iterator[None]:
    """Switch off TF32 and the like inside. A script may allow them, but they choose wrong codes."""
    backends: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"  # float32 as IEEE 754 defines it, unrounded
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
