import json

import pytest
import torch

from vqgan.conditions import (
    NO_CONDITION,
    PADDING,
    TRANSFORMS,
    Condition,
    caption_condition,
    class_condition,
    edges,
    gray,
    image_condition,
    lowres,
)
from vqgan.errors import InputError

CAPTIONS = ["Red star on blue", "small blue Heart on red", "heart"]


def pictures():
    return torch.rand(5, 3, 32, 32) * 2 - 1


# --- tokens --------------------------------------------------------------------------------------


def test_a_class_is_its_place_among_the_names():
    condition = class_condition(("cat", "dog", "eel"))
    assert condition.encode_classes(["eel", "cat", "eel"]).tolist() == [[2], [0], [2]]
    assert (condition.vocabulary, condition.length) == (3, 1)


def test_an_unknown_class_is_refused_and_the_known_are_listed():
    with pytest.raises(InputError, match="'wolf'.*cat, dog, eel"):
        class_condition(("cat", "dog", "eel")).encode_classes(["cat", "wolf"])


def test_nothing_is_one_token_which_is_in_its_vocabulary():
    assert NO_CONDITION.start_tokens(3).tolist() == [[0], [0], [0]]
    assert (NO_CONDITION.vocabulary, NO_CONDITION.length) == (1, 1)


def test_the_vocabulary_of_captions_is_their_words_in_order():
    condition = caption_condition(CAPTIONS)
    assert condition.names == (PADDING, "blue", "heart", "on", "red", "small", "star")
    assert (condition.vocabulary, condition.length) == (7, 5)


def test_captions_become_words_whatever_their_case_padded_at_the_end():
    tokens = caption_condition(CAPTIONS).encode_captions(["red STAR on Blue", " heart "])
    assert tokens.tolist() == [[4, 6, 3, 1, 0], [2, 0, 0, 0, 0]]
    assert tokens.dtype == torch.int64


def test_unknown_words_are_named_and_the_known_are_listed():
    with pytest.raises(InputError, match="'moon'.*blue, heart, on, red,"):
        caption_condition(CAPTIONS).encode_captions(["heart", "red moon on green"])


@pytest.mark.parametrize("caption", ["", "  ", "small small blue heart on red"])
def test_empty_and_too_long_captions_are_refused(caption):
    words = len(caption.split())
    with pytest.raises(InputError, match=f"1 to 5 words, not {words}"):
        caption_condition(CAPTIONS).encode_captions([caption])


def test_the_tokens_of_every_drawn_caption_say_its_words(shapes):
    condition = caption_condition(shapes.train_captions)
    assert (condition.vocabulary, condition.length) == (1 + 3 + 8 + 10 + 1, 5)  # "on", padding
    captions = shapes.train_captions + shapes.test_captions
    tokens = condition.encode_captions(captions)
    read = [" ".join(condition.names[token] for token in row) for row in tokens.tolist()]
    assert read == captions


def test_an_image_condition_is_as_long_as_its_tokens():
    condition = image_condition("edges", 512, 32)
    assert (condition.vocabulary, condition.length, condition.transform) == (512, 32, "edges")


@pytest.mark.parametrize(
    "condition",
    [
        NO_CONDITION,
        class_condition(("cat", "dog")),
        caption_condition(CAPTIONS),
        image_condition("gray", 16, 6),
    ],
    ids=lambda condition: condition.kind,
)
def test_a_condition_survives_json_and_a_checkpoint(condition, tmp_path):
    state = condition.to_dict()
    torch.save(state, tmp_path / "c.pt")
    for read in (json.loads(json.dumps(state)), torch.load(tmp_path / "c.pt", weights_only=True)):
        assert read == state and Condition.from_dict(read) == condition


# --- pictures of pictures ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_picture_keeps_its_shape_and_range_and_is_mirrored_with_its_image(name):
    x, picture = pictures(), TRANSFORMS[name]
    made = picture(x)
    assert made.shape == x.shape and made.min() >= -1 and made.max() <= 1
    assert torch.allclose(picture(x.flip(3)), made.flip(3), atol=1e-6)
    assert not torch.allclose(made.flip(3), made, atol=0.1)


def test_gray_weighs_the_colours_as_bt_601():
    x = pictures()
    expected = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    for channel in gray(x).unbind(dim=1):
        assert torch.allclose(channel, expected, atol=1e-6)
    for level in (-1.0, 0.5, 1.0):  # what is grey already stays
        assert torch.allclose(gray(torch.full((1, 3, 4, 4), level)), torch.tensor(level))


def test_a_flat_picture_has_no_edges():
    color = torch.tensor([0.9, -0.4, 0.1]).view(1, 3, 1, 1)
    assert torch.allclose(edges(color.expand(2, 3, 16, 16)), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize(("step", "drawn"), [(2.0, -1), (1.0, -1), (0.5, 0), (0.25, 0.5)])
def test_a_step_of_brightness_is_a_line_as_dark_as_it_is_high(step, drawn):
    x = torch.full((1, 3, 16, 16), -1.0)
    x[..., 8:] += step
    expected = torch.ones(16)
    expected[7:9] = drawn  # on both sides of the step
    assert torch.allclose(edges(x), expected, atol=1e-5)


def test_edges_are_alike_in_all_directions():
    x = pictures() / 4  # of little contrast, so that no edge is as black as can be
    drawn = edges(x)
    assert drawn.min() > -1
    assert torch.allclose(edges(x.transpose(2, 3)), drawn.transpose(2, 3), atol=1e-6)
    assert torch.allclose(edges(x.flip(2)), drawn.flip(2), atol=1e-6)
    assert torch.allclose(edges(-x), drawn, atol=1e-6)  # from dark to bright, and back


def test_lowres_is_the_mean_of_each_block_of_4x4():
    x = pictures()
    small = lowres(x)
    for i, j in ((0, 0), (3, 4), (7, 31), (18, 5)):
        top, left = i // 4 * 4, j // 4 * 4
        mean = x[:, :, top : top + 4, left : left + 4].mean(dim=(2, 3))
        assert torch.allclose(small[:, :, i, j], mean, atol=1e-6)


def test_lowres_of_lowres_is_the_same():
    small = lowres(pictures())
    assert torch.allclose(lowres(small), small, atol=1e-6)
