"""The study's script: what it writes, that it resumes, that its flags act, what it refuses."""

import functools
import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from commands import main as vqgan_command
from PIL import Image
from scripts import (
    error_in_process,
    lines,
    model_folder,
    run_in_process,
    same_weights,
    start_process,
    wait_for,
    weights,
)

import train_vqvae
from vqgan import figures
from vqgan.device import choose_precision
from vqgan.training import read_log
from vqgan.vae import VAE, SpatialVAE
from vqgan.vqvae import VQVAE

# Eight steps an epoch, and a checkpoint every three: neither divides the other. A batch has four
# vectors for each code: a few dozen codes die within these steps, and are restarted.
SMALL = ["--data", "shapes", "--limit", "64", "--batch-size", "8", "--epochs", "2"]
SMALL += ["--checkpoint-every", "3", "--device", "cpu"]
NO_CODEBOOK = SMALL  # for the models that have none
SMALL = [*SMALL, "--num-embeddings", "128"]


run = functools.partial(run_in_process, train_vqvae)
error_of = functools.partial(error_in_process, train_vqvae)
start = functools.partial(start_process, train_vqvae)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of both models, never interrupted, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    stdout, stderr = start(out, *SMALL).communicate(timeout=300)
    assert (out / "metrics.json").exists(), stderr
    return out, stdout


# --- what a run writes -------------------------------------------------------------------------


def test_metrics_config_and_table(finished):
    out, stdout = finished
    written = json.loads((out / "metrics.json").read_text())
    assert written.keys() >= {"command", "data", "device", "versions", "seconds", "models"}
    vae, vqvae = written["models"]["vae"], written["models"]["vqvae"]
    for result in (vae, vqvae):
        for key in ("nmse", "psnr", "ssim", "ssim_global", "bits_per_image", "seconds"):
            assert np.isfinite(result[key])
    assert vae["perplexity"] is None and vqvae["bits_per_image"] == 64 * 7
    assert 1 <= vqvae["perplexity"] <= vqvae["codes_used"] <= 128
    assert vqvae["entropy_bits_per_image"] == pytest.approx(64 * np.log2(vqvae["perplexity"]))
    assert f"{vqvae['nmse']:.4f}" in stdout and f"{vae['ssim']:.4f}" in stdout
    assert json.loads((out / "config.json").read_text())["epochs"] == 2


def test_log_has_rows_at_checkpoints_and_the_end(finished):
    out, _ = finished
    for name in ("vae", "vqvae"):
        rows = read_log(model_folder(out, name) / "log.csv")
        assert [row["step"] for row in rows] == [3, 6, 9, 12, 15, 16]
        assert rows[-1]["epoch"] == 2


def test_a_run_learns(tmp_path):
    """Of the same eight images at every step: batches differ by more than a few steps teach."""
    flags = ["--limit", 8, "--batch-size", 8, "--epochs", 32, "--checkpoint-every", 16, "--no-flip"]
    out = run(tmp_path / "run", *SMALL, *flags)
    for name in ("vae", "vqvae"):
        first, last = read_log(model_folder(out, name) / "log.csv")
        assert last["loss"] < 0.98 * first["loss"]  # by 5% or more, of other seeds too


def test_pictures_are_there_and_not_blank(finished):
    out, _ = finished
    names = {path.name for path in out.glob("*.png")}
    assert names == {
        "reconstructions.png", "losses.png", "codebook_usage.png",
        "vae_samples.png", "vae_interpolations.png",
    }  # fmt: skip
    for name in names:
        pixels = np.asarray(Image.open(out / name).convert("L"))
        assert 0.01 < (pixels < 250).mean() and pixels.std() > 10, name


def test_a_checkpoint_builds_its_model_and_gives_the_measured_error(finished, shapes):
    out, _ = finished
    written = json.loads((out / "metrics.json").read_text())
    x = shapes.test_images[:64].float() / 127.5 - 1
    for name, kind in (("vae", VAE), ("vqvae", VQVAE)):
        state = torch.load(model_folder(out, name) / "checkpoint.pt", weights_only=True)
        model = kind(**state["model_args"])
        model.load_state_dict(state["weights"])
        with torch.no_grad():
            error = (model.eval()(x).reconstruction - x).square().mean().item()
        nmse = error / written["data"]["variance"]
        # In another layout a vector between two codes may get the other: 0.1% of the error at most.
        assert nmse == pytest.approx(written["models"][name]["nmse"], rel=5e-3)


def test_training_losses_by_hand(shape_images):
    """MSE / variance plus the quantizer's loss; and for the VAE the bound, term by term."""
    x = shape_images * 2 - 1
    model = VQVAE().eval()
    losses, output = train_vqvae.training_losses(model, x, variance=0.3), model(x)
    mse = (output.reconstruction - x).square().mean()
    assert torch.allclose(losses["reconstruction"], mse / 0.3)
    assert torch.allclose(losses["loss"], mse / 0.3 + output.loss)
    assert torch.equal(losses["quantizer"], output.loss)
    for model in (VAE(kl_weight=2.0).eval(), SpatialVAE(kl_weight=2.0).eval()):
        losses = train_vqvae.training_losses(model, x, variance=0.3)
        bound = losses["negative log-likelihood"] + 2 * losses["KL"]
        assert torch.allclose(losses["loss"], bound)


def test_a_sampled_latent_costs_the_vae_some_error_and_the_vqvae_none(finished):
    models = json.loads((finished[0] / "metrics.json").read_text())["models"]
    assert models["vae"]["nmse_sampled"] != models["vae"]["nmse"]
    assert models["vqvae"]["nmse_sampled"] == models["vqvae"]["nmse"]


# --- the spatial VAE ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spatial(tmp_path_factory):
    """The spatial VAE beside the VQ-VAE, never interrupted, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "spatial"
    stdout, stderr = start(out, *SMALL, "--models", "vae-spatial", "vqvae").communicate(timeout=300)
    assert (out / "metrics.json").exists(), stderr
    return out, stdout


def test_the_spatial_vae_is_measured_as_the_others(spatial, finished):
    out, stdout = spatial
    models = json.loads((out / "metrics.json").read_text())["models"]
    others = json.loads((finished[0] / "metrics.json").read_text())["models"]
    result = models["vae-spatial"]
    assert result.keys() == others["vae"].keys() and result["perplexity"] is None
    assert result["bits_per_image"] > 0 and result["nmse_sampled"] != result["nmse"]
    (row,) = (line for line in stdout.splitlines() if line.startswith("spatial VAE "))
    assert f"{result['nmse']:.4f}" in row and f"{result['bits_per_image']:.0f}" in row
    drawn = {path.name for path in out.glob("vae-spatial_*.png")}
    assert drawn == {"vae-spatial_samples.png", "vae-spatial_interpolations.png"}
    # The opponent is that of a run with the flat VAE.
    assert same_weights(weights(out, "vqvae"), weights(finished[0], "vqvae"))


def test_a_spatial_vae_killed_and_resumed_is_the_uninterrupted_one(spatial, tmp_path):
    whole, out = spatial[0], tmp_path / "killed"
    process = start(out, *SMALL, "--models", "vae-spatial", "vqvae")
    wait_for(lambda: lines(model_folder(out, "vae-spatial") / "log.csv") >= 3, process)
    process.kill()
    process.communicate()
    assert not (out / "vqvae").exists()
    run(out, "--resume")
    for name in ("vae-spatial", "vqvae"):
        assert same_weights(weights(out, name), weights(whole, name))
        log = (out / name / "log.csv").read_bytes()
        assert log == (whole / name / "log.csv").read_bytes()


def test_flags_of_both_vaes_reach_the_spatial_one_and_its_checkpoint_reconstructs(
    tmp_path, image_folder, capsys
):
    flags = ["--likelihood", "learned", "--kl-weight", 2.5, "--num-downsamples", 3, "--epochs", 1]
    out = run(tmp_path / "run", *NO_CODEBOOK, "--models", "vae-spatial", *flags)
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["model"] == "SpatialVAE"
    model_args = {"likelihood": "learned", "kl_weight": 2.5, "num_downsamples": 3}
    assert model_args.items() <= checkpoint["model_args"].items()
    image, picture = image_folder / "cats" / "00.png", tmp_path / "out.png"
    vqgan_command("reconstruct", out, image, "--image-size", 64, "--out", picture)
    text = capsys.readouterr().out
    assert "SpatialVAE, 64x64 pixels; " in text and "PSNR" in text and picture.exists()
    vqgan_command("info", out)
    text = capsys.readouterr().out
    assert "SpatialVAE, " in text and "kl_weight: 2.5" in text and "nmse_sampled: " in text


# --- stop and resume ---------------------------------------------------------------------------


def test_a_run_killed_at_many_moments_and_resumed_is_the_uninterrupted_one(finished, tmp_path):
    whole, _ = finished
    out = tmp_path / "killed"
    moments = (
        lambda: (out / "config.json").exists(),  # before anything is trained
        lambda: (
            lines(model_folder(out, "vae") / "log.csv") >= 3
        ),  # between two checkpoints of the first model
        lambda: (
            model_folder(out, "vqvae") / "checkpoint.pt"
        ).exists(),  # just at the second's first one
        lambda: lines(model_folder(out, "vqvae") / "log.csv") >= 6,
        lambda: lines(model_folder(out, "vqvae") / "log.csv") >= 7,  # trained: in the evaluation
    )
    for number, moment in enumerate(moments):
        process = start(out, *(["--resume"] if number else SMALL))
        wait_for(moment, process)
        process.kill()  # SIGKILL: nothing of the process runs after it
        process.communicate()
        assert not (out / "metrics.json").exists()
    _, stderr = start(out, "--resume").communicate(timeout=300)
    assert (out / "metrics.json").exists(), stderr
    for name in ("vae", "vqvae"):
        assert same_weights(weights(out, name), weights(whole, name))
        log = (model_folder(out, name) / "log.csv").read_bytes()
        assert log == (model_folder(whole, name) / "log.csv").read_bytes()
    for key in ("nmse", "ssim", "bits_per_image"):
        models = [json.loads((o / "metrics.json").read_text())["models"] for o in (out, whole)]
        assert models[0]["vqvae"][key] == models[1]["vqvae"][key]


def test_a_run_older_than_a_flag_goes_on_with_the_flags_default(finished, tmp_path):
    whole, _ = finished
    out = tmp_path / "older"
    shutil.copytree(whole, out)
    config = json.loads((out / "config.json").read_text())
    del config["num_rendered"]
    (out / "config.json").write_text(json.dumps(config))
    assert "--num-rendered 10000" in error_of(out, "--resume", "--num-rendered", 20_000)
    run(out, "--resume")
    assert json.loads((out / "config.json").read_text())["num_rendered"] == 10_000


def test_a_finished_run_can_be_resumed_for_more_epochs(finished, tmp_path):
    """Three epochs at once are two, then one more; fewer than it has had are refused."""
    whole, _ = finished
    out = tmp_path / "longer"
    shutil.copytree(whole, out)
    run(out, "--resume", "--epochs", 3)
    chunk_size = run(tmp_path / "chunk_size", *SMALL, "--epochs", 3)
    assert same_weights(weights(out, "vae"), weights(chunk_size, "vae"))
    assert same_weights(weights(out, "vqvae"), weights(chunk_size, "vqvae"))
    assert "--epochs 1" in error_of(out, "--resume", "--epochs", 1)
    run(out, "--resume")  # which has changed nothing


@pytest.mark.parametrize(
    ("flags", "seq_len"),
    [
        ("--models vqvae --quantizer residual --num-rounds 2 --gradient-estimator rotation", 128),
        ("--models vqvae --quantizer simvq", 64),
        ("--models vqvae --cosine --embedding-dim 8", 64),
        ("--models vqvae2 --quantizer lfq", 320),
    ],
)
def test_every_codebook_resumed_is_the_uninterrupted_one(flags, seq_len, tmp_path):
    """Two epochs at once, and one and then another. The table says what a sequence costs."""
    flags = [*SMALL, "--limit", 64, "--batch-size", 16, "--num-embeddings", 32, *flags.split()]
    whole = run(tmp_path / "whole", *flags, "--epochs", 2)
    out = run(tmp_path / "out", *flags, "--epochs", 1)
    run(out, "--resume", "--epochs", 2)
    assert same_weights(weights(out, ""), weights(whole, ""))
    (result,) = json.loads((out / "metrics.json").read_text())["models"].values()
    assert result["bits_per_image"] == 5 * seq_len


def test_a_model_trains_the_same_alone(finished, tmp_path):
    """Each model has its own start: same seed, same run, whatever was trained before it."""
    whole, _ = finished
    run(tmp_path / "alone", *SMALL, "--models", "vqvae")
    assert same_weights(weights(tmp_path / "alone", "vqvae"), weights(whole, "vqvae"))


def test_a_vae_whose_config_still_has_the_flags_of_a_codebook_is_resumed(tmp_path):
    """Their defaults were written out by older versions."""
    flags = [*NO_CODEBOOK, "--models", "vae", "--limit", 32, "--epochs", 1]
    out = run(tmp_path / "run", *flags)
    config = json.loads((out / "config.json").read_text())
    config |= {"quantizer": "ema", "num_embeddings": 512, "embedding_dim": 64, "data_init": True}
    (out / "config.json").write_text(json.dumps(config))
    run(out, "--resume", "--epochs", 2)
    assert json.loads((out / "metrics.json").read_text())["models"]["vae"]["epochs"] == 2


# --- flags -------------------------------------------------------------------------------------


def test_a_sweep_draws_its_figure_and_gives_each_run_a_folder(tmp_path):
    flags = ["--models", "vae-spatial", "vqvae", "--batch-sizes", 16, 32, "--epochs", 1]
    draw = figures.metric_by_batch_size
    with mock.patch.object(figures, "metric_by_batch_size", wraps=draw) as drawn:
        out = run(tmp_path / "sweep", *SMALL, *flags)
    lines_drawn = drawn.call_args.args[1]
    assert lines_drawn.keys() == {"spatial VAE", "VQ-VAE"}
    assert all(line.keys() == {16, 32} for line in lines_drawn.values())
    models = json.loads((out / "metrics.json").read_text())["models"]
    names = ("vae-spatial", "vqvae")
    assert set(models) == {f"{name}-batch{size}" for name in names for size in (16, 32)}
    assert (out / "ssim_by_batch_size.png").exists()
    assert read_log(out / "vae-spatial-batch16" / "log.csv")[-1]["step"] == 4
    assert read_log(out / "vae-spatial-batch32" / "log.csv")[-1]["step"] == 2


FLAGS = {
    "lr": (["--lr", "1e-3"], "vae"),
    "seed": (["--seed", "1"], "vae"),
    "flip": (["--no-flip"], "vae"),
    "likelihood": (["--likelihood", "fixed"], "vae"),
    "kl_weight": (["--kl-weight", "2.5"], "vae"),
    "precision": (["--precision", "PRECISION"], "vae"),
    "quantizer": (["--quantizer", "gradient"], "vqvae"),
    "num_embeddings": (["--num-embeddings", "64"], "vqvae"),
    "num_downsamples": (["--num-downsamples", "1"], "vqvae"),
    "data_init": (["--no-data-init"], "vqvae"),
    "restart_dead_codes": (["--no-restart-dead-codes"], "vqvae"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_changes_what_it_says(name, tmp_path, finished):
    flags, model = FLAGS[name]
    if name == "precision":  # the other one than this machine's choice
        auto = choose_precision("auto", torch.device("cpu"))
        flags = ["--precision", "fp32" if auto == torch.bfloat16 else "bf16"]
    small = NO_CODEBOOK if model == "vae" else SMALL
    out = run(tmp_path / "run", *small, "--models", model, *flags)
    whole, _ = finished
    changed, default = weights(out, model), weights(whole, model)
    assert changed.keys() != default.keys() or not same_weights(changed, default)
    checkpoint = torch.load(model_folder(out, model) / "checkpoint.pt", weights_only=True)
    assert checkpoint["model"].lower() == model  # --models
    if name in checkpoint["model_args"]:
        config = json.loads((out / "config.json").read_text())
        assert checkpoint["model_args"][name] == config[name]


def test_a_run_starts_from_the_weights_and_the_codebook_of_another(finished, tmp_path):
    """At a learning rate of almost nothing, only the averages of the codebook move on."""
    source = model_folder(finished[0], "vqvae") / "checkpoint.pt"
    flags = [*SMALL, "--models", "vqvae", "--init-from", source, "--lr", "1e-12", "--seed", "9"]
    started, given = weights(run(tmp_path / "run", *flags), "vqvae"), weights(finished[0], "vqvae")
    for name in given:
        if name.startswith(("encoder", "decoder")):
            assert torch.allclose(started[name], given[name], atol=1e-6)
    # A codebook that was initialized anew would be other vectors. (Dead codes are restarted.)
    moved = (started["quantizer.codebook"] - given["quantizer.codebook"]).norm(dim=1)
    assert (moved < 0.5 * given["quantizer.codebook"].norm(dim=1)).double().mean() > 0.5

    # Killed before its first checkpoint, it starts from them again; afterwards it needs no file.
    copy = shutil.copy(source, tmp_path / "copy.pt")
    flags[flags.index(source)] = copy
    out = tmp_path / "killed"
    whole = weights(run(out, *flags), "vqvae")
    (out / "checkpoint.pt").unlink()
    assert same_weights(weights(run(out, "--resume"), "vqvae"), whole)
    copy.unlink()
    run(out, "--resume", "--epochs", "3")


def test_a_run_starts_from_no_other_model(finished, tmp_path):
    flags = [*NO_CODEBOOK, "--init-from", model_folder(finished[0], "vqvae") / "checkpoint.pt"]
    assert "is a VQVAE of other sizes" in error_of(tmp_path / "a", *flags, "--models", "vae")
    flags += ["--models", "vqvae", "--num-embeddings", "64"]
    assert "is a VQVAE of other sizes" in error_of(tmp_path / "b", *flags)


def test_the_log_says_how_many_codes_are_in_use(finished):
    rows = read_log(model_folder(finished[0], "vqvae") / "log.csv")
    assert all(1 < row["codes_used"] <= 128 for row in rows)
    assert "codes_used" not in read_log(model_folder(finished[0], "vae") / "log.csv")[0]


def test_limit_epochs_and_batch_size_count_steps(tmp_path):
    flags = ["--data", "shapes", "--limit", "50", "--batch-size", "20", "--epochs", "3"]
    flags += ["--models", "vae"]
    out = run(tmp_path / "run", *flags)
    assert read_log(model_folder(out, "vae") / "log.csv")[-1]["step"] == 2 * 3
    data = json.loads((out / "metrics.json").read_text())["data"]
    assert data["training_images"] == data["test_images"] == 50


def test_image_size_resizes_a_folder(tmp_path, image_folder):
    """Also: a test set of a few images is enough for every picture."""
    flags = ["--data", str(image_folder), "--image-size", "48", "--batch-size", "8"]
    out = run(tmp_path / "run", *flags, "--epochs", "1")
    checkpoint = torch.load(model_folder(out, "vae") / "checkpoint.pt", weights_only=True)
    assert checkpoint["model_args"]["image_size"] == 48
    vqvae = json.loads((out / "metrics.json").read_text())["models"]["vqvae"]
    assert vqvae["bits_per_image"] == 12 * 12 * 9


def test_compile_gives_the_same_run_and_the_same_names(tmp_path):
    """Traced by torch.compile (without its C++ compiler, which takes a minute here)."""
    flags = [*SMALL, "--models", "vqvae", "--epochs", "1", "--precision", "fp32"]
    plain = run(tmp_path / "plain", *flags)
    traced = []

    def compile(self):
        traced.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    with mock.patch.object(torch.nn.Module, "compile", compile):
        compiled = run(tmp_path / "compiled", *flags, "--compile")
    assert len(traced) == 1
    assert weights(plain, "vqvae").keys() == weights(compiled, "vqvae").keys()
    losses = [
        [row["loss"] for row in read_log(model_folder(o, "vqvae") / "log.csv")]
        for o in (plain, compiled)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_help_states_every_default(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for flag, default in (("--epochs", "40"), ("--lr", "0.0005"), ("--out", "runs/study")):
        assert flag in text and f"(default: {default})" in text


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data", "imagenet"], "--data imagenet"),
        (["--data", "EMPTY"], "has no files"),
        (["--data", "shapes", "--batch-size", "128", "--limit", "100"], "1 to 100"),
        (["--data", "shapes", "--device", "tpu"], "--device tpu"),
        (["--data", "shapes", "--image-size", "64"], "needs --image-size 32"),
        (["--data", "shapes", "--image-size", "40"], "multiple of 2^4"),
        (["--data", "EMPTY", "--models", "vqvae", "--image-size", "8"], "at least 11"),
        (["--data", "shapes", "--models", "vae-spatial", "--num-downsamples", "6"], "of 2^6"),
        (["--data", "shapes", "--quantizer", "gradient", "--no-restart-dead-codes"], "has no"),
        (["--data", "shapes", "--quantizer", "fsq", "--levels", "8", "1"], "--levels [8, 1]"),
        (
            ["--data", "shapes", "--quantizer", "fsq", "--embedding-dim", "3"],
            "follows from its --levels",
        ),
        (["--data", "shapes", "--quantizer", "lfq", "--num-embeddings", "100"], "power of two"),
        (["--data", "shapes", "--quantizer", "residual", "--num-rounds", "0"], "--num-rounds 0"),
        (["--data", "shapes", "--levels", "8", "8", "--num-embeddings", "64"], "the product"),
        (["--data", "shapes", "--models", "vqvae2", "--num-downsamples", "1"], "has two grids"),
        (["--data", "shapes", "--models", "vqvae2", "--num-rounds", "2"], "has two grids"),
        (["--data", "shapes", "--models", "vae", "--cosine"], "--cosine: vae has no codebook"),
        (["--data", "shapes", "--resume"], "no run in"),
    ],
)
def test_what_cannot_work_stops_with_one_line(flags, expected, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = [str(tmp_path / "empty") if flag == "EMPTY" else flag for flag in flags]
    assert expected in error_of(tmp_path / "run", *flags)


@pytest.mark.parametrize(
    "flags",
    [["--epochs", "0"], ["--epochs", "-3"], ["--epoch", "3"], ["--lr", "nan"], ["--seed", "-1"]],
)
def test_flags_out_of_range_or_unknown_are_named(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "run", *flags)
    assert stopped.value.code != 0 and flags[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_and_not_continued_as_another(finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "--resume" in error_of(out, *SMALL)
    assert "--num-embeddings 128" in error_of(out, "--resume", "--num-embeddings", 64)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_checkpoint_of_another_model_is_refused(finished, tmp_path):
    out = tmp_path / "mixed"
    shutil.copytree(finished[0], out)
    shutil.copy(
        model_folder(out, "vqvae") / "checkpoint.pt", model_folder(out, "vae") / "checkpoint.pt"
    )
    assert "is of VQVAE(" in error_of(out, "--resume")


def test_a_loss_that_diverges_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """A first step of 1e9 leaves weights that are finite; the second loss is not."""
    out = tmp_path / "run"
    message = error_of(out, *SMALL, "--models", "vqvae", "--lr", "1e9", "--checkpoint-every", 1)
    assert "'reconstruction'" in message and "at step 2" in message and "diverged" in message
    assert torch.load(model_folder(out, "vqvae") / "checkpoint.pt", weights_only=True)["step"] == 1
    for value in weights(out, "vqvae").values():
        assert not torch.is_tensor(value) or torch.isfinite(value).all()


def test_a_full_disk_stops_with_one_line_and_keeps_what_was_written(finished, tmp_path):
    """A limit on the size of files stands in for the full disk: the checkpoint does not fit."""
    resource = pytest.importorskip("resource")  # not on Windows
    out = tmp_path / "full"
    shutil.copytree(finished[0], out)
    before = (model_folder(out, "vae") / "checkpoint.pt").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start(out, "--resume", "--epochs", 3, preexec_fn=limit)
    _, stderr = process.communicate(timeout=300)
    message = stderr.strip().splitlines()[-1]
    assert process.returncode != 0 and message.startswith("error: ") and "room" in message
    assert "Traceback" not in stderr
    assert (model_folder(out, "vae") / "checkpoint.pt").read_bytes() == before


def test_an_output_folder_that_cannot_be_written_stops_with_one_line(tmp_path):
    (tmp_path / "file").touch()
    assert "--out" in error_of(tmp_path / "file" / "run", *SMALL)
