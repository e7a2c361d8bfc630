"""`python -m vqgan`, and the models that it loads."""

import json
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

from vqgan.data import Batches
from vqgan.errors import InputError
from vqgan.loading import image_size_of, load_model
from vqgan.training import save_checkpoint
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
def test_a_loaded_model_is_the_saved_one(tmp_path, kind, shape_images):
    model = save(tmp_path / "c.pt", kind)
    loaded = load_model(tmp_path / "c.pt")
    x = shape_images * 2 - 1
    assert torch.equal(loaded(x).reconstruction, model(x).reconstruction)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert image_size_of(loaded) == 32


def test_checkpoints_of_something_else_are_named(tmp_path):
    save(tmp_path / "c.pt", VQVAE)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    torch.save(state | {"model": "Diffusion"}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="'Diffusion'.*VQGAN"):
        load_model(tmp_path / "other.pt")
    torch.save(state | {"arguments": {"depth": 3}}, tmp_path / "arguments.pt")
    with pytest.raises(InputError, match="depth"):
        load_model(tmp_path / "arguments.pt")


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_reconstruct_writes_originals_over_reconstructions(tmp_path, images, kind, capsys):
    save(tmp_path / "c.pt", kind)
    main("reconstruct", tmp_path / "c.pt", *images, "--out", tmp_path / "out.png")
    pixels = np.asarray(Image.open(tmp_path / "out.png").convert("L"))
    assert pixels.std() > 10
    text = capsys.readouterr().out
    assert text.count("PSNR") == 3 and "32x32" in text and "out.png" in text
    assert ("bits an image" in text) == (kind is not VAE)


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
        (["c.pt", "0.png", "--config", "empty.json"], "lacks resolution"),
        (["c.pt", "0.png", "--config", "theirs.json"], "leave the config out"),
        (["c.pt", "gone.png"], "gone.png cannot be read"),
        (["c.pt", "c.pt"], "c.pt cannot be read as an image"),
        (["0.png", "0.png"], "0.png is not a checkpoint"),
        (["c.pt", "0.png", "--image-size", "30"], "sides that 4 divides"),
        (["vae.pt", "0.png", "--image-size", "64"], "32 pixels only"),
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
