import functools
from unittest import mock

import numpy as np
import pytest
import torch
from commands import CLASSES, K, save_pair
from PIL import Image

from vqgan.conditions import (
    NO_CONDITION,
    caption_condition,
    class_condition,
    image_condition,
)
from vqgan.data import load_dataset
from vqgan.masked import MaskedTransformer
from vqgan.shapes import render_shapes
from vqgan.transformer import GPT


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="of the tests marked `device`: cuda, say")


@pytest.fixture(scope="session", autouse=True)
def shapes_drawn_once():
    """Runs in this process share the drawn shapes, which take seconds to draw."""
    with mock.patch("vqgan.data.render_shapes", functools.cache(render_shapes)):
        yield


@pytest.fixture(scope="session")
def shapes():
    """Drawn shapes: 10,000 training and 2,000 test images."""
    return load_dataset("shapes", seed=0)


@pytest.fixture(scope="session")
def shape_images(shapes):
    """A few shapes as float (16, 3, 32, 32) in [0, 1]."""
    return shapes.test_images[:16].float() / 255


@pytest.fixture
def image_folder(tmp_path):
    """A folder with two classes of twenty PNG files of 40x36 pixels each."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cats", "dogs")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 128, size=(36, 40, 3), dtype=np.uint8) + 100 * label
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i:02}.png")
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


# --- of the command ----------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path, shape_images):
    """Three image files, one of them of another size."""
    paths = []
    for i in range(3):
        pixels = (255 * shape_images[i].permute(1, 2, 0)).byte().numpy()
        image = Image.fromarray(pixels)
        paths.append(tmp_path / f"{i}.png")
        (image.resize((80, 40)) if i == 2 else image).save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, shapes):
    """A folder with a pair for each kind of condition."""
    folder = tmp_path_factory.mktemp("pairs")
    conditions = {
        "none": NO_CONDITION,
        "class": class_condition(CLASSES),
        "caption": caption_condition(shapes.train_captions[:200]),
        "image": image_condition("gray", K, 16),
    }
    for kind, condition in conditions.items():
        save_pair(folder / kind, condition, shapes.train_images[:64])
    save_pair(folder / "undropped", conditions["class"], shapes.train_images[:64], 0.0)
    save_pair(
        folder / "masked", conditions["class"], shapes.train_images[:64], prior=MaskedTransformer
    )
    return folder


@pytest.fixture
def rows(monkeypatch):
    """The rows of the pictures that are to be drawn, and drawing is left out."""
    drawn = []
    monkeypatch.setattr(
        "vqgan.figures.image_rows", lambda path, rows, *, title: drawn.append((rows, title))
    )
    return drawn


@pytest.fixture
def asked(monkeypatch):
    """Keyword arguments (and the condition's tokens) of every call of a prior's `sample`."""
    calls = []
    for prior in (GPT, MaskedTransformer):

        def remember(self, condition, sample=prior.sample, **settings):
            calls.append(settings | {"condition": condition})
            return sample(self, condition, **settings)

        monkeypatch.setattr(prior, "sample", remember)
    return calls
