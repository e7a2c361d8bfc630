import hashlib

import numpy as np
import pytest

from vqgan.shapes import (
    CLASSES,
    COLORS,
    SHAPES,
    SIZES,
    TEXTURES,
    detect_colors,
    render_shapes,
    render_textures,
)


def test_a_seed_gives_the_same_bytes_on_every_machine():
    images, labels, captions, _ = render_shapes(500, seed=3)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes() + "".join(captions).encode())
    assert digest.hexdigest()[:16] == "e51fcf11e99caeaf"


def test_another_seed_gives_other_images():
    assert not np.array_equal(render_shapes(10, seed=0)[0], render_shapes(10, seed=1)[0])


def test_every_class_colour_and_size_is_drawn_and_captions_name_the_label():
    images, labels, captions, class_names = render_shapes(3000, seed=0)
    assert images.shape == (3000, 3, 32, 32) and images.dtype == np.uint8
    assert class_names == CLASSES and set(labels) == set(range(10))
    for label, caption in zip(labels, captions, strict=True):
        size, color, shape, on, background = caption.split()
        assert shape == CLASSES[label] and on == "on"
        assert size in SIZES and {color, background} <= set(COLORS) and color != background


def test_a_pixel_within_the_shape_has_the_colour_of_the_caption():
    images, _, captions, _ = render_shapes(2000, seed=0)
    for image, caption in zip(images, captions, strict=True):
        if caption.startswith("large") and "circle" in caption:
            color = np.array(COLORS[caption.split()[1]])
            distance = np.abs(image.transpose(1, 2, 0).astype(int) - color).max(axis=-1)
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
    inside = SHAPES[name](axis[None, None, :], axis[None, :, None])
    assert inside.mean() * 2.4**2 == pytest.approx(area, rel=0.02)


# --- colours told from pixels --------------------------------------------------------------------


def test_the_colours_of_drawn_pictures_are_told(shapes):
    captions = [caption.split() for caption in shapes.test_captions[:500]]
    told = detect_colors(shapes.test_images[:500].numpy())
    assert np.mean([c[0] == words[1] for c, words in zip(told, captions, strict=True)]) >= 0.99
    assert np.mean([c[1] == words[4] for c, words in zip(told, captions, strict=True)]) >= 0.99


def test_the_colours_of_pictures_painted_by_hand_are_told():
    pairs = [(a, b) for a in COLORS for b in COLORS if a != b]
    images = np.empty((len(pairs), 3, 32, 32), dtype=np.uint8)
    for image, (square, ground) in zip(images, pairs, strict=True):
        image[:] = np.array(COLORS[ground])[:, None, None]
        image[:, 10:20, 12:22] = np.array(COLORS[square])[:, None, None]
    assert ("red", "blue") in pairs and detect_colors(images) == pairs


def test_a_shape_is_never_said_to_have_the_colour_of_its_background():
    """Also where a model drew no shape at all."""
    images = np.array(list(COLORS.values()), dtype=np.uint8)[:, :, None, None]
    told = detect_colors(np.broadcast_to(images, (8, 3, 32, 32)))
    assert [ground for _, ground in told] == list(COLORS)
    assert all(shape != ground for shape, ground in told)


# --- textures ------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_textures_on_every_machine():
    images, labels, *_ = render_textures(500, seed=3)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes())
    assert digest.hexdigest()[:16] == "44cca8178e282ce1"
    assert not np.array_equal(images, render_textures(500, seed=4)[0])


def test_every_texture_is_drawn_of_two_colours_of_the_palette():
    images, labels, captions, class_names = render_textures(400, seed=0)
    assert captions is None
    assert images.shape == (400, 3, 32, 32) and images.dtype == np.uint8
    assert class_names == TEXTURES and set(labels) == set(range(4))
    palette, pairs = {color: name for name, color in COLORS.items()}, set()
    for image, label in zip(images, labels, strict=True):
        found = {tuple(pixel) for pixel in image.reshape(3, -1).T.tolist()}
        if TEXTURES[label] in ("stripes", "checks"):
            assert len(found) == 2 and found <= set(palette)
            pairs.add(frozenset(palette[color] for color in found))
        else:
            assert len(found) > 20  # mixtures, which lie between the two
            low, high = np.min(list(found), axis=0), np.max(list(found), axis=0)
            assert any(
                (low >= np.minimum(a, b)).all() and (high <= np.maximum(a, b)).all()
                for a in palette
                for b in palette
                if a != b
            )
    assert len(pairs) == 8 * 7 / 2


def test_stripes_and_checks_look_alike_everywhere():
    """The share of one color in the quadrants of 16 pixels, of which a wave takes 10 at most."""
    images, labels, *_ = render_textures(2000, seed=0)
    for name in ("stripes", "checks"):
        chosen = images[labels == TEXTURES.index(name)]
        first = (chosen == chosen[:, :, :1, :1]).all(axis=1)  # (n, 32, 32)
        shares = first.reshape(-1, 2, 16, 2, 16).mean(axis=(2, 4))
        assert shares.min() > 0.3 and shares.max() < 0.7
        assert np.abs(shares.mean(axis=0) - 0.5).max() < 0.02
