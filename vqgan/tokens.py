"""Images as sequences of tokens, which a prior is trained on. They are computed once and cached.

image (3, H, W) -> tokenizer -> tokens (N,)
condition (C,) and tokens (N,), concatenated -> a row of `TokenDataset`
rows -> `TokenLoader` -> condition (B, C), tokens (B, N)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqgan import conditions
from vqgan.checkpoint import fingerprint
from vqgan.conditions import Condition
from vqgan.console import progress_bar
from vqgan.data import ImageDataset, TrainLoader, eval_batch_size, eval_batches, images_fingerprint
from vqgan.errors import InputError
from vqgan.files import load_plain, save_plain
from vqgan.image_folder import ImageFiles
from vqgan.training import Run
from vqgan.vqvae import VQAutoencoder


def build_condition(
    kind: str, data: ImageDataset, tokenizer: VQAutoencoder, *, transform: str
) -> Condition:
    """Build the condition of a kind for a data set and its tokenizer.

    Args:
        kind: one of `conditions.KINDS`.
        transform: one of `conditions.TRANSFORMS`, for the kind "image".

    Raises:
        InputError: the data set has no classes, no captions, or unknown words in test captions.
    """
    if kind == "class":
        if data.train_labels is None or not data.class_names:
            raise InputError("condition=class needs class folders DIR/<class>/*, or condition=none")
        return conditions.class_condition(data.class_names)
    if kind == "caption":
        if data.train_captions is None or data.test_captions is None:
            raise InputError("condition=caption needs captions: give data=shapes, which has them")
        condition = conditions.caption_condition(data.train_captions)
        condition.encode_captions(data.test_captions)  # raises if a word is unknown
        return condition
    if kind == "image":
        sizes = (tokenizer.num_embeddings, tokenizer.seq_len)
        return conditions.image_condition(transform, *sizes)
    return conditions.NO_CONDITION


class TokenDataset(NamedTuple):
    """Conditions and tokens of all images, concatenated: int32 (images, augmentations, C + N).

    With flips, training images appear twice, as they are and mirrored; all others appear once.
    """

    condition: Condition
    train: Tensor
    test: Tensor

    @property
    def train_tokens(self) -> Tensor:
        """(images x augmentations, N) int64."""
        return self.train[..., self.condition.length :].flatten(0, 1).long()

    @property
    def test_conditions(self) -> Tensor:
        """(images, C) int64."""
        return self.test[:, 0, : self.condition.length].long()

    @property
    def test_tokens(self) -> Tensor:
        """(images, N) int64."""
        return self.test[:, 0, self.condition.length :].long()


class TokenLoader(TrainLoader):
    """Shuffled batches of a `TokenDataset`: condition (B, C) and tokens (B, N), both int64."""

    def __init__(
        self, dataset: TokenDataset, batch_size: int, *, device: torch.device, seed: int, flip: bool
    ):
        super().__init__(dataset.train, batch_size, device=device, seed=seed, flip=flip)
        self.condition_length = dataset.condition.length

    def make_batch(self, sequences: Tensor, row: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """Select one augmentation of each sequence (B, augmentations, C + N) by the flips (B,)."""
        images = torch.arange(len(sequences), device=sequences.device)
        # Augmentation 0 is the image as it is, and 1 is mirrored.
        chosen = sequences[images, mirrored.long()].long()  # (B, C + N)
        return chosen[:, : self.condition_length], chosen[:, self.condition_length :]


def load_tokens(run: Run, tokenizer: VQAutoencoder, condition: Condition) -> TokenDataset:
    """Load the tokens of the run's images from its tokens.pt, or compute and write them.

    (Encoding takes a while; the file is reused for the same images, tokenizer, flip, transform.)
    """
    data, path = run.data, run.out / "tokens.pt"
    key = [fingerprint(tokenizer), str(run.flip), condition.transform]
    key += [images_fingerprint(images) for images in (data.train_images, data.test_images)]
    try:
        cached = load_plain(path, remedy="remove it")
        is_current = cached["key"] == key
    except Exception:  # no file, a damaged one, or another one
        is_current = False
    if not is_current:
        transform = conditions.TRANSFORMS.get(condition.transform)
        shared: dict[str, Any] = {"transform": transform, "device": run.device}
        train = tokenize(data.train_images, tokenizer, flip=run.flip, **shared)
        test = tokenize(data.test_images, tokenizer, flip=False, **shared)
        cached = {"key": key, "train": train, "test": test}
        save_plain(path, cached)
    train, test = cached["train"], cached["test"]
    if condition.kind != "image":  # images were prepended by `tokenize`
        train = _prepend(condition, data.train_labels, data.train_captions, train)
        test = _prepend(condition, data.test_labels, data.test_captions, test)
    return TokenDataset(condition, train, test)


@torch.no_grad()
def tokenize(
    images: Tensor | ImageFiles,
    tokenizer: VQAutoencoder,
    *,
    transform: Callable[[Tensor], Tensor] | None,
    flip: bool,
    device: torch.device,
) -> Tensor:
    """Encode all images: int32 (images, augmentations, N); with `transform` (images, .., 2 N).

    The tokens of transform(image) stand before those of the image.
    """
    sequences = []
    batches = eval_batches(images, device=device)
    num_batches = math.ceil(len(images) / eval_batch_size(tokenizer.image_size))
    for x in progress_bar(batches, desc="encoding", total=num_batches, unit="batch"):
        augmentations = []
        for view in (x, x.flip(3)) if flip else (x,):
            parts = (view,) if transform is None else (transform(view), view)
            augmentations.append(torch.cat([tokenizer.tokens(part) for part in parts], dim=1))
        sequences.append(torch.stack(augmentations, dim=1).int().cpu())
    return torch.cat(sequences)


def _prepend(condition: Condition, labels: Any, captions: Any, tokens: Tensor) -> Tensor:
    """Prepend labels or captions to tokens (images, augmentations, N): (.., .., C + N)."""
    if condition.kind == "class":
        prefix = labels[:, None]
    elif condition.kind == "caption":
        prefix = condition.encode_captions(captions)
    else:
        prefix = condition.start_tokens(len(tokens))
    prefix = prefix[:, None].expand(-1, tokens.shape[1], -1)
    return torch.cat([prefix.to(tokens.dtype), tokens], dim=2)
