"""Data sets, and batches of them: CIFAR-10, a folder, or images that the package draws.

A set that fits in memory is one uint8 tensor on the training device, and a batch is one indexing
operation, without workers or Python per image. A larger folder streams through a DataLoader.

    uint8 (N, 3, H, W) -> shuffled rows of a batch -> float (B, 3, H, W) in [-1, 1], some mirrored
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10

from vqgan import distributed
from vqgan.errors import InputError, file_input
from vqgan.image_folder import ImageFiles, read_folder
from vqgan.images import from_uint8
from vqgan.shapes import render_shapes, render_textures

Images = Tensor | ImageFiles  # uint8 (N, 3, H, W)
Batch = Tensor | tuple[Tensor, Tensor]  # x, or x and labels
NUM_TRAIN, NUM_TEST = 10_000, 2_000  # images to draw by default: for training, for testing


@dataclass
class ImageDataset:
    """Training and test images with their labels and captions.

    Images are uint8 (N, 3, H, W), or an `ImageFiles` of the same length where the folder is too
    large to hold. Labels are int64 (N,), or None where images have no classes; captions are N
    strings for the drawn shapes, else None.
    """

    train_images: Images
    test_images: Images
    train_labels: Any
    test_labels: Any
    class_names: tuple[str, ...]
    train_captions: Any = None
    test_captions: Any = None

    def first(self, limit: int) -> "ImageDataset":
        """The same set with at most `limit` training and `limit` test images."""
        parts = {k: v for k, v in vars(self).items() if k != "class_names" and v is not None}
        return replace(self, **{name: part[:limit] for name, part in parts.items()})


def load_dataset(
    source: str,
    *,
    root: str | Path = "data",
    image_size: int = 32,
    seed: int = 0,
    num_rendered: int = NUM_TRAIN,
) -> ImageDataset:
    """Load one of the four sources.

    Args:
        source: "cifar10" (downloaded to `root` unless it is there), "shapes" or "textures"
            (drawn from `seed`), or a folder of images: train/<class>/* and test/<class>/*, or
            <class>/*, or loose images; the last two are always split in the same way.
        image_size: side of the square images in pixels; images of a folder are resized and cropped
            to it, those of the other sources have 32.
        num_rendered: training images of "shapes" and "textures"; it leaves test images unchanged.

    Raises:
        InputError: the source is unknown, has no readable images, or cannot be downloaded.
    """
    if source in ("cifar10", "shapes", "textures") and image_size != 32:
        raise InputError(f"image_size={image_size}: data={source} needs image_size=32")
    if source in ("shapes", "textures"):
        return _render(source, seed, num_rendered)
    if source == "cifar10":
        return _load_cifar10(Path(root))
    if Path(source).is_dir():
        return ImageDataset(*read_folder(Path(source), image_size=image_size))
    known = "cifar10, shapes, textures, or a folder"
    raise InputError(f"data={source} is unknown, or has moved: give {known}")


def _render(source: str, seed: int, num_rendered: int) -> ImageDataset:
    """Draw shapes or textures, `num_rendered` for training and NUM_TEST for testing."""
    render = render_shapes if source == "shapes" else render_textures
    images, labels, captions, class_names = render(NUM_TRAIN + NUM_TEST, seed=seed)
    # Images beyond NUM_TRAIN come from a separate random stream, so the others do not change.
    num_more = max(0, num_rendered - NUM_TRAIN)
    more_images, more_labels, more_captions, _ = render(num_more, seed=(seed, 1))
    train = slice(min(num_rendered, NUM_TRAIN))
    return ImageDataset(
        train_images=torch.from_numpy(np.concatenate([more_images, images[train]])),
        test_images=torch.from_numpy(images[NUM_TRAIN:]),
        train_labels=torch.from_numpy(np.concatenate([more_labels, labels[train]])),
        test_labels=torch.from_numpy(labels[NUM_TRAIN:]),
        class_names=class_names,
        train_captions=captions and (more_captions or []) + captions[train],
        test_captions=captions and captions[NUM_TRAIN:],
    )


def _load_cifar10(root: Path) -> ImageDataset:
    """Load 50,000 and 10,000 images of ten classes, downloaded unless they are in `root`."""
    if not (root / "cifar-10-batches-py").is_dir():
        print(f"downloading CIFAR-10 (170 MB) from {CIFAR10.url} to {root}")
    advice = f": place {CIFAR10.url} there, or give another data_root=FOLDER, or data=shapes"
    with file_input(f"CIFAR-10 is not in {root} and cannot be downloaded", advice):
        with distributed.first_alone():
            parts = [CIFAR10(root=root, train=part, download=True) for part in (True, False)]
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return ImageDataset(images[0], images[1], labels[0], labels[1], tuple(parts[0].classes))


# --- batches -----------------------------------------------------------------------------------


class TrainLoader:
    """Shuffled training batches: each `for x in loader` is one epoch.

    Yields x, float (B, 3, H, W) in [-1, 1] on `device`; given labels (N,), it yields pairs of x and
    its labels (B,). An incomplete last batch is left out (the next epoch shuffles anew), so every
    step averages over the same number of images.

    All randomness of an epoch, its order and its flips, is drawn at the epoch's start from a
    generator of this object's own. So the generator's state at that moment and the number of
    batches given out are the whole state: after `load_state_dict` the epoch goes on where it was.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        flip: bool = True,
        labels: Tensor | None = None,
    ):
        if batch_size % (count := distributed.num_processes()):
            raise InputError(f"batch_size={batch_size}: give a multiple of {count}, the processes")
        if not 1 <= batch_size <= len(images):
            raise InputError(f"batch_size={batch_size}: give 1 to {len(images)} (all images)")
        self.images = images.to(device) if isinstance(images, Tensor) else images
        self.batch_size, self.device, self.flip = batch_size, torch.device(device), flip
        self.labels = None if labels is None else labels.to(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch_start = self.generator.get_state()
        self.position = 0  # in the epoch: how many batches were given out

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        self.generator.set_state(self.epoch_start)
        order = torch.randperm(len(self.images), generator=self.generator)
        flips = torch.rand(len(self.images), generator=self.generator) < (0.5 if self.flip else 0)
        order = order[: len(self) * self.batch_size].view(-1, self.batch_size)  # (steps, B)
        flips = flips[: order.numel()].view_as(order).to(self.device)
        order, flips = distributed.part(order, dim=1), distributed.part(flips, dim=1)
        if isinstance(self.images, Tensor):
            order = order.to(self.device)  # once per epoch, not at every step
        for images in _fetch(self.images, order[self.position :], self.device):
            row, mirrored = order[self.position], flips[self.position]
            self.position += 1
            yield self.make_batch(images, row, mirrored)
        self.epoch_start, self.position = self.generator.get_state(), 0

    def make_batch(self, images: Tensor, row: Tensor, mirrored: Tensor) -> Batch:
        """Make a batch of images uint8 (B, 3, H, W), given their indices and flips, both (B,)."""
        x = from_uint8(images)
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return x if self.labels is None else (x, self.labels[row.to(self.device)])

    @cached_property
    def fingerprint(self) -> str:
        """Of the images; computed when it is first needed, because 150 MB take a moment."""
        return images_fingerprint(self.images)

    def state_dict(self) -> dict:
        """The epoch and the position in it, and which images they are, for a checkpoint."""
        state = {"epoch_start": self.epoch_start, "position": self.position}
        return state | {"num_images": len(self.images), "images": self.fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state. Raises InputError if the images are others than then."""
        if state["num_images"] != len(self.images):
            given, had = len(self.images), state["num_images"]
            raise InputError(f"the run had {had} training images, not {given}: give the same")
        if "images" in state and state["images"] != self.fingerprint:  # older states lack it
            raise InputError("the run had other training images: give those, or start a new run")
        self.epoch_start, self.position = state["epoch_start"].cpu(), state["position"]
        self.generator.set_state(self.epoch_start)
        if self.position not in range(len(self) + 1):
            raise ValueError(f"position {self.position} in an epoch of {len(self)} batches")


def images_fingerprint(images: Images) -> str:
    """SHA-256 of the pixels of a tensor, or of the names and sizes of files, which is faster.

    Names begin below the folder that all files are in, so a folder may move or be renamed.
    """
    if isinstance(images, Tensor):
        return hashlib.sha256(images.cpu().contiguous().numpy().data).hexdigest()
    folder = os.path.commonpath([path.parent for path in images.paths])
    names = [f"{p.relative_to(folder).as_posix()} {p.stat().st_size}\n" for p in images.paths]
    return hashlib.sha256("".join([f"{images.image_size}\n", *names]).encode()).hexdigest()


def eval_batches(
    images: Images, batch_size: int | None = None, *, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """All images once, in order: float (B, 3, H, W) in [-1, 1]; the last batch may be smaller.

    A `batch_size` of None means `eval_batch_size`.
    """
    image_size = images.shape[-1] if isinstance(images, Tensor) else images.image_size
    batch_size = batch_size or eval_batch_size(image_size)
    for chunk in _fetch(images, torch.arange(len(images)).split(batch_size), torch.device(device)):
        yield from_uint8(chunk)


def _fetch(images, indices, device: torch.device) -> Iterator[Tensor]:
    """Yield the images of each row of indices, uint8 (B, 3, H, W), on the device."""
    if isinstance(images, Tensor):
        for row in indices:
            yield images[row].to(device)
    else:
        loader = DataLoader(
            images,
            batch_sampler=[row.tolist() for row in indices],
            num_workers=min(4, os.cpu_count() or 1),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or it would advance the global one
            worker_init_fn=_ignore_interrupt,
        )
        try:
            for batch in loader:
                yield batch.to(device, non_blocking=True)
        except InputError as error:  # a worker adds its traceback before our line
            line = str(error).strip().splitlines()[-1]
            raise InputError(line.removeprefix(f"{InputError.__module__}.InputError: ")) from None


def _ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C to the main process, which stops its workers: each would print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def eval_batch_size(image_size: int) -> int:
    """Number of images to evaluate at once: 500 of 32 pixels per side, fewer of larger ones."""
    return max(1, 500 * 32**2 // image_size**2)


def pixel_variance(images: Images) -> float:
    """Variance of all pixels of all channels, in the models' range [-1, 1].

    It is the unit of the error in van den Oord's code: MSE / variance is 1 for a model that always
    predicts the mean of all pixels. Of a streamed folder only the first 2,000 images are measured.
    """
    total, total_squares, count, is_one_color = 0.0, 0.0, 0, True
    subset = images if isinstance(images, Tensor) else images[:2000]
    color = next(eval_batches(subset[:1]))[..., :1, :1]  # (1, 3, 1, 1), of the first pixel
    for x in eval_batches(subset, 1000):
        is_one_color = is_one_color and bool((x == color).all())
        x = x.double()
        total, total_squares = total + x.sum().item(), total_squares + x.square().sum().item()
        count += x.numel()
    if is_one_color:
        raise InputError("the training images all have one color: give others")
    return total_squares / count - (total / count) ** 2
