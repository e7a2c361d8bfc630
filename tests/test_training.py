import gc
import json
import time
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from vqgan import training
from vqgan.checkpoint import load_checkpoint
from vqgan.data import ImageDataset
from vqgan.errors import InputError
from vqgan.training import (
    Log,
    ModelEMA,
    Run,
    Session,
    Stopwatch,
    TrainState,
    evenly_spaced,
    read_log,
)

CPU = torch.device("cpu")


class Tiny(nn.Sequential):
    """A small network with dropout, so that a step draws random numbers."""

    def __init__(self, width: int, dropout: float = 0.5):
        super().__init__(
            nn.Flatten(), nn.Linear(12, width), nn.Dropout(dropout), nn.Linear(width, 12)
        )


@pytest.fixture
def run(tmp_path):
    """Seven steps an epoch, in three epochs; a checkpoint every four."""
    images = torch.randint(0, 256, (29, 3, 2, 2), dtype=torch.uint8)
    return Run(
        out=tmp_path / "run",
        data=ImageDataset(images, images[:5], None, None, ()),
        variance=0.25,
        device=CPU,
        dtype=torch.float32,
        epochs=3,
        seed=4,
        flip=True,
        checkpoint_every=4,
        resume=False,
        metadata={"data": "noise", "image_size": 2, "command": "python train.py"},
    )


class Stopped(Exception):
    """In place of a kill."""


def start(run, seed=1, **more):
    """A model and its session."""
    torch.manual_seed(seed)
    model = Tiny(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    parts = {"model_args": {"width": 8}, "optimizers": {"adam": optimizer}}
    parts |= {"loader": run.loader(4), "state": {"seen": []}}
    return model, optimizer, Session(run, run.out / "tiny", model=model, **parts | more)


def take_steps(model, optimizer, session, stop=None):
    """A loop as the scripts have it; returns the losses of the steps that were taken."""
    losses = []
    for step, x in session:
        if step == stop:
            raise Stopped
        loss = (model(x) - x.flatten(1)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        session.log({"loss": loss, "half": loss / 2})
        losses.append(loss.item())
        session.state["seen"] = [*session.state["seen"], step]
    return losses


def checkpoint(run):
    return torch.load(run.out / "tiny" / "checkpoint.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the run -----------------------------------------------------------------------------------


def test_the_loader_is_of_the_training_images_with_the_runs_seed_and_flips(run):
    first, again, other = run.loader(4), run.loader(4), replace(run, seed=5).loader(4)
    assert len(first) == 7 and first.flip and not replace(run, flip=False).loader(4).flip
    a, b, c = (torch.cat(list(loader)) for loader in (first, again, other))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.min() >= -1 and a.max() <= 1
    assert torch.equal(c, torch.cat(list(run.loader(4, seed=5))))


def test_labels_come_with_their_images_on_request(run):
    labels = torch.arange(29)
    images = run.data.train_images.float() / 127.5 - 1
    for x, label in replace(run, flip=False).loader(4, labels=labels):
        assert torch.allclose(x, images[label], atol=1e-6)


def test_metrics_say_what_was_measured_on_what_by_what(run):
    models = {"a": {"ssim": 0.5, "seconds": 1.5}, "b": {"ssim": 0.25, "seconds": 2.0}}
    run.write_metrics(models, eval_classifier={"accuracy": None})
    written = json.loads((run.out / "metrics.json").read_text())
    keys = ["command", "data", "device", "processes", "versions", "seconds"]
    keys += ["eval_classifier", "models"]
    assert list(written) == keys
    assert written["models"] == models and written["seconds"] == 3.5
    assert written["command"] == "python train.py" and written["eval_classifier"] == {
        "accuracy": None
    }
    assert written["data"] == {
        "source": "noise", "training_images": 29, "test_images": 5, "variance": 0.25
    }  # fmt: skip
    assert written["device"].startswith("cpu") and "fp32" in written["device"]
    assert written["versions"].keys() == {"vqgan", "torch", "torchvision", "python"}


def test_a_run_is_not_changed_by_those_that_it_is_handed_to(run):
    with pytest.raises(AttributeError):
        run.epochs = 4


# --- the session: steps ------------------------------------------------------------------------


def test_steps_are_counted_from_zero_and_every_epoch_has_all_batches(run):
    _, _, session = start(run)
    assert session.total_steps == 21 and session.step == 0 and session.epoch == 0
    seen, expected = [], run.loader(4)
    for step, x in session:
        assert session.step == step  # of steps taken, this one is not among them yet
        seen.append((step, x))
        session.log({"loss": torch.tensor(1.0)})
        assert session.step == step + 1 and session.epoch == (step + 1) / 7
    assert [step for step, _ in seen] == list(range(21))
    batches = [x for _ in range(3) for x in expected]
    assert all(torch.equal(x, y) for (_, x), y in zip(seen, batches, strict=True))
    assert list(session) == []  # there is nothing left to take


def test_the_model_is_in_training_mode_from_the_start(run):
    model, _, session = start(run)
    model.eval()
    next(iter(session))
    assert model.training


@pytest.mark.parametrize("times", [0, 2])
def test_a_step_without_one_log_is_a_fault_of_the_program(run, times):
    _, _, session = start(run)
    steps = iter(session)
    next(steps)
    for _ in range(times):
        session.log({"loss": torch.tensor(1.0)})
    with pytest.raises(RuntimeError, match="log"):
        next(steps)


# --- the session: rows -------------------------------------------------------------------------


def test_rows_end_where_a_checkpoint_is_saved_and_at_the_end(run):
    model, optimizer, session = start(run)
    losses = take_steps(model, optimizer, session)
    rows = read_log(run.out / "tiny" / "log.csv")
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 21]
    assert rows[1]["loss"] == pytest.approx(sum(losses[4:8]) / 4, rel=1e-4)
    assert rows[-1]["epoch"] == 3 and rows[-1]["half"] == pytest.approx(losses[-1] / 2, rel=1e-4)


def test_rows_end_every_so_many_steps_and_where_the_script_says(run, monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 5)
    _, _, session = start(replace(run, checkpoint_every=1000))
    assert session.rows == []
    returned = [
        session.log({"loss": torch.tensor(float(step))}, end_row=step + 1 == 8)
        for step, _ in session
    ]
    assert [step + 1 for step, row in enumerate(returned) if row] == [5, 8, 10, 15, 20, 21]
    assert returned[7] == {"step": 8, "epoch": 1.1429, "loss": 6.0}  # of 5, 6 and 7
    rows = [row for row in returned if row]
    assert read_log(run.out / "tiny" / "log.csv") == session.rows == rows


def test_a_loss_that_is_not_finite_ends_the_training_and_the_last_checkpoint_stays(run):
    _, _, session = start(run)
    with pytest.raises(InputError, match="'half' is nan at step 6.*diverged"):
        for step, _ in session:
            bad = torch.tensor(torch.nan if step == 5 else 1.0)
            session.log({"loss": bad, "half": bad})
    assert checkpoint(run)["step"] == 4
    assert [row["step"] for row in read_log(run.out / "tiny" / "log.csv")] == [4]


# --- the session: stop and resume --------------------------------------------------------------


def session_with(kind, run, seed=1):
    """The trained model is kept; or its average; or a copy that the script chooses."""
    if kind == "average":
        return start(run, seed, model_ema_decay=0.9)
    torch.manual_seed(10 + seed)
    return start(run, seed, **({"eval_model": Tiny(8)} if kind == "chosen" else {}))


@pytest.mark.parametrize("kind", ["trained", "average", "chosen"])
@pytest.mark.parametrize("stop", [0, 3, 4, 6, 7, 10, 20])
def test_a_stopped_and_resumed_training_is_the_unstopped_one(run, tmp_path, kind, stop):
    """Before a checkpoint, just after one, in an epoch and at its end."""
    whole = replace(run, out=tmp_path / "whole")
    losses = take_steps(*session_with(kind, whole))
    with pytest.raises(Stopped):
        take_steps(*session_with(kind, run), stop=stop)

    model, optimizer, session = session_with(kind, replace(run, resume=True), seed=2)
    if stop < 4:  # nothing was saved: the start is the model's own
        model, optimizer, session = session_with(kind, replace(run, resume=True))
    assert session.step == stop // 4 * 4
    rest = take_steps(model, optimizer, session)
    assert rest == losses[-len(rest) :] and len(rest) == 21 - stop // 4 * 4
    a, b = checkpoint(run), checkpoint(whole)
    assert same(a["weights"], b["weights"]) and a["extra_state"].keys() == b["extra_state"].keys()
    assert ("trained" in a["extra_state"]) == (kind != "trained")
    if kind != "trained":
        assert same(a["extra_state"]["trained"], b["extra_state"]["trained"])
    logs = [(r.out / "tiny" / "log.csv").read_bytes() for r in (run, whole)]
    assert logs[0] == logs[1]
    # What the script remembers comes back: of the steps up to the checkpoint, and those after it.
    # (A checkpoint is saved once the script has done what it does after `log`.)
    assert session.state["seen"] == list(range(21))
    assert a["extra_state"]["state"] == {"seen": list(range(21))}


def test_a_finished_training_takes_no_step_and_writes_nothing_when_resumed(run):
    take_steps(*start(run))
    path = run.out / "tiny" / "checkpoint.pt"
    before = path.read_bytes()
    model, optimizer, session = start(replace(run, resume=True), seed=2)
    assert take_steps(model, optimizer, session) == [] and session.step == 21
    assert path.read_bytes() == before
    assert same(model.state_dict(), checkpoint(run)["weights"])
    assert [row["step"] for row in read_log(run.out / "tiny" / "log.csv")][-1] == 21


def test_more_epochs_go_on_where_it_ended(run, tmp_path):
    take_steps(*start(run))
    model, optimizer, session = start(replace(run, resume=True, epochs=4))
    assert session.total_steps == 28 and len(take_steps(model, optimizer, session)) == 7
    chunk_size = replace(run, out=tmp_path / "at once", epochs=4)
    take_steps(*start(chunk_size))
    assert same(checkpoint(run)["weights"], checkpoint(chunk_size)["weights"])


def test_a_run_that_is_not_resumed_starts_anew(run):
    take_steps(*start(run))
    _, _, session = start(run)
    assert session.step == 0 and session.state == {"seen": []}
    assert read_log(run.out / "tiny" / "log.csv") == []


def test_another_models_checkpoint_is_refused(run):
    take_steps(*start(run))
    with pytest.raises(InputError, match="width = 8.*width = 9"):
        start(replace(run, resume=True), model_args={"width": 9})


def test_extra_state_goes_on_too(run):
    companion = nn.BatchNorm1d(2)
    companion.running_mean += 3
    take_steps(*start(run, extra_state={"discriminator": companion}))
    other = nn.BatchNorm1d(2)
    start(replace(run, resume=True), extra_state={"discriminator": other})
    assert torch.equal(other.running_mean, companion.running_mean)


def test_the_seconds_before_a_resume_count(run):
    model, optimizer, session = start(run)
    with pytest.raises(Stopped):
        take_steps(model, optimizer, session, stop=10)
    state = checkpoint(run)
    torch.save(state | {"seconds": 500.0}, run.out / "tiny" / "checkpoint.pt")
    model, optimizer, session = start(replace(run, resume=True))
    take_steps(model, optimizer, session)
    assert 500 < session.seconds < 600
    assert checkpoint(run)["seconds"] == session.seconds


# --- the session: what it keeps ----------------------------------------------------------------


def test_the_average_of_the_weights_is_what_is_kept(run):
    model, optimizer, session = start(run, model_ema_decay=0.9)
    by_hand = ModelEMA(model, 0.9)
    for step, x in session:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.log({"loss": loss})
        by_hand.update(model, step + 1)
    assert session.eval_model is not model
    assert same(session.eval_model.state_dict(), by_hand.model.state_dict())
    assert not same(session.eval_model.state_dict(), model.state_dict())
    assert same(checkpoint(run)["weights"], session.eval_model.state_dict())
    assert same(checkpoint(run)["extra_state"]["trained"], model.state_dict())


def test_without_an_average_the_trained_model_is_kept(run):
    model, _, session = start(run)
    assert session.eval_model is model


def test_the_checkpoint_says_of_the_model_what_run_and_script_know(run):
    take_steps(*start(run, metadata={"condition": {"kind": "none"}}))
    state = load_checkpoint(run.out / "tiny" / "checkpoint.pt")
    assert state["metadata"] == run.metadata | {"condition": {"kind": "none"}, "processes": 1}
    assert state["model_args"] == {"width": 8, "dropout": 0.5} and state["step"] == 21


def test_after_the_last_step_the_optimizer_is_not_held(run):
    model, optimizer, session = start(run)
    take_steps(model, optimizer, session)
    held = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert held() is None


def test_a_script_of_one_model_has_no_subfolder(run):
    torch.manual_seed(1)
    model, loader = Tiny(8), run.loader(29)
    sizes = {"width": 8}
    session = Session(run, run.out, model=model, model_args=sizes, optimizers={}, loader=loader)
    for _ in session:
        session.log({"loss": torch.tensor(1.0)})
    assert {path.name for path in run.out.iterdir()} == {"checkpoint.pt", "log.csv"}


def test_the_summary_says_what_training_it_was(run):
    model, optimizer, session = start(run)
    take_steps(model, optimizer, session)
    assert session.summary == {
        "parameters": 8 * 13 + 12 * 9,
        "batch_size": 4,
        "epochs": 3,
        "model_args": {"width": 8, "dropout": 0.5},
        "seconds": round(session.seconds, 1),
    }


def test_a_state_gives_back_what_it_was_given():
    state = TrainState(start=4, rows=[(0.5, torch.zeros(2))])
    other = TrainState(start=0, rows=[])
    other.load_state_dict(state.state_dict())
    assert other["start"] == 4 and torch.equal(other["rows"][0][1], torch.zeros(2))
    assert type(state.state_dict()) is dict


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(16, 4, {4, 8, 12, 16}), (10, 3, {3, 7, 10}), (2, 6, {0, 1, 2}), (5, 1, {5})],
)
def test_steps_that_are_spaced_evenly_end_with_the_last(total, count, expected):
    steps = evenly_spaced(total, count)
    assert steps - {0} == expected - {0} and len(steps) <= count


def test_a_stopwatch_goes_on_from_what_it_had():
    watch = Stopwatch(10.0)
    time.sleep(0.01)
    assert 10.01 <= watch.seconds < 11 and Stopwatch().seconds < 1


def test_average_of_weights_by_hand():
    """Buffers too; early steps weigh little; the model is left alone."""
    model = nn.BatchNorm1d(1)
    average = ModelEMA(model, decay=0.9)
    weight, mean = 1.0, 0.0
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.fill_(step)
            model.running_mean.fill_(-step)
            model.num_batches_tracked.fill_(step)
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        weight = decay * weight + (1 - decay) * step
        mean = decay * mean - (1 - decay) * step
    # In float32, whose roundings add up to a few times 1e-7 over the steps.
    assert average.model.weight.item() == pytest.approx(weight, rel=1e-5)
    assert average.model.running_mean.item() == pytest.approx(mean, rel=1e-5)
    assert average.model.num_batches_tracked == 199  # what has no average is copied
    assert model.weight.item() == 199 and not average.model.training
    assert not average.model.weight.requires_grad and model.weight.requires_grad


# --- log ---------------------------------------------------------------------------------------


def fill(log, steps):
    for step in steps:
        log.record(step, {"loss": torch.tensor(float(step)), "kl": torch.tensor(2.0)})
        if step % 2 == 0:
            log.write_row(epoch=step / 10)


def test_rows_average_the_steps_between_them(tmp_path):
    fill(Log(tmp_path / "log.csv", resume_at=0), range(1, 5))
    assert read_log(tmp_path / "log.csv") == [
        {"step": 2, "epoch": 0.2, "loss": 1.5, "kl": 2.0},
        {"step": 4, "epoch": 0.4, "loss": 3.5, "kl": 2.0},
    ]


def test_rows_past_the_checkpoint_are_cut(tmp_path):
    """A log that was killed and resumed is the uninterrupted one."""
    fill(Log(tmp_path / "whole.csv", resume_at=0), range(1, 13))
    fill(Log(tmp_path / "killed.csv", resume_at=0), range(1, 9))
    fill(Log(tmp_path / "killed.csv", resume_at=6), range(7, 13))
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_row_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """Also where the process is killed while it writes one."""
    log = Log(tmp_path / "log.csv", resume_at=0)
    fill(log, range(1, 5))
    before = (tmp_path / "log.csv").read_bytes()

    def killed(*args):
        raise Stopped

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(Stopped):
        fill(log, range(5, 7))
    assert (tmp_path / "log.csv").read_bytes() == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path, bad):
    log = Log(tmp_path / "log.csv", resume_at=0)
    fill(log, range(1, 7))
    log.record(7, {"loss": torch.tensor(1.0), "kl": torch.tensor(1.0)})
    log.record(8, {"loss": torch.tensor(bad), "kl": torch.tensor(bad)})  # the sum is bad too
    with pytest.raises(InputError, match="'kl' is (nan|inf) at step 8"):
        log.write_row(epoch=1.0)
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [2, 4, 6]


def test_no_log_has_no_rows_and_another_file_is_named(tmp_path):
    assert read_log(tmp_path / "gone.csv") == []
    for text in ("step,loss\n1,much\n", "step,loss\n1\n", "step,loss\n1,2,3\n"):
        (tmp_path / "log.csv").write_text(text)
        with pytest.raises(InputError, match="log.csv is not a log"):
            read_log(tmp_path / "log.csv")
    for content in (
        b"step,loss\n1,2\n",
        b"step,loss\n1,\xff\n",
        b"step,loss\n1," + 200_000 * b"1" + b"\n",
    ):
        (tmp_path / "log.csv").write_bytes(content)
        with pytest.raises(InputError, match="log.csv is not a log"):
            read_log(tmp_path / "log.csv")


def test_a_term_that_is_logged_since_an_update_is_missing_before(tmp_path):
    (tmp_path / "log.csv").write_text("step,epoch,loss\n50,0.5,2\n")
    log = Log(tmp_path / "log.csv", resume_at=50)
    log.record(51, {"loss": torch.tensor(1.0), "codes_used": torch.tensor(3.0)})
    log.write_row(epoch=1.0)
    expected = {"step": 51, "epoch": 1.0, "loss": 1.0, "codes_used": 3.0}
    assert read_log(tmp_path / "log.csv") == [{"step": 50, "epoch": 0.5, "loss": 2.0}, expected]
