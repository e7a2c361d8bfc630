import functools
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from vqgan.data import load_dataset
from vqgan.shapes import draw_shapes


@pytest.fixture(scope="session", autouse=True)
def shapes_drawn_once():
    """Runs in this process share the drawn shapes, which take seconds to draw."""
    with mock.patch("vqgan.data.draw_shapes", functools.cache(draw_shapes)):
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
