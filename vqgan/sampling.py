"""How logits become tokens: guidance, temperature, top-k and top-p, and the key-value cache.

    logits (B, K) -> classifier_free_guidance -> filter_top_k_top_p -> sample_token -> token (B,)

`GPT` and `MaskedTransformer` generate sequences with these; `sample_sliding_window` generates grids
that are larger than those of the training.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MIN_TEMPERATURE = 1e-6  # below it, one token has all of the probability in float32
MAX_GUIDANCE = 100  # far above any useful scale, and far below what overflows


class KeyValueCache:
    """Keys and values of one layer at the positions read so far, preallocated for all."""

    def __init__(self, batch_size: int, n_head: int, length: int, head_size: int, like: Tensor):
        self.keys = like.new_empty(batch_size, n_head, length, head_size)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # positions that are filled

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, n_head, T, head_size) of new positions; returns those of all so far."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def classifier_free_guidance(logits: Tensor, guidance: float) -> Tensor:
    """Logits (2 B, K), conditioned and then unconditioned -> (B, K). Scale 1 changes nothing.

    Ho, Salimans 2022, arXiv 2207.12598, eq. 6 with g = 1 + w:

        logits = l(null) + g (l(condition) - l(null))
    """
    if guidance == 1:
        return logits
    conditioned, unconditioned = logits.chunk(2)
    return unconditioned + guidance * (conditioned - unconditioned)


def filter_top_k_top_p(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set logits (..., K) to -inf for all but the likeliest tokens, first top-k and then top-p."""
    if top_k is not None:
        likeliest, tokens = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, tokens, likeliest)
    if top_p is not None and top_p < 1:
        probabilities, tokens = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        cumulative = probabilities.cumsum(dim=-1) - probabilities  # of all likelier tokens together
        # From the order of their probabilities back to that of the tokens.
        remove = (cumulative >= top_p).scatter(-1, tokens, cumulative >= top_p)
        logits = logits.masked_fill(remove, -math.inf)
    return logits


def sample_token(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Sample one token per row: logits (B, K), uniform numbers (B,) in (0, 1] -> (B,) int64.

    The cumulative probabilities divide the line from 0 to 1 into one interval per token, and u
    falls into one of them. A token of probability 0 has no interval, and is never sampled.
    """
    if temperature < MIN_TEMPERATURE:
        return logits.argmax(dim=-1)
    logits = logits.float()  # bfloat16 would sum K probabilities badly
    probabilities = filter_top_k_top_p(logits / temperature, top_k, top_p).softmax(dim=-1)
    cdf = probabilities.cumsum(dim=-1)  # (B, K), where each interval ends
    u = uniform.to(cdf)[:, None] * cdf[:, -1:]  # the last is 1, up to rounding
    token = torch.searchsorted(cdf, u).clamp(max=cdf.shape[1] - 1)  # (B, 1), the first end >= u
    # Sums that are computed in parallel may be rounded up in an interval of length 0.
    is_possible = probabilities.gather(1, token) > 0
    return torch.where(is_possible, token, probabilities.argmax(dim=1, keepdim=True)).squeeze(1)


def uniform_numbers(
    seq_len: int, batch_size: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Draw all numbers that sequences are sampled with, (seq_len, B) in (0, 1].

    They are drawn at the start, so that given tokens or filters do not shift the others, and one
    sequence after the other, so that the first of B get the same numbers for any B. (That takes a
    generator on the CPU, whose numbers do not depend on how many are drawn at once.)
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    uniform = torch.rand(batch_size, seq_len, generator=generator, device=generator.device)
    return (1 - uniform).T.to(device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside, and back into its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def sample_sliding_window(
    prior: Any,
    tokenizer: Any,
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
    """Generate grids larger than the tokenizer's: (B, height, width) int64.

    Each token is predicted in a window of h x w tokens around it (the tokenizer's grid), as in
    figure 3 of Esser et al. 2021, with the positions of the window. At the border the window stays
    inside, and the token is no longer in its middle. A token depends on nothing outside of its
    window, and the model takes every window for a whole image. So this works where images look
    alike everywhere (textures, landscapes), while centered objects become a crowd of pieces. A
    condition that is an image would belong to one window only.

    There is no cache, since a token's position changes with the window.

    Args:
        prior: a `GPT`.
        tokenizer: the one whose tokens the prior generates, with a single grid.
        height, width: the size of the grid in tokens, at least h and w.
        the others: as in `GPT.sample_progressive`.

    Raises:
        ValueError: there are several grids, the grid is smaller than the window, or a setting is
            out of range.
    """
    check_sampling(prior.num_embeddings, temperature, top_k, top_p, guidance)
    if len(tokenizer.grids) != 1:
        raise ValueError(f"a sliding window takes one grid, and there are {len(tokenizer.grids)}")
    (h, w), B = tokenizer.grids[0], len(condition)
    if height < h or width < w:
        raise ValueError(f"{height}x{width} tokens are smaller than the window of {h}x{w}")
    uniform = uniform_numbers(height * width, B, generator, condition.device)
    condition = prior.with_unconditioned(condition, guidance)  # (B or 2 B, C)
    grid = torch.zeros(B, height, width, dtype=torch.int64, device=condition.device)
    with eval_mode(prior):
        for row in range(height):
            for column in range(width):
                top = min(max(row - h // 2, 0), height - h)
                left = min(max(column - w // 2, 0), width - w)
                window = grid[:, top : top + h, left : left + w].flatten(1)  # (B, h w)
                index = (row - top) * w + column - left  # of the token in its window
                tokens = window[:, : index + 1].repeat(len(condition) // B, 1)  # the last is unread
                logits = prior.head(prior.forward_features(condition, tokens)[:, -1])
                logits = classifier_free_guidance(logits, guidance)  # (B, K)
                u = uniform[row * width + column]
                grid[:, row, column] = sample_token(logits, u, temperature, top_k, top_p)
                if progress is not None:
                    progress(B)
    return grid


def describe_sampling(setting: dict) -> str:
    """Describe a setting of a prior's `sample`, as in "guidance 2, temperature 1, top-k 100"."""
    if setting["temperature"] < MIN_TEMPERATURE and "steps" not in setting:
        return "greedy: always the likeliest token"
    values = (f"{name.replace('_', '-')} {v:g}" for name, v in setting.items() if v is not None)
    return ", ".join(values)


def check_sampling(
    num_embeddings: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    guidance: float,
    steps: int = 1,
    choice_temperature: float = 0.0,
) -> None:
    """Raise `ValueError` for a setting of a prior's `sample` that is out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: give 0 (greedy) or a number above")
    if top_k is not None and not 1 <= top_k <= num_embeddings:
        raise ValueError(f"top_k={top_k}: give 1 to {num_embeddings}, the number of codes")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: give a number above 0 and up to 1")
    if not 0 <= guidance <= MAX_GUIDANCE:
        raise ValueError(f"guidance={guidance}: give 0 to {MAX_GUIDANCE}; 1 is none")
    if steps < 1:
        raise ValueError(f"steps={steps}: give 1 or more rounds")
    if not 0 <= choice_temperature < math.inf:
        raise ValueError(f"choice_temperature={choice_temperature}: give 0 or a number above")
