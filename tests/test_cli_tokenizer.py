"""`vqgan reconstruct`, `encode` and `decode`."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from commands import ABOUT, ARGUMENTS, DATA, error_of, main, save, save_tokenizer
from PIL import Image

from vqgan.checkpoint import save_checkpoint
from vqgan.data import TrainLoader
from vqgan.image_folder import read_image
from vqgan.images import from_uint8, to_uint8
from vqgan.pretrained import load_model
from vqgan.vae import VAE
from vqgan.vqgan import VQGAN
from vqgan.vqvae import VQVAE

# --- reconstruct -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_reconstruct_writes_originals_over_reconstructions(tmp_path, images, kind, capsys):
    save(tmp_path / "c.pt", kind)
    main("reconstruct", tmp_path / "c.pt", *images, "--out", tmp_path / "out.png")
    pixels = np.asarray(Image.open(tmp_path / "out.png").convert("L"))
    assert pixels.std() > 10
    text = capsys.readouterr().out
    assert (
        text.count(": PSNR") == 3
        and "3 images, mean PSNR" in text
        and "32x32" in text
        and "out.png" in text
    )
    assert ("bits per image" in text) == (kind in (VQVAE, VQGAN))


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
    ("model_args", "expected"),
    [
        (["gone.pt", "0.png"], "there is no checkpoint gone.pt"),
        ([".", "0.png"], ". is a folder, and a checkpoint was expected: name run/checkpoint.pt"),
        (["c.pt", "0.png", "--config", "empty.json"], "leave the config out"),
        (["theirs.ckpt", "0.png", "--config", "empty.json"], "resolution"),
        (["c.pt", "0.png", "--config", "theirs.json"], "leave the config out"),
        (["c.pt", "gone.png"], "gone.png cannot be read"),
        (["c.pt", "c.pt"], "c.pt cannot be read as an image"),
        (["0.png", "0.png"], "0.png is no checkpoint"),
        (["c.pt", "0.png", "--image-size", "30"], "multiples of 4"),
        (["vae.pt", "0.png", "--image-size", "64"], "takes --image-size 32 only"),
        (["theirs.ckpt", "0.png"], "--config"),
        (["c.pt", "0.png", "--out", "x.jpg"], ".png"),
        (["c.pt", "0.png", "--out", "0.png"], "overwritten"),
        (["c.pt", "0.png", "--config", "0.png"], "JSON"),
        (["c.pt", "0.png", "--config", "list.json"], "object"),
    ],
)
def test_bad_input_is_one_line(tmp_path, images, model_args, expected, monkeypatch):
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
    assert expected in error_of("reconstruct", *model_args)
    assert images[0].read_bytes() == before and not (tmp_path / "reconstructions.png").exists()


def test_reconstruct_with_a_transformer_takes_its_tokenizer(pairs, images, rows, capsys):
    main("reconstruct", pairs / "class" / "checkpoint.pt", images[0])
    assert "VQVAE, 32x32 pixels: 4x4 codes of 24" in capsys.readouterr().out
    x = from_uint8(torch.tensor(read_image(images[0], 32)))[None]
    expected = (load_model(pairs / "class" / "tokenizer.pt")(x).reconstruction + 1) / 2
    assert torch.allclose(rows[0][0][1][1], expected.clamp(0, 1), atol=1e-6)


def test_reconstruct_takes_the_size_that_the_checkpoint_says(tmp_path, images, capsys):
    save(tmp_path / "c.pt", VQVAE)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    changed = {"model_args": state["model_args"] | {"image_size": 64}}
    torch.save(state | changed, tmp_path / "c.pt")
    main("reconstruct", tmp_path / "c.pt", images[0], "--out", tmp_path / "out.png")
    assert "64x64 pixels" in capsys.readouterr().out


# --- encode and decode -------------------------------------------------------------------------


def encoded(pairs, out, *images, name="class/checkpoint.pt"):
    main("encode", pairs / name, *images, "--out", out)
    return out


@pytest.mark.parametrize("name", ["class/checkpoint.pt", "class/vqvae/checkpoint.pt"])
def test_decoded_are_the_models_reconstructions(tmp_path, pairs, images, name):
    (tmp_path / "more").mkdir()
    shutil.copy(images[1], tmp_path / "more" / images[0].name)  # another picture, the same name
    paths = [*images, tmp_path / "more" / images[0].name]
    codes = encoded(pairs, tmp_path / "indices.npz", *paths, name=name)
    checkpoint = pairs / name
    main("decode", codes, "--out", tmp_path / "decoded", "--checkpoint", checkpoint)
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
    model_args = {"num_hiddens": 8, "num_embeddings": K, "num_downsamples": 4}
    save_checkpoint(
        tmp_path / "c.pt", model=VQVAE(**model_args), model_args=model_args, optimizers={},
        batches=TrainLoader(torch.zeros(4, 3, 48, 48, dtype=torch.uint8), 2), step=0, seconds=0.0,
        metadata=ABOUT | {"image_size": 48},
    )  # fmt: skip
    indices = torch.randint(K, (2, 3, 3))
    indices[0, 0, 0], indices[1, 2, 2] = K - 1, K - 1
    monkeypatch.setattr(VQVAE, "encode", lambda self, x: mock.Mock(indices=indices[: len(x)]))
    decode, seen = VQVAE.decode_indices, []
    monkeypatch.setattr(
        VQVAE, "decode_indices", lambda self, codes: seen.append(codes) or decode(self, codes)
    )
    monkeypatch.chdir(tmp_path)
    main("encode", "c.pt", *images[:2], "--image-size", "48")
    main("decode", "indices.npz")
    assert len([*(tmp_path / "decoded").iterdir()]) == 2
    assert torch.equal(seen[0], indices)
    bits = {1: 1, 2: 1, 3: 2, 16: 4, 24: 5, 512: 9}[K]
    with np.load(tmp_path / "indices.npz") as file:
        assert file["packed"].shape == (2, -(-9 * bits // 8))
        assert file["indices"].dtype == np.int32 and (file["indices"] == indices.numpy()).all()


def test_encode_says_what_codes_and_other_formats_take(tmp_path, pairs, images, capsys):
    encoded(pairs, tmp_path / "indices.npz", *images[:2])
    text = capsys.readouterr().out
    jpeg, png = re.search(r"32x32 pixels are (\d+) bytes as JPEG.*?(\d+) as PNG", text).groups()
    assert text.count(": 10 bytes as indices") == 2  # 16 indices of 5 bits
    pixels = read_image(images[0], 32).transpose(1, 2, 0)
    for size, format in ((jpeg, "JPEG"), (png, "PNG")):
        Image.fromarray(pixels).save(tmp_path / "x", format)
        assert int(size) == (tmp_path / "x").stat().st_size
    assert "2 images, 16 indices of 5 bits each" in text


def test_another_size_is_encoded_on_request(tmp_path, pairs, images):
    encoded(pairs, tmp_path / "indices.npz", images[0], "--image-size", 64)
    checkpoint = ["--checkpoint", pairs / "class" / "checkpoint.pt"]
    main("decode", tmp_path / "indices.npz", "--out", tmp_path / "decoded", *checkpoint)
    assert Image.open(tmp_path / "decoded" / "1-0.png").size == (64, 64)


def test_codes_are_decoded_by_the_model_that_encoded_and_no_other(tmp_path, pairs, images, shapes):
    codes = encoded(pairs, tmp_path / "indices.npz", images[0])
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
        with_content(path, packed=np.zeros((1, 10)))
    elif how == "three dimensions":
        with_content(path, packed=np.zeros((1, 10, 1), dtype=np.uint8))
    elif how == "names in two dimensions":
        with_content(path, names=np.array([["a"]]))
    elif how == "numbers for names":
        with_content(path, names=np.array([1]))
    elif how == "bytes for names":
        with_content(path, names=np.array([b"a"]))
    elif how == "negative grid":
        with_content(path, grid_size=np.array([-4, -4]))
    elif how == "grid of floats":
        with_content(path, grid_size=np.array([4.0, 4.0]))
    elif how == "a number for a path":
        with_content(path, checkpoint=np.array(1))
    elif how == "compressed":
        with np.load(path) as file:
            content = {name: file[name] for name in file.files}
        np.savez_compressed(path, **content)
    elif how == "grid":
        with_content(path, grid_size=np.array([5, 7]))
    elif how == "names":
        with_content(path, names=np.array(["a", "b"]))
    elif how == "K":
        with_content(path, num_embeddings=np.array(512))
    elif how == "too high":
        with_content(path, packed=np.full((1, 10), 255, dtype=np.uint8))


BREAKAGES = ["cut", "flipped", "text", "empty", "array", "pickle", "foreign", "objects"]
BREAKAGES += ["no fingerprint", "floats", "grid", "names", "K", "too high", "three dimensions"]
BREAKAGES += ["names in two dimensions", "numbers for names", "bytes for names", "compressed"]
BREAKAGES += ["a number for a path", "negative grid", "grid of floats"]


@pytest.mark.parametrize("how", BREAKAGES)
def test_damaged_and_foreign_codes_are_one_line_and_never_run(
    how, tmp_path, pairs, images, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    codes = encoded(pairs, tmp_path / "indices.npz", images[0])
    break_codes(codes, how)
    checkpoint = ["--checkpoint", pairs / "class" / "checkpoint.pt"]
    message = error_of("decode", codes, "--out", tmp_path / "decoded", *checkpoint)
    damaged = "it has an index 31 of 24" if how == "too high" else "is not a file of `encode`"
    assert "indices.npz" in message and damaged in message
    assert "allow_pickle" not in message  # numpy's advice, and unsafe
    assert not (tmp_path / "executed").exists() and not (tmp_path / "decoded").exists()


def test_a_file_of_indices_does_not_choose_which_file_is_opened(
    tmp_path, pairs, images, monkeypatch
):
    """A stranger's may name a pipe, a device, or on Windows another computer."""
    os.mkfifo(tmp_path / "pipe")
    shutil.copy(pairs / "class" / "tokenizer.pt", tmp_path / "tokenizer.pt")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    codes = encoded(pairs, tmp_path / "indices.npz", images[0])
    for path in ("pipe", str(tmp_path / "tokenizer.pt"), "below/../tokenizer.pt", "gone.pt"):
        with_content(codes, checkpoint=np.array(path))
        assert f"give --checkpoint {path}" in error_of("decode", codes)
    with_content(codes, checkpoint=np.array("tokenizer.pt"))
    main("decode", codes)
    shutil.copytree(pairs / "class", tmp_path / "run")
    with_content(codes, checkpoint=np.array("run"))  # a folder, as `encode` takes it
    main("decode", codes)


def test_indices_of_a_huge_image_are_refused(tmp_path, pairs, images):
    codes = encoded(pairs, tmp_path / "indices.npz", images[0])
    with_content(codes, grid_size=np.array([1, 1024]), packed=np.zeros((1, 640), dtype=np.uint8))
    checkpoint = ["--checkpoint", pairs / "class" / "checkpoint.pt"]
    assert "8192 pixels, not 1 to 4096" in error_of("decode", codes, *checkpoint)


def test_folders_are_encoded_and_reconstructed(tmp_path, pairs, images, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / ".hidden").mkdir(parents=True)
    for name in ("b.png", "a.png", ".hidden/c.png"):
        shutil.copy(images[0], folder / name)
    main("encode", pairs / "class" / "checkpoint.pt", folder, images[1])
    with np.load("indices.npz") as file:
        assert file["names"].tolist() == ["a", "b", images[1].stem]
        assert file["indices"].shape == (3, 4, 4)
    main("reconstruct", pairs / "class" / "checkpoint.pt", folder)
    assert capsys.readouterr().out.count("photos/") == 4
    main("encode", pairs / "class" / "checkpoint.pt", folder)  # replaces nothing
    assert (tmp_path / "indices-2.npz").exists() and Path("reconstructions.png").exists()


def test_an_image_that_ends_like_indices_is_not_overwritten(tmp_path, pairs, images):
    shutil.copy(images[0], tmp_path / "a.npz")
    before = (tmp_path / "a.npz").read_bytes()
    flags = [tmp_path / "a.npz", "--out", tmp_path / "a.npz"]
    assert "overwritten" in error_of("encode", pairs / "class" / "checkpoint.pt", *flags)
    assert (tmp_path / "a.npz").read_bytes() == before


def test_decode_writes_nowhere_but_into_its_folder(tmp_path, pairs, images):
    codes = encoded(pairs, tmp_path / "indices.npz", images[0])
    checkpoint = ["--checkpoint", pairs / "class" / "checkpoint.pt"]
    for number, (name, expected) in enumerate(
        {
            "../../../escaped": "escaped", "/tmp/escaped": "escaped", "a\\b": "a_b",
            "nul\0l": "nul_l", "\udce9t": "_t", 100 * "猫": 60 * "猫", "..": "",
        }.items()
    ):  # fmt: skip
        with_content(codes, names=np.array([name]))
        out = tmp_path / "a" / f"decoded{number}"
        main("decode", codes, "--out", out, *checkpoint)
        assert [path.name for path in out.iterdir()] == [f"1-{expected or '..'}.png"]
    assert not list(tmp_path.glob("escaped*")) and not list((tmp_path / "a").glob("escaped*"))


@pytest.mark.parametrize(
    ("model_args", "expected"),
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
def test_what_cannot_be_encoded_is_one_line(tmp_path, images, model_args, expected, monkeypatch):
    save(tmp_path / "c.pt", VQVAE)
    save(tmp_path / "vae.pt", VAE)
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(*model_args)
