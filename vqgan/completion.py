"""Fills a hole in an image: a transformer generates the tokens there, given those around it.

    image, hole -> the hole's pixels flat -> tokens -> those in the hole generated -> image

A token has seen more than its own pixels, through the encoder's convolutions, its normalization
and its attention. Were the image encoded as it is, tokens beside the hole would hold a part of what
was in it, and a removed object would come back. So the hole is painted over before anything is
encoded. Tokens beside it have seen the paint, and are kept all the same, because they say best what
has to go on inside. (The fillings are worse if they are generated, too: docs/filling_in.md.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgan.conditions import TRANSFORMS
from vqgan.evaluation import decode_tokens
from vqgan.pretrained import Pipeline


def paint_over(x: Tensor, hole: Tensor) -> Tensor:
    """Images (B, C, H, W) whose hole, (H, W) bool, has the mean color of the pixels around it."""
    # The hole and all pixels that touch it, also at a corner, without the hole.
    wider = F.max_pool2d(hole[None].float(), kernel_size=3, stride=1, padding=1)[0].bool()
    border = wider & ~hole
    mean = x[..., border].mean(dim=-1)  # (B, C)
    return torch.where(hole, mean[:, :, None, None], x)


def missing_tokens(hole: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """The tokens to generate, (N,) bool: in each grid those that the hole touches."""
    H, W = hole.shape
    missing = []
    for h, w in grids:
        touched = hole.view(h, H // h, w, W // w).any(dim=3).any(dim=1)  # (h, w)
        missing.append(touched.flatten())
    return torch.cat(missing)


def prepare(
    pipeline: Pipeline, x: Tensor, hole: Tensor, condition: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The condition, and the tokens that are given: -1 for those to generate, see `complete`.

    Returns:
        condition (B, C) and tokens (B, N), both int64.

    Raises:
        ValueError: the hole is empty or leaves no token.
    """
    transformer, tokenizer = pipeline.transformer, pipeline.tokenizer
    if hole.shape != x.shape[-2:] or not hole.any():
        size, shape = tuple(x.shape[-2:]), tuple(hole.shape)
        raise ValueError(f"hole is {shape} with {int(hole.sum())} pixels: give {size} with some")
    missing = missing_tokens(hole, tokenizer.grids)
    if missing.all():
        raise ValueError("the hole touches every token: keep more")
    painted = paint_over(x, hole)
    if condition is None and pipeline.condition.kind == "image":
        condition = tokenizer.tokens(TRANSFORMS[pipeline.condition.transform](painted))
    elif condition is None and pipeline.condition.kind == "none":
        condition = pipeline.condition.start_tokens(len(x)).to(x.device)
    elif condition is None:
        size = (len(x), pipeline.condition.length)
        condition = torch.full(size, transformer.null_token, device=x.device)
    return condition, tokenizer.tokens(painted).masked_fill(missing, -1)


def complete(
    pipeline: Pipeline, x: Tensor, hole: Tensor, condition: Tensor | None = None, **settings
) -> Tensor:
    """Generate what is in a hole, and what a decoder makes of the rest.

    Args:
        x: images (B, 3, H, W) in [-1, 1], of the tokenizer's size. What is in the hole has no
            effect.
        hole: (H, W) bool, on the same device, true where pixels are to be generated.
        condition: (B, C) int64; None is a dropped condition. For a model conditioned on images it
            is that of the image, whose painted hole says "a flat patch".
        settings: of the transformer's `sample`.

    Returns:
        images (B, 3, H, W), about [-1, 1], on the CPU. `paste` puts the original around the hole.

    Raises:
        ValueError: the hole is empty or leaves no token, or a setting is out of range.
    """
    condition, given = prepare(pipeline, x, hole, condition)
    tokens = pipeline.transformer.sample(condition, given=given, **settings)
    return decode_tokens(pipeline.tokenizer, tokens)


def paste(x: Tensor, completed: Tensor, hole: Tensor) -> Tensor:
    """The original images around the hole, and the completed ones inside of it."""
    return torch.where(hole, completed, x)
