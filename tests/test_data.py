import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from vqgan import data
from vqgan.data import (
    TrainLoader,
    eval_batch_size,
    eval_batches,
    images_fingerprint,
    load_dataset,
    pixel_variance,
)
from vqgan.errors import InputError
from vqgan.image_folder import ImageFiles
from vqgan.images import from_uint8


def test_variance_is_numpys():
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    expected = np.var(images.numpy() / 255.0) * 4  # [-1, 1] is twice as wide as [0, 1]
    assert pixel_variance(images) == pytest.approx(expected, rel=1e-6)


def test_images_of_one_colour_are_refused():
    with pytest.raises(InputError, match="one color"):
        red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
        pixel_variance(red.expand(5, 3, 8, 8))


def numbered(n):
    """Images that say which they are: all pixels of image i are i."""
    return torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 4, 4).contiguous()


def numbers(x):
    return ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    batches = TrainLoader(numbered(20), 5, seed=1)
    first = [i for x in batches for i in numbers(x)]
    second = [i for x in batches for i in numbers(x)]
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert first == [i for x in TrainLoader(numbered(20), 5, seed=1) for i in numbers(x)]
    assert first != [i for x in TrainLoader(numbered(20), 5, seed=2) for i in numbers(x)]


def test_the_last_incomplete_batch_is_left_out():
    assert [len(x) for x in TrainLoader(numbered(23), 5)] == [5, 5, 5, 5]


def test_flips_mirror_about_half_of_the_images_and_can_be_switched_off():
    gradient = torch.arange(0, 200, 50, dtype=torch.uint8).expand(400, 3, 4, 4).contiguous()
    (x,) = TrainLoader(gradient, 400, flip=True)
    mirrored = x[:, 0, 0, 0] > x[:, 0, 0, -1]
    assert 150 < mirrored.sum() < 250
    (x,) = TrainLoader(gradient, 400, flip=False)
    assert torch.equal(x, from_uint8(gradient))


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 9])
def test_batches_go_on_where_their_state_was_taken(stop):
    def endless(batches):
        while True:
            yield from batches

    whole = TrainLoader(numbered(20), 5, seed=1)
    stream = endless(whole)
    for _ in range(stop):
        next(stream)
    state = whole.state_dict()
    expected = [next(stream) for _ in range(6)]
    resumed = TrainLoader(numbered(20), 5, seed=99)
    resumed.load_state_dict(state)
    stream = endless(resumed)
    assert all(torch.equal(next(stream), x) for x in expected)


def test_batches_of_another_set_are_refused():
    batches = TrainLoader(numbered(21), 5)
    with pytest.raises(InputError, match="20 training images.*21"):
        batches.load_state_dict(TrainLoader(numbered(20), 5).state_dict())


def test_batches_of_other_images_are_refused_however_many():
    state = TrainLoader(numbered(20), 5).state_dict()
    others = TrainLoader(numbered(20).flip(0), 5)
    with pytest.raises(InputError, match="other training images: give those"):
        others.load_state_dict(state)
    del state["images"]  # as in checkpoints of earlier versions
    others.load_state_dict(state)


def test_images_are_fingerprinted_once_and_not_before_the_first_checkpoint():
    with mock.patch.object(data, "images_fingerprint", wraps=images_fingerprint) as fingerprint:
        batches = TrainLoader(numbered(20), 5)
        list(batches)
        assert fingerprint.call_count == 0
        assert batches.state_dict()["images"] == batches.state_dict()["images"]
        assert fingerprint.call_count == 1


def test_a_fingerprint_is_of_every_pixel():
    images = numbered(20)
    before = images_fingerprint(images)
    assert before == images_fingerprint(images.expand(2, *images.shape)[1].clone())
    assert before == images_fingerprint(images.mT.contiguous().mT)  # of another layout in memory
    images[19, 2, 3, 3] += 1
    assert images_fingerprint(images) != before


def test_a_fingerprint_of_files_stays_when_their_folder_moves(image_folder, tmp_path):
    def fingerprint(folder, image_size=16, names=("cats", "dogs")):
        paths = [path for name in names for path in sorted((folder / name).iterdir())]
        return images_fingerprint(ImageFiles(paths, image_size))

    before, cats = fingerprint(image_folder), fingerprint(image_folder, names=["cats"])
    moved = image_folder.rename(tmp_path / "moved")
    assert fingerprint(moved) == before and fingerprint(moved, names=["cats"]) == cats != before
    assert fingerprint(moved, image_size=32) != before
    (moved / "cats").rename(moved / "lynxes")
    assert fingerprint(moved, names=["lynxes", "dogs"]) != before
    (moved / "lynxes").rename(moved / "cats")
    assert fingerprint(moved) == before
    with open(moved / "dogs" / "19.png", "ab") as file:
        file.write(b" ")
    assert fingerprint(moved) != before


STREAM = """
import os, signal, sys, time
from pathlib import Path
from vqgan.data import TrainLoader
from vqgan.image_folder import ImageFiles

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
try:
    images = ImageFiles(sorted(Path(sys.argv[1]).rglob("*.png")), 32)
    for number, x in enumerate(TrainLoader(images, 1)):
        if number > 20:  # every worker has given some
            os.killpg(0, signal.SIGINT)
            time.sleep(1)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent in another way")
def test_ctrl_c_stops_a_streamed_folder_without_tracebacks_of_its_workers(image_folder):
    """Ctrl-C reaches every process of the group."""
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(image_folder)],
        capture_output=True, text=True, start_new_session=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout == "stopped\n" and "KeyboardInterrupt" not in done.stderr, done.stderr


def test_batches_leave_the_global_generator_alone(image_folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(TrainLoader(numbered(20), 5))
    list(eval_batches(ImageFiles(sorted(image_folder.rglob("*.png")), 16), 20))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [0, -1, 21])
def test_a_batch_size_that_does_not_fit_is_refused(batch_size):
    with pytest.raises(InputError, match=f"{batch_size}.*1 to 20"):
        TrainLoader(numbered(20), batch_size)


def test_batches_in_order_give_all():
    x = torch.cat(list(eval_batches(numbered(23), 5)))
    assert numbers(x) == list(range(23))


def test_an_unknown_source_is_named():
    with pytest.raises(InputError, match="imagenet.*cifar10.*shapes.*folder"):
        load_dataset("imagenet")


def test_cifar10_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    with pytest.raises(InputError) as error:
        load_dataset("cifar10", root=tmp_path)
    for part in ("cifar-10-python.tar.gz", str(tmp_path), "data_root=", "data=shapes"):
        assert part in str(error.value)


def test_shapes_have_captions_and_the_same_seed_the_same_images(shapes):
    assert shapes.train_images.shape == (10_000, 3, 32, 32)
    assert len(shapes.test_captions) == len(shapes.test_images) == 2_000
    assert shapes.class_names[shapes.test_labels[0]] in shapes.test_captions[0]
    with pytest.raises(InputError, match="image_size=64.*shapes.*32"):
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
    more, fewer = (load_dataset("shapes", seed=0, num_rendered=count) for count in (10_300, 200))
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
    assert len(load_dataset("textures", num_rendered=10_001).train_images) == 10_001


def test_textures_of_another_size_are_refused():
    with pytest.raises(InputError, match="image_size=64.*textures"):
        load_dataset("textures", image_size=64)


def test_labels_come_with_their_images_and_resume():
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 2, 2)
    batches = TrainLoader(images, 8, seed=3, labels=torch.arange(40) * 10)
    seen = []
    for x, labels in batches:
        numbers = ((x[:, 0, 0, 0] + 1) * 127.5).round().long()
        assert torch.equal(labels, numbers * 10)
        seen += labels.tolist()
        if batches.position == 2:
            state = batches.state_dict()
    assert sorted(seen) == [10 * i for i in range(40)]
    other = TrainLoader(images, 8, seed=9, labels=torch.arange(40) * 10)
    other.load_state_dict(state)
    assert [label for _, labels in other for label in labels.tolist()] == seen[16:]


def test_fewer_images_are_measured_at_once_the_larger_they_are():
    assert [eval_batch_size(size) for size in (32, 64, 256, 10_000)] == [500, 125, 7, 1]
    images = numbered(23).repeat(1, 1, 8, 8)  # 32 pixels
    (x,) = eval_batches(images)
    assert numbers(x) == list(range(23))
