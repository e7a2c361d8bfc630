import numpy as np
import pytest
import torch
from PIL import Image

from vqgan import data
from vqgan.data import Batches, batches_in_order, load_dataset, pixel_variance
from vqgan.errors import InputError
from vqgan.image_folder import ImageFiles, read_image
from vqgan.images import from_uint8, to_unit


def test_ranges_and_their_inverse():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = from_uint8(levels)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal((to_unit(x) * 255).round().to(torch.uint8), levels)
    assert to_unit(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]  # decoders are unbounded


def test_variance_is_numpys():
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    expected = np.var(images.numpy() / 255.0) * 4  # [-1, 1] is twice as wide as [0, 1]
    assert pixel_variance(images) == pytest.approx(expected, rel=1e-6)


def test_images_of_one_colour_are_refused():
    with pytest.raises(InputError, match="one colour"):
        red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
        pixel_variance(red.expand(5, 3, 8, 8))


def numbered(n):
    """Images that say which they are: all pixels of image i are i."""
    return torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 4, 4).contiguous()


def numbers(x):
    return ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    batches = Batches(numbered(20), 5, seed=1)
    first = [i for x in batches for i in numbers(x)]
    second = [i for x in batches for i in numbers(x)]
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert first == [i for x in Batches(numbered(20), 5, seed=1) for i in numbers(x)]
    assert first != [i for x in Batches(numbered(20), 5, seed=2) for i in numbers(x)]


def test_the_last_incomplete_batch_is_left_out():
    assert [len(x) for x in Batches(numbered(23), 5)] == [5, 5, 5, 5]


def test_flips_mirror_about_half_of_the_images_and_can_be_switched_off():
    gradient = torch.arange(0, 200, 50, dtype=torch.uint8).expand(400, 3, 4, 4).contiguous()
    (x,) = Batches(gradient, 400, flip=True)
    mirrored = x[:, 0, 0, 0] > x[:, 0, 0, -1]
    assert 150 < mirrored.sum() < 250
    (x,) = Batches(gradient, 400, flip=False)
    assert torch.equal(x, from_uint8(gradient))


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 9])
def test_batches_go_on_where_their_state_was_taken(stop):
    def endless(batches):
        while True:
            yield from batches

    whole = Batches(numbered(20), 5, seed=1)
    stream = endless(whole)
    for _ in range(stop):
        next(stream)
    state = whole.state_dict()
    expected = [next(stream) for _ in range(6)]
    resumed = Batches(numbered(20), 5, seed=99)
    resumed.load_state_dict(state)
    stream = endless(resumed)
    assert all(torch.equal(next(stream), x) for x in expected)


def test_batches_of_another_set_are_refused():
    batches = Batches(numbered(21), 5)
    with pytest.raises(InputError, match="20 training images.*21"):
        batches.load_state_dict(Batches(numbered(20), 5).state_dict())


def test_batches_leave_the_global_generator_alone(image_folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(Batches(numbered(20), 5))
    list(batches_in_order(ImageFiles(sorted(image_folder.rglob("*.png")), 16), 20))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [0, -1, 21])
def test_a_batch_size_that_does_not_fit_is_refused(batch_size):
    with pytest.raises(InputError, match="20 training images"):
        Batches(numbered(20), batch_size)


def test_batches_in_order_give_all():
    x = torch.cat(list(batches_in_order(numbered(23), 5)))
    assert numbers(x) == list(range(23))


# --- folders -----------------------------------------------------------------------------------


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
    with pytest.raises(InputError, match="dogs, wolves"):
        load_dataset(str(root))
    (root / "test").rename(root / "val")
    with pytest.raises(InputError, match="train/ but no test/"):
        load_dataset(str(root))


def test_files_beside_class_folders_are_counted(image_folder, capsys):
    (image_folder / "notes.txt").touch()
    (image_folder / ".DS_Store").touch()
    load_dataset(str(image_folder))
    assert "skipped 1 files beside" in capsys.readouterr().out


def test_loose_images_have_no_labels(image_folder):
    dataset = load_dataset(str(image_folder / "cats"))
    assert dataset.train_labels is None and dataset.class_names == ()
    assert len(dataset.train_images) == 18 and len(dataset.test_images) == 2


def test_a_large_folder_streams_the_same_images(image_folder, monkeypatch):
    held = load_dataset(str(image_folder))
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    streamed = load_dataset(str(image_folder))
    assert isinstance(streamed.train_images, ImageFiles)
    for a, b in zip(Batches(held.train_images, 6), Batches(streamed.train_images, 6), strict=True):
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


@pytest.mark.parametrize("limit", [data.MEMORY_LIMIT, 0], ids=["held", "streamed"])
def test_unreadable_files_are_named_skipped_and_counted(image_folder, capsys, monkeypatch, limit):
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(data, "MAX_NAMED", 2)
    truncated = image_folder / "dogs" / "00.png"
    truncated.write_bytes(truncated.read_bytes()[:200])
    (image_folder / "cats" / "broken.png").write_bytes(b"not an image")
    (image_folder / "dogs" / "empty.jpg").touch()
    dataset = load_dataset(str(image_folder))
    printed = capsys.readouterr().out
    assert "broken.png" in printed and "00.png" in printed
    assert "skipped 1 more" in printed and "skipped 3 of 42" in printed
    assert len(dataset.train_images) + len(dataset.test_images) == 39


def test_a_truncated_file_of_a_streamed_folder_is_named(image_folder):
    path = image_folder / "cats" / "00.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="00.png") as error:
        list(batches_in_order(ImageFiles([path], 32), 1))
    assert "\n" not in str(error.value)  # although a worker process raised it


def test_folders_without_images_are_refused(tmp_path, image_folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no files"):
        load_dataset(str(tmp_path / "empty"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("text")
    with pytest.raises(InputError, match="none of the 1 files"):
        load_dataset(str(tmp_path / "bad"))
    (image_folder / "eels").mkdir()
    with pytest.raises(InputError, match="eels"):
        load_dataset(str(image_folder))
    (image_folder / "eels" / "a.png").write_text("text")
    with pytest.raises(InputError, match="'eels'.* has no readable image"):
        load_dataset(str(image_folder))


def test_an_unknown_source_is_named():
    with pytest.raises(InputError, match="'imagenet'.*cifar10.*shapes.*folder"):
        load_dataset("imagenet")


def test_cifar10_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    with pytest.raises(InputError) as error:
        load_dataset("cifar10", root=tmp_path)
    for part in ("cifar-10-python.tar.gz", str(tmp_path), "--data-root", "--data shapes"):
        assert part in str(error.value)


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


def test_shapes_have_captions_and_the_same_seed_the_same_images(shapes):
    assert shapes.train_images.shape == (10_000, 3, 32, 32)
    assert len(shapes.test_captions) == len(shapes.test_images) == 2_000
    assert shapes.class_names[shapes.test_labels[0]] in shapes.test_captions[0]
    with pytest.raises(InputError, match="32 pixels"):
        load_dataset("shapes", image_size=64)


def test_textures_have_classes_and_no_captions_and_the_same_seed_the_same_images():
    first, again = load_dataset("textures", seed=5), load_dataset("textures", seed=5)
    assert first.class_names == ("stripes", "checks", "bumps", "speckle")
    for part, count in (("train", 10_000), ("test", 2_000)):
        images, labels = getattr(first, f"{part}_images"), getattr(first, f"{part}_labels")
        assert images.shape == (count, 3, 32, 32) and images.dtype == torch.uint8
        assert labels.bincount().tolist() == pytest.approx([count / 4] * 4, rel=0.15)
        assert getattr(first, f"{part}_captions") is None
        assert torch.equal(images, getattr(again, f"{part}_images"))
        assert torch.equal(labels, getattr(again, f"{part}_labels"))
    assert not torch.equal(first.train_images[:2000], first.test_images)


def test_more_training_shapes_leave_the_others_and_the_test_images_as_they_are(shapes):
    more, fewer = (load_dataset("shapes", seed=0, num_drawn=count) for count in (10_300, 200))
    for name in ("images", "labels", "captions"):
        usual = getattr(shapes, f"train_{name}")
        longer, shorter = getattr(more, f"train_{name}"), getattr(fewer, f"train_{name}")
        assert len(longer) == 10_300 and len(shorter) == 200
        assert all(
            a == b if name == "captions" else torch.equal(a, b)
            for a, b in ((longer[-10_000:], usual), (shorter, usual[:200]))
        )
    assert torch.equal(more.test_images, shapes.test_images)
    assert more.test_captions == fewer.test_captions == shapes.test_captions
    # The new ones are new: none of them is among the first.
    flat = {image.numpy().tobytes() for image in shapes.train_images}
    assert not any(image.numpy().tobytes() in flat for image in more.train_images[:-10_000])
    assert len(load_dataset("textures", num_drawn=10_001).train_images) == 10_001


def test_textures_of_another_size_are_refused():
    with pytest.raises(InputError, match="textures have 32 pixels a side, not 64"):
        load_dataset("textures", image_size=64)


def test_labels_come_with_their_images_and_resume():
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 2, 2)
    batches = Batches(images, 8, seed=3, labels=torch.arange(40) * 10)
    seen = []
    for x, labels in batches:
        numbers = ((x[:, 0, 0, 0] + 1) * 127.5).round().long()
        assert torch.equal(labels, numbers * 10)
        seen += labels.tolist()
        if batches.position == 2:
            state = batches.state_dict()
    assert sorted(seen) == [10 * i for i in range(40)]
    other = Batches(images, 8, seed=9, labels=torch.arange(40) * 10)
    other.load_state_dict(state)
    assert [label for _, labels in other for label in labels.tolist()] == seen[16:]
