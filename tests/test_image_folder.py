import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqgan import image_folder as folders
from vqgan.data import TrainLoader, eval_batches, load_dataset, pixel_variance
from vqgan.errors import InputError
from vqgan.image_folder import ImageFiles, find_images, read_image, read_images


def test_class_folders_are_split_once(image_folder):
    first, again = (load_dataset(str(image_folder), image_size=32, seed=s) for s in (0, 1))
    assert first.class_names == ("cats", "dogs")
    assert first.train_images.shape == (36, 3, 32, 32) and first.test_images.shape == (4, 3, 32, 32)
    assert torch.equal(first.train_images, again.train_images)
    bright = first.train_images.float().mean(dim=(1, 2, 3)) > 110  # dogs are 100 levels brighter
    assert torch.equal(bright.long(), first.train_labels)
    assert len(set(first.first(10).train_labels.tolist())) == 2  # --limit sees all classes


def test_train_and_test_folders_are_kept_apart(image_folder, tmp_path):
    root = tmp_path / "split"
    for part in ("train", "test"):
        for name in ("cats", "dogs"):
            (root / part / name).mkdir(parents=True)
    for name in ("cats", "dogs"):
        for i, path in enumerate(sorted((image_folder / name).iterdir())):
            path.rename(root / ("train" if i < 15 else "test") / name / path.name)
    dataset = load_dataset(str(root))
    assert len(dataset.train_images) == 30 and len(dataset.test_images) == 10
    assert dataset.test_labels.bincount().tolist() == [5, 5]
    (root / "test" / "dogs").rename(root / "test" / "wolves")
    with pytest.raises(InputError, match="dogs.*wolves"):
        load_dataset(str(root))
    (root / "test").rename(root / "val")
    with pytest.raises(InputError, match="train.* give train/ and test/"):
        load_dataset(str(root))


def test_files_beside_class_folders_are_counted(image_folder, capsys):
    for name in ("notes.txt", "labels.csv", "paper.pdf", ".DS_Store", ".cover.png"):
        (image_folder / name).touch()
    dataset = load_dataset(str(image_folder))
    assert "skipped 3 files next to" in capsys.readouterr().out
    assert len(dataset.train_images) + len(dataset.test_images) == 40


def test_images_beside_folders_are_refused(image_folder):
    """Nobody can know whether the images are meant, or the folders."""
    for name in ("a.png", "b.JPG", "notes.txt"):
        (image_folder / name).touch()
    with pytest.raises(InputError, match=r"2 images next to 2 folders \(cats, dogs\): move"):
        load_dataset(str(image_folder))


@pytest.mark.parametrize("kind", ["class folders", "loose images"])
def test_hidden_folders_are_left_out(image_folder, kind):
    """They hold copies, which would be in both parts of the split."""
    cats = image_folder / "cats"
    for hidden in (".ipynb_checkpoints", ".thumbnails/large"):
        shutil.copytree(image_folder / "dogs", cats / hidden)
    if kind == "class folders":
        (cats / "more").mkdir()  # a folder that is not hidden
        (cats / "05.png").rename(cats / "more" / "05.png")
    dataset = load_dataset(str(image_folder if kind == "class folders" else cats))
    num_images = len(dataset.train_images) + len(dataset.test_images)
    assert num_images == (40 if kind == "class folders" else 20)


def test_folders_among_paths_stand_for_their_images(image_folder, tmp_path):
    cats, dogs = image_folder / "cats", image_folder / "dogs"
    for name in (".hidden.png", ".thumbnails/a.png", "notes.txt", "deep/er/z.png"):
        (dogs / name).parent.mkdir(parents=True, exist_ok=True)
        (dogs / name).touch()
    expected = [dogs / f"{i:02}.png" for i in range(20)] + [dogs / "deep" / "er" / "z.png"]
    assert find_images([str(cats / "07.png"), str(dogs), "a", "notes.txt"]) == [
        cats / "07.png", *expected, Path("a"), Path("notes.txt")
    ]  # fmt: skip
    assert len(find_images([image_folder])) == 41
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").touch()
    with pytest.raises(InputError, match="none has no images in it: "):
        find_images([cats, tmp_path / "none"])


def test_loose_images_have_no_labels(image_folder):
    dataset = load_dataset(str(image_folder / "cats"))
    assert dataset.train_labels is None and dataset.class_names == ()
    assert len(dataset.train_images) == 18 and len(dataset.test_images) == 2


def test_a_large_folder_streams_the_same_images(image_folder, monkeypatch):
    held = load_dataset(str(image_folder))
    monkeypatch.setattr(folders, "MEMORY_LIMIT", 0)
    streamed = load_dataset(str(image_folder))
    assert isinstance(streamed.train_images, ImageFiles)
    for a, b in zip(
        TrainLoader(held.train_images, 6), TrainLoader(streamed.train_images, 6), strict=True
    ):
        assert torch.equal(a, b)
    assert pixel_variance(held.train_images) == pixel_variance(streamed.train_images)


def test_a_streamed_image_owns_its_memory(image_folder, recwarn):
    """Pillow's arrays are read-only: torch would warn, and a write to the tensor be undefined."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # or it warns once in a process, perhaps before this test
    try:
        ImageFiles(sorted(image_folder.rglob("*.png")), 32)[0]
    finally:
        torch.set_warn_always(before)
    assert not recwarn.list


@pytest.mark.parametrize("limit", [folders.MEMORY_LIMIT, 0], ids=["held", "streamed"])
def test_unreadable_files_are_named_skipped_and_counted(image_folder, capsys, monkeypatch, limit):
    monkeypatch.setattr(folders, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(folders, "MAX_NAMED", 2)
    truncated = image_folder / "dogs" / "00.png"
    truncated.write_bytes(truncated.read_bytes()[:200])
    (image_folder / "cats" / "broken.png").write_bytes(b"not an image")
    (image_folder / "dogs" / "empty.jpg").touch()
    dataset = load_dataset(str(image_folder))
    printed = capsys.readouterr().out
    assert "broken.png" in printed and "00.png" in printed
    assert printed.count("skipped ") == 3 and "skipped 3 of 42" in printed  # two are named
    assert len(dataset.train_images) + len(dataset.test_images) == 39


def test_a_truncated_file_of_a_streamed_folder_is_named(image_folder):
    path = image_folder / "cats" / "00.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="00.png") as error:
        list(eval_batches(ImageFiles([path], 32), 1))
    assert "\n" not in str(error.value)  # although a worker process raised it


def test_folders_without_images_are_refused(tmp_path, image_folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no files"):
        load_dataset(str(tmp_path / "empty"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("text")
    with pytest.raises(InputError, match="none of the 1 files.*bad"):
        load_dataset(str(tmp_path / "bad"))
    (image_folder / "eels").mkdir()
    with pytest.raises(InputError, match="eels"):
        load_dataset(str(image_folder))
    (image_folder / "eels" / "a.png").write_text("text")
    with pytest.raises(InputError, match="'eels'.* has no readable image"):
        load_dataset(str(image_folder))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("size", [(32, 32), (64, 20), (5, 70)])
def test_any_mode_and_size_becomes_rgb(tmp_path, mode, size):
    """A mid-grey image stays mid-grey, whatever the file's mode."""
    if mode in ("I;16", "I"):  # of 16 bits, and 16 bits in 32
        dtype = np.uint16 if mode == "I;16" else np.int32
        image = Image.fromarray(np.full(size[::-1], 128 * 256, dtype=dtype))
    else:
        image = Image.new("L", size, 128).convert(mode)
    path = tmp_path / ("image.tif" if mode in ("CMYK", "I") else "image.png")
    image.save(path)
    pixels = read_image(path, 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8
    assert abs(pixels.mean() - 128) < (12 if mode == "1" else 2)  # "1" is dithered


@pytest.mark.parametrize(
    "values, problem",
    [
        (np.linspace(0, 1, 64, dtype=np.float32), "mode F has no known range"),
        (np.arange(-1, 63, dtype=np.int32), "from -1 to 62"),
        (np.arange(64, dtype=np.int32) * 1041, "from 0 to 65583"),
    ],
)
def test_values_of_unknown_range_are_refused(tmp_path, values, problem):
    """They would come out black or white, and nothing would say so."""
    Image.fromarray(np.tile(values, (64, 1))).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"a.tif.*{problem}.*save it as 8 or 16 bits"):
        read_images([tmp_path / "a.tif"], 32)


@pytest.mark.parametrize("bits, is_dark", [(8, True), (12, True), (14, False), (16, False)])
def test_dark_images_of_16_bits_are_warned_of_once(image_folder, bits, is_dark):
    """Many cameras and scanners write 12 bits into 16."""
    ramp = np.tile(np.linspace(0, 2**bits - 1, 64).astype(np.uint16), (64, 1))
    for name in ("b.png", "a.png"):
        Image.fromarray(ramp).save(image_folder / "cats" / name)
    Image.new("L", (32, 32)).save(image_folder / "cats" / "black.png")  # of 8 bits, so it is meant
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as a user's Python does
        load_dataset(str(image_folder))
    assert [str(w.message) for w in caught] == is_dark * [
        "images of 16 bits are almost black: are they of 12?"
    ]


def smooth(mode):
    """An image (700, 500) without edges, and not the same after a turn."""
    x, y = np.meshgrid(np.linspace(0, 1, 700), np.linspace(0, 1, 500))
    channels = [255 * x, 255 * y, 255 * x * y, 255 - 128 * x * x]
    if mode in ("I;16", "I"):
        return Image.fromarray((257 * channels[2]).astype("u2" if mode == "I;16" else "i4"))
    image = Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
    return image.convert("RGB").convert(mode) if mode in ("P", "L") else image.convert(mode)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("turn", [1, 6])
def test_a_huge_image_is_the_same_and_not_copied_at_its_size(tmp_path, monkeypatch, mode, turn):
    """At 13,000 x 13,000 pixels with transparency, four copies took 2.6 GB."""
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I") else "a.png")
    smooth(mode).save(path, exif=exif, **({"transparency": 0} if mode == "P" else {}))
    expected = read_image(path, 16).astype(int)
    sizes, convert = [], Image.Image.convert
    monkeypatch.setattr(
        Image.Image, "convert", lambda im, mode: (sizes.append(im.size), convert(im, mode))[1]
    )
    monkeypatch.setattr(folders, "HUGE", 700 * 500 - 1)
    assert np.abs(read_image(path, 16) - expected).max() <= 6  # of 255
    if mode in folders.REDUCIBLE:
        assert all(width * height <= 700 * 500 / 40 for width, height in sizes[mode == "RGBA" :])


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 32) == 255).all()


def test_images_that_a_user_names_are_read_or_refused(image_folder):
    paths = sorted(image_folder.rglob("*.png"))[:3]
    images = read_images([str(path) for path in paths], 16)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images[2], torch.tensor(read_image(paths[2], 16)))
    (image_folder / "text.png").write_text("no image")
    for name in ("text.png", "gone.png"):
        with pytest.raises(InputError, match=f"{name} cannot be read as an image"):
            read_images([paths[0], image_folder / name], 16)


def test_a_part_of_a_streamed_set_is_streamed_too(image_folder):
    files = ImageFiles(sorted(image_folder.rglob("*.png")), 16)
    assert len(files) == 40 and files[3].shape == (3, 16, 16)
    for part in (files[3:5], files[np.array([3, 4])]):
        assert isinstance(part, ImageFiles) and len(part) == 2
        assert torch.equal(part[0], files[3]) and torch.equal(part[1], files[4])


def test_an_image_that_was_turned_is_turned_back(tmp_path):
    """By the orientation that a camera writes down."""
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[0] = 255  # a white row at the top
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is on the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    read = read_image(tmp_path / "turned.png", 8)
    assert (read[:, :, -1] == 255).all() and (read[:, :, :-1] == 0).all()
