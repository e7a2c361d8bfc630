"""Experiments: each writes the folder of results that has its name."""

import importlib.util
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import save

from vqgan import prices
from vqgan.classifier import Classifier
from vqgan.data import ImageDataset
from vqgan.errors import InputError
from vqgan.images import from_uint8, to_unit
from vqgan.masked import MaskedTransformer
from vqgan.metrics import nats_to_bits
from vqgan.perceptual import ClassifierDistance
from vqgan.vae import SpatialVAE
from vqgan.vqvae import VQVAE

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXPERIMENTS = sorted(DOCS.glob("experiments/[!_]*.py"))


def test_docs_has_no_other_python():
    paths = [path.relative_to(DOCS) for path in DOCS.rglob("*.py")]
    paths = [path for path in paths if path.parts[0] != "_build"]
    others = [path for path in paths if str(path.parent) not in ("_ext", "experiments")]
    assert others == [Path("conf.py")]


@pytest.fixture
def load(monkeypatch):
    """Loads an experiment as a module."""

    def load(path):
        monkeypatch.syspath_prepend(path.parent)  # where Python looks when it is run
        spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
        experiment = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(experiment)
        return experiment

    return load


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_writes_the_folder_of_its_name(path, load):
    experiment = load(path)
    assert experiment.OUT == Path("docs/results") / path.stem
    assert f"docs/results/{path.stem}/" in experiment.__doc__
    assert f"python docs/experiments/{path.name}" in experiment.__doc__
    # Every file that it says it writes is committed, and it writes no others' by name.
    files = set(re.findall(r"[\w-]+\.(?:png|json)\b", experiment.__doc__))
    assert files and all((DOCS / "results" / path.stem / name).exists() for name in files)
    assert not re.search(r"[\"']docs[/\"']", path.read_text().replace(experiment.__doc__, ""))


def test_no_experiment_hides_a_module_of_python():
    """Its folder comes first where Python looks: `compression`, of 3.14, breaks gzip."""
    names = {path.stem for path in DOCS.glob("experiments/*.py")}
    names |= {path.stem for path in DOCS.glob("_ext/*.py")}
    assert not names & {*sys.stdlib_module_names, "compression"}


def test_an_experiment_repeats_what_is_committed(tmp_path):
    """The one that takes seconds, in an empty folder: the same files, of the same things."""
    script = DOCS / "experiments" / "path.py"
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True, capture_output=True)
    written, committed = tmp_path / "docs" / "results" / "path", DOCS / "results" / "path"
    assert {file.name for file in written.iterdir()} == {file.name for file in committed.iterdir()}
    new, old = (json.loads((path / "metrics.json").read_text()) for path in (written, committed))
    assert new["command"] == "python docs/experiments/path.py"
    assert new.keys() == old.keys()
    assert new["caption"] == old["caption"]
    for name, tensor in old["tensors"].items():
        assert all(new["tensors"][name][key] == tensor[key] for key in ("shape", "dtype"))
    assert new["ssim"] == pytest.approx(old["ssim"], abs=0.01)


@torch.no_grad()
def test_the_fair_comparison_prices_the_runs_that_are_there(
    tmp_path, monkeypatch, load, shapes, capsys
):
    """Of a spatial VAE with two seeds, and of two VQ-VAEs, one of which has a transformer."""
    fair = load(DOCS / "experiments" / "fair_comparison.py")

    def write(name, nmse, kind=None, **result):
        result = {"nmse_sampled": nmse, "ssim_sampled": 0.5, "nmse": 0.1, "epochs": 3} | result
        (tmp_path / "fair" / name).mkdir(parents=True)
        metrics = {"models": {"transformer" if kind is None else "any": result}}
        metrics |= {"command": "python train_vqvae.py", "device": "cpu", "seconds": 1.0}
        (tmp_path / "fair" / name / "metrics.json").write_text(json.dumps(metrics))
        return kind and save(tmp_path / "fair" / name / "checkpoint.pt", kind)

    model = write("vae-spatial-w1-seed0", 0.2, SpatialVAE)
    write("vae-spatial-w1-seed1", 0.3, SpatialVAE)
    write("vqvae-8x8-k32-seed0", 0.4, VQVAE)
    write("vqvae-8x8-k128-seed0", 0.4, VQVAE)
    write("prior-vqvae-8x8-k32-seed0", None, bits_per_image=123.0)
    images = ImageDataset(**vars(shapes) | {"test_images": shapes.test_images[:50]})
    monkeypatch.setattr(fair, "load_dataset", lambda source: images)
    monkeypatch.chdir(tmp_path)
    fair.main(Namespace(data="shapes", runs=tmp_path))

    written = json.loads((fair.OUT / "metrics.json").read_text())
    assert (fair.OUT / "rate_distortion.png").exists()
    models, seed0 = written["models"], written["runs"]["vae-spatial-w1-seed0"]
    assert models.keys() == {"vae-spatial-w1", "vqvae-8x8-k32", "vqvae-8x8-k128"}
    spatial = models["vae-spatial-w1"]
    assert spatial["nmse_sampled"] == pytest.approx(0.25) and spatial["seeds"] == 2
    assert spatial["nmse_sampled_range"] == [0.2, 0.3]
    bits = nats_to_bits(model(from_uint8(images.test_images)).kl.mean().item())
    assert seed0["fixed_bits_per_image"] == pytest.approx(bits, rel=1e-4)
    train, test = (
        [part.flatten(1) for part in model.encode(from_uint8(x))]
        for x in (images.train_images, images.test_images)
    )
    for prior, bits in prices.gaussian_prices(train, test).items():
        assert seed0[f"{prior}_bits_per_image"] == pytest.approx(bits, rel=1e-3)
    assert models["vqvae-8x8-k32"]["fixed_bits_per_image"] == 64 * 4  # 16 codes
    assert models["vqvae-8x8-k32"]["context_bits_per_image"] == 123
    assert models["vqvae-8x8-k128"]["context_bits_per_image"] is None
    text = capsys.readouterr().out
    assert "there is no finished run " + str(tmp_path / "fair" / "vae-seed0") in text
    assert "prior-vqvae-8x8-k128-seed0" in text and "prior-vqvae-8x8-k32" not in text
    for points in written["landmarks"].values():
        sizes, errors = ([p[key] for p in points] for key in ("bits_per_image", "nmse_sampled"))
        assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


def test_bytes_of_image_files_leave_out_headers(load):
    fair = load(DOCS / "experiments" / "fair_comparison.py")
    header, data = b"tag, size.", b"12345"  # of 15 bytes together, and one more is padding
    webp = b"RIFF" + bytes([28, 0, 0, 0]) + b"WEBPVP8 " + bytes([15, 0, 0, 0]) + header + data
    assert fair.frame_bytes(webp + b"\0") == 5
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    for format, payload in fair.FORMATS.items():
        decoded, (file,) = fair.through_file(image, format, quality=20, **fair.OPTIONS[format])
        assert decoded.shape == image.shape and 100 < payload(file) <= len(file) - 30


def test_the_sweep_means_the_losses_of_the_last_epoch_and_compares_equal_epochs(
    tmp_path, monkeypatch, load, shapes
):
    sweep = load(DOCS / "experiments" / "sweep.py")
    monkeypatch.setattr(sweep, "load_dataset", lambda source: shapes)

    def write(name, epochs, kind=VQVAE):
        run = tmp_path / "sweep" / name
        run.mkdir(parents=True)
        result = {"ssim": 0.5, "ssim_global": 0.75, "epochs": epochs}
        metrics = {"models": {"any": result}, "device": "cpu", "command": "python train_vqvae.py"}
        (run / "metrics.json").write_text(json.dumps(metrics))
        save(run / "checkpoint.pt", kind)
        log = "step,epoch,loss,reconstruction\n1,0.5,9,8\n2,1.0,7,6\n3,1.5,5,4\n4,2.0,3,1\n"
        (run / "log.csv").write_text(log)

    write("vqvae-batch16", 2)
    write("vae-batch16", 2, SpatialVAE)
    monkeypatch.chdir(tmp_path)
    sweep.main(Namespace(data="shapes", runs=tmp_path))
    assert len([*sweep.OUT.glob("*.png")]) == 3
    written = json.loads((sweep.OUT / "metrics.json").read_text())["models"]
    assert written.keys() == {"vae-batch16", "vqvae-batch16"}
    result = written["vqvae-batch16"]
    assert (result["final_epoch"], result["final_loss"], result["ssim"]) == (2, 4, 0.5)
    assert result["final_reconstruction"] == 2.5
    write("vae-batch32", 3, SpatialVAE)
    with pytest.raises(InputError, match="runs of 2, 3 epochs"):
        sweep.main(Namespace(data="shapes", runs=tmp_path))


def test_moving_shapes_go_straight_on_bounce_and_are_found_where_they_are(load):
    moving = load(DOCS / "experiments" / "moving.py")
    path = torch.from_numpy(moving.glide(50, 30, np.random.default_rng(0)))
    assert path.min() >= moving.RADIUS and path.max() <= moving.SIZE - moving.RADIUS
    steps = path.diff(dim=1)
    speed = steps.norm(dim=-1)
    assert speed.max() <= moving.SPEED + 1e-9 and speed.median() == pytest.approx(moving.SPEED)
    # A coordinate's steps have one size, and are shorter only where the point meets a wall.
    is_short = steps.abs() < steps.abs().amax(dim=1, keepdim=True) - 1e-9
    to_wall = torch.minimum(path - moving.RADIUS, moving.SIZE - moving.RADIUS - path)[:, :-1]
    assert is_short.any() and to_wall[is_short].max() < moving.SPEED
    assert (steps[:, 1:] * steps[:, :-1] < 0).any()  # they bounce

    films = moving.draw_films(50, 30, np.random.default_rng(1))
    assert films.shape == (50, 30, 3, moving.SIZE, moving.SIZE)
    rng = np.random.default_rng(1)
    rng.integers(len(moving.KINDS), size=50)  # the kinds are drawn first, then the same paths
    path = torch.from_numpy(moving.glide(50, 30, rng))
    found = moving.centers(to_unit(from_uint8(films)))
    # Up to the points of supersampling, a quarter of a pixel apart.
    assert (found - path).norm(dim=-1).max() < 1 / moving.SUPERSAMPLING


def test_moving_splits_the_last_frame_from_those_that_are_remembered(load):
    moving = load(DOCS / "experiments" / "moving.py")
    film = torch.arange(12).view(1, 4, 3)  # four frames of three tokens
    for memory, condition in ((1, [6, 7, 8]), (2, [3, 4, 5, 6, 7, 8])):
        given, last = moving.split_last(film, memory)
        assert given.tolist() == [condition] and last.tolist() == [[9, 10, 11]]
    path = torch.zeros(2, moving.GIVEN + 2, 2)
    found = path.clone()
    found[0, -1] = torch.tensor([3.0, 4.0])  # in one of two films
    assert moving.errors(found, path) == [0, 2.5]


def test_style_measures_from_one_image_to_the_other(load):
    style = load(DOCS / "experiments" / "style.py")
    features = torch.randn(2, 5, 4, 4)
    shuffled = features.flatten(2)[..., torch.randperm(16)].view_as(features)
    assert torch.allclose(style.gram(shuffled), style.gram(features), atol=1e-6)  # any places
    assert style.gram(features)[1, 2, 3] == pytest.approx(
        (features[1, 2] * features[1, 3]).mean().item(), abs=1e-6
    )
    network = ClassifierDistance(Classifier(3, width=4))
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    objective = style.Objective(network, images[:2], images[2:])
    for image, distances in ((images[:2], (0, 1)), (images[2:], (1, 0))):
        for found, expected in zip(objective(image), distances, strict=True):
            assert found.tolist() == pytest.approx([expected] * 2, abs=1e-5)
    start = torch.rand(2, 3, 16, 16)
    style.STEPS = 5
    moved = style.optimize(objective, start, lambda x: x, 0.01)
    before, after = (sum(objective(x)).sum() for x in (start, moved))
    assert after < before


def test_filling_in_measures_the_step_across_each_border_of_a_hole(load):
    filling_in = load(DOCS / "experiments" / "filling_in.py")
    x = torch.randn(2, 3, 8, 8)
    x[:, :, 2:6, 2:7] = 5 + x[:, :, 1:2, 2:7]  # inside of the box each column is even
    steps = filling_in.steps_across(x, (2, 2, 7, 6))
    assert steps.keys() == {"upper", "lower", "left", "right"}
    assert steps["upper"].item() == pytest.approx(5, abs=1e-5)
    expected = (x[:, :, 2:6, 7] - x[:, :, 2:6, 6]).abs().mean().item()
    assert steps["right"].item() == pytest.approx(expected)
    assert filling_in.steps_across(x, (0, 0, 8, 4)).keys() == {"lower"}  # the others are no border
    hole = filling_in.hole_of((2, 2, 7, 6), 8)
    assert hole.sum() == 20 and hole[2:6, 2:7].all()


@torch.no_grad()
def test_filling_in_prices_a_masked_transformer_in_a_gpts_order(load, shapes):
    """Token after token: each predicted from those before it, with all others masked."""
    filling_in = load(DOCS / "experiments" / "filling_in.py")
    tokenizer = VQVAE(image_size=32, num_embeddings=16, num_hiddens=16, num_residual_hiddens=8)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    transformer = MaskedTransformer(16, 64, len(shapes.class_names), 1, **sizes).eval()
    for parameter in transformer.parameters():
        parameter.normal_(std=0.3)
    pipeline = Namespace(transformer=transformer, tokenizer=tokenizer.eval())
    filling_in.NUM_PRICED = 2
    price = 0.0
    for image, label in zip(shapes.test_images[:2], shapes.test_labels[:2], strict=True):
        tokens = tokenizer.tokens(from_uint8(image[None]))
        for i in range(64):
            seen = tokens.clone()
            seen[:, i:] = transformer.mask_token
            log_p = transformer(label.view(1, 1), seen).log_softmax(dim=2)
            price -= log_p[0, i, tokens[0, i]].item() / (2 * 64)
    assert filling_in.raster_nats(pipeline, shapes) == pytest.approx(price, abs=1e-4)
    assert price > 2
