"""Stage two's script: codes once, conditions, the best epoch, resume, samples, its flags."""

import contextlib
import copy
import functools
import io
import json
import math
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import (
    error_in_process,
    lines,
    run_in_process,
    same_weights,
    start_process,
    wait_for,
)

import train_transformer
from train_transformer import learning_rate
from vqgan import report
from vqgan.checkpoint import fingerprint, save_checkpoint
from vqgan.classifier import Classifier, save_classifier
from vqgan.data import TrainLoader, load_dataset
from vqgan.images import from_uint8
from vqgan.pretrained import load_model, load_pipeline
from vqgan.training import Log, read_log
from vqgan.transformer import GPT
from vqgan.vae import VAE
from vqgan.vqvae import VQVAE

run = functools.partial(run_in_process, train_transformer)
error_of = functools.partial(error_in_process, train_transformer)
start = functools.partial(start_process, train_transformer)

K, N = 32, 16  # codes in the book, codes of an image
# Eight steps an epoch, and a checkpoint every four: within an epoch, and exactly at its end.
SMALL = ["--limit", "128", "--batch-size", "16", "--epochs", "2", "--checkpoint-every", "4"]
SMALL += ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--device", "cpu"]
SMALL += ["--num-samples", "32", "--progress-rows", "2"]
ABOUT = {"data": "shapes", "image_size": 32, "command": "python train_vqvae.py --data shapes"}


def save(path, model, model_args, metadata=ABOUT):
    batches = TrainLoader(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), 2)
    save_checkpoint(
        path, model=model, model_args=model_args, optimizers={}, batches=batches, step=0,
        seconds=0.0, metadata=metadata,
    )  # fmt: skip


def save_tokenizer(path, images, seed=0, metadata=ABOUT):
    """A small VQ-VAE, untrained but for its codebook, which starts from the images' vectors."""
    torch.manual_seed(seed)
    model_args = {"num_hiddens": 8, "num_embeddings": K, "num_downsamples": 3}
    model = VQVAE(**model_args)
    with torch.no_grad():
        model.train().encode(from_uint8(images[:64]))
    save(path, model.eval(), model_args, metadata)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, shapes):
    """The checkpoint of a tokenizer, with an evaluation classifier beside it, untrained too."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder / "checkpoint.pt", shapes.train_images)
    save_classifier(folder / "eval_classifier.pt", Classifier(10, 4), 0.1)
    return folder / "checkpoint.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    """A small run, never interrupted; what it printed is beside its folder.

    The tokenizer is named by its folder, and the evaluation classifier is found there.
    """
    folder, printed = tmp_path_factory.mktemp("runs"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(folder / "whole", "--tokenizer", tokenizer.parent, *SMALL)
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder / "whole"


@pytest.fixture
def no_pictures():
    """Most of the time of a small run is matplotlib's."""
    with (
        mock.patch("vqgan.report.save_transformer_figures"),
        mock.patch("vqgan.report.save_progress_figure"),
    ):
        yield


@pytest.fixture
def loose_images(tmp_path, image_folder):
    """Images without classes."""
    (tmp_path / "loose").mkdir()
    for number, path in enumerate(image_folder.rglob("*.png")):
        shutil.copy(path, tmp_path / "loose" / f"{number}.png")
    return tmp_path / "loose"


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


def measured(out):
    """What a run found out, without what a clock says."""
    written = metrics_of(out)
    kept = {key: written[key] for key in ("baselines", "validation", "reference_frechet")}
    kept["samples"] = [{**sample, "seconds": 0} for sample in written["samples"]]
    return kept | {"transformer": {**written["models"]["transformer"], "seconds": 0}}


def files_of(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


# --- what a run writes -------------------------------------------------------------------------


def test_metrics(finished):
    written = metrics_of(finished)
    result = written["models"]["transformer"]
    assert result["bits_per_image"] == pytest.approx(result["nats_per_token"] * N / math.log(2))
    assert result["fixed_length_bits_per_image"] == N * 5
    assert result["compression"] == pytest.approx(8 * 3 * 32**2 / result["bits_per_image"])
    assert result["frechet"] == written["samples"][0]["frechet"] > 0
    assert result["class_accuracy"] == written["samples"][0]["class_accuracy"]
    assert result["best_epoch"] in (1, 2) and result["batch_size"] == 16
    model = load_model(finished / "checkpoint.pt")
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert written["baselines"].keys() == {"uniform", "unigram", "bigram"}
    assert [row["epoch"] for row in written["validation"]] == [1, 2]
    assert written["reference_frechet"].keys() == {"reconstructions", "training images"}
    assert len(written["samples"]) == 1 and written["samples"][0]["num_samples"] == 32
    assert written["eval_classifier"]["accuracy"] == 0.1


def test_a_run_learns(finished):
    """Untrained, a code costs ln K; soon less."""
    assert metrics_of(finished)["models"]["transformer"]["nats_per_token"] < math.log(K)


def test_the_table_of_samples_and_the_baselines_are_printed(finished):
    text = (finished.parent / "printed.txt").read_text()
    for title in report.BASELINES.values():
        assert title in text
    assert f"{math.log(K):.3f} nats per token: uniform (ln K)" in text
    assert "samples 1" in text and "Fréchet distance of reconstructions" in text
    frechet = metrics_of(finished)["samples"][0]["frechet"]
    assert f"{frechet:.3f}" in text


def test_files_and_pictures_are_there_and_not_blank(finished):
    names = {path.name for path in finished.iterdir()}
    pictures = {"losses.png", "samples.png", "completions.png", "progress.png"}
    files = {"config.json", "metrics.json", "log.csv", "checkpoint.pt", "tokenizer.pt", "tokens.pt"}
    files.add(".lock")
    assert names == files | pictures
    for name in pictures:
        pixels = np.asarray(Image.open(finished / name).convert("L"))
        assert 0.01 < (pixels < 250).mean() and pixels.std() > 5, name


def test_the_log_has_a_row_for_every_checkpoint(finished):
    rows = read_log(finished / "log.csv")
    assert [row["step"] for row in rows] == [4, 8, 12, 16]
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[0]["gradient"] > 0


def test_the_checkpoint_says_what_it_was_trained_on(finished, tokenizer):
    metadata = checkpoint(finished)["metadata"]
    assert metadata["data"] == "shapes" and metadata["image_size"] == 32
    assert metadata["condition"]["kind"] == "class" and len(metadata["condition"]["names"]) == 10
    assert metadata["tokenizer"] == str(tokenizer.parent) and "--tokenizer" in metadata["command"]
    assert metadata["tokenizer_fingerprint"] == fingerprint(load_model(tokenizer))


def test_the_checkpoint_and_the_tokenizer_beside_it_are_a_pair(finished):
    pipeline = load_pipeline(finished / "checkpoint.pt")
    assert pipeline.tokenizer.image_size == 32 and pipeline.transformer.seq_len == N


def test_the_loss_is_that_of_checkpoint_and_codes_by_hand(finished, shapes):
    model = load_model(finished / "checkpoint.pt")
    indices = torch.load(finished / "tokens.pt", weights_only=True)["test"][:, 0].long()
    probabilities = model(shapes.test_labels[:128, None], indices).double().softmax(dim=-1)
    nats = -probabilities.gather(2, indices[..., None]).log().mean().item()
    assert metrics_of(finished)["models"]["transformer"]["nats_per_token"] == pytest.approx(
        nats, rel=1e-5
    )


@pytest.mark.usefixtures("no_pictures")
def test_the_checkpoint_is_the_model_of_the_best_epoch(tmp_path, tokenizer):
    seen, values = [], iter([1.0, 2.0, 1.5])  # after each epoch, and of what is measured

    def evaluate_likelihood(model, *args):
        seen.append(copy.deepcopy(model.state_dict()))
        return next(values), 0.1

    with mock.patch.object(train_transformer, "evaluate_likelihood", evaluate_likelihood):
        out = run(tmp_path / "run", "--tokenizer", tokenizer, *SMALL)
    first, second, of_the_end = seen
    assert same_weights(checkpoint(out)["weights"], first) and same_weights(of_the_end, first)
    assert same_weights(checkpoint(out)["extra_state"]["trained"], second)
    assert not same_weights(first, second)
    assert metrics_of(out)["models"]["transformer"]["best_epoch"] == 1


# --- stop and resume ---------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted(step):
    """Ctrl-C when a step is logged."""
    record = Log.record

    def stop(self, at, losses):
        if at == step:
            raise KeyboardInterrupt
        record(self, at, losses)

    with mock.patch.object(Log, "record", stop):
        yield


def assert_same_run(out, finished):
    resumed, whole = checkpoint(out), checkpoint(finished)
    assert same_weights(resumed["weights"], whole["weights"])
    assert same_weights(resumed["extra_state"]["trained"], whole["extra_state"]["trained"])
    assert (out / "log.csv").read_bytes() == (finished / "log.csv").read_bytes()
    assert measured(out) == measured(finished)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("step", [3, 6, 9])  # before a checkpoint, in an epoch, after its last step
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(
    step, tmp_path, tokenizer, finished
):
    with interrupted(step), pytest.raises(SystemExit, match="130"):
        run(tmp_path / "run", "--tokenizer", tokenizer, *SMALL)
    assert_same_run(run(tmp_path / "run", "--resume"), finished)


def test_a_killed_and_resumed_run_is_the_uninterrupted_one(tmp_path, tokenizer, finished):
    process = start(tmp_path / "run", "--tokenizer", tokenizer, *SMALL)
    wait_for(lambda: lines(tmp_path / "run" / "log.csv") >= 2, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert_same_run(run(tmp_path / "run", "--resume"), finished)
    pictures = [
        checkpoint(o)["extra_state"]["state"]["progress"] for o in (finished, tmp_path / "run")
    ]
    for (epoch, x), (other_epoch, other) in zip(*pictures, strict=True):
        assert epoch == other_epoch and torch.equal(x, other)


@pytest.mark.usefixtures("no_pictures")
def test_sampling_flags_may_change_and_only_the_evaluation_is_done_again(tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "run")
    flags = ["--temperature", 0.5, "--top-k", 4, "--guidance", 2, "--num-samples", 8]
    with mock.patch("vqgan.tokens.tokenize") as encode:
        run(out, "--resume", *flags)
    assert not encode.called
    assert (out / "checkpoint.pt").read_bytes() == (finished / "checkpoint.pt").read_bytes()
    (sample,) = metrics_of(out)["samples"]
    assert (sample["temperature"], sample["top_k"], sample["guidance"]) == (0.5, 4, 2)
    assert sample["num_samples"] == 8 and sample["top_p"] is None
    assert sample["frechet"] != metrics_of(finished)["samples"][0]["frechet"]


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_takes_more_epochs(tmp_path, finished):
    out = run(shutil.copytree(finished, tmp_path / "run"), "--resume", "--epochs", 3)
    assert [row["epoch"] for row in metrics_of(out)["validation"]] == [1, 2, 3]
    assert read_log(out / "log.csv")[-1]["step"] == 24


@pytest.mark.usefixtures("no_pictures")
def test_a_run_goes_on_with_its_own_copy_of_the_tokenizer(tmp_path, tokenizer, finished):
    out = shutil.copytree(finished, tmp_path / "run")
    own = tokenizer.read_bytes()
    try:
        tokenizer.write_bytes(b"something else by now")
        run(out, "--resume")
    finally:
        tokenizer.write_bytes(own)
    for name in ("tokenizer.pt", "tokens.pt", "checkpoint.pt"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert metrics_of(out)["models"] == metrics_of(finished)["models"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tokenizer", "other.pt"], "--tokenizer"),
        (["--n-layer", "2"], "--n-layer 1"),
        (["--condition", "none"], "--condition class"),
        (["--epochs", "1"], "--epochs 1"),
    ],
)
def test_a_resumed_run_stays_the_same_run(flags, expected, tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "run")
    before = files_of(out)
    assert expected in error_of(out, "--resume", *flags)
    assert files_of(out) == before


@pytest.mark.usefixtures("no_pictures")
def test_a_masked_transformer_trains_resumes_and_is_priced(tmp_path, tokenizer, capsys):
    flags = ["--tokenizer", tokenizer, *SMALL, "--prior", "masked", "--steps", 2, 4]
    whole = run(tmp_path / "whole", *flags)
    state, result = checkpoint(whole), metrics_of(whole)["models"]["transformer"]
    assert state["model"] == "MaskedTransformer"
    assert state["model_args"]["mask_schedule"] == "cosine"
    assert [sample["steps"] for sample in metrics_of(whole)["samples"]] == [2, 4]
    assert result["nats_per_token_is_bound"] and result["nats_per_token_standard_error"] > 0
    text = capsys.readouterr().out
    assert f"at most {result['nats_per_token']:.3f} +- " in text and "     steps " in text
    assert json.loads((whole / "config.json").read_text())["mask_schedule"] == "cosine"
    # The estimate is that of the masks of seed 0.
    model, data = load_model(whole), torch.load(whole / "tokens.pt")["test"][:, 0].long()
    condition = load_dataset("shapes", seed=0).first(128).test_labels[:, None]
    nats = model.nats_per_token(condition, data, torch.Generator().manual_seed(0))
    assert nats.mean().item() == pytest.approx(result["nats_per_token"], rel=1e-5)
    expected = nats.std(correction=0).item() / 128**0.5
    assert result["nats_per_token_standard_error"] == pytest.approx(expected, rel=1e-4)

    with interrupted(6), pytest.raises(SystemExit, match="130"):
        run(tmp_path / "stopped", *flags)
    assert_same_run(run(tmp_path / "stopped", "--resume"), whole)


# --- conditions --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["none"], ["caption"], ["image", "--condition-image", "gray"]])
def test_every_kind_of_condition_trains_and_is_drawn(flags, tmp_path, tokenizer):
    with mock.patch("vqgan.report.save_progress_figure"):
        flags = ["--tokenizer", tokenizer, *SMALL, "--epochs", 1, "--condition", *flags]
        out = run(tmp_path / "run", *flags)
    condition = checkpoint(out)["metadata"]["condition"]
    assert condition["kind"] == flags[flags.index("--condition") + 1]
    assert condition["transform"] == ("gray" if condition["kind"] == "image" else "")
    pixels = np.asarray(Image.open(out / "samples.png").convert("L"))
    assert pixels.std() > 5
    (sample,) = metrics_of(out)["samples"]
    assert (sample["class_accuracy"] is None) == (condition["kind"] == "none")
    assert (sample["prompt_accuracy"] is None) == (condition["kind"] != "caption")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("drop", "lowest", "highest"), [(0.99, 0.9, 1), (0.5, 0.3, 0.7), (0, 0, 0)]
)
def test_a_share_of_conditions_is_not_told(drop, lowest, highest, tmp_path, tokenizer):
    told, loss = [], GPT.loss

    def remember(self, condition, indices):
        if self.training:
            told.append(condition)
        return loss(self, condition, indices)

    with mock.patch.object(GPT, "loss", remember):
        run(tmp_path / "run", "--tokenizer", tokenizer, *SMALL, "--condition-drop", drop)
    told = torch.cat(told)
    assert len(told) == 16 * 16
    assert lowest <= (told == 10).float().mean() <= highest  # ten classes, 0 to 9


@pytest.mark.usefixtures("no_pictures")
def test_a_start_token_is_never_dropped(tmp_path, tokenizer):
    told, loss = [], GPT.loss

    def remember(self, condition, indices):
        told.append(condition)
        return loss(self, condition, indices)

    flags = [*SMALL, "--condition", "none", "--condition-drop", 0.9]
    with mock.patch.object(GPT, "loss", remember):
        run(tmp_path / "run", "--tokenizer", tokenizer, *flags)
    assert (torch.cat(told) == 0).all()


@pytest.mark.usefixtures("no_pictures")
def test_a_caption_is_dropped_as_a_whole(tmp_path, tokenizer):
    told, loss = [], GPT.loss

    def remember(self, condition, indices):
        told.append((condition == self.null_token) if self.training else condition[:0] > 0)
        return loss(self, condition, indices)

    flags = [*SMALL, "--condition", "caption", "--condition-drop", 0.5]
    with mock.patch.object(GPT, "loss", remember):
        run(tmp_path / "run", "--tokenizer", tokenizer, *flags)
    told = torch.cat(told)
    assert told.any() and not told.all() and (told == told[:, :1]).all()


# --- flags -------------------------------------------------------------------------------------


def test_the_learning_rate_by_hand():
    rate = functools.partial(learning_rate, highest=2.0, warmup=10, total=110)
    assert rate(0) == pytest.approx(0.2) and rate(9) == rate(10) == 2
    assert rate(60) == pytest.approx((2 + 0.2) / 2)  # half way down
    assert rate(110) == pytest.approx(0.2)
    assert learning_rate(0, highest=2.0, warmup=0, total=5) == 2


@pytest.mark.usefixtures("no_pictures")
def test_the_optimizer_gets_the_learning_rate_and_the_decay_of_matrices(tmp_path, tokenizer):
    flags = ["--weight-decay", 0.3, "--lr", 0.02, "--warmup", 4]
    out = run(tmp_path / "run", "--tokenizer", tokenizer, *SMALL, *flags)
    groups = checkpoint(out)["optimizers"]["adamw"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0]
    last = learning_rate(15, highest=0.02, warmup=4, total=16)
    assert [group["lr"] for group in groups] == [last, last]


FLAGS = {
    "lr": ["--lr", "3e-3"],
    "warmup": ["--warmup", "2"],
    "weight_decay": ["--weight-decay", "5"],
    "seed": ["--seed", "1"],
    "flip": ["--no-flip"],
    "condition_drop": ["--condition-drop", "0.9"],
    "batch_size": ["--batch-size", "32"],
    "n_layer": ["--n-layer", "2"],
    "n_head": ["--n-head", "4"],
    "n_embd": ["--n-embd", "24"],
    "dropout": ["--dropout", "0.5"],
}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_changes_what_it_says(name, tmp_path, tokenizer, finished):
    flags = [*SMALL, "--num-samples", 4, *FLAGS[name]]
    changed = checkpoint(run(tmp_path / "run", "--tokenizer", tokenizer, *flags))
    default = checkpoint(finished)
    last, of_default = changed["extra_state"]["trained"], default["extra_state"]["trained"]
    assert last.keys() != of_default.keys() or not same_weights(last, of_default)
    if name in default["model_args"]:
        assert changed["model_args"][name] == float(FLAGS[name][1]) != default["model_args"][name]


@pytest.mark.usefixtures("no_pictures")
def test_every_combination_of_sampling_flags_is_measured(tmp_path, finished, capsys):
    flags = ["--temperature", 1, 0, "--guidance", 1, 3, "--top-k", 5, "--top-p", 0.9]
    out = run(shutil.copytree(finished, tmp_path / "run"), "--resume", *flags)
    samples = metrics_of(out)["samples"]
    combinations = [(sample["temperature"], sample["guidance"]) for sample in samples]
    assert sorted(combinations) == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert all((sample["top_k"], sample["top_p"]) == (5, 0.9) for sample in samples)
    text = capsys.readouterr().out
    assert "samples 4" in text and "samples 5" not in text
    assert metrics_of(out)["models"]["transformer"]["frechet"] == samples[0]["frechet"]


@pytest.mark.usefixtures("no_pictures")
def test_pictures_and_epochs_are_as_many_as_asked(tmp_path, tokenizer):
    flags = [*SMALL, "--epochs", 3, "--progress-rows", 6, "--num-samples", 2]
    out = run(tmp_path / "run", "--tokenizer", tokenizer, *flags)
    state = checkpoint(out)["extra_state"]["state"]
    assert [epoch for epoch, _ in state["progress"]] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert state["progress"][0][1].shape == (12, 3, 32, 32)
    assert [row["epoch"] for row in state["validation"]] == [1, 2, 3]


@pytest.mark.usefixtures("no_pictures")
def test_more_samples_than_test_images_go_around_again(tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "run")
    run(out, "--resume", "--num-samples", 150)
    assert metrics_of(out)["samples"][0]["num_samples"] == 150


@pytest.mark.usefixtures("no_pictures")
def test_a_yardstick_of_ones_own_choice(tmp_path, finished, tokenizer):
    torch.manual_seed(3)
    save_classifier(tmp_path / "y.pt", Classifier(10, 4), 0.25)
    flags = ["--eval-classifier", tmp_path / "y.pt", *SMALL]
    out = run(tmp_path / "run", "--tokenizer", tokenizer, *flags)
    assert metrics_of(out)["eval_classifier"]["accuracy"] == 0.25
    assert measured(out)["samples"] != measured(finished)["samples"]
    assert measured(out)["validation"] == measured(finished)["validation"]


# --- folders, and images without classes -------------------------------------------------------


@pytest.fixture
def of_folder(tmp_path, image_folder, shapes):
    """A tokenizer that was trained on the folder with classes."""
    metadata = ABOUT | {"data": str(image_folder)}
    save_tokenizer(tmp_path / "of_folder" / "checkpoint.pt", shapes.train_images, metadata=metadata)
    save_classifier(tmp_path / "of_folder" / "eval_classifier.pt", Classifier(2, 4), 0.5)
    return tmp_path / "of_folder" / "checkpoint.pt"


@pytest.mark.usefixtures("no_pictures")
def test_data_and_size_are_the_tokenizers(tmp_path, of_folder, image_folder):
    flags = [*SMALL, "--batch-size", 8, "--epochs", 1, "--num-samples", 4]
    out = run(tmp_path / "run", "--tokenizer", of_folder, *flags)
    assert metrics_of(out)["data"]["source"] == str(image_folder)
    assert checkpoint(out)["metadata"]["condition"]["names"] == ["cats", "dogs"]
    assert json.loads((out / "config.json").read_text())["image_size"] == 32


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("has_classifier", [False, True])
def test_unlabelled_images_have_a_loss_and_no_frechet(
    has_classifier, tmp_path, tokenizer, loose_images
):
    flags = [*SMALL, "--batch-size", 8, "--epochs", 1, "--condition", "none", "--other-data"]
    if has_classifier:
        flags += ["--eval-classifier", tokenizer.parent / "eval_classifier.pt"]
    out = run(tmp_path / "run", "--tokenizer", tokenizer, "--data", loose_images, *flags)
    result = metrics_of(out)["models"]["transformer"]
    assert result["frechet"] is None and result["nats_per_token"] > 0
    assert metrics_of(out)["samples"] == []


@pytest.mark.usefixtures("no_pictures")
def test_another_tokenizers_classifier_does_not_measure_other_data(
    tmp_path, tokenizer, image_folder
):
    flags = [
        *SMALL,
        "--batch-size",
        8,
        "--epochs",
        1,
        "--other-data",
        "--eval-classifier-epochs",
        1,
    ]
    out = run(tmp_path / "run", "--tokenizer", tokenizer, "--data", image_folder, *flags)
    assert (out / "eval_classifier.pt").exists()
    assert checkpoint(out)["metadata"]["data"] == str(image_folder)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data", "textures"], "--data textures, but"),
        (["--image-size", "64"], "--image-size 64, but"),
        (["--image-size", "36", "--other-data"], "36x36 pixels"),
        (
            ["--data", "textures", "--condition", "caption", "--other-data"],
            "--condition caption needs captions",
        ),
        (["--top-k", "33"], "--top-k 33: give 1 to 32"),
        (["--top-p", "1.5"], "--top-p 1.5"),
        (["--guidance", "1", "2", "--condition", "none"], "--guidance needs a --condition"),
        (["--guidance", "2", "--condition-drop", "0"], "--condition-drop"),
        (["--num-samples", "1"], "--num-samples 1"),
        (["--n-embd", "18", "--n-head", "4"], "--n-head 4 must divide --n-embd 18"),
        (["--batch-size", "200"], "1 to 128"),
        (["--prior", "masked", "--steps", "4", "17"], "--steps 17: give 1 to 16"),
        (["--steps", "4"], "--steps is about --prior masked"),
        (["--mask-schedule", "uniform"], "--mask-schedule is about --prior masked"),
    ],
)
def test_what_cannot_work_stops_with_one_line(flags, expected, tmp_path, tokenizer, few_textures):
    with (
        mock.patch("vqgan.tokens.tokenize", side_effect=AssertionError),
        mock.patch.object(train_transformer, "load_eval_classifier", side_effect=AssertionError),
    ):
        message = error_of(tmp_path / "run", "--tokenizer", tokenizer, *SMALL, *flags)
    assert expected in message


@pytest.fixture
def few_textures():
    """No need to draw twelve thousand of them here."""

    def load(source, **more):
        data = load_dataset("shapes", seed=0).first(128)
        return replace(data, train_captions=None) if source == "textures" else data

    with mock.patch("vqgan.arguments.load_dataset", load):
        yield


@pytest.mark.usefixtures("no_pictures", "few_textures")
def test_other_data_on_request(tmp_path, tokenizer):
    flags = [*SMALL, "--data", "textures", "--other-data", "--epochs", 1]
    flags += ["--eval-classifier", tokenizer.parent / "eval_classifier.pt", "--num-samples", 4]
    out = run(tmp_path / "run", "--tokenizer", tokenizer, *flags)
    assert metrics_of(out)["data"]["source"] == "textures"


@pytest.mark.parametrize(
    "flags",
    [["--top-k", "0"], ["--dropout", "1"], ["--condition-drop", "1"], ["--condition", "words"]],
)
def test_flags_out_of_range_are_named(flags, tmp_path, tokenizer, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "--tokenizer", tokenizer, *flags)
    assert flags[0] in capsys.readouterr().err


def test_a_tokenizer_must_be_given_and_be_one(tmp_path, tokenizer, finished):
    save(
        tmp_path / "vae.pt", VAE(image_size=32, num_hiddens=8), {"image_size": 32, "num_hiddens": 8}
    )
    (tmp_path / "text.pt").write_text("no checkpoint")
    out = tmp_path / "run"
    assert "--tokenizer is missing" in error_of(out)
    for path, expected in (
        (tmp_path, "is a folder"),
        (tmp_path / "gone.pt", "there is no checkpoint"),
        (tmp_path / "vae.pt", "is of a VAE, not a tokenizer"),
        (finished / "checkpoint.pt", f"is of a GPT, not a tokenizer: name {finished}"),
        (tmp_path / "text.pt", "text.pt is no"),
    ):
        assert expected in error_of(out, "--tokenizer", path)
    assert not out.exists()


def test_a_tokenizer_that_does_not_say_its_data_needs_the_flag(tmp_path, shapes):
    save_tokenizer(tmp_path / "silent.pt", shapes.train_images, metadata={})
    assert "give --data" in error_of(tmp_path / "run", "--tokenizer", tmp_path / "silent.pt")


def test_a_class_needs_labelled_images(tmp_path, tokenizer, loose_images):
    flags = ["--tokenizer", tokenizer, "--data", loose_images, "--other-data", "--batch-size", 8]
    assert "--condition class needs class folders" in error_of(tmp_path / "run", *flags)


def test_a_run_that_is_there_is_not_overwritten(finished, tokenizer):
    before = files_of(finished)
    assert "--resume" in error_of(finished, "--tokenizer", tokenizer, *SMALL)
    assert files_of(finished) == before


def test_a_loss_that_diverges_keeps_the_last_good_checkpoint(tmp_path, tokenizer):
    flags = ["--lr", "1e9", "--warmup", 0, "--checkpoint-every", 1]
    message = error_of(tmp_path / "run", "--tokenizer", tokenizer, *SMALL, *flags)
    assert "diverged" in message and checkpoint(tmp_path / "run")["step"] == 1


def test_help_states_defaults(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for flag, default in (("--n-layer", "6"), ("--out", "runs/transformer"), ("--dropout", "0.1")):
        assert flag in text and f"(default: {default})" in text
    assert "None" not in text


@pytest.mark.usefixtures("no_pictures")
def test_a_damaged_file_of_codes_is_made_again(tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "run")
    good = torch.load(out / "tokens.pt", weights_only=True)
    (out / "tokens.pt").write_bytes((out / "tokens.pt").read_bytes()[:500])
    run(out, "--resume")
    again = torch.load(out / "tokens.pt", weights_only=True)
    assert torch.equal(again["train"], good["train"]) and again["key"] == good["key"]


def test_a_yardstick_of_other_classes_is_refused_before_anything_is_encoded(tmp_path, tokenizer):
    save_classifier(tmp_path / "three.pt", Classifier(3, 4), 0.5)
    flags = ["--tokenizer", tokenizer, "--eval-classifier", tmp_path / "three.pt"]
    message = error_of(tmp_path / "run", *SMALL, *flags)
    assert "three.pt has 3 classes, not 10" in message and "--eval-classifier" in message
    assert not (tmp_path / "run" / "tokens.pt").exists()


def test_words_that_only_test_captions_have_stop_before_anything_is_encoded(tmp_path, tokenizer):
    flags = ["--tokenizer", tokenizer, *SMALL, "--condition", "caption", "--limit", 20]
    assert "is unknown" in error_of(tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "tokens.pt").exists()


@pytest.mark.usefixtures("no_pictures")
def test_the_command_of_other_samples_is_kept_with_that_of_the_training(tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "run")
    command = metrics_of(run(out, "--resume", "--temperature", 0.5))["command"]
    assert command.startswith(metrics_of(finished)["command"]) and "0.5" in command.split("&&")[1]
