import hashlib

import numpy as np
import pytest

from vqgan.shapes import CLASSES, COLOURS, SIZES, _is_inside, draw_shapes


def test_a_seed_gives_the_same_bytes_on_every_machine():
    images, labels, captions, _ = draw_shapes(500, seed=3)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes() + "".join(captions).encode())
    assert digest.hexdigest()[:16] == "e51fcf11e99caeaf"


def test_another_seed_gives_other_images():
    assert not np.array_equal(draw_shapes(10, seed=0)[0], draw_shapes(10, seed=1)[0])


def test_every_class_colour_and_size_is_drawn_and_captions_name_the_label():
    images, labels, captions, class_names = draw_shapes(3000, seed=0)
    assert images.shape == (3000, 3, 32, 32) and images.dtype == np.uint8
    assert class_names == CLASSES and set(labels) == set(range(10))
    for label, caption in zip(labels, captions, strict=True):
        size, colour, shape, on, background = caption.split()
        assert shape == CLASSES[label] and on == "on"
        assert size in SIZES and {colour, background} <= set(COLOURS) and colour != background


def test_a_pixel_within_the_shape_has_the_colour_of_the_caption():
    images, _, captions, _ = draw_shapes(2000, seed=0)
    for image, caption in zip(images, captions, strict=True):
        if caption.startswith("large") and "circle" in caption:
            colour = np.array(COLOURS[caption.split()[1]])
            distance = np.abs(image.transpose(1, 2, 0).astype(int) - colour).max(axis=-1)
            assert (distance <= 20).mean() > 0.2  # pi 0.65^2 / 4 of the image or more


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("circle", np.pi),
        ("ring", np.pi * (1 - 0.36)),
        ("square", 1.7**2),
        ("triangle", 3 * np.sqrt(3) / 4),  # inscribed in the unit circle
        ("diamond", 2 / 1.6),
        ("star", 1.12),  # a pentagram in the unit circle
    ],
)
def test_areas_match_geometry(name, area):
    axis = np.linspace(-1.2, 1.2, 601)
    inside = _is_inside(name, axis[None, None, :], axis[None, :, None])
    assert inside.mean() * 2.4**2 == pytest.approx(area, rel=0.02)
