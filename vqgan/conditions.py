"""What a picture is conditioned on, as a few tokens that stand before its codes.

    none      nothing to say: one start token, always the same
    class     one token, the picture's label
    caption   a token for each word, from the words of the training captions
    image     the codes of another picture, which a function makes of the picture: its edges, its
              grey copy, its small copy; so one mechanism colours, sharpens, or fills in a sketch

The transformer has a table of its own for these tokens, so code 0 and class 0 have nothing in
common, and no token of a condition can ever be sampled (`transformer.py`). It has one more row for
a condition that is not told, which guidance needs: `GPT.nothing`.
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
    """How a model's conditions become tokens; kept in its checkpoint as a plain dictionary.

    Attributes:
        kind: of `KINDS`.
        vocabulary: how many different tokens there are.
        length: C, tokens of one condition.
        names: of classes, or words; a token is an index into it. Empty for none and image.
        picture: of `PICTURES`, for an image.
    """

    kind: str
    vocabulary: int
    length: int
    names: tuple[str, ...] = ()
    picture: str = ""

    def to_dict(self) -> dict:
        """For a checkpoint: numbers, strings and a list of names."""
        return asdict(self) | {"names": list(self.names)}

    @staticmethod
    def from_dict(state: dict) -> "Condition":
        """What `to_dict` gave, a condition again."""
        names, picture = tuple(state["names"]), state["picture"] or ""
        return Condition(**state | {"names": names, "picture": picture})

    def of_nothing(self, count: int) -> Tensor:
        """(count, 1) start tokens, for the kind none."""
        return torch.zeros(count, 1, dtype=torch.int64)

    def of_classes(self, names: Sequence[str]) -> Tensor:
        """Names of classes -> (B, 1). Raises InputError for an unknown one, and lists the known."""
        for name in names:
            if name not in self.names:
                raise InputError(f"there is no class {name!r}: give {', '.join(self.names)}")
        return torch.tensor([[self.names.index(name)] for name in names])

    def of_captions(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, C), padded after the last word.

        Raises:
            InputError: a word that no training caption has (the known are listed), or too many.
        """
        places = {word: place for place, word in enumerate(self.names)}
        tokens = torch.full((len(captions), self.length), places[PADDING])
        for row, caption in zip(tokens, captions, strict=True):
            words = caption.lower().split()
            unknown = [word for word in words if word not in places]
            if unknown:
                known = ", ".join(word for word in self.names if word)
                raise InputError(f"caption {caption!r}: {unknown[0]!r} is unknown; give {known}")
            if not 1 <= len(words) <= self.length:
                num_words = f"1 to {self.length} words, not {len(words)}"
                raise InputError(f"caption {caption!r}: give {num_words}")
            row[: len(words)] = torch.tensor([places[word] for word in words])
        return tokens


def class_condition(class_names: Sequence[str]) -> Condition:
    """One token, the class's place among the names: the label of the data set."""
    return Condition("class", vocabulary=len(class_names), length=1, names=tuple(class_names))


def caption_condition(captions: Sequence[str]) -> Condition:
    """The words of the captions, in alphabetical order; as long as the longest of them."""
    split = [caption.lower().split() for caption in captions]
    words = (PADDING, *sorted({word for words in split for word in words}))
    length = max(len(words) for words in split)
    return Condition("caption", vocabulary=len(words), length=length, names=words)


def image_condition(picture: str, num_embeddings: int, seq_len: int) -> Condition:
    """Of a tokenizer with K codes, and `seq_len` tokens per image."""
    return Condition("image", vocabulary=num_embeddings, length=seq_len, picture=picture)


NO_CONDITION = Condition("none", vocabulary=1, length=1)


# --- pictures of pictures ------------------------------------------------------------------------

LUMA = (0.299, 0.587, 0.114)  # how bright red, green and blue look: ITU-R BT.601
# Sobel's operator for changes from left to right; transposed, from top to bottom.
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
LOWRES_FACTOR = 4  # a 32-pixel image keeps 8x8 pixels


def gray(x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> the same without its colours."""
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
    blocks = F.avg_pool2d(x, LOWRES_FACTOR, ceil_mode=True)  # at the border, of what is there
    blocks = blocks.repeat_interleave(LOWRES_FACTOR, 2).repeat_interleave(LOWRES_FACTOR, 3)
    return blocks[..., : x.shape[2], : x.shape[3]]


PICTURES = {"edges": edges, "gray": gray, "lowres": lowres}
