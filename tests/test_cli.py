"""`python -m vqgan`, and the models that it loads."""

import json
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from vqgan.checkpoint import fingerprint, load_checkpoint, save_checkpoint, save_model
from vqgan.conditions import (
    NO_CONDITION,
    PICTURES,
    caption_condition,
    class_condition,
    image_condition,
)
from vqgan.data import Batches
from vqgan.image_folder import read_image
from vqgan.images import from_uint8, to_uint8
from vqgan.pretrained import load_model, load_pair
from vqgan.transformer import GPT
from vqgan.vae import VAE
from vqgan.vqgan import VQGAN
from vqgan.vqvae import VQVAE

DATA = Path(__file__).parent / "data"
ARGUMENTS = {
    VAE: {"image_size": 32, "num_hiddens": 8},
    VQVAE: {"num_hiddens": 8, "num_embeddings": 16},
    VQGAN: {"channels": 8, "num_embeddings": 16},
}


def save(path, kind):
    """A checkpoint of a small model, untrained."""
    model = kind(**ARGUMENTS[kind])
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    save_checkpoint(
        path, model=model, arguments=ARGUMENTS[kind], optimizers={}, batches=Batches(images, 2),
        step=0, seconds=0.0,
    )  # fmt: skip
    return model.eval()


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


def main(*arguments):
    with mock.patch.object(sys, "argv", ["vqgan", *map(str, arguments)]):
        runpy.run_module("vqgan", run_name="__main__")


def error_of(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(*arguments)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_reconstruct_writes_originals_over_reconstructions(tmp_path, images, kind, capsys):
    save(tmp_path / "c.pt", kind)
    main("reconstruct", tmp_path / "c.pt", *images, "--out", tmp_path / "out.png")
    pixels = np.asarray(Image.open(tmp_path / "out.png").convert("L"))
    assert pixels.std() > 10
    text = capsys.readouterr().out
    assert text.count("PSNR") == 3 and "32x32" in text and "out.png" in text
    assert ("bits per image" in text) == (kind is not VAE)


def test_reconstruct_reads_the_authors_checkpoints(tmp_path, images, capsys):
    reference = torch.load(DATA / "compvis_vqgan_tiny_io.pt", weights_only=True)
    (tmp_path / "config.json").write_text(json.dumps(reference["config"]))
    flags = ["--config", tmp_path / "config.json", "--out", tmp_path / "out.png"]
    main("reconstruct", DATA / "compvis_vqgan_tiny.ckpt", *images, *flags)
    assert "16x16 codes of 32, 1280 bits" in capsys.readouterr().out
    assert (tmp_path / "out.png").exists()


def test_another_size_on_request(tmp_path, images, capsys):
    save(tmp_path / "c.pt", VQGAN)
    flags = ["--image-size", 64, "--out", tmp_path / "out.png"]
    main("reconstruct", tmp_path / "c.pt", images[0], *flags)
    assert "64x64 pixels: 16x16 codes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gone.pt", "0.png"], "there is no checkpoint gone.pt"),
        ([".", "0.png"], ". is a folder, and a checkpoint was expected: name run/checkpoint.pt"),
        (["c.pt", "0.png", "--config", "empty.json"], "resolution"),
        (["c.pt", "0.png", "--config", "theirs.json"], "leave the config out"),
        (["c.pt", "gone.png"], "gone.png cannot be read"),
        (["c.pt", "c.pt"], "c.pt cannot be read as an image"),
        (["0.png", "0.png"], "0.png is no checkpoint"),
        (["c.pt", "0.png", "--image-size", "30"], "multiples of 4"),
        (["vae.pt", "0.png", "--image-size", "64"], "32 pixels"),
        (["theirs.ckpt", "0.png"], "--config"),
        (["c.pt", "0.png", "--out", "x.jpg"], ".png"),
        (["c.pt", "0.png", "--out", "0.png"], "overwritten"),
        (["c.pt", "0.png", "--config", "0.png"], "JSON"),
        (["c.pt", "0.png", "--config", "list.json"], "object"),
    ],
)
def test_bad_input_is_one_line(tmp_path, images, arguments, expected, monkeypatch):
    save(tmp_path / "c.pt", VQGAN)
    save(tmp_path / "vae.pt", VAE)
    shutil.copy(DATA / "compvis_vqgan_tiny.ckpt", tmp_path / "theirs.ckpt")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "empty.json").write_text("{}")
    config = torch.load(DATA / "compvis_vqgan_tiny_io.pt", weights_only=True)["config"]
    (tmp_path / "theirs.json").write_text(json.dumps(config))
    save(tmp_path / "run" / "checkpoint.pt", VQVAE)
    monkeypatch.chdir(tmp_path)
    before = images[0].read_bytes()
    assert expected in error_of("reconstruct", *arguments)
    assert images[0].read_bytes() == before and not (tmp_path / "reconstructions.png").exists()


def test_it_runs_as_a_module_and_explains_itself():
    command = [sys.executable, "-m", "vqgan", "reconstruct", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CHECKPOINT" in done.stdout


# --- a transformer and its tokenizer -----------------------------------------------------------

K = 24  # codes, of five bits: no power of two
CLASSES = ("cat", "dog", "horse")
ABOUT = {"data": "shapes", "image_size": 32, "command": "python train_vqvae.py --data shapes"}


def save_tokenizer(path, images, seed=0):
    torch.manual_seed(seed)
    arguments = {"num_hiddens": 8, "num_embeddings": K, "num_downsamples": 3}
    model = VQVAE(**arguments)
    with torch.no_grad():
        model.train().encode(from_uint8(images[:64]))  # the codebook starts from them
    save_checkpoint(
        path, model=model.eval(), arguments=arguments, optimizers={}, batches=Batches(images, 2),
        step=120, seconds=90.0, about=ABOUT,
    )  # fmt: skip
    return model


def save_pair(folder, condition, images, condition_drop=0.1):
    """As train_transformer.py writes it, untrained; its codes are far from alike."""
    tokenizer = save_tokenizer(folder / "vqvae" / "checkpoint.pt", images)
    save_model(folder / "tokenizer.pt", load_checkpoint(folder / "vqvae" / "checkpoint.pt"))
    arguments = {
        "num_embeddings": K,
        "seq_len": 16,
        "condition_vocabulary": condition.vocabulary,
        "condition_length": condition.length,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "dropout": 0.1,
    }
    model = GPT(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    about = ABOUT | {
        "command": "python train_transformer.py --tokenizer vqvae/checkpoint.pt",
        "condition": condition.to_dict(),
        "condition_drop": condition_drop,
        "tokenizer": "vqvae/checkpoint.pt",
        "tokenizer_fingerprint": fingerprint(tokenizer),
    }
    save_checkpoint(
        folder / "checkpoint.pt", model=model, arguments=arguments,
        optimizers={"adamw": torch.optim.AdamW(model.parameters())}, batches=Batches(images, 2),
        step=240, seconds=120.0, companions={"last": model}, about=about,
    )  # fmt: skip


@pytest.fixture(scope="module")
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
    """Keyword arguments (and the condition's tokens) of every call of `GPT.sample`."""
    calls, sample = [], GPT.sample

    def remember(self, condition, **settings):
        calls.append(settings | {"condition": condition})
        return sample(self, condition, **settings)

    monkeypatch.setattr(GPT, "sample", remember)
    return calls


def is_picture(path):
    return np.asarray(Image.open(path).convert("L")).std() > 5


# --- sample ------------------------------------------------------------------------------------


def sampled(pairs, out, *flags, kind="class"):
    main("sample", pairs / kind / "checkpoint.pt", "--count", 2, "--out", out, *flags)
    return out.read_bytes()


def test_a_seed_gives_the_same_picture_and_another_another(tmp_path, pairs):
    first = sampled(pairs, tmp_path / "a.png")
    assert is_picture(tmp_path / "a.png")
    assert sampled(pairs, tmp_path / "b.png") == first
    assert sampled(pairs, tmp_path / "c.png", "--seed", 1) != first


def test_no_class_means_every_class(pairs, rows, capsys):
    main("sample", pairs / "class" / "checkpoint.pt", "--count", 3)
    ((drawn, _),) = rows
    assert [label for label, _ in drawn] == list(CLASSES)
    assert all(x.shape == (3, 3, 32, 32) and 0 <= x.min() for _, x in drawn)
    assert "3 pictures of cat, dog, horse" in capsys.readouterr().out


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
    condition = load_pair(pairs / "caption" / "checkpoint.pt").condition
    for call, caption in zip(asked, captions, strict=True):
        assert torch.equal(call["condition"], condition.of_captions([caption] * 2))


def test_without_a_condition_nothing_is_asked(pairs, rows):
    main("sample", pairs / "none" / "checkpoint.pt", "--count", 2)
    assert len(rows) == 1


@pytest.mark.parametrize("flags", [[], ["--as-is"]])
def test_a_model_of_pictures_is_asked_with_one(pairs, rows, asked, images, flags):
    flags = ["--image", images[0], "--count", 2, *flags]
    main("sample", pairs / "image" / "checkpoint.pt", *flags)
    tokenizer = load_model(pairs / "image" / "tokenizer.pt")
    x = from_uint8(torch.tensor(read_image(images[0], 32)))[None]
    picture = x if "--as-is" in flags else PICTURES["gray"](x)
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
    assert set(rows[0][1].split(", ")) == {"temperature 0.7", "top-k 5", "top-p 0.9", "guidance 2"}


def test_temperature_zero_leaves_nothing_to_chance(pairs, rows):
    for seed in (0, 1):
        main("sample", pairs / "none" / "checkpoint.pt", "--temperature", 0, "--seed", seed)
    (first, title), (second, _) = rows
    assert torch.equal(first[0][1], second[0][1])
    # Two pictures of one batch: where they stand in it may round their sums otherwise.
    assert torch.allclose(first[0][1][0], first[0][1][1], atol=1e-5)
    assert title.startswith("greedy")


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
        ("class", ["--height", "33"], "33x32 pixels: give multiples of 8"),
        ("class", ["--width", "24"], "32x24 pixels: give multiples of 8, 32 or more"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(
    kind, flags, expected, pairs, images, rows, monkeypatch
):
    monkeypatch.chdir(images[0].parent)
    before = images[0].read_bytes()
    assert expected in error_of("sample", pairs / kind / "checkpoint.pt", *flags)
    assert rows == [] and images[0].read_bytes() == before


def test_top_p_zero_is_named(pairs, capsys):
    with pytest.raises(SystemExit):
        main("sample", pairs / "class" / "checkpoint.pt", "--top-p", 0)
    assert "--top-p" in capsys.readouterr().err


# --- complete ----------------------------------------------------------------------------------


def test_a_completion_is_a_picture(tmp_path, pairs, images, capsys):
    flags = ["--count", 2, "--out", tmp_path / "out.png"]
    main("complete", pairs / "class" / "checkpoint.pt", images[0], *flags)
    assert is_picture(tmp_path / "out.png")
    assert "8 of 16 codes kept; 2 completions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("top", (slice(0, 2), slice(0, 4))),
        ("left", (slice(0, 4), slice(0, 2))),
        ("8,0,24,16", (slice(0, 2), slice(1, 3))),
        ("1,0,31,17", (slice(0, 2), slice(1, 3))),  # codes that are cut are not kept
    ],
)
def test_the_kept_codes_are_the_pictures_own(keep, kept, pairs, images, rows, monkeypatch):
    seen, sample = [], GPT.sample

    def remember(self, condition, *, given, **settings):
        seen.append((given, sample(self, condition, given=given, **settings)))
        return seen[-1][1]

    monkeypatch.setattr(GPT, "sample", remember)
    main("complete", pairs / "none" / "checkpoint.pt", images[0], "--keep", keep, "--count", 3)
    ((given, written),) = seen
    x = from_uint8(torch.tensor(read_image(images[0], 32)))[None]
    own = load_model(pairs / "none" / "tokenizer.pt").encode(x).indices
    expected = torch.full((3, 4, 4), -1)
    expected[:, kept[0], kept[1]] = own[:, kept[0], kept[1]]
    assert torch.equal(given, expected.flatten(1))
    assert torch.equal(written[given >= 0], given[given >= 0])
    shown = rows[0][0][0][1][1]  # the picture with what is not kept in grey
    grey = (shown == 0.5).all(dim=0)[4::8, 4::8]
    assert torch.equal(grey, expected[0] < 0)


def test_a_completion_may_be_told_its_class(pairs, images, rows, asked):
    path = pairs / "class" / "checkpoint.pt"
    main("complete", path, images[0], "--class", "horse", "--count", 2)
    main("complete", path, images[0], "--count", 2)
    assert asked[0]["condition"].tolist() == [[2], [2]]
    assert asked[1]["condition"].tolist() == [[3], [3]]  # `nothing`


def test_a_completion_may_be_told_its_caption(pairs, images, rows, asked, shapes):
    path, caption = pairs / "caption" / "checkpoint.pt", shapes.train_captions[0]
    main("complete", path, images[0], "--caption", caption, "--count", 1)
    assert torch.equal(asked[0]["condition"], load_pair(path).condition.of_captions([caption]))


def test_a_model_of_pictures_completes_with_the_pictures_own(pairs, images, rows, asked):
    main("complete", pairs / "image" / "checkpoint.pt", images[0], "--count", 1)
    x = from_uint8(torch.tensor(read_image(images[0], 32)))[None]
    codes = load_model(pairs / "image" / "tokenizer.pt").encode(PICTURES["gray"](x)).indices
    assert torch.equal(asked[0]["condition"], codes.flatten(1))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["0.png", "--keep", "bottom"], "--keep bottom: give top, left"),
        (["0.png", "--keep", "1,2,3"], "--keep 1,2,3: give"),
        (["0.png", "--keep", "0,0,7,32"], "keeps 0 of 16"),
        (["0.png", "--keep", "0,0,32,32"], "keeps 16 of 16"),
        (["0.png", "--class", "cat", "dog"], "give one"),
        (["gone.png"], "gone.png cannot be read"),
        (["broken.png"], "broken.png cannot be read"),
        (["0.png", "--out", "0.png"], "overwritten"),
    ],
)
def test_what_cannot_be_completed_is_one_line(flags, expected, pairs, images, rows, monkeypatch):
    monkeypatch.chdir(images[0].parent)
    (images[0].parent / "broken.png").write_text("no picture")
    assert expected in error_of("complete", pairs / "class" / "checkpoint.pt", *flags)
    assert rows == []


# --- encode and decode -------------------------------------------------------------------------


def encoded(pairs, out, *images, name="class/checkpoint.pt"):
    main("encode", pairs / name, *images, "--out", out)
    return out


@pytest.mark.parametrize("name", ["class/checkpoint.pt", "class/vqvae/checkpoint.pt"])
def test_decoded_are_the_models_reconstructions(tmp_path, pairs, images, name):
    (tmp_path / "more").mkdir()
    shutil.copy(images[1], tmp_path / "more" / images[0].name)  # another picture, the same name
    paths = [*images, tmp_path / "more" / images[0].name]
    codes = encoded(pairs, tmp_path / "codes.npz", *paths, name=name)
    main("decode", codes, "--out", tmp_path / "decoded")
    decoded = sorted((tmp_path / "decoded").iterdir())
    assert [path.name for path in decoded] == ["1-0.png", "2-1.png", "3-2.png", "4-0.png"]
    model = load_model(pairs / "class" / "tokenizer.pt")
    # All at once, as `encode` does: in another batch a vector between two codes may get the other.
    x = from_uint8(torch.stack([torch.tensor(read_image(path, 32)) for path in paths]))
    for path, expected in zip(decoded, to_uint8(model(x).reconstruction).int(), strict=True):
        pixels = torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1)
        assert (pixels - expected).abs().max() <= 1  # model(x) decodes z + (e - z): e, rounded


@pytest.mark.parametrize("K", [1, 2, 3, 16, 24, 512])
def test_codes_of_a_codebook_of_any_size_come_back(tmp_path, images, K, monkeypatch):
    """And take as many bytes as their bits fill."""
    arguments = {"num_hiddens": 8, "num_embeddings": K, "num_downsamples": 4}
    save_checkpoint(
        tmp_path / "c.pt", model=VQVAE(**arguments), arguments=arguments, optimizers={},
        batches=Batches(torch.zeros(4, 3, 48, 48, dtype=torch.uint8), 2), step=0, seconds=0.0,
        about=ABOUT | {"image_size": 48},
    )  # fmt: skip
    indices = torch.randint(K, (2, 3, 3))
    indices[0, 0, 0], indices[1, 2, 2] = K - 1, K - 1
    monkeypatch.setattr(VQVAE, "encode", lambda self, x: mock.Mock(indices=indices[: len(x)]))
    decode, seen = VQVAE.decode_indices, []
    monkeypatch.setattr(
        VQVAE, "decode_indices", lambda self, codes: seen.append(codes) or decode(self, codes)
    )
    main("encode", tmp_path / "c.pt", *images[:2], "--out", tmp_path / "codes.npz")
    main("decode", tmp_path / "codes.npz", "--out", tmp_path / "decoded")
    assert torch.equal(seen[0], indices)
    bits = {1: 1, 2: 1, 3: 2, 16: 4, 24: 5, 512: 9}[K]
    with np.load(tmp_path / "codes.npz") as file:
        assert file["codes"].shape == (2, -(-9 * bits // 8))


def test_encode_says_what_codes_and_other_formats_take(tmp_path, pairs, images, capsys):
    encoded(pairs, tmp_path / "codes.npz", *images[:2])
    text = capsys.readouterr().out
    jpeg, png = re.search(r"32x32 pixels are (\d+) bytes as JPEG.*?(\d+) as PNG", text).groups()
    assert text.count(": 10 bytes as codes") == 2  # 16 codes of 5 bits
    pixels = read_image(images[0], 32).transpose(1, 2, 0)
    for size, format in ((jpeg, "JPEG"), (png, "PNG")):
        Image.fromarray(pixels).save(tmp_path / "x", format)
        assert int(size) == (tmp_path / "x").stat().st_size
    assert "2 images, 16 codes of 5 bits each" in text


def test_another_size_is_encoded_on_request(tmp_path, pairs, images):
    encoded(pairs, tmp_path / "codes.npz", images[0], "--image-size", 64)
    main("decode", tmp_path / "codes.npz", "--out", tmp_path / "decoded")
    assert Image.open(tmp_path / "decoded" / "1-0.png").size == (64, 64)


def test_codes_are_decoded_by_the_model_that_encoded_and_no_other(tmp_path, pairs, images, shapes):
    codes = encoded(pairs, tmp_path / "codes.npz", images[0])
    save_tokenizer(tmp_path / "other.pt", shapes.train_images[:64], seed=1)
    flags = ["--out", tmp_path / "decoded", "--checkpoint"]
    assert "did not encode" in error_of("decode", codes, *flags, tmp_path / "other.pt")
    assert not (tmp_path / "decoded").exists()
    main("decode", codes, *flags, pairs / "class" / "tokenizer.pt")  # the same weights, elsewhere
    assert (tmp_path / "decoded" / "1-0.png").exists()


class Evil:
    def __reduce__(self):
        return (Path("executed").write_text, ("",))


def with_content(path, **changes):
    """The codes with other entries; None: without one."""
    with np.load(path) as file:
        content = {name: file[name] for name in file.files} | changes
    np.savez(path, **{name: value for name, value in content.items() if value is not None})


def break_codes(path, how):
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "flipped":
        data = bytearray(path.read_bytes())
        data[60:90] = bytes(30)
        path.write_bytes(data)
    elif how == "text":
        path.write_text("no codes")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif how == "foreign":
        np.savez(path, x=np.zeros(3))
    elif how == "objects":
        with_content(path, names=np.array([Evil()], dtype=object))
    elif how == "no fingerprint":
        with_content(path, fingerprint=None)
    elif how == "floats":
        with_content(path, codes=np.zeros((1, 10)))
    elif how == "grid":
        with_content(path, grid_size=np.array([5, 7]))
    elif how == "names":
        with_content(path, names=np.array(["a", "b"]))
    elif how == "K":
        with_content(path, num_embeddings=np.array(512))
    elif how == "too high":
        with_content(path, codes=np.full((1, 10), 255, dtype=np.uint8))


BREAKAGES = ["cut", "flipped", "text", "empty", "array", "pickle", "foreign", "objects"]
BREAKAGES += ["no fingerprint", "floats", "grid", "names", "K", "too high"]


@pytest.mark.parametrize("how", BREAKAGES)
def test_damaged_and_foreign_codes_are_one_line_and_never_run(
    how, tmp_path, pairs, images, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    codes = encoded(pairs, tmp_path / "codes.npz", images[0])
    break_codes(codes, how)
    message = error_of("decode", codes, "--out", tmp_path / "decoded")
    assert "codes.npz is not a file of `encode`" in message
    assert "allow_pickle" not in message  # numpy's advice, and unsafe
    assert not (tmp_path / "executed").exists() and not (tmp_path / "decoded").exists()


def test_decode_writes_nowhere_but_into_its_folder(tmp_path, pairs, images):
    codes = encoded(pairs, tmp_path / "codes.npz", images[0])
    with_content(codes, names=np.array(["../../../escaped"]))
    main("decode", codes, "--out", tmp_path / "a" / "decoded")
    assert [path.name for path in (tmp_path / "a" / "decoded").iterdir()] == ["1-escaped.png"]
    assert not list(tmp_path.glob("escaped*")) and not list((tmp_path / "a").glob("escaped*"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["encode", "vae.pt", "0.png"], "not a tokenizer"),
        (["encode", "gone.pt", "0.png"], "there is no checkpoint"),
        (["encode", "c.pt", "gone.png"], "gone.png cannot be read"),
        (["encode", "c.pt", "0.png", "--out", "codes.txt"], ".npz"),
        (["encode", "c.pt", "0.png", "--image-size", "30"], "multiples of 4"),
        (["encode", "c.pt", "0.png", "--device", "abacus"], "--device abacus"),
        (["decode", "gone.npz"], "gone.npz"),
        (["decode", "gone.npz", "--device", "abacus"], "--device abacus"),
        (["reconstruct", "c.pt", "0.png", "--device", "abacus"], "--device abacus"),
    ],
)
def test_what_cannot_be_encoded_is_one_line(tmp_path, images, arguments, expected, monkeypatch):
    save(tmp_path / "c.pt", VQVAE)
    save(tmp_path / "vae.pt", VAE)
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(*arguments)


def test_reconstruct_with_a_transformer_takes_its_tokenizer(pairs, images, rows, capsys):
    main("reconstruct", pairs / "class" / "checkpoint.pt", images[0])
    assert "VQVAE, 32x32 pixels: 4x4 codes of 24" in capsys.readouterr().out
    x = from_uint8(torch.tensor(read_image(images[0], 32)))[None]
    expected = (load_model(pairs / "class" / "tokenizer.pt")(x).reconstruction + 1) / 2
    assert torch.allclose(rows[0][0][1][1], expected.clamp(0, 1), atol=1e-6)


# --- info and export ---------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path, pairs):
    """A copy of the classes' run with its metrics.json, and its tokenizer's with its own."""
    folder = shutil.copytree(pairs / "class", tmp_path / "run")
    result = {"nats_per_code": 2.125, "frechet": None, "epochs": 7, "arguments": {"n_layer": 1}}
    models = {"transformer": result, "vqvae": {"nmse": 0.0625}}
    (folder / "metrics.json").write_text(json.dumps({"models": models}))
    return folder


def info_of(capsys, path):
    capsys.readouterr()
    main("info", path)
    return capsys.readouterr().out


def test_info_says_what_a_transformer_is(measured, capsys):
    text = info_of(capsys, measured / "checkpoint.pt")
    parameters = sum(p.numel() for p in load_model(measured / "checkpoint.pt").parameters())
    assert f"GPT, {parameters:,} parameters" in text and "n_embd: 16" in text
    assert "condition: class (cat, dog, horse)" in text
    assert "tokenizer: vqvae/checkpoint.pt" in text
    assert "trained on shapes, 32 pixels: python train_transformer.py --tokenizer" in text
    assert "240 steps, 2.0 minutes" in text
    assert "nats_per_code: 2.125" in text and "epochs: 7" in text and "frechet" not in text


def test_info_finds_the_result_of_a_vqvae_in_its_runs_folder(measured, capsys):
    text = info_of(capsys, measured / "vqvae" / "checkpoint.pt")
    assert "VQVAE," in text and "nmse: 0.0625" in text and "condition" not in text


def test_info_does_not_take_the_transformers_result_for_its_tokenizers(measured, capsys):
    text = info_of(capsys, measured / "tokenizer.pt")
    assert "VQVAE," in text and "nats_per_code" not in text


def test_info_says_that_there_is_no_result(pairs, capsys):
    assert "no metrics.json" in info_of(capsys, pairs / "class" / "checkpoint.pt")


@pytest.mark.parametrize(("kind", "what"), [("image", "gray"), ("none", "one start token")])
def test_info_says_what_a_model_is_asked(kind, what, pairs, capsys):
    text = info_of(capsys, pairs / kind / "checkpoint.pt")
    assert f"condition: {kind} ({what})" in text


def test_info_on_models_of_earlier_versions(tmp_path, capsys):
    save(tmp_path / "c.pt", VAE)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    torch.save({key: state[key] for key in ("model", "arguments", "weights")}, tmp_path / "c.pt")
    assert "VAE," in info_of(capsys, tmp_path / "c.pt")
    assert "there is no checkpoint" in error_of("info", tmp_path / "gone.pt")


def test_an_exported_pair_is_small_and_whole(tmp_path, measured, capsys, rows):
    out = tmp_path / "exported"
    main("export", measured / "checkpoint.pt", "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "tokenizer.pt"]
    for name in ("checkpoint.pt", "tokenizer.pt"):
        assert (out / name).stat().st_size < 0.8 * (measured / name).stat().st_size
        dtypes = {
            value.dtype
            for value in torch.load(out / name, weights_only=True)["weights"].values()
            if torch.is_tensor(value)
        }
        assert torch.float32 not in dtypes
    exported, own = load_pair(out / "checkpoint.pt"), load_pair(measured / "checkpoint.pt")
    condition, indices = torch.tensor([[1]]), torch.arange(16)[None]
    logits = [pair.transformer(condition, indices) for pair in (exported, own)]
    assert torch.allclose(*logits, atol=0.05) and not torch.equal(*logits)
    main("sample", out / "checkpoint.pt", "--count", 1)
    assert len(rows) == 1
    text = info_of(capsys, out / "checkpoint.pt")
    assert "nats_per_code: 2.125" in text and "no metrics.json" not in text


def test_export_does_not_replace_the_run_that_it_exports(measured):
    before = {path: path.read_bytes() for path in measured.glob("*.pt")}
    assert "--out" in error_of("export", measured / "checkpoint.pt", "--out", measured)
    assert {path: path.read_bytes() for path in measured.glob("*.pt")} == before


def test_export_needs_a_transformer(tmp_path, pairs):
    message = error_of("export", pairs / "class" / "tokenizer.pt", "--out", tmp_path / "out")
    assert "not a transformer" in message and not (tmp_path / "out").exists()


def test_an_export_never_replaces_a_checkpoint(pairs, tmp_path):
    shutil.copytree(pairs / "class", tmp_path / "other")
    before = (tmp_path / "other" / "checkpoint.pt").read_bytes()
    message = error_of("export", pairs / "class" / "checkpoint.pt", "--out", tmp_path / "other")
    assert "holds a checkpoint.pt already" in message
    assert (tmp_path / "other" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("version", ["old", "new"])
def test_reconstruct_takes_the_size_that_the_checkpoint_says(tmp_path, images, capsys, version):
    save(tmp_path / "c.pt", VQVAE)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    if version == "old":  # not among the arguments, but beside them
        changed = {"arguments": ARGUMENTS[VQVAE], "about": ABOUT | {"image_size": 64}}
    else:
        changed = {"arguments": state["arguments"] | {"image_size": 64}}
    torch.save(state | changed, tmp_path / "c.pt")
    main("reconstruct", tmp_path / "c.pt", images[0], "--out", tmp_path / "out.png")
    assert "64x64 pixels" in capsys.readouterr().out


def test_flags_without_effect_are_refused(pairs, images, rows):
    assert "--as-is" in error_of("sample", pairs / "image" / "checkpoint.pt", "--as-is")
    command = ["complete", pairs / "class" / "checkpoint.pt", images[0], "--guidance", 3]
    assert "--guidance" in error_of(*command)
    assert rows == []
