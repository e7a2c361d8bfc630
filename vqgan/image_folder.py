"""A folder of images: which files it has, which of them can be read, how they are split.

    folder/train/<class>/*  and  folder/test/<class>/*      two parts, as they are
    folder/<class>/*                                        labelled, split here
    folder/*                                                loose images, split here

Any mode and size that Pillow opens becomes RGB of one size. Files that cannot be read are named and
left out, before training and not hours into it.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vqgan.errors import InputError

TEST_SHARE = 0.1  # of a folder that has no test/ of its own
MAX_NAMED = 100  # unreadable files that are named, before the rest is only counted
MEMORY_LIMIT = 4 * 2**30  # bytes of uint8 images to hold at once; a larger folder streams


class Folder(NamedTuple):
    """What `read_folder` found; see `data.ImageDataset`, which begins with the same."""

    train_images: "Tensor | ImageFiles"
    test_images: "Tensor | ImageFiles"
    train_labels: Tensor | None
    test_labels: Tensor | None
    class_names: tuple[str, ...]


def read_folder(folder: Path, *, image_size: int) -> Folder:
    """List the files, read them, and split them where they are not split.

    Raises:
        InputError: no readable image, in the folder or in a class of it; parts that do not match.
    """
    if (folder / "train").is_dir() != (folder / "test").is_dir():
        there, missing = ("train", "test") if (folder / "train").is_dir() else ("test", "train")
        raise InputError(
            f"{folder} has a folder {there}/ but no {missing}/: give both, with the same class "
            "folders, or one folder of class folders to be split"
        )
    if (folder / "train").is_dir():
        train_paths, train_labels, class_names = list_images(folder / "train")
        test_paths, test_labels, test_names = list_images(folder / "test")
        if test_names != class_names:
            odd = sorted(set(class_names) ^ set(test_names))
            raise InputError(
                f"{folder}/train and {folder}/test have different classes: {', '.join(odd)} "
                "is in one only; give both the same class folders"
            )
        paths, labels = train_paths + test_paths, train_labels + test_labels
    else:
        paths, labels, class_names = list_images(folder)
        train_paths = None

    fits = len(paths) * 3 * image_size**2 <= MEMORY_LIMIT
    images, readable = _read_all(paths, image_size, hold=fits)
    if not any(readable):
        raise InputError(
            f"none of the {len(paths)} files in {folder} can be read as an image: "
            "give a folder of PNG, JPEG or other files that Pillow opens"
        )
    readable_labels = {label for label, ok in zip(labels, readable, strict=True) if ok}
    for label, name in enumerate(class_names):
        if label not in readable_labels:
            raise InputError(
                f"class {name!r} in {folder} has no readable image: add some, or remove it"
            )

    # Shuffled, so that the first N images are of all classes; and with a seed of its own, so that
    # runs of other seeds are measured on the same test images.
    kept = [i for i, ok in enumerate(readable) if ok]
    order = np.random.default_rng(0).permutation(kept)
    if train_paths is not None:
        train, test = order[order < len(train_paths)], order[order >= len(train_paths)]
    else:
        num_test = max(1, round(TEST_SHARE * len(order)))
        train, test = order[num_test:], order[:num_test]
    if len(train) == 0 or len(test) == 0:
        raise InputError(
            f"{folder} gives {len(train)} training and {len(test)} test images: "
            "each part needs at least one"
        )
    labels = torch.tensor(labels) if class_names else None
    return Folder(
        train_images=images[train],
        test_images=images[test],
        train_labels=labels[train] if class_names else None,
        test_labels=labels[test] if class_names else None,
        class_names=class_names,
    )


def list_images(folder: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Files of a folder of class folders (with labels), or of loose files (labels all 0)."""
    entries = sorted(p for p in folder.iterdir() if p.name[0] != ".")
    classes = [p for p in entries if p.is_dir()]
    if 0 < len(classes) < len(entries):
        loose = len(entries) - len(classes)
        print(f"skipped {loose} files beside the class folders of {folder}: they have no class")
    paths, labels = [], []
    for label, directory in enumerate(classes or [folder]):
        files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name[0] != ".")
        if not files:
            what = f"class folder {directory}" if classes else f"folder {folder}"
            raise InputError(f"the {what} has no files in it: put images there, or name another")
        paths += files
        labels += [label] * len(files)
    return paths, labels, tuple(directory.name for directory in classes)


def read_image(path: Path, image_size: int) -> np.ndarray:
    """One image file of any mode and size -> uint8 (3, image_size, image_size), RGB.

    Resized so that the shorter side fits, then cropped in the middle. Transparency is laid over
    white. Raises OSError (or another of Pillow's errors) where the file is not an image.
    """
    with Image.open(path) as image:
        image.draft("RGB", (image_size, image_size))  # a large JPEG is decoded at a lower scale
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # convert() would clip its 65,536 levels at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if image.size != (image_size, image_size):
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)


def read_images(paths: Sequence[str | Path], image_size: int) -> Tensor:
    """Image files -> uint8 (N, 3, H, W), H = W = image_size; InputError for an unreadable one."""
    images = []
    for path in paths:
        try:
            images.append(torch.tensor(read_image(Path(path), image_size)))
        except Exception as error:  # Pillow raises many types on broken files
            raise InputError(
                f"{path} cannot be read as an image ({error}): name a PNG, JPEG or another file "
                "that Pillow opens"
            ) from error
    return torch.stack(images)


def _read_all(
    paths: list[Path], image_size: int, *, hold: bool
) -> tuple["Tensor | ImageFiles", list[bool]]:
    """Read every file once: what can be read is known before training, not hours into it.

    Returns all images as uint8 (N, 3, H, W), or, unless they are to be held, as `ImageFiles`; and
    which of them could be read. Those that could not are named, and counted.
    """
    images = np.zeros((len(paths) if hold else 0, 3, image_size, image_size), dtype=np.uint8)

    def read(i: int) -> str | None:
        try:
            image = read_image(paths[i], image_size)
        except Exception as error:  # Pillow raises many types on broken files
            return str(error) or type(error).__name__
        if hold:
            images[i] = image
        return None

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # Pillow decodes in parallel
        work = pool.map(read, range(len(paths)))
        faults = list(tqdm(work, total=len(paths), desc="reading", unit="file", leave=False))
    broken = [(path, fault) for path, fault in zip(paths, faults, strict=True) if fault]
    for path, fault in broken[:MAX_NAMED]:
        print(f"skipped {path}: {fault}")
    if len(broken) > MAX_NAMED:
        print(f"skipped {len(broken) - MAX_NAMED} more")
    if broken:
        print(f"skipped {len(broken)} of {len(paths)} files that cannot be read as an image")
    held = torch.from_numpy(images) if hold else ImageFiles(paths, image_size)
    return held, [fault is None for fault in faults]


class ImageFiles(Dataset):
    """Image files that are read when they are asked for: item i is uint8 (3, H, W)."""

    def __init__(self, paths: list[Path], image_size: int):
        self.paths, self.image_size = paths, image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: "int | slice | np.ndarray") -> "Tensor | ImageFiles":
        """One image; or, of a slice or an array of indices, the smaller set."""
        if isinstance(index, slice):
            return ImageFiles(self.paths[index], self.image_size)
        if isinstance(index, np.ndarray):
            return ImageFiles([self.paths[i] for i in index], self.image_size)
        try:
            # A copy: to share the memory of a read-only array, torch warns.
            return torch.tensor(read_image(self.paths[index], self.image_size))
        except Exception as error:
            raise InputError(
                f"{self.paths[index]} cannot be read any more ({error}): "
                "put it back and resume, or start a new run without it"
            ) from error
