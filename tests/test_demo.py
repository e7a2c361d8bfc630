import base64
import io
import re
import sys

import numpy as np
import pytest
import torch
from commands import CLASSES, error_of, save
from PIL import Image

from vqgan.demo import BRUSH_SIDE, Demo, show
from vqgan.errors import InputError
from vqgan.images import to_uint8
from vqgan.vqvae import VQVAE

SETTINGS = {"prompt": CLASSES[0], "seed": 3}


@pytest.fixture(scope="module")
def shipped():
    return Demo("shapes", torch.device("cpu"))


@pytest.fixture(scope="module")
def vqvae(tmp_path_factory):
    """A tokenizer alone, untrained, whose decoder is convolutional."""
    path = tmp_path_factory.mktemp("vqvae") / "checkpoint.pt"
    save(path, VQVAE)
    return Demo(str(path), torch.device("cpu"))


def open_pair(folder):
    return Demo(str(folder), torch.device("cpu"))


def images_of(html):
    """The images of a piece of HTML, uint8 (H, W, 3)."""
    files = re.findall(r"data:image/png;base64,([^\"]+)", html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))) for file in files]


def codes_of(html):
    """What the squares of a grid show: a code, or "" where none is yet."""
    return re.findall(r'<button name="position"[^>]*>(\d*)</button>', html)


def hole_of(rows, columns):
    hole = torch.zeros(BRUSH_SIDE, BRUSH_SIDE, dtype=torch.bool)
    hole[rows, columns] = True
    return hole.flatten().tolist()


# --- the first tab -----------------------------------------------------------------------------


def test_an_image_is_shown_as_it_is(shape_images):
    (shown,) = images_of(show(shape_images[:1]))
    assert np.array_equal(shown.transpose(2, 0, 1), (255 * shape_images[0]).round().byte().numpy())


def test_a_click_changes_one_code_of_one_visitor(shipped):
    first = shipped.click(None, "example", 2)
    marked = shipped.click(first, "position", 10)
    code = (int(first.tokens[0, 10]) + 1) % 256
    changed = shipped.click(marked, "code", code)
    assert changed.changed[0, 10] == code
    assert (changed.changed != first.tokens).sum() == 1
    assert torch.equal(first.changed, first.tokens) and torch.equal(marked.tokens, first.tokens)
    images, grid = shipped.board(changed)
    assert codes_of(grid) == [str(code) for code in changed.changed[0].tolist()]
    assert f"<b>code {code}</b>, and the encoder chose {first.tokens[0, 10]}." in grid
    assert re.findall(r'value="(\d+)" aria-pressed="true"', grid) == ["10"]
    assert "24,576 bits" in images and "512 bits" in images
    original, decoded, other, difference, _ = images_of(images)
    assert np.array_equal(original.transpose(2, 0, 1), to_uint8(first.x)[0].numpy())
    assert (decoded != other).any() and difference.max() == 255
    same = images_of(shipped.board(first)[0])
    assert np.array_equal(same[1], same[2]) and not same[3].any()


def test_a_code_of_a_vqvae_changes_its_receptive_field_only(vqvae):
    """Three 3x3 convolutions reach 3 squares further, two transposed ones 18 pixels in all."""
    choice = vqvae.click(vqvae.click(None, "example", 0), "position", 0)
    before = int(choice.tokens[0, 0])
    for code in range(16):
        _, decoded, other, *_ = images_of(vqvae.board(vqvae.click(choice, "code", code))[0])
        differs = (decoded != other).any(axis=2)
        assert not differs[19:].any() and not differs[:, 19:].any()
        assert differs.any() == (code != before)


def test_a_code_of_the_shipped_vqgan_changes_mostly_what_is_near(shipped):
    """Of the squared change, 12x12 pixels around the square have four fifths or more."""
    torch.manual_seed(0)
    tokens = shipped.tokenizer.tokens(shipped.examples).repeat_interleave(8, 0)  # (96, 64)
    changed, fractions = tokens.clone(), []
    positions = torch.randint(64, (len(tokens),))
    changed[torch.arange(len(tokens)), positions] = torch.randint(256, (len(tokens),))
    difference = shipped.tokenizer.decode_tokens(tokens) - shipped.tokenizer.decode_tokens(changed)
    for change, position in zip(difference.square().sum(dim=1), positions.tolist(), strict=True):
        top, left = (4 * i - 4 for i in divmod(position, 8))
        near = change[max(top, 0) : top + 12, max(left, 0) : left + 12].sum()
        fractions += [near / change.sum()] if change.sum() > 0 else []
    assert torch.stack(fractions).mean() >= 0.8


def test_an_upload_is_read_and_deleted(shipped, images):
    choice = shipped.upload(str(images[0]))
    assert choice.x.shape == (1, 3, 32, 32) and not images[0].exists()
    path = images[1].with_name("notes.txt")
    path.write_text("no image")
    with pytest.raises(InputError, match="^notes.txt cannot be read as an image") as raised:
        shipped.upload(str(path))
    assert str(path.parent) not in str(raised.value) and not path.exists()


# --- the second tab ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "class", "masked", "image"])
def test_the_grid_fills_and_the_last_is_the_sample(kind, pairs):
    demo = open_pair(pairs / kind)
    x, N = demo.examples[:1], demo.tokenizer.seq_len
    grids, images = zip(*demo.generate(x, [], **SETTINGS), strict=True)
    filled = [sum(code != "" for code in codes_of(grid)) for grid in grids]
    assert filled == sorted(set(filled)) and filled[-1] == N
    assert len(filled) == (10 if kind == "masked" else N)
    generator = torch.Generator().manual_seed(3)
    condition = demo.condition(CLASSES[0], x)
    tokens = demo.pipeline.transformer.sample(condition, generator=generator)
    assert codes_of(grids[-1]) == [str(code) for code in tokens[0].tolist()]
    assert torch.equal(images[-1], demo.tokenizer.decode_tokens(tokens))
    assert (images[0] == 0).any() and not (images[-1] == 0).any()  # gray where nothing is yet


@pytest.mark.parametrize("kind", ["none", "class", "masked", "image"])
def test_a_hole_is_filled_and_the_rest_is_untouched(kind, pairs):
    demo = open_pair(pairs / kind)
    x = demo.examples[:1]
    *_, (grid, image) = demo.generate(x, hole_of(slice(2, 5), slice(6, 8)), **SETTINGS)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[4:10, 12:16] = True
    assert torch.equal(image[..., ~inside], x[..., ~inside])
    assert (image != x).any(dim=1)[0][inside].all()
    assert "" not in codes_of(grid)


def test_an_image_that_is_the_condition_does_not_show_what_was_in_the_hole(pairs):
    demo, hole = open_pair(pairs / "image"), hole_of(slice(2, 5), slice(6, 8))
    x = demo.examples[:1]
    other = x.clone()
    other[..., 4:10, 12:16] = 1
    *_, (_, image) = demo.generate(x, hole, **SETTINGS)
    *_, (_, same) = demo.generate(other, hole, **SETTINGS)
    assert torch.equal(image, same)


def test_captions_and_dropped_conditions(pairs):
    demo = open_pair(pairs / "caption")
    x, caption = demo.examples[:1], "small red star"
    tokens = demo.pipeline.condition.encode_captions([caption])
    assert torch.equal(demo.condition(caption, x), tokens)
    assert (demo.condition("", x) == demo.pipeline.transformer.null_token).all()
    with pytest.raises(InputError, match="needs a class"):
        open_pair(pairs / "undropped").condition("", x)


@pytest.mark.parametrize(
    ("hole", "settings", "expected"),
    [
        (hole_of([], []), {}, "no hole yet"),
        (hole_of(slice(0, 16), slice(0, 16)), {}, "keep more"),
        ([], {"prompt": "unicorn"}, "no class 'unicorn'"),
        ([], {"temperature": -1}, "temperature=-1"),
    ],
)
def test_what_cannot_be_generated_is_said(hole, settings, expected, pairs):
    demo = open_pair(pairs / "class")
    with pytest.raises(ValueError, match=expected):
        list(demo.generate(demo.examples[:1], hole, **SETTINGS | settings))


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'gradio>=6'" in error_of("demo")
