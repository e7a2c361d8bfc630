"""`vqgan info` and `export`, and `python -m vqgan`."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from commands import error_of, main, save

from vqgan.checkpoint import load_checkpoint
from vqgan.pretrained import load_model, load_pipeline
from vqgan.vae import VAE


def test_it_runs_as_a_module_and_explains_itself():
    command = [sys.executable, "-m", "vqgan", "reconstruct", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CHECKPOINT" in done.stdout


@pytest.fixture
def measured(tmp_path, pairs):
    """A copy of the classes' run with its metrics.json, and its tokenizer's with its own."""
    folder = shutil.copytree(pairs / "class", tmp_path / "run")
    models = {
        "transformer": {
            "nats_per_token": 2.125,
            "frechet": None,
            "class_accuracy": 0.25,
            "epochs": 7,
        },
        "vqvae": {"nmse": 0.0625},
    }
    for result, path in zip(models.values(), (folder, folder / "vqvae"), strict=True):
        result["model_args"] = load_checkpoint(path / "checkpoint.pt")["model_args"]
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
    assert "nats_per_token: 2.125" in text and "epochs: 7" in text and "frechet" not in text
    assert "class_accuracy: 0.25 (of samples at the command's first setting)" in text


def test_info_finds_the_result_of_a_vqvae_in_its_runs_folder(measured, capsys):
    text = info_of(capsys, measured / "vqvae" / "checkpoint.pt")
    assert "VQVAE," in text and "nmse: 0.0625" in text and "condition" not in text


def test_info_does_not_take_the_transformers_result_for_its_tokenizers(measured, capsys):
    """Whatever the run's folder is called."""
    renamed = measured.rename(measured.with_name("transformer"))
    text = info_of(capsys, renamed / "tokenizer.pt")
    assert "VQVAE," in text and "nats_per_token" not in text and "no metrics.json" in text


def test_info_says_that_there_is_no_result(pairs, capsys):
    assert "no metrics.json" in info_of(capsys, pairs / "class" / "checkpoint.pt")


@pytest.mark.parametrize(("kind", "what"), [("image", "gray"), ("none", "one start token")])
def test_info_says_what_a_model_is_asked(kind, what, pairs, capsys):
    text = info_of(capsys, pairs / kind / "checkpoint.pt")
    assert f"condition: {kind} ({what})" in text


def test_info_on_models_of_earlier_versions(tmp_path, capsys):
    save(tmp_path / "c.pt", VAE)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    torch.save({key: state[key] for key in ("model", "model_args", "weights")}, tmp_path / "c.pt")
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
    exported, own = load_pipeline(out / "checkpoint.pt"), load_pipeline(measured / "checkpoint.pt")
    condition, indices = torch.tensor([[1]]), torch.arange(16)[None]
    logits = [pipeline.transformer(condition, indices) for pipeline in (exported, own)]
    assert torch.allclose(*logits, atol=0.05) and not torch.equal(*logits)
    main("sample", out / "checkpoint.pt", "--count", 1)
    assert len(rows) == 1
    text = info_of(capsys, out / "checkpoint.pt")
    assert "nats_per_token: 2.125" in text and "no metrics.json" not in text


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
