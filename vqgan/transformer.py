"""Stage two: a transformer writes a grid of codes, one after the other, under a condition.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2), over the codes
of Esser, Rombach, Ommer 2021, arXiv 2012.09841, section 3.2, eq. 9 and 10:

    p(s | c) = prod_i p(s_i | s_<i, c)          L = -mean_i log p(s_i | s_<i, c)

s are the codes of an image in raster order (rows from the top, each from the left), and c is what
the image depends on: a few tokens before them, with a table of their own (`conditions.py`). So the
network writes codes and nothing else: it has K outputs, and no token of a condition is among them.

Way of the data, C tokens of condition and N codes, of which the last is only predicted:

    condition (B, C), indices (B, N) -> x (B, C + N - 1, n_embd) -> blocks -> the same
    positions C - 1 to C + N - 2 -> head -> logits (B, N, K)

    position  0 ... C-1 | C     C+1   ...  C+N-2
    reads     condition | s_1   s_2   ...  s_N-1
    predicts  ...   s_1 | s_2   s_3   ...  s_N
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan.errors import InputError


class KeyValueCache:
    """Keys and values of one layer at the positions read so far; room for all is taken at once."""

    def __init__(self, batch_size: int, n_head: int, length: int, head_size: int, like: Tensor):
        self.keys = like.new_empty(batch_size, n_head, length, head_size)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # positions that are filled

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in k, v (B, n_head, T, head_size) of new positions; returns those of all so far."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + mask) v in H heads of d = n_embd / H: none sees a later position.

    Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762, section 3.2. (H, the number
    of heads, is `n_head`, and not the height of an image as elsewhere.)
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """x (B, T, n_embd) -> the same; with a cache, x are the T positions after those in it."""
        B, T, n_embd = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
        if cache is not None:
            k, v = cache.append(k, v)
        # With a cache, either all positions come at once, or a single one that may see all before.
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=T > 1
        )  # (B, H, T, d)
        return self.proj(y.transpose(1, 2).reshape(B, T, n_embd))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the norms stand before, as in GPT-2."""

    def __init__(self, n_embd: int, n_head: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(n_embd, eps=1e-5)
        self.attention = CausalSelfAttention(n_embd, n_head, dropout)
        self.norm2 = nn.LayerNorm(n_embd, eps=1e-5)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd),  # four times as wide inside, as in every GPT
            nn.GELU(),  # the exact one, x Phi(x), not the approximation by tanh
            nn.Linear(4 * n_embd, n_embd),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A transformer over grids of codes.

    Args:
        num_embeddings: K, codes in the tokenizer's codebook.
        grid_size: (h, w) of the grids.
        condition_vocabulary: how many tokens a condition may consist of, 0 to this - 1.
        condition_length: C, tokens of a condition; at least 1, since the first code is predicted
            from the last of them.
        n_layer, n_head, n_embd: blocks, attention heads of each, width.
        dropout: share of activations that are dropped in training.

    The table of conditions has one row more than its vocabulary: token `nothing` (the field's null
    token) stands for a condition that is not told, which guidance needs (see `sample`).

    Raises:
        InputError: a size below 1, or heads that do not divide the width.
    """

    def __init__(
        self,
        num_embeddings: int,
        grid_size: tuple[int, int],
        condition_vocabulary: int,
        condition_length: int,
        n_layer: int = 6,
        n_head: int = 8,
        n_embd: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        sizes = {
            "num_embeddings": num_embeddings,
            "height of the grid": grid_size[0],
            "width of the grid": grid_size[1],
            "condition_vocabulary": condition_vocabulary,
            "condition_length": condition_length,
            "n_layer": n_layer,
            "n_head": n_head,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, not {size}")
        if n_embd < 1 or n_embd % n_head:
            raise InputError(
                f"a width of {n_embd} cannot be shared by {n_head} heads: give another"
            )
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must lie in [0, 1), not {dropout}")
        self.num_embeddings, self.grid_size = num_embeddings, tuple(grid_size)
        self.condition_vocabulary, self.condition_length = condition_vocabulary, condition_length
        self.n_head = n_head
        self.num_codes = grid_size[0] * grid_size[1]  # N of a whole grid
        self.nothing = condition_vocabulary  # the token of a condition that is not told

        self.condition_table = nn.Embedding(condition_vocabulary + 1, n_embd)
        self.code_table = nn.Embedding(num_embeddings, n_embd)
        length = condition_length + self.num_codes - 1  # positions that are read: "block size"
        self.position_table = nn.Parameter(torch.empty(length, n_embd))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, eps=1e-5)
        self.head = nn.Linear(n_embd, num_embeddings, bias=False)
        self._initialise(n_layer)

    def _initialise(self, n_layer: int) -> None:
        """As GPT-2: small normal weights (0.02), no biases, and a sum of blocks of variance one.

        Each of the 2 n_layer branches adds its own variance to x, so each is shrunk by
        1 / sqrt(2 n_layer) (Radford et al. 2019, section 2.3).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # the others are the norms' scales, which stay at one
                is_last_of_a_branch = name.endswith(("proj.weight", "mlp.2.weight"))
                shrink = 1 / math.sqrt(2 * n_layer) if is_last_of_a_branch else 1.0
                nn.init.normal_(parameter, std=0.02 * shrink)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """For AdamW: decay pulls matrices that multiply to zero, and leaves tables, norms, biases.

        A row of a table moves only when its token occurs; decay would pull rare ones away.
        """
        matrices = [layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)]
        chosen = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in self.parameters() if id(parameter) not in chosen]
        return [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    # --- training -----------------------------------------------------------------------------

    def forward(self, condition: Tensor, indices: Tensor) -> Tensor:
        """Logits of every code, given the condition and the codes before it.

        Args:
            condition: (B, C) int64, 0 to condition_vocabulary - 1, or `nothing`.
            indices: (B, N) int64, 0 to K - 1, in raster order, 1 <= N <= h w. The last is not read.

        Returns:
            logits (B, N, K); those of code i depend on the condition and on codes 0 to i - 1.

        Raises:
            ValueError: other shapes, or ids out of range. (Ranges are looked at on the CPU only: a
                GPU would have to be waited for at every step. It stops by itself, less clearly.)
        """
        return self.head(self._read(condition, indices))

    def _read(self, condition: Tensor, indices: Tensor) -> Tensor:
        """What the head predicts each code from: (B, N, n_embd)."""
        self._check_condition(condition)
        self._check_indices(condition, indices)
        x = torch.cat([self.condition_table(condition), self.code_table(indices[:, :-1])], dim=1)
        x = self.dropout(x + self.position_table[: x.shape[1]])  # (B, C + N - 1, n_embd)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, self.condition_length - 1 :])

    def loss(self, condition: Tensor, indices: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats a code, (); arguments as `forward`'s."""
        logits = self(condition, indices).float()  # (B, N, K)
        return F.cross_entropy(logits.flatten(0, 1), indices.flatten())

    def _check_condition(self, condition: Tensor) -> None:
        """Raise ValueError for another shape than (B, C), or tokens out of range."""
        if condition.dim() != 2 or condition.shape[1] != self.condition_length:
            raise ValueError(
                f"a condition of shape (B, {self.condition_length}) was expected, "
                f"not {tuple(condition.shape)}"
            )
        _check_range(condition, 0, self.nothing, "tokens of a condition")

    def _check_indices(self, condition: Tensor, indices: Tensor) -> None:
        """Raise ValueError for another shape than (B, N), 1 <= N <= h w, or codes out of range."""
        if indices.dim() != 2 or len(indices) != len(condition):
            raise ValueError(
                f"indices of shape ({len(condition)}, N) were expected, not {tuple(indices.shape)}"
            )
        if not 1 <= indices.shape[1] <= self.num_codes:
            h, w = self.grid_size
            raise ValueError(
                f"{indices.shape[1]} codes were given, but the transformer's block holds 1 to "
                f"{self.num_codes} ({h}x{w}): cut them, or sample_large writes larger grids"
            )
        _check_range(indices, 0, self.num_embeddings - 1, "indices")

    # --- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        known: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Write grids of codes, in raster order. The model's mode is left as it was.

        Every position is read once: its keys and values are kept, so a code costs one position's
        work and not that of all before it.

        Args:
            condition: (B, C) int64.
            temperature: logits are divided by it: below 1 likely codes get likelier, and 0 always
                takes the likeliest (greedy: grey and repetitive).
            top_k: draw from the k likeliest codes only, 1 to K; None: from all.
            top_p: draw from the fewest likeliest codes whose probabilities sum to p, in (0, 1];
                None: from all. (Holtzman et al. 2020, arXiv 1904.09751, section 3.1.)
            guidance: g of classifier-free guidance (Ho, Salimans 2022, arXiv 2207.12598, eq. 6 with
                g = 1 + w): logits = l(nothing) + g (l(condition) - l(nothing)). 1 is none, 0 leaves
                the condition out, more exaggerates it. Needs a model that was trained with some of
                its conditions dropped, and twice the work.
            known: (B, h, w) int64, codes that are kept, and -1 where one is to be written. Codes
                are written in raster order, each seeing those above it and to its left, known or
                not: a known top half is continued, but what is known further down is kept without
                having been foreseen.
            generator: what is drawn from, on any device; None: one of its own, seeded by the
                operating system. The global random state is not touched.
            progress: called after every position, with how many codes were written (B).

        Returns:
            indices (B, h, w) int64, 0 to K - 1.

        Raises:
            ValueError: other shapes, or ids out of range.
            InputError: a temperature, top_k, top_p or guidance out of range.
        """
        self._check_condition(condition)
        check_sampling(self.num_embeddings, temperature, top_k, top_p, guidance)
        B, (h, w) = len(condition), self.grid_size
        if known is not None:
            if known.shape != (B, h, w):
                raise ValueError(
                    f"known of shape {(B, h, w)} was expected, not {tuple(known.shape)}"
                )
            _check_range(known.cpu(), -1, self.num_embeddings - 1, "known codes")
            known = known.to(condition.device).flatten(1)  # (B, N)
        uniform = _uniform(self.num_codes, B, generator).to(condition.device)
        caches = self._new_caches(2 * B if guidance != 1 else B)
        was_training = self.training
        self.eval()
        try:
            tokens = self._with_unconditional(condition) if guidance != 1 else condition
            x = self.condition_table(tokens)  # (B or 2 B, C, n_embd)
            codes = []
            for i in range(self.num_codes):
                logits = self._next_logits(x, caches)  # (B or 2 B, K)
                logits = _guide(logits, guidance) if guidance != 1 else logits
                code = draw(logits, uniform[i], temperature, top_k, top_p)  # (B,)
                if known is not None:
                    code = torch.where(known[:, i] < 0, code, known[:, i])
                codes.append(code)
                x = self.code_table(code)[:, None]  # (B, 1, n_embd)
                x = torch.cat([x, x]) if guidance != 1 else x
                if progress is not None:
                    progress(B)
        finally:
            self.train(was_training)
        return torch.stack(codes, dim=1).view(B, h, w)

    @torch.no_grad()
    def sample_large(
        self,
        condition: Tensor,
        height: int,
        width: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Write grids larger than those of the training: (B, height, width).

        Each code is predicted in a window of h x w codes around it, as in the paper's figure 3,
        with the window's own positions; at the borders the window stops and the code moves in it.
        A code knows nothing outside of its window, and every window is taken for a whole image. So
        this works where images look alike everywhere (textures, landscapes); centred objects come
        out as a crowd of pieces. A condition that is an image would belong to one window only.

        No cache: a window that moves gives every code in it another position.

        Args:
            height, width: of the grid in codes, at least h and w.
            the others: as `sample`'s.
        """
        self._check_condition(condition)
        check_sampling(self.num_embeddings, temperature, top_k, top_p, guidance)
        (h, w), B = self.grid_size, len(condition)
        if height < h or width < w:
            raise InputError(
                f"a grid of {height}x{width} codes was asked for, but the window has {h}x{w}: "
                "give at least as many"
            )
        uniform = _uniform(height * width, B, generator).to(condition.device)
        tokens = self._with_unconditional(condition) if guidance != 1 else condition
        codes = torch.zeros(B, height, width, dtype=torch.int64, device=condition.device)
        was_training = self.training
        self.eval()
        try:
            for row in range(height):
                for column in range(width):
                    top = min(max(row - h // 2, 0), height - h)
                    left = min(max(column - w // 2, 0), width - w)
                    window = codes[:, top : top + h, left : left + w].flatten(1)  # (B, h w)
                    last = (row - top) * w + column - left
                    seen = window[:, : last + 1]  # the last is the code itself, which is not read
                    seen = torch.cat([seen, seen]) if guidance != 1 else seen
                    logits = self.head(self._read(tokens, seen)[:, -1])  # (B or 2 B, K)
                    logits = _guide(logits, guidance) if guidance != 1 else logits
                    u = uniform[row * width + column]
                    codes[:, row, column] = draw(logits, u, temperature, top_k, top_p)
                    if progress is not None:
                        progress(B)
        finally:
            self.train(was_training)
        return codes

    def _new_caches(self, batch_size: int) -> list[KeyValueCache]:
        """One for each block, empty."""
        length, n_embd = self.position_table.shape
        shape = (batch_size, self.n_head, length, n_embd // self.n_head)
        return [KeyValueCache(*shape, like=self.position_table) for _ in self.blocks]

    def _next_logits(self, x: Tensor, caches: list[KeyValueCache]) -> Tensor:
        """Read the next T positions, given their tokens' rows x (B, T, n_embd).

        Returns the logits (B, K) of the code that follows the last of them.
        """
        start = caches[0].length
        x = x + self.position_table[start : start + x.shape[1]]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        return self.head(self.norm(x[:, -1]))

    def _with_unconditional(self, condition: Tensor) -> Tensor:
        """(B, C) -> (2 B, C): the conditions, and as many times nothing."""
        return torch.cat([condition, torch.full_like(condition, self.nothing)])


# --- drawing a code ------------------------------------------------------------------------------


LOWEST_TEMPERATURE = 1e-6  # below it, chance has no part in float32
MOST_GUIDANCE = 100  # beyond sense, and far below what overflows


def _guide(logits: Tensor, guidance: float) -> Tensor:
    """Logits (2 B, K) with and without the condition -> (B, K); see `GPT.sample`."""
    with_condition, without = logits.chunk(2)
    return without + guidance * (with_condition - without)


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """One code for each row of logits (B, K), by uniform numbers (B,) in (0, 1]: (B,) int64.

    The probabilities are laid end to end on a line from 0 to 1; u falls into the stretch of one
    code. A code of probability 0 has no stretch, and is never drawn.
    """
    if temperature < LOWEST_TEMPERATURE:
        return logits.argmax(dim=-1)
    logits = logits.float()  # bfloat16 would sum K probabilities badly
    probabilities = keep_likely(logits / temperature, top_k, top_p).softmax(dim=-1)
    ends = probabilities.cumsum(dim=-1)  # (B, K), where each stretch ends
    u = uniform.to(ends)[:, None] * ends[:, -1:]  # the last end is 1 only but for rounding
    code = torch.searchsorted(ends, u).clamp(max=ends.shape[1] - 1)  # (B, 1), first end >= u
    # Sums that are computed in parallel may be rounded up in a stretch of length 0.
    is_possible = probabilities.gather(1, code) > 0
    return torch.where(is_possible, code, probabilities.argmax(dim=1, keepdim=True)).squeeze(1)


def keep_likely(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (..., K) with -inf for all but the likeliest codes; top-k first, then top-p."""
    if top_k is not None:
        likeliest, codes = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, codes, likeliest)
    if top_p is not None and top_p < 1:
        probabilities, codes = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities  # of all likelier codes together
        too_many = (before >= top_p).scatter(-1, codes, before >= top_p)  # back in their order
        logits = logits.masked_fill(too_many, -math.inf)
    return logits


def _uniform(num_codes: int, batch_size: int, generator: torch.Generator | None) -> Tensor:
    """All numbers that a sampling draws with, (num_codes, B) in (0, 1].

    Drawn at the start, so that what is known, or how it is filtered, does not shift the others.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return 1 - torch.rand(num_codes, batch_size, generator=generator, device=generator.device)


def describe_sampling(setting: dict) -> str:
    """A setting of `GPT.sample` as a title: "guidance 2, temperature 1, top-k 100"."""
    if setting["temperature"] < LOWEST_TEMPERATURE:
        return "greedy: always the likeliest code"
    values = (f"{name.replace('_', '-')} {v:g}" for name, v in setting.items() if v is not None)
    return ", ".join(values)


def check_sampling(
    num_embeddings: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    guidance: float,
) -> None:
    """Raise InputError for a setting of `GPT.sample` that is out of range."""
    if not 0 <= temperature < math.inf:
        raise InputError(
            f"temperature {temperature} was given: give 0 (greedy: always the likeliest code) or a "
            "number above, 1 for the model's own probabilities"
        )
    if top_k is not None and not 1 <= top_k <= num_embeddings:
        raise InputError(
            f"top-k {top_k} was given, but there are {num_embeddings} codes: give 1 to "
            f"{num_embeddings}, or leave it out"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top-p {top_p} was given: give a number above 0 and up to 1")
    if not 0 <= guidance <= MOST_GUIDANCE:
        raise InputError(
            f"guidance {guidance} was given: give 1 (none) to {MOST_GUIDANCE}, or 0, which leaves "
            "the condition out"
        )


def _check_range(ids: Tensor, lowest: int, highest: int, what: str) -> None:
    """Raise ValueError for ids outside of lowest to highest; looks at tensors on the CPU only."""
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = ids.min().item(), ids.max().item()
    if low < lowest or high > highest:
        raise ValueError(f"{what} from {low} to {high} were given: give {lowest} to {highest}")
