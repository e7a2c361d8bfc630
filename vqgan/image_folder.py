"""A folder of images: which files it has, which of them can be read, how they are split.

    folder/train/<class>/*  and  folder/test/<class>/*      two parts, used as they are
    folder/<class>/*                                        labeled images, split here
    folder/*                                                loose images, split here

Images of any mode and size that Pillow opens become RGB of one size. Files that cannot be read are
named and left out, before training and not hours into it.
"""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from vqgan.console import progress_bar
from vqgan.errors import InputError, file_input

TEST_FRACTION = 0.1  # of the images in a folder without train/ and test/
HUGE = 2**24  # pixels of a file
REDUCIBLE = ("L", "LA", "RGB", "RGBA", "CMYK")  # modes whose pixels can be averaged
MAX_NAMED = 100  # unreadable files to name; the rest are only counted
MEMORY_LIMIT = 4 * 2**30  # bytes of uint8 images to hold at once; a larger folder streams


def read_folder(folder: Path, *, image_size: int) -> tuple:
    """List the files, read them, and split them unless the folder does.

    Returns the arguments of `data.ImageDataset`: images, labels and the names of the classes.

    Raises:
        InputError: the folder or a class has no readable image, or the parts do not match.
    """
    parts = [folder / name for name in ("train", "test") if (folder / name).is_dir()]
    if len(parts) == 1:
        raise InputError(f"{folder} has only {parts[0].name}/: give train/ and test/")
    paths, labels, class_names = list_images(parts[0] if parts else folder)
    num_train = len(paths)
    if parts:
        test_paths, test_labels, test_names = list_images(parts[1])
        unmatched = sorted(set(class_names) ^ set(test_names))
        if unmatched:
            raise InputError(f"train/ and test/ of {folder} must both have the classes {unmatched}")
        paths, labels = paths + test_paths, labels + test_labels

    images, readable = _read_all(paths, image_size)
    if not readable:
        raise InputError(f"none of the {len(paths)} files in {folder} is an image: give others")
    found = {labels[i] for i in readable}
    for label, name in enumerate(class_names):
        if label not in found:
            raise InputError(f"class {name!r} in {folder} has no readable image: add some")

    # They are shuffled, so that the first N images are of all classes, and always with seed 0, so
    # that runs of other seeds are measured on the same test images.
    order = np.random.default_rng(0).permutation(readable)
    if parts:
        train, test = order[order < num_train], order[order >= num_train]
    else:
        num_test = max(1, round(TEST_FRACTION * len(order)))
        train, test = order[num_test:], order[:num_test]
    if len(train) == 0 or len(test) == 0:
        raise InputError(f"{folder} has {len(train)} train and {len(test)} test images: add more")
    if not class_names:
        return images[train], images[test], None, None, ()
    all_labels = torch.tensor(labels)
    return images[train], images[test], all_labels[train], all_labels[test], class_names


def list_images(folder: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Files in class folders with their labels, or loose files, with labels 0; and class names.

    Raises:
        InputError: a folder is empty, or images lie beside folders, so that either could be meant.
    """
    entries = sorted(p for p in folder.iterdir() if p.name[0] != ".")
    classes = [p for p in entries if p.is_dir()]
    loose = [p for p in entries if not p.is_dir()]
    num_images = sum(map(_is_image, loose))
    if classes and num_images:
        raise InputError(
            f"{folder} has {num_images} images next to {len(classes)} folders "
            f"({', '.join(p.name for p in classes[:3])}): move the images into class folders, or "
            "the folders to another place"
        )
    if classes and loose:
        print(f"skipped {len(loose)} files next to the class folders of {folder}: not images")
    paths, labels = [], []
    for label, directory in enumerate(classes or [folder]):
        files = _files_below(directory)
        if not files:
            raise InputError(f"the folder {directory} has no files in it: put images there")
        paths += files
        labels += [label] * len(files)
    return paths, labels, tuple(directory.name for directory in classes)


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Replace each folder by the images in it, sorted; files are taken as they are.

    Raises:
        InputError: a folder has no images.
    """
    found = []
    for path in map(Path, paths):
        images = list(filter(_is_image, _files_below(path))) if path.is_dir() else [path]
        if not images:
            raise InputError(f"the folder {path} has no images in it: give one that has")
        found += images
    return found


def _files_below(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, sorted.

    Hidden ones are left out, because they are copies that a notebook or a file manager makes.
    """
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in files if not any(n[0] == "." for n in p.relative_to(folder).parts))


def _is_image(path: Path) -> bool:
    """Whether Pillow opens files with this suffix; the file itself is not looked at."""
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def read_image(path: Path, image_size: int) -> np.ndarray:
    """One image file of any mode and size -> uint8 (3, image_size, image_size), RGB.

    The shorter side is resized to fit, and the center is cropped. Transparent images are laid over
    white. Raises OSError (or another of Pillow's errors) if the file is not an image, and
    ValueError if nobody can know which of its values is white.
    """
    with Image.open(path) as file:
        file.draft("RGB", (image_size, image_size))  # a large JPEG is decoded at a lower scale
        factor = min(file.size) // (4 * image_size)
        image: Image.Image = file
        if file.width * file.height > HUGE and factor > 1 and file.mode in REDUCIBLE:
            file.load()  # turns a TIFF that was turned, which swaps its width and height
            image = file.reduce(factor)  # first, because each step below copies the image
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("mode F has no known range: save it as 8 or 16 bits")
        if image.mode[0] == "I":  # 16 or 32 bits; convert() would clip their 65,536 levels at 255
            values = np.asarray(image)
            low, high = values.min(), values.max()
            if low < 0 or high > 65_535:
                raise ValueError(f"values from {low} to {high}: save it as 8 or 16 bits")
            if high < 0.1 * 65_535:
                warnings.warn("images of 16 bits are almost black: are they of 12?", stacklevel=1)
            image = Image.fromarray((values >> 8).astype(np.uint8))
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if image.size != (image_size, image_size):
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)


def read_images(paths: Sequence[str | Path], image_size: int) -> Tensor:
    """Files -> uint8 (N, 3, H, W), H = W = image_size. Raises InputError if one is unreadable."""
    images = []
    for path in paths:
        with file_input(f"{path} cannot be read as an image"):
            images.append(torch.tensor(read_image(Path(path), image_size)))
    return torch.stack(images)


def read_mask(path: str | Path, image_path: str | Path, image_size: int) -> Tensor:
    """A black and white image of the size of another -> (H, W) bool, true where it is white.

    It is resized and cropped as the image is. Every pixel of the small image that has seen what was
    below the white is true: the bicubic filter reaches two pixels far. What is transparent counts
    as black.

    Raises:
        InputError: one of both is no image, or their sizes differ.
    """
    sizes = []
    for file in (path, image_path):
        with file_input(f"{file} cannot be read as an image"), Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            sizes.append(image.size)
            if file == path:
                image = image.convert("RGBA")
                mask = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    if sizes[0] != sizes[1]:
        given, expected = ("x".join(map(str, size)) for size in sizes)
        raise InputError(f"{path} has {given} pixels, and {image_path} {expected}: give one size")
    white = np.asarray(mask.convert("L")) > 127
    if white.shape != (image_size, image_size):
        full = Image.fromarray(white.astype(np.float32))  # in floats no small share is rounded off
        small = ImageOps.fit(full, (image_size, image_size), Image.Resampling.BOX)
        touched = Image.fromarray(np.asarray(small) > 0).convert("L")
        white = np.asarray(touched.filter(ImageFilter.MaxFilter(5))) > 0
    return torch.tensor(white)


def _read_all(paths: list[Path], image_size: int) -> tuple["Tensor | ImageFiles", list[int]]:
    """Read every file once, so that bad ones are known before training, not hours into it.

    Returns all images, uint8 (N, 3, H, W), or as `ImageFiles` if they are too large to hold, and
    the indices of those that can be read. The others are named and counted.
    """
    fits = len(paths) * 3 * image_size**2 <= MEMORY_LIMIT
    images = np.zeros((len(paths) if fits else 0, 3, image_size, image_size), dtype=np.uint8)

    def read(i: int) -> str | None:
        try:
            image = read_image(paths[i], image_size)
        except Exception as error:  # Pillow raises many types on broken files
            return str(error) or type(error).__name__
        if fits:
            images[i] = image
        return None

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # Pillow decodes in parallel
        work = pool.map(read, range(len(paths)))
        bar = progress_bar(work, total=len(paths), desc="reading", unit="file", leave=False)
        faults = list(bar)
    broken = [i for i, fault in enumerate(faults) if fault is not None]
    for i in broken[:MAX_NAMED]:
        print(f"skipped {paths[i]}: {faults[i]}")
    if broken:
        print(f"skipped {len(broken)} of {len(paths)} files that cannot be read as an image")
    readable = [i for i, fault in enumerate(faults) if fault is None]
    return torch.from_numpy(images) if fits else ImageFiles(paths, image_size), readable


class ImageFiles(Dataset):
    """Image files that are read when they are indexed: item i is uint8 (3, H, W)."""

    def __init__(self, paths: list[Path], image_size: int):
        self.paths, self.image_size = paths, image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: "int | slice | np.ndarray") -> "Tensor | ImageFiles":
        """Read one image, or select the subset of a slice or an array of indices."""
        if isinstance(index, slice):
            return ImageFiles(self.paths[index], self.image_size)
        if isinstance(index, np.ndarray):
            return ImageFiles(np.array(self.paths)[index].tolist(), self.image_size)
        with file_input(f"{self.paths[index]} is unreadable", ": restore it and resume"):
            # torch.tensor copies, because torch warns when it shares a read-only array.
            return torch.tensor(read_image(self.paths[index], self.image_size))
