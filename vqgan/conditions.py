"""What an image is conditioned on, as a few tokens that precede its own.

    none      one start token, always the same
    class     one token, the image's label
    caption   one token per word, from the words of the training captions
    image     the tokens of a transform of the image: its edges, its gray copy or its low-resolution
              copy; so one mechanism colors, sharpens, or fills in a sketch

The transformer has a separate embedding table for these tokens, so code 0 and class 0 have nothing
in common, and no token of a condition can ever be sampled (`transformer.py`). The table has one
more row for a dropped condition, which guidance needs: `Prior.null_token`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgan.errors import InputError

KINDS = ("none", "class", "caption", "image")
PADDING = ""  # the word after the last one of a short caption


@dataclass(frozen=True)
class Condition:
    """How conditions become tokens; a checkpoint holds this as a plain dictionary.

    Attributes:
        kind: one of `KINDS`.
        vocabulary: number of different tokens.
        length: C, the number of tokens per condition.
        names: classes or words, which tokens index; empty for none and image.
        transform: one of `TRANSFORMS`, for an image.
    """

    kind: str
    vocabulary: int
    length: int
    names: tuple[str, ...] = ()
    transform: str = ""

    def __post_init__(self):
        if (
            self.kind not in KINDS
            or not all(isinstance(name, str) for name in self.names)
            or (self.kind in ("class", "caption") and len(self.names) != self.vocabulary)
            or (self.kind == "caption" and PADDING not in self.names)
            or (self.kind == "image" and self.transform not in TRANSFORMS)
        ):
            raise ValueError(f"no condition has kind={self.kind!r} with these names or transform")

    def to_dict(self) -> dict:
        """Return numbers, strings and a list of names, for a checkpoint."""
        return asdict(self) | {"names": list(self.names)}

    @staticmethod
    def from_dict(state: dict) -> "Condition":
        """Rebuild a condition from what `to_dict` returned."""
        names, transform = tuple(state["names"]), state["transform"] or ""
        return Condition(**state | {"names": names, "transform": transform})

    def start_tokens(self, count: int) -> Tensor:
        """(count, 1) start tokens, for the kind none."""
        return torch.zeros(count, 1, dtype=torch.int64)

    def encode_classes(self, names: Sequence[str]) -> Tensor:
        """Names of classes -> (B, 1). Raises InputError, with all names, for an unknown one."""
        for name in names:
            if name not in self.names:
                raise InputError(f"there is no class {name!r}: give {', '.join(self.names)}")
        return torch.tensor([[self.names.index(name)] for name in names])

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, C), padded after the last word.

        Raises:
            InputError: a word is unknown (the known are listed), or there are not 1 to C words.
        """
        index = {word: i for i, word in enumerate(self.names)}
        tokens = torch.full((len(captions), self.length), index[PADDING])
        for row, caption in zip(tokens, captions, strict=True):
            words = caption.lower().split()
            unknown = [word for word in words if word not in index]
            if unknown:
                known = ", ".join(word for word in self.names if word)
                raise InputError(f"caption {caption!r}: {unknown[0]!r} is unknown; give {known}")
            if not 1 <= len(words) <= self.length:
                num_words = f"1 to {self.length} words, not {len(words)}"
                raise InputError(f"caption {caption!r}: give {num_words}")
            row[: len(words)] = torch.tensor([index[word] for word in words])
        return tokens


def class_condition(class_names: Sequence[str]) -> Condition:
    """One token, the index of the class among the names, which is its label."""
    return Condition("class", vocabulary=len(class_names), length=1, names=tuple(class_names))


def caption_condition(captions: Sequence[str]) -> Condition:
    """Words of the captions, in alphabetical order; the length is that of the longest caption."""
    split = [caption.lower().split() for caption in captions]
    words = (PADDING, *sorted({word for words in split for word in words}))
    length = max(len(words) for words in split)
    return Condition("caption", vocabulary=len(words), length=length, names=words)


def image_condition(transform: str, num_embeddings: int, seq_len: int) -> Condition:
    """`seq_len` tokens of a transformed image, from a tokenizer with K codes."""
    return Condition("image", vocabulary=num_embeddings, length=seq_len, transform=transform)


NO_CONDITION = Condition("none", vocabulary=1, length=1)


# --- transforms of images ------------------------------------------------------------------------

LUMA = (0.299, 0.587, 0.114)  # how bright red, green and blue look: ITU-R BT.601
# Sobel's operator finds changes from left to right; transposed, from top to bottom.
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
LOWRES_FACTOR = 4  # a 32-pixel image keeps 8x8 pixels


def gray(x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> the same without its colors."""
    weights = torch.tensor(LUMA, device=x.device).view(1, 3, 1, 1)
    return (x * weights).sum(dim=1, keepdim=True).expand_as(x)


def edges(x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> black lines on white where the brightness changes."""
    brightness = F.pad(gray(x)[:, :1], (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor(SOBEL, device=x.device)
    kernels = torch.stack([sobel, sobel.T])[:, None]  # (2, 1, 3, 3)
    change = F.conv2d(brightness, kernels).norm(dim=1, keepdim=True)  # (B, 1, H, W)
    # A step of half the range (1) has a change of 4: 1 - 4 / 2 = -1, black.
    return (1 - change / 2).clamp(min=-1).expand_as(x)


def lowres(x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> means over blocks of 4x4 pixels, at the old size."""
    blocks = F.avg_pool2d(x, LOWRES_FACTOR, ceil_mode=True)  # smaller blocks at the border
    blocks = blocks.repeat_interleave(LOWRES_FACTOR, 2).repeat_interleave(LOWRES_FACTOR, 3)
    return blocks[..., : x.shape[2], : x.shape[3]]


TRANSFORMS = {"edges": edges, "gray": gray, "lowres": lowres}
