import numpy as np
import pytest
import torch
from PIL import Image

from vqgan import image_folder as folders
from vqgan.data import TrainLoader, eval_batches, load_dataset, pixel_variance
from vqgan.errors import InputError
from vqgan.image_folder import ImageFiles, read_image, read_images


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
    (image_folder / "notes.txt").touch()
    (image_folder / ".DS_Store").touch()
    load_dataset(str(image_folder))
    assert "skipped 1 files next to" in capsys.readouterr().out


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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(32, 32), (64, 20), (5, 70)])
def test_any_mode_and_size_becomes_rgb(tmp_path, mode, size):
    """A mid-grey image stays mid-grey, whatever the file's mode."""
    if mode == "I;16":
        image = Image.fromarray(np.full(size[::-1], 128 * 256, dtype=np.uint16))
    else:
        image = Image.new("L", size, 128).convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    pixels = read_image(path, 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8
    assert abs(pixels.mean() - 128) < (12 if mode == "1" else 2)  # "1" is dithered


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
