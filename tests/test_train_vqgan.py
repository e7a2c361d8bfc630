"""Stage one's script: both steps, what it writes, that it resumes, that its flags act."""

import functools
import json
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
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

import train_vqgan
from vqgan.compvis import _their_names
from vqgan.discriminator import PatchDiscriminator
from vqgan.pretrained import load_model
from vqgan.training import read_log
from vqgan.vqgan import VQGAN

run = functools.partial(run_in_process, train_vqgan)
error_of = functools.partial(error_in_process, train_vqgan)
start = functools.partial(start_process, train_vqgan)

# Eight steps an epoch, and a checkpoint every three: neither divides the other. The discriminator
# learns from step 4 on (a quarter of 16), and is used from step 6 on.
DATA = ["--data", "shapes", "--limit", "32", "--batch-size", "4", "--epochs", "2"]
DATA += ["--checkpoint-every", "3", "--device", "cpu"]
NETWORK = ["--channels", "8", "--latent-channels", "8", "--embedding-dim", "8"]
NETWORK += ["--num-embeddings", "32", "--disc-channels", "8"]
SHORT = ["--classifier-epochs", "1", "--eval-classifier-epochs", "1", "--disc-warmup", "2"]
SMALL = [*DATA, *NETWORK, *SHORT, "--progress-rows", "4"]
ALL = ["mse", "perceptual", "vqgan"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of all three objectives, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    _, stderr = start(out, *SMALL, "--objectives", *ALL).communicate(timeout=300)
    assert (out / "metrics.json").exists(), stderr
    return out


@pytest.fixture
def no_pictures():
    """Half of the time of a small run is matplotlib's."""
    with (
        mock.patch("vqgan.report.save_vqgan_figures"),
        mock.patch("vqgan.report.save_progress_figure"),
    ):
        yield


def checkpoint(out, objective="vqgan"):
    return torch.load(model_folder(out, objective) / "checkpoint.pt", weights_only=True)


# --- the two steps -----------------------------------------------------------------------------


def leaves(loss):
    """The parameters that a loss would hand a gradient to."""
    found, seen, nodes = set(), set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found


@pytest.mark.usefixtures("no_pictures")
def test_no_gradient_leaks_from_one_step_into_the_other(tmp_path):
    """The discriminator's loss reaches all of its weights and nothing of the generator; the
    generator's adversarial loss reaches the generator and nothing of the discriminator."""
    discriminators, generators, reached = [], [], {"discriminator": [], "generator": []}

    def remember(kind, into):
        class Remembered(kind):
            @functools.wraps(kind.__init__)  # with its signature, which a checkpoint keeps
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                into.append(self)

        Remembered.__name__ = kind.__name__
        return Remembered

    def watch(name, function):
        def watched(*args):
            loss = function(*args)
            reached[name].append(leaves(loss))
            return loss

        return watched

    with (
        mock.patch.object(
            train_vqgan, "PatchDiscriminator", remember(PatchDiscriminator, discriminators)
        ),
        mock.patch.object(train_vqgan, "VQGAN", remember(train_vqgan.VQGAN, generators)),
        mock.patch.object(
            train_vqgan,
            "discriminator_loss",
            watch("discriminator", train_vqgan.discriminator_loss),
        ),
        mock.patch.object(
            train_vqgan, "generator_loss", watch("generator", train_vqgan.generator_loss)
        ),
    ):
        run(tmp_path / "run", *SMALL)
    of_d, of_g = set(discriminators[0].parameters()), set(generators[-1].parameters())
    assert len(reached["discriminator"]) == 12 and len(reached["generator"]) == 10
    for found in reached["discriminator"]:
        assert found == of_d
    for found in reached["generator"]:
        assert generators[-1].last_layer in found and found <= of_g


@pytest.mark.usefixtures("no_pictures")
def test_with_weight_zero_the_adversary_changes_nothing(finished, tmp_path):
    """Its own learning leaves no trace in the generator: the run is the perceptual one."""
    out = run(tmp_path / "run", *SMALL, "--adversarial-weight", 0)
    assert same_weights(weights(out, "vqgan"), weights(finished, "perceptual"))
    assert not same_weights(weights(finished, "vqgan"), weights(finished, "perceptual"))
    rows = read_log(model_folder(out, "vqgan") / "log.csv")
    assert rows[-1]["discriminator"] > 0 and rows[-1]["lambda"] > 0


def test_terms_of_the_reconstruction_by_hand(shape_images):
    x = shape_images * 2 - 1
    x_hat = x + 0.1 * torch.randn_like(x)

    def distance(a, b):
        return (a - b).abs().amax(dim=(1, 2, 3))  # (B,)

    mse = train_vqgan.reconstruction_terms(x, x_hat, "mse", distance, 0.25)
    assert mse.keys() == {"reconstruction"}
    assert torch.allclose(mse["reconstruction"], (x - x_hat).square().mean() / 0.25)
    terms = train_vqgan.reconstruction_terms(x, x_hat, "vqgan", distance, 0.25)
    assert torch.allclose(terms["reconstruction"], (x - x_hat).abs().mean() / 0.5)
    assert torch.allclose(terms["perceptual"], distance(x, x_hat).mean())


def test_the_loss_is_the_sum_of_its_logged_terms(finished):
    """Equations 4 and 6 from the log, where a row is one step."""
    for objective in ALL:
        for row in read_log(model_folder(finished, objective) / "log.csv")[
            :1
        ]:  # before the adversary
            total = row["reconstruction"] + row.get("perceptual", 0) + row["quantizer"]
            assert row["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.usefixtures("no_pictures")
def test_the_loss_has_the_weighted_adversary_in_it(tmp_path):
    flags = ["--disc-start", 0, "--disc-warmup", 0, "--checkpoint-every", 1]
    out = run(tmp_path / "run", *SMALL, *flags, "--adversarial-weight", 0.7)
    for row in read_log(model_folder(out, "vqgan") / "log.csv"):
        total = row["reconstruction"] + row["perceptual"] + row["quantizer"]
        total += 0.7 * row["lambda"] * row["adversarial"]
        assert row["loss"] == pytest.approx(total, rel=1e-3, abs=1e-4)


# --- what a run writes -------------------------------------------------------------------------


def test_metrics(finished):
    written = json.loads((finished / "metrics.json").read_text())
    assert written["models"].keys() == set(ALL)
    for result in written["models"].values():
        for key in ("nmse", "psnr", "ssim", "ssim_global", "perceptual", "frechet", "seconds"):
            assert np.isfinite(result[key]) and (result[key] > 0 or key == "ssim"), key
        assert result["bits_per_image"] == 64 * 5 and 1 <= result["codes_used"] <= 32
        assert 0 <= result["class_accuracy"] <= 1
    for network in ("perceptual", "eval_classifier"):
        assert 0 <= written[network]["accuracy"] <= 1
    assert (finished / "classifier.pt").exists() and (finished / "eval_classifier.pt").exists()


def test_the_log_says_when_the_adversary_learns_and_is_used(finished):
    rows = {row["step"]: row for row in read_log(model_folder(finished, "vqgan") / "log.csv")}
    assert list(rows) == [3, 4, 6, 9, 12, 15, 16]  # also where the discriminator starts
    assert rows[4]["discriminator"] == rows[4]["lambda"] == rows[4]["real"] == 0
    assert rows[6]["discriminator"] > 0 and rows[6]["lambda"] == 0
    assert 0 < rows[9]["lambda"] <= 5 and rows[9]["adversarial"] != 0
    assert rows[9]["real"] != rows[9]["fake"]
    assert 1 <= rows[9]["codes_used"] <= 32
    mse = read_log(model_folder(finished, "mse") / "log.csv")[0]
    assert "perceptual" not in mse and "lambda" not in mse


def test_pictures_are_there_and_not_blank(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*.png")}
    common = {"reconstructions.png", "losses.png", "adversarial.png", "codebook_usage.png"}
    assert names == common | {f"{objective}/progress.png" for objective in ALL}
    for name in names:
        pixels = np.asarray(Image.open(finished / name).convert("L"))
        assert 0.01 < (pixels < 250).mean() and pixels.std() > 10, name


def test_progress_has_the_same_images_at_the_asked_moments(finished):
    pictures = checkpoint(finished)["extra_state"]["state"]["progress"]
    assert [epoch for epoch, _ in pictures] == [0.5, 1, 1.5, 2]
    for _, images in pictures:
        assert images.dtype == torch.uint8 and images.shape == (12, 3, 32, 32)
    assert not torch.equal(pictures[0][1], pictures[-1][1])


def test_the_checkpoint_is_the_averaged_model_that_was_measured(finished, shapes):
    written = json.loads((finished / "metrics.json").read_text())
    model = load_model(model_folder(finished, "vqgan") / "checkpoint.pt")
    assert model.quantizer.initialized  # or training on would throw its codes away
    x = shapes.test_images[:32].float() / 127.5 - 1
    error = (model(x).reconstruction - x).square().mean().item()
    nmse = error / written["data"]["variance"]
    # In another layout a vector between two codes may get the other: 0.1% of the error at most.
    assert nmse == pytest.approx(written["models"]["vqgan"]["nmse"], rel=5e-3)
    state = checkpoint(finished)
    assert not same_weights(state["weights"], state["extra_state"]["trained"])


@pytest.mark.usefixtures("no_pictures")
def test_without_averaging_the_checkpoint_is_the_trained_model(finished, tmp_path):
    out = run(tmp_path / "run", *SMALL, "--model-ema-decay", 0)
    state = checkpoint(out)
    assert "trained" not in state["extra_state"]
    assert same_weights(state["weights"], checkpoint(finished)["extra_state"]["trained"])


@pytest.mark.usefixtures("no_pictures")
def test_an_objective_trains_the_same_alone(finished, tmp_path):
    out = run(tmp_path / "alone", *SMALL)
    assert same_weights(weights(out, "vqgan"), weights(finished, "vqgan"))
    assert not (out / "mse").exists()


# --- stop and resume ---------------------------------------------------------------------------


def test_a_run_killed_at_many_moments_and_resumed_is_the_uninterrupted_one(finished, tmp_path):
    out = tmp_path / "killed"
    moments = (
        lambda: (out / "classifier.pt").exists(),  # before anything else
        lambda: (out / "perceptual" / "checkpoint.pt").exists(),
        lambda: lines(model_folder(out, "vqgan") / "log.csv") >= 4,  # the discriminator has started
        lambda: lines(model_folder(out, "vqgan") / "log.csv") >= 6,  # and is used
    )
    for number, moment in enumerate(moments):
        process = start(out, *(["--resume"] if number else [*SMALL, "--objectives", *ALL]))
        wait_for(moment, process)
        process.kill()
        process.communicate()
        assert not (out / "metrics.json").exists()
    _, stderr = start(out, "--resume").communicate(timeout=300)
    assert (out / "metrics.json").exists(), stderr
    for objective in ALL:
        log = (model_folder(out, objective) / "log.csv").read_bytes()
        assert log == (model_folder(finished, objective) / "log.csv").read_bytes()
        resumed, whole = checkpoint(out, objective), checkpoint(finished, objective)
        assert same_weights(resumed["weights"], whole["weights"])
        states = [c["extra_state"].pop("state") for c in (resumed, whole)]
        for (epoch, x), (other_epoch, other) in zip(*(s["progress"] for s in states), strict=True):
            assert epoch == other_epoch and torch.equal(x, other)
        for name in whole["extra_state"]:
            assert same_weights(resumed["extra_state"][name], whole["extra_state"][name])
    for name, optimizer in checkpoint(out)["optimizers"].items():
        other = checkpoint(finished)["optimizers"][name]["state"]
        for i, moments in optimizer["state"].items():
            assert torch.equal(moments["exp_avg_sq"], other[i]["exp_avg_sq"])
    models = [json.loads((o / "metrics.json").read_text())["models"] for o in (out, finished)]
    assert models[0]["vqgan"]["frechet"] == models[1]["vqgan"]["frechet"]


@pytest.mark.usefixtures("no_pictures")
def test_more_epochs_do_not_start_the_adversary_again(finished, tmp_path):
    out = tmp_path / "longer"
    shutil.copytree(finished, out)
    run(out, "--resume", "--epochs", 3)
    rows = read_log(model_folder(out, "vqgan") / "log.csv")
    assert rows[-1]["step"] == 24
    assert all(row["lambda"] > 0 for row in rows if row["step"] >= 9)
    state = checkpoint(out)["extra_state"]["state"]
    assert (state["disc_start"], state["gan_start"]) == (4, 6)


# --- flags -------------------------------------------------------------------------------------

FLAGS = {
    "lr": ["--lr", "1e-3"],
    "seed": ["--seed", "1"],
    "flip": ["--no-flip"],
    "model_ema_decay": ["--model-ema-decay", "0.1"],
    "channels": ["--channels", "12"],
    "channel_multipliers": ["--channel-multipliers", "1", "2"],
    "num_residual_blocks": ["--num-residual-blocks", "2"],
    "attention_resolutions": ["--attention-resolutions", "16", "8"],
    "latent_channels": ["--latent-channels", "4"],
    "embedding_dim": ["--embedding-dim", "4"],
    "num_embeddings": ["--num-embeddings", "16"],
    "quantizer": ["--quantizer", "gradient"],
    "perceptual": ["--perceptual", "none"],
    "perceptual_weight": ["--perceptual-weight", "0.5"],
    "classifier_epochs": ["--classifier-epochs", "2"],
    "gan_loss": ["--gan-loss", "non-saturating"],
    "adversarial_weight": ["--adversarial-weight", "2"],
    "max_lambda": ["--max-lambda", "0.001"],
    "disc_start": ["--disc-start", "0.5"],
    "disc_warmup": ["--disc-warmup", "0"],
    "disc_lr": ["--disc-lr", "0.01"],
    "disc_channels": ["--disc-channels", "4"],
    "disc_norm": ["--disc-norm", "group"],
}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_changes_what_it_says(name, tmp_path, finished):
    out = run(tmp_path / "run", *SMALL, *FLAGS[name])
    changed, default = weights(out, "vqgan"), weights(finished, "vqgan")
    assert changed.keys() != default.keys() or not same_weights(changed, default)
    model_args = checkpoint(out)["model_args"]
    if name in model_args:
        config = json.loads((out / "config.json").read_text())
        assert model_args[name] == config[name] != checkpoint(finished)["model_args"].get(name)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_starts_from_a_checkpoint_of_the_papers_authors(tmp_path):
    """Of their width of 128, at which their 32 groups are our channels / 4."""
    config = {"double_z": False, "z_channels": 8, "resolution": 32, "in_channels": 3, "out_ch": 3}
    config |= {"ch": 128, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
    config |= {"embed_dim": 8, "n_embed": 32, "dropout": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = {"channels": 128, "channel_multipliers": (1, 1), "attention_resolutions": ()}
    sizes |= {"latent_channels": 8, "embedding_dim": 8, "num_embeddings": 32}
    torch.manual_seed(5)
    model = VQGAN(**sizes, quantizer="gradient", norm_groups=32)
    theirs = {name: model.state_dict()[ours] for ours, name in _their_names(model).items()}
    torch.save({"state_dict": theirs}, tmp_path / "c.ckpt")

    network = ["--channels", 128, "--channel-multipliers", 1, 1, "--attention-resolutions"]
    network += ["--latent-channels", 8, "--embedding-dim", 8, "--num-embeddings", 32]
    network += ["--quantizer", "gradient", "--objectives", "mse", "--limit", 8]
    source = ["--init-from", tmp_path / "c.ckpt", "--init-config", tmp_path / "config.json"]
    flags = [*DATA, *SHORT, *network, "--lr", "1e-12", "--epochs", 1]
    started = weights(run(tmp_path / "run", *flags, *source), "mse")
    for name, given in model.state_dict().items():
        if name.startswith(("encoder", "decoder", "quantizer.codebook")):
            assert torch.allclose(started[name], given, atol=1e-5), name
    source[-1] = tmp_path / "gone.json"
    assert "gone.json" in error_of(tmp_path / "other", *flags, *source)


@pytest.mark.usefixtures("no_pictures")
def test_yardstick_epochs_change_the_yardstick_and_nothing_else(finished, tmp_path):
    out = run(tmp_path / "run", *SMALL, "--eval-classifier-epochs", 2)
    assert same_weights(weights(out, "vqgan"), weights(finished, "vqgan"))
    models = [json.loads((o / "metrics.json").read_text())["models"] for o in (out, finished)]
    assert models[0]["vqgan"]["frechet"] != models[1]["vqgan"]["frechet"]
    assert models[0]["vqgan"]["nmse"] == models[1]["vqgan"]["nmse"]


def test_a_network_by_name(tmp_path):
    """The paper's, on its arguments alone: it is too large to train here."""
    flags = ("--network", "f16", "--image-size", "64", "--perceptual", "none")
    flags += ("--num-embeddings", "1024", "--out", str(tmp_path))
    with mock.patch.object(sys, "argv", ["train_vqgan.py", *flags]):
        args = train_vqgan.parse()
    model_args = train_vqgan.network_args(args)
    assert model_args["resolution"] == 64 and model_args["num_embeddings"] == 1024
    assert model_args["channel_multipliers"] == [1, 1, 2, 2, 4]


def test_images_without_classes_need_another_distance_and_have_no_frechet(tmp_path, image_folder):
    loose = tmp_path / "loose"
    loose.mkdir()
    for number, path in enumerate(image_folder.rglob("*.png")):
        shutil.copy(path, loose / f"{number}.png")
    flags = ["--data", loose, "--batch-size", 8, "--epochs", 1, *NETWORK]
    flags += ["--disc-warmup", 1]
    assert "--perceptual classifier needs class folders" in error_of(tmp_path / "a", *flags)
    out = run(tmp_path / "b", *flags, "--perceptual", "none")
    result = json.loads((out / "metrics.json").read_text())["models"]["vqgan"]
    assert result["frechet"] is None and result["perceptual"] is None and result["nmse"] > 0


@pytest.mark.usefixtures("no_pictures")
def test_rfid_is_measured_when_asked_for(tmp_path):
    class Fid:
        images, device = [], "cpu"

        def update(self, images, real):
            assert 0 <= images.min() and images.max() <= 1
            self.images.append(real)

        def compute(self):
            return torch.tensor(7.0)

        def reset(self):
            self.images.clear()

    with mock.patch.object(train_vqgan, "inception_distance", lambda device: Fid()):
        out = run(tmp_path / "run", *SMALL, "--rfid")
    assert json.loads((out / "metrics.json").read_text())["models"]["vqgan"]["rfid"] == 7


@pytest.mark.usefixtures("no_pictures")
def test_a_lambda_that_stays_at_its_clamp_is_warned_of(tmp_path, capsys):
    flags = ["--max-lambda", "1e-6", "--checkpoint-every", 1, "--disc-start", 0]
    run(tmp_path / "run", *SMALL, *flags)
    text = capsys.readouterr().out
    assert text.count("warning: lambda stays at its clamp of 1e-06") == 1


@pytest.mark.usefixtures("no_pictures")
def test_compile_gives_the_same_run(tmp_path):
    """Traced by torch.compile (without its C++ compiler, which takes a minute here)."""
    flags = [*SMALL, "--precision", "fp32", "--disc-start", 0.1]
    plain = run(tmp_path / "plain", *flags)

    def compile(self):
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    with mock.patch.object(torch.nn.Module, "compile", compile):
        compiled = run(tmp_path / "compiled", *flags, "--compile")
    assert not torch._functorch.config.donated_buffer  # lambda needs the graph twice
    assert weights(plain, "vqgan").keys() == weights(compiled, "vqgan").keys()
    losses = [
        [row["loss"] for row in read_log(model_folder(o, "vqgan") / "log.csv")]
        for o in (plain, compiled)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.usefixtures("no_pictures")
def test_a_single_test_image_has_no_frechet_distance(tmp_path, image_folder):
    folder = tmp_path / "split"
    for part, count in (("train", 20), ("test", 1)):
        for name in ("cats", "dogs")[: 2 if part == "train" else 1]:
            (folder / part / name).mkdir(parents=True)
            for path in sorted((image_folder / name).glob("*.png"))[:count]:
                shutil.copy(path, folder / part / name)
    (folder / "test" / "dogs").mkdir()
    (folder / "test" / "dogs" / "broken.png").write_text("")
    flags = ["--data", folder, "--batch-size", 8, "--epochs", 1, *NETWORK, *SHORT]
    out = run(tmp_path / "run", *flags)
    result = json.loads((out / "metrics.json").read_text())["models"]["vqgan"]
    assert result["frechet"] is None and result["perceptual"] > 0


def test_help_states_defaults(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for flag, default in (("--lr", "0.0003"), ("--out", "runs/vqgan"), ("--max-lambda", "5.0")):
        assert flag in text and f"(default: {default})" in text
    assert "None" not in text


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--image-size", "30"], "30x30 pixels"),
        (["--attention-resolutions", "7"], "--attention-resolutions 7 never occurs"),
        (["--channels", "14"], "14 channels"),
        (["--image-size", "8"], "SSIM needs 11"),
        (["--perceptual", "none", "--objectives", "perceptual"], "--perceptual none"),
        (["--data", "imagenet"], "--data imagenet"),
        (["--batch-size", "200"], "1 to 32"),
        (["--disc-warmup", "12"], "from step 16 on, but the training has 16 steps"),
    ],
)
def test_what_cannot_work_stops_with_one_line(flags, expected, tmp_path):
    assert expected in error_of(tmp_path / "run", *SMALL, *flags)


@pytest.mark.parametrize(
    "flags", [["--disc-start", "1"], ["--max-lambda", "0"], ["--model-ema-decay", "1.5"]]
)
def test_flags_out_of_range_are_named(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", *flags)
    assert flags[0] in capsys.readouterr().err


def test_lpips_without_weights_stops_before_training(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    message = error_of(tmp_path / "run", *SMALL, "--perceptual", "lpips")
    assert "VGG16" in message and "--perceptual classifier" in message
    assert not (tmp_path / "run" / "vqgan").exists()


def test_another_scripts_run_is_not_continued(finished, tmp_path):
    out = tmp_path / "vqvae"
    out.mkdir()
    config = {"command": "python train_vqvae.py", "epochs": 1, "precision": "fp32"}
    config["likelihood"] = "optimal"  # a flag of that script
    (out / "config.json").write_text(json.dumps(config))
    assert "a run of another script" in error_of(out, "--resume")
    assert "--resume" in error_of(finished, *SMALL)


def test_a_loss_that_diverges_names_its_term_and_keeps_the_last_good_checkpoint(tmp_path):
    flags = ["--lr", "1e9", "--checkpoint-every", 1]
    message = error_of(tmp_path / "run", *SMALL, *flags)
    assert "at step 2" in message and "diverged" in message
    assert checkpoint(tmp_path / "run")["step"] == 1
