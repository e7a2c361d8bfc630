"""`vqgan sample` and `vqgan complete`."""

import zlib

import numpy as np
import pytest
import torch
from commands import CLASSES, error_of, is_picture, main, save_pair
from PIL import Image

from vqgan.completion import paint_over
from vqgan.conditions import TRANSFORMS, class_condition
from vqgan.image_folder import read_image
from vqgan.images import from_uint8, to_uint8
from vqgan.pretrained import load_model, load_pipeline
from vqgan.transformer import GPT
from vqgan.vqvae import VQVAE
from vqgan.vqvae2 import VQVAE2


def pixels_of(path):
    return from_uint8(torch.from_numpy(read_image(path, 32)))[None]


# --- tokenizers with another codebook, or several grids ---------------------------------------

TOKENIZERS = {
    "fsq": (VQVAE, {"quantizer": "fsq", "num_embeddings": 64}),
    "lfq": (VQVAE, {"quantizer": "lfq", "num_embeddings": 32}),
    "simvq": (VQVAE, {"quantizer": "simvq"}),
    "residual": (VQVAE, {"quantizer": "residual", "num_rounds": 2}),
    "vqvae2": (VQVAE2, {"num_downsamples": 2}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_encodes_decodes_samples_and_completes(
    name, tmp_path, shapes, images, rows, monkeypatch
):
    kind, model_args = TOKENIZERS[name]
    condition = class_condition(CLASSES)
    save_pair(tmp_path, condition, shapes.train_images, kind=kind, **model_args)
    monkeypatch.chdir(tmp_path)
    tokenizer = load_model("tokenizer.pt")

    main("sample", "checkpoint.pt", "--class", "dog", "--count", 2)
    ((drawn, _),) = rows
    assert [label for label, _ in drawn] == ["dog"] and drawn[0][1].shape == (2, 3, 32, 32)

    main("complete", "checkpoint.pt", images[0], "--class", "dog", "--count", 2, "--keep", "top")
    assert rows[1][0][1][1].shape == (2, 3, 32, 32)

    main("encode", "tokenizer.pt", *images[:2])
    main("decode", "indices.npz")
    with np.load("indices.npz") as file:
        assert file["grid_size"].tolist() in ([*map(list, tokenizer.grids)], [*tokenizer.grids[0]])
        tokens = torch.from_numpy(file["indices"]).long().flatten(1)
    originals = torch.stack([torch.from_numpy(read_image(path, 32)) for path in images[:2]])
    with torch.no_grad():
        assert torch.equal(tokens, tokenizer.tokens(from_uint8(originals)))
        expected = to_uint8(tokenizer.decode_tokens(tokens))
    for path, pixels in zip(sorted(tmp_path.glob("decoded/*.png")), expected, strict=True):
        assert torch.equal(torch.from_numpy(read_image(path, 32)), pixels)

    main("reconstruct", "tokenizer.pt", images[0], "--out", "r.png")
    grids = " and ".join(f"{h}x{w}" for h, w in tokenizer.grids)
    assert f"{grids} codes of {tokenizer.num_embeddings}" in rows[-1][1]


def test_completions_keep_the_tokens_of_every_grid(tmp_path, shapes, images, asked, capsys):
    save_pair(
        tmp_path, class_condition(CLASSES), shapes.train_images, kind=VQVAE2, num_downsamples=2
    )
    main("complete", tmp_path / "checkpoint.pt", images[0], "--class", "dog", "--count", 1)
    tokenizer, hole = load_model(tmp_path / "tokenizer.pt"), torch.zeros(32, 32, dtype=torch.bool)
    hole[16:] = True
    tokens = tokenizer.tokens(paint_over(pixels_of(images[0]), hole))
    given = tokenizer.split_tokens(asked[0]["given"])
    for level, whole in zip(given, tokenizer.split_tokens(tokens), strict=True):
        kept = level.shape[1] // 2
        assert torch.equal(level[:, :kept], whole[:, :kept]) and (level[:, kept:] == -1).all()
    assert "foresee" not in capsys.readouterr().out  # in either grid, nothing kept comes later


def test_the_coarse_image_is_shown_above_the_fine_one(tmp_path, shapes, rows, pairs):
    save_pair(
        tmp_path, class_condition(CLASSES), shapes.train_images, kind=VQVAE2, num_downsamples=2
    )
    main("sample", tmp_path / "checkpoint.pt", "--class", "dog", "cat", "--count", 2, "--coarse")
    ((drawn, _),) = rows
    assert [label for label, _ in drawn] == ["dog, coarse", "dog", "cat, coarse", "cat"]
    assert not torch.equal(drawn[0][1], drawn[1][1])
    assert "leave it out" in error_of("sample", pairs / "class" / "checkpoint.pt", "--coarse")
    message = error_of("sample", tmp_path / "checkpoint.pt", "--height", "64")
    assert "several grids have one size" in message


# --- sample ------------------------------------------------------------------------------------


def sampled(pairs, out, *flags, kind="class"):
    main("sample", pairs / kind / "checkpoint.pt", "--count", 2, "--out", out, *flags)
    return out.read_bytes()


def test_a_seed_gives_the_same_picture_and_another_another(tmp_path, pairs):
    first = sampled(pairs, tmp_path / "a.png")
    assert is_picture(tmp_path / "a.png")
    assert sampled(pairs, tmp_path / "b.png") == first
    assert sampled(pairs, tmp_path / "c.png", "--seed", 1) != first


@pytest.fixture
def tokens_of(pairs, images, monkeypatch):
    """Runs a command, and returns the tokens of every call of `GPT.sample`."""
    drawn, sample = [], GPT.sample

    def remember(self, condition, **settings):
        drawn.append(sample(self, condition, **settings))
        return drawn[-1]

    def run(command, *flags):
        drawn.clear()
        image = [images[0]] if command == "complete" else []
        main(command, pairs / "class" / "checkpoint.pt", *image, *flags)
        return list(drawn)

    monkeypatch.setattr(GPT, "sample", remember)
    return run


def alike(a, b):
    """Sums over another batch may be rounded otherwise, which could change a token or two."""
    return a.shape == b.shape and (a == b).double().mean() > 0.9


@pytest.mark.parametrize("command", ["sample", "complete"])
def test_a_seed_gives_the_same_first_pictures_for_any_count(command, tokens_of, rows):
    (eight,) = tokens_of(command, "--class", "dog", "--count", 8)
    for count in (1, 4):
        (fewer,) = tokens_of(command, "--class", "dog", "--count", count)
        assert alike(fewer, eight[:count])


def test_pictures_do_not_depend_on_the_chunks(tokens_of, rows, monkeypatch):
    (whole,) = tokens_of("sample", "--class", "dog", "--count", 8)
    monkeypatch.setattr("vqgan.cli_sample.MAX_CHUNK_SIZE", 3)
    chunks = tokens_of("sample", "--class", "dog", "--count", 8)
    assert [len(chunk) for chunk in chunks] == [3, 3, 2] and alike(torch.cat(chunks), whole)


def test_a_class_has_the_same_pictures_beside_others_and_alone(tokens_of, rows, asked):
    (alone,) = tokens_of("sample", "--class", "dog", "--count", 8)
    _, dog = tokens_of("sample", "--class", "cat", "dog", "--count", 8)
    assert alike(dog, alone)
    _, dog, _ = tokens_of("sample", "--count", 8)  # all classes
    assert alike(dog, alone)
    cat, dog, horse = (call["generator"].initial_seed() for call in asked[-3:])
    assert len({cat, dog, horse}) == 3
    # Written down, since Python's hash() would give another one in every process.
    assert dog == zlib.crc32(b"0 dog")


def test_no_class_means_every_class(pairs, rows, capsys):
    main("sample", pairs / "class" / "checkpoint.pt", "--count", 3)
    ((drawn, _),) = rows
    assert [label for label, _ in drawn] == list(CLASSES)
    assert all(x.shape == (3, 3, 32, 32) and 0 <= x.min() for _, x in drawn)
    assert "images of cat, dog, horse, 3 of each" in capsys.readouterr().out


def test_classes_are_asked_for_by_name_and_count(pairs, rows, asked):
    main("sample", pairs / "class" / "checkpoint.pt", "--class", "horse", "cat", "--count", 10)
    ((drawn, _),) = rows
    assert [(label, len(x)) for label, x in drawn] == [
        ("horse", 8), ("", 2), ("cat", 8), ("", 2)
    ]  # fmt: skip
    assert [call["condition"].tolist() for call in asked] == [[[2]] * 10, [[0]] * 10]


def test_captions_are_asked_for(pairs, rows, asked, shapes):
    captions = shapes.train_captions[:2]
    main("sample", pairs / "caption" / "checkpoint.pt", "--caption", *captions, "--count", 2)
    ((drawn, _),) = rows
    assert [label for label, _ in drawn] == captions
    condition = load_pipeline(pairs / "caption" / "checkpoint.pt").condition
    for call, caption in zip(asked, captions, strict=True):
        assert torch.equal(call["condition"], condition.encode_captions([caption] * 2))


def test_without_a_condition_nothing_is_asked(pairs, rows):
    main("sample", pairs / "none" / "checkpoint.pt", "--count", 2)
    assert len(rows) == 1


@pytest.mark.parametrize("flags", [[], ["--as-is"]])
def test_a_model_of_pictures_is_asked_with_one(pairs, rows, asked, images, flags):
    flags = ["--image", images[0], "--count", 2, *flags]
    main("sample", pairs / "image" / "checkpoint.pt", *flags)
    tokenizer = load_model(pairs / "image" / "tokenizer.pt")
    x = from_uint8(torch.tensor(read_image(images[0], 32)))[None]
    picture = x if "--as-is" in flags else TRANSFORMS["gray"](x)
    expected = tokenizer.encode(picture).indices.flatten(1)
    assert torch.equal(asked[0]["condition"], expected.expand(2, -1))
    labels = [label for label, _ in rows[0][0]]
    assert labels == (
        ["gray", "samples"] if "--as-is" in flags else ["original", "gray", "samples"]
    )


def test_sampling_flags_reach_the_model(pairs, rows, asked):
    flags = ["--temperature", 0.7, "--top-k", 5, "--top-p", 0.9, "--guidance", 2]
    main("sample", pairs / "class" / "checkpoint.pt", "--class", "dog", *flags)
    wanted = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "guidance": 2}
    assert {name: asked[0][name] for name in wanted} == wanted
    title = rows[0][1].removeprefix("Samples (").removesuffix(")")
    assert set(title.split(", ")) == {"temperature 0.7", "top-k 5", "top-p 0.9", "guidance 2"}


def test_temperature_zero_leaves_nothing_to_chance(pairs, rows):
    for seed in (0, 1):
        main("sample", pairs / "none" / "checkpoint.pt", "--temperature", 0, "--seed", seed)
    (first, title), (second, _) = rows
    assert torch.equal(first[0][1], second[0][1])
    # Two pictures of one batch: where they stand in it may round their sums otherwise.
    assert torch.allclose(first[0][1][0], first[0][1][1], atol=1e-5)
    assert title.startswith("Samples (greedy")


def test_larger_pictures_on_request(pairs, rows):
    flags = ["--class", "cat", "--height", 40, "--width", 64, "--count", 1]
    main("sample", pairs / "class" / "checkpoint.pt", *flags)
    assert rows[0][0][0][1].shape == (1, 3, 40, 64)


@pytest.mark.parametrize("command", ["sample", "complete"])
@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("class", ["--class", "cow"], "no class 'cow': give cat, dog, horse"),
        ("caption", ["--class", "cat"], "condition is caption; give --caption"),
        ("class", ["--caption", "small red star on blue"], "condition is class; give --class"),
        ("none", ["--class", "cat"], "condition is none; leave it out"),
        ("image", ["--class", "cat"], "condition is image"),
        ("caption", ["--caption", "small mauve star"], "'mauve' is unknown; give"),
        ("class", ["--top-k", "0"], "--top-k 0"),
        ("class", ["--top-k", "25"], "--top-k 25: give 1 to 24"),
        ("class", ["--top-p", "1.5"], "--top-p 1.5"),
        ("none", ["--guidance", "2"], "--guidance"),
        ("undropped", ["--guidance", "2"], "--condition-drop"),
        ("class", ["--device", "abacus"], "--device abacus"),
        ("class", ["--out", "x.jpg"], ".png"),
        ("class", ["--tokenizer", "gone.pt"], "there is no checkpoint gone.pt"),
        ("class/tokenizer.pt", [], "not a transformer"),
    ],
)
def test_what_a_transformer_cannot_do_is_one_line(
    command, kind, flags, expected, pairs, images, rows
):
    path = pairs / kind if kind.endswith(".pt") else pairs / kind / "checkpoint.pt"
    image = images[:1] if command == "complete" else []
    assert expected in error_of(command, path, *image, *flags)
    assert rows == []


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("caption", [], "needs a --caption"),
        ("image", [], "from gray: name one with --image"),
        ("class", ["--image", "0.png"], "condition is class; give --class"),
        ("image", ["--image", "gone.png"], "gone.png cannot be read"),
        ("image", ["--image", "0.png", "--height", "64"], "leave --height, --width out"),
        ("image", ["--image", "0.png", "--out", "0.png"], "overwritten"),
        ("class", ["--height", "33"], "--height 33, --width 32: give multiples of 8"),
        ("class", ["--width", "24"], "--height 32, --width 24: give multiples of 8 from 32"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(
    kind, flags, expected, pairs, images, rows, monkeypatch
):
    monkeypatch.chdir(images[0].parent)
    before = images[0].read_bytes()
    assert expected in error_of("sample", pairs / kind / "checkpoint.pt", *flags)
    assert rows == [] and images[0].read_bytes() == before


def test_a_masked_transformer_samples_in_rounds_and_in_one_size(pairs, rows, asked):
    path = pairs / "masked" / "checkpoint.pt"
    main("sample", path, "--class", "dog", "--count", 2, "--steps", 5, "--guidance", 2)
    assert asked[0]["steps"] == 5 and "steps 5" in rows[0][1]
    assert rows[0][0][0][1].shape == (2, 3, 32, 32)
    assert "one size" in error_of("sample", path, "--height", 64)
    assert "--steps" in error_of("sample", pairs / "class" / "checkpoint.pt", "--steps", 5)


def test_top_p_zero_is_named(pairs, capsys):
    with pytest.raises(SystemExit):
        main("sample", pairs / "class" / "checkpoint.pt", "--top-p", 0)
    assert "--top-p" in capsys.readouterr().err


# --- complete ----------------------------------------------------------------------------------


def test_a_completion_is_a_picture(tmp_path, pairs, images, capsys):
    flags = ["--count", 2, "--out", tmp_path / "out.png"]
    main("complete", pairs / "class" / "checkpoint.pt", images[0], *flags)
    assert is_picture(tmp_path / "out.png")
    assert "8 of 16 tokens kept (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "hole", "generated"),  # pixels, and tokens of 8 pixels
    [
        ([], (slice(16, 32), slice(0, 32)), (slice(2, 4), slice(0, 4))),
        (["--keep", "left"], (slice(0, 32), slice(16, 32)), (slice(0, 4), slice(2, 4))),
        (["--keep", "0,0,32,7"], (slice(7, 32), slice(0, 32)), None),
        (["--keep", "0,0,32,31"], (slice(31, 32), slice(0, 32)), (slice(3, 4), slice(0, 4))),
        (["--hole", "8,0,32,9"], (slice(0, 9), slice(8, 32)), (slice(0, 2), slice(1, 4))),
    ],
)
@pytest.mark.parametrize("prior", ["class", "masked"])
def test_the_kept_codes_are_the_pictures_own(
    prior, flags, hole, generated, pairs, images, rows, asked
):
    command = ["complete", pairs / prior / "checkpoint.pt", images[0], *flags, "--count", 3]
    if generated is None:
        assert "so none is kept: keep more" in error_of(*command)
        return
    main(*command)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[hole] = True
    x = pixels_of(images[0])
    own = load_model(pairs / prior / "tokenizer.pt").encode(paint_over(x, mask)).indices
    expected = own.repeat(3, 1, 1)
    expected[:, generated[0], generated[1]] = -1
    assert torch.equal(asked[0]["given"], expected.flatten(1))
    (_, shown), (_, completed) = rows[0][0]
    assert (shown[1][:, mask] == 0.5).all() and torch.equal(shown[1][:, ~mask], shown[0][:, ~mask])
    # Around the hole the original, to the pixel.
    assert torch.equal(completed[:, :, ~mask], shown[:1].expand(3, -1, -1, -1)[:, :, ~mask])


def test_a_painted_mask_is_a_hole(tmp_path, pairs, images, asked, rows, capsys):
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[:8, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command = ["complete", pairs / "masked" / "checkpoint.pt", images[0], "--count", 1]
    main(*command, "--mask", tmp_path / "mask.png", "--steps", 3)
    main(*command, "--hole", "8,0,32,8", "--no-paste")
    assert torch.equal(asked[0]["given"], asked[1]["given"]) and asked[0]["steps"] == 3
    pasted, decoded = (drawn[0][1][1] for drawn in rows)
    hole = torch.from_numpy(mask > 0)
    assert (pasted[:, :, ~hole] != decoded[:, :, ~hole]).any()
    assert "foresee" not in capsys.readouterr().out


def test_completions_do_not_depend_on_the_chunks(pairs, images, rows, monkeypatch):
    command = ["complete", pairs / "masked" / "checkpoint.pt", images[0], "--count", 5]
    main(*command)
    monkeypatch.setattr("vqgan.cli_sample.MAX_CHUNK_SIZE", 2)
    main(*command)
    torch.testing.assert_close(rows[0][0][1][1], rows[1][0][1][1], rtol=0, atol=1e-5)


def test_what_is_removed_does_not_come_back_at_the_edge_of_a_mask(
    tmp_path, pairs, rows, asked, monkeypatch
):
    """Two large images that differ inside of a mask only, which no pixel of the model fits."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    pixels = torch.randint(256, (320, 320, 3), dtype=torch.uint8)
    mask = torch.zeros(320, 320, 4, dtype=torch.uint8)  # transparent, as paint programs save it
    mask[4:46, 3:166] = 255
    Image.fromarray(mask.numpy(), "RGBA").save("mask.png")
    for name, value in (("a.png", 0), ("b.png", 255)):
        other = torch.where(mask[..., :3] > 0, torch.tensor(value, dtype=torch.uint8), pixels)
        Image.fromarray(other.numpy()).save(name)
        main("complete", pairs / "masked", name, "--mask", "mask.png", "--count", 1)
    assert torch.equal(asked[0]["given"], asked[1]["given"])
    (first, second) = (drawn[0][1][1] for drawn in rows)
    assert torch.equal(first, second)


def test_a_gpt_says_what_it_cannot_foresee(pairs, images, rows, capsys):
    command = ["complete", pairs / "class" / "checkpoint.pt", images[0], "--count", 1]
    main(*command)
    assert "foresee" not in capsys.readouterr().out  # nothing is below the hole
    main(*command, "--hole", "8,0,32,8")
    assert "did not foresee" in capsys.readouterr().out


def test_a_completion_may_be_told_its_class(pairs, images, rows, asked):
    path = pairs / "class" / "checkpoint.pt"
    main("complete", path, images[0], "--class", "horse", "--count", 2)
    main("complete", path, images[0], "--count", 2)
    assert asked[0]["condition"].tolist() == [[2], [2]]
    assert asked[1]["condition"].tolist() == [[3], [3]]  # `null_token`


def test_a_completion_may_be_told_its_caption(pairs, images, rows, asked, shapes):
    path, caption = pairs / "caption" / "checkpoint.pt", shapes.train_captions[0]
    main("complete", path, images[0], "--caption", caption, "--count", 1)
    assert torch.equal(
        asked[0]["condition"], load_pipeline(path).condition.encode_captions([caption])
    )


def test_a_model_of_pictures_completes_with_the_pictures_own(pairs, images, rows, asked):
    main("complete", pairs / "image" / "checkpoint.pt", images[0], "--count", 1)
    hole = torch.zeros(32, 32, dtype=torch.bool)
    hole[16:] = True
    x = paint_over(pixels_of(images[0]), hole)
    codes = load_model(pairs / "image" / "tokenizer.pt").encode(TRANSFORMS["gray"](x)).indices
    assert torch.equal(asked[0]["condition"], codes.flatten(1))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["0.png", "--keep", "bottom"], "--keep bottom: give top, left"),
        (["0.png", "--keep", "1,2,3"], "--keep 1,2,3: give"),
        (
            ["0.png", "--keep", "0,0,3,32"],
            "--keep 0,0,3,32: the hole touches every token, so none is kept",
        ),
        (["0.png", "--keep", "0,0,32,32"], "--keep 0,0,32,32: no pixel of 32x32"),
        (["0.png", "--hole", "0,0,32,32"], "--hole 0,0,32,32: every pixel of 32x32"),
        (["0.png", "--hole", "8,8,40,24"], "--hole 8,8,40,24: the resized image has 32x32 pixels"),
        (["0.png", "--hole", "4,4,4,9"], "--hole 4,4,4,9: no pixel of 32x32"),
        (["0.png", "--hole", "top"], "--hole top: give a box, as in"),
        (["0.png", "--hole", "0,0,4,4", "--keep", "top"], "--keep and --hole both say"),
        (["0.png", "--mask", "black.png"], "--mask black.png: no pixel"),
        (["0.png", "--mask", "white.png"], "--mask white.png: every pixel"),
        (["0.png", "--mask", "small.png"], "small.png has 8x8 pixels, and 0.png 32x32"),
        (["0.png", "--mask", "broken.png"], "broken.png cannot be read"),
        (["0.png", "--hole", ""], "--hole : give a box"),
        (["0.png", "--mask", "half.png", "--out", "half.png"], "overwritten"),
        (["0.png", "--steps", "4"], "--steps is about a masked transformer"),
        (["0.png", "--class", "cat", "dog"], "give one"),
        (["gone.png"], "gone.png cannot be read"),
        (["broken.png"], "broken.png cannot be read"),
        (["0.png", "--out", "0.png"], "overwritten"),
    ],
)
def test_what_cannot_be_completed_is_one_line(flags, expected, pairs, images, rows, monkeypatch):
    monkeypatch.chdir(images[0].parent)
    (images[0].parent / "broken.png").write_text("no picture")
    Image.new("L", (32, 32), 0).save("black.png")
    Image.new("L", (32, 32), 255).save("white.png")
    Image.new("L", (8, 8), 255).save("small.png")
    Image.new("L", (32, 32), 255).save("half.png")
    assert expected in error_of("complete", pairs / "class" / "checkpoint.pt", *flags)
    assert rows == []


def test_flags_without_effect_are_refused(pairs, images, rows):
    assert "--as-is" in error_of("sample", pairs / "image" / "checkpoint.pt", "--as-is")
    command = ["complete", pairs / "class" / "checkpoint.pt", images[0], "--guidance", 3]
    assert "--guidance" in error_of(*command)
    assert rows == []
