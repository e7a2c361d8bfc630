"""The range of images: bytes in files, [-1, 1] in models, [0, 1] in metrics and figures.

uint8 (N, 3, H, W), 0 to 255  --from_uint8-->  float [-1, 1]  --model-->  about [-1, 1]
float about [-1, 1]  --to_unit-->  float [0, 1], clamped
"""

import torch
from torch import Tensor

MAX_IMAGE_SIZE = 4096  # side in pixels; a damaged file that says more would fill the memory


def from_uint8(images: Tensor) -> Tensor:
    """uint8 0 to 255 -> float32 in [-1, 1], same shape."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float, about [-1, 1] -> uint8 0 to 255, clamped, same shape."""
    return (255 * to_unit(x)).round().to(torch.uint8)


def to_unit(x: Tensor) -> Tensor:
    """Float, about [-1, 1] (decoders are unbounded) -> float32 in [0, 1], clamped, same shape."""
    return ((x.float() + 1) / 2).clamp(0, 1)


def check_channels(x: Tensor, in_channels: int) -> None:
    """Raise `ValueError` unless x is a batch of images (B, in_channels, H, W)."""
    if x.dim() != 4 or x.shape[1] != in_channels:
        is_gray = x.dim() == 4 and (x.shape[1], in_channels) == (1, 3)
        remedy = "; x.expand(-1, 3, -1, -1) makes gray images RGB" if is_gray else ""
        shape = tuple(x.shape)
        raise ValueError(f"images (B, {in_channels}, H, W) were expected, not {shape}{remedy}")


def check_multiple(height: int, width: int, factor: int) -> None:
    """Raise `ValueError` unless `factor` divides both sides, in pixels."""
    if height < 1 or width < 1 or height % factor or width % factor:
        raise ValueError(f"{height}x{width} pixels: give multiples of {factor}")
