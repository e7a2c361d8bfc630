"""What every training needs besides its mathematics: the run, its sessions, the log.

Each script has its own loop, and takes its steps from a session:

    session = Session(run, "vqvae", model=model, ...)
    for step, x in session:                  # resumes, shows the bar, saves when due
        loss = ...
        session.log({"loss": loss, ...})     # ends the step

A run folder holds

    config.json     the flags of the run
    <model>/        checkpoint.pt and log.csv (of a script that trains one model: no subfolder)
    metrics.json    what was measured at the end
    *.png           figures

A run that was killed and resumed ends with the same weights as one that was not (`checkpoint.py`),
and log rows that it wrote after its last checkpoint are cut, for they will be written again.
"""

import copy
import csv
import io
import math
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

import vqgan
from vqgan.checkpoint import (
    DIVERGED,
    all_arguments,
    is_float,
    load_checkpoint,
    restore,
    save_checkpoint,
    write_atomically,
    write_json,
)
from vqgan.data import Batches, ImageDataset
from vqgan.device import describe_device
from vqgan.errors import InputError

LOG_EVERY = 50  # steps averaged in a row of log.csv


@dataclass(frozen=True)
class Run:
    """What every model of a run has in common."""

    out: Path
    data: ImageDataset
    variance: float  # of the training pixels in [-1, 1]
    device: torch.device
    dtype: torch.dtype  # of the network's matrix multiplications
    about: dict  # for checkpoints: data, image_size, command
    epochs: int
    seed: int
    flip: bool
    checkpoint_every: int  # in steps
    resume: bool

    def loader(
        self, batch_size: int, *, seed: int | None = None, labels: Tensor | None = None
    ) -> Batches:
        """Shuffled batches of the training images, and of labels if they are given."""
        seed = self.seed if seed is None else seed
        images, device = self.data.train_images, self.device
        return Batches(images, batch_size, device=device, seed=seed, flip=self.flip, labels=labels)

    def write_metrics(self, models: dict[str, dict], **more) -> None:
        """metrics.json: what was measured of each model, on which data, by what; and more keys."""
        data = {"source": self.about["data"], "variance": self.variance}
        data["training_images"] = len(self.data.train_images)
        data["test_images"] = len(self.data.test_images)
        content = {
            "command": self.about["command"],
            "data": data,
            "device": describe_device(self.device, self.dtype),
            "versions": versions(),
            "seconds": sum(result["seconds"] for result in models.values()),
        }
        write_json(self.out / "metrics.json", content | more | {"models": models})


class TrainState(dict):
    """A dictionary that checkpoints keep."""

    def state_dict(self) -> dict:
        """Plain numbers, strings, lists and tensors, for a checkpoint."""
        return dict(self)

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` gave."""
        self.update(state)


class Session:
    """The training of one model: a generator of steps that keeps the books.

        for step, batch in session:     # step: how many were taken before
            ...                         # gradients and optimizers
            session.log(losses)         # ends the step
            ...                         # from here on, session.step and session.epoch count it

    It goes on from the last checkpoint where the run is resumed, shows a bar, writes the rows of
    log.csv, stops where a loss is not finite, and saves a checkpoint when one is due.

    Args:
        name: the subfolder of the run; "" for a script that trains one model.
        arguments: the model's constructor arguments.
        loader: the batches, each epoch shuffled anew.
        state: what the script remembers between steps besides weights: plain numbers, lists and
            tensors, in `session.state` after a resume too.
        companions: what else training goes on with, by name: anything with a `state_dict`.
        kept: the model that is measured and that a checkpoint is of, if not the trained one.
        ema_decay: of the moving average of the weights, which is kept then; 0: none.
        about: what a checkpoint says of the model, beyond what the run says.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        *,
        model: nn.Module,
        arguments: dict,
        optimizers: Mapping[str, torch.optim.Optimizer],
        loader: Batches,
        state: dict | None = None,
        companions: dict | None = None,
        kept: nn.Module | None = None,
        ema_decay: float = 0.0,
        about: dict | None = None,
    ):
        self.model, self.loader = model, loader
        self.epochs, self.total_steps = run.epochs, run.epochs * len(loader)
        self.checkpoint_every = run.checkpoint_every
        self.ema = ModelEMA(model, ema_decay) if ema_decay else None
        self.kept: Any = self.ema.model if self.ema else (kept or model)
        self.state = TrainState(state or {})
        companions = {"state": self.state} | (companions or {})
        if self.kept is not model:
            companions["trained"] = model
        self.parts: dict[str, Any] = {"optimizers": optimizers, "companions": companions}
        self.parts["batches"] = loader
        self.about: dict[str, Any] = {"arguments": arguments, "about": run.about | (about or {})}

        # The start, or the last checkpoint of a run that was cut off.
        self.step, self.seconds = 0, 0.0
        folder = run.out / name
        self.checkpoint = folder / "checkpoint.pt"
        if run.resume and self.checkpoint.exists():
            saved = load_checkpoint(self.checkpoint, model_class=type(model), arguments=arguments)
            restore(saved, model=self.kept, **self.parts)
            self.step, self.seconds = saved["step"], saved["seconds"]
        self.log_file = Log(folder / "log.csv", resume_at=self.step)
        self.bar = tqdm(
            desc=name or run.out.name, total=self.total_steps * loader.batch_size,
            initial=self.step * loader.batch_size, unit="img", unit_scale=True, mininterval=0.5,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.model.train()
        watch = Stopwatch(self.seconds)
        with self.bar:
            while self.step < self.total_steps:
                for batch in self.loader:  # one epoch, or the rest of it after a resume
                    step = self.step
                    yield step, batch
                    if self.step != step + 1:
                        raise RuntimeError("each step of a session ends with one session.log()")
                    if self.save_is_due:
                        self.seconds = watch.seconds
                        now: dict[str, Any] = {"step": self.step, "seconds": self.seconds}
                        files = self.parts | self.about
                        save_checkpoint(self.checkpoint, model=self.kept, **now, **files)
                    self.bar.update(self.loader.batch_size)

    def log(self, losses: dict[str, Tensor], *, end_row: bool = False) -> dict | None:
        """End a step. Returns the row of log.csv that it ends, if it ends one.

        Args:
            losses: each (), on the device; "loss" is shown. Every step has the same.
            end_row: end a row here, so that none averages over what is before and after.
        """
        self.step += 1
        if self.ema:
            self.ema.update(self.model, self.step)
        self.log_file.record(self.step, losses)
        # A checkpoint ends a row, so that a resume begins with a new one.
        if not (self.step % LOG_EVERY == 0 or self.save_is_due or end_row):
            return None
        row = self.log_file.write_row(epoch=self.epoch)
        self.bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
        return row

    @property
    def summary(self) -> dict:
        """What metrics.json says of the training."""
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "batch_size": self.loader.batch_size,
            "epochs": self.epochs,
            "arguments": all_arguments(type(self.model), self.about["arguments"]),
            "seconds": round(self.seconds, 1),
        }

    @property
    def rows(self) -> list[dict[str, float]]:
        """The rows of log.csv."""
        return self.log_file.rows

    @property
    def epoch(self) -> float:
        """Epochs trained so far, 2.5 in the middle of the third."""
        return self.step / len(self.loader)

    @property
    def save_is_due(self) -> bool:
        """Whether a checkpoint will be saved after this step."""
        return self.step % self.checkpoint_every == 0 or self.step == self.total_steps


def evenly_spaced(total_steps: int, count: int) -> set[int]:
    """`count` steps from 1 to `total_steps`, the last among them."""
    return {round(total_steps * i / count) for i in range(1, count + 1)}


class ModelEMA:
    """A copy of a model whose weights and buffers are moving averages of the model's.

        ema = d ema + (1 - d) weights,   d = min(decay, (1 + t) / (10 + t)) at step t

    so that the random weights of the beginning are forgotten soon. The averages lie in the middle
    of where the last steps wander. The codebook is averaged too: it must fit the averaged encoder.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model's weights after training step `step`, 1 being the first."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(_floats(self.model), _floats(model), 1 - decay)  # all in one kernel
        # What has no average is copied: whether a codebook still waits for its first batch. Not
        # strict, since the averaged floats are left out.
        state = model.state_dict()
        state = {name: value for name, value in state.items() if not is_float(value)}
        self.model.load_state_dict(state, strict=False)


def _floats(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in model.state_dict().values() if is_float(tensor)]


# --- the log -------------------------------------------------------------------------------------


class Log:
    """A CSV file of losses, averaged between two rows; and the watch over NaN.

    `record` keeps a step's losses on the device, `write_row` reads them: the loop waits for the
    GPU once a row, not once a step.
    """

    def __init__(self, path: Path, *, resume_at: int):
        """Start a log, or go on after step `resume_at`: rows beyond it are cut."""
        self.path = path
        self.pending: list[tuple[int, dict[str, Tensor]]] = []
        rows = read_log(path) if resume_at > 0 else []
        self.rows = [row for row in rows if row["step"] <= resume_at]
        self._write()

    def record(self, step: int, losses: dict[str, Tensor]) -> None:
        """Losses of one step, each (), still on the device."""
        self.pending.append((step, {name: loss.detach() for name, loss in losses.items()}))

    def write_row(self, epoch: float) -> dict[str, float]:
        """Average what was recorded since the last row, append it, and return it.

        Raises InputError, and names step and term, where a loss is not finite.
        """
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack(list(losses.values())) for _, losses in self.pending])
        values = values.cpu().double()  # (steps, terms): here the loop waits for the GPU
        for (step, _), row in zip(self.pending, values.tolist(), strict=True):
            # The sum comes last: it is not finite whenever a term is not.
            for name, value in sorted(zip(names, row, strict=True), key=lambda x: x[0] == "loss"):
                if not math.isfinite(value):
                    raise InputError(f"{name!r} is {value} at step {step}: {DIVERGED}")
        row = {"step": self.pending[-1][0], "epoch": round(epoch, 4)}
        for name, mean in zip(names, values.mean(dim=0).tolist(), strict=True):
            row[name] = float(f"{mean:.6g}")
        self.rows.append(row)
        self.pending = []
        self._write()
        return row

    def _write(self) -> None:
        content = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(content, fieldnames=list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        write_atomically(self.path, content.getvalue().encode())


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a log.csv, {"step", "epoch", "loss", ...}; none where there is no file."""
    if not path.exists():
        return []
    rows = csv.DictReader(io.StringIO(path.read_text()))
    try:
        return [{k: (int if k == "step" else float)(v) for k, v in row.items()} for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a log of numbers: repair it, or move it away") from error


class Stopwatch:
    """Seconds of training, those before a resume included."""

    def __init__(self, seconds_before: float = 0.0):
        self.start = time.perf_counter() - seconds_before

    @property
    def seconds(self) -> float:
        """Up to now."""
        return time.perf_counter() - self.start


def versions() -> dict[str, str]:
    """For metrics.json: what numbers may depend on, besides the device."""
    packages = {"vqgan": vqgan, "torch": torch, "torchvision": torchvision}
    numbers = {name: package.__version__ for name, package in packages.items()}
    return numbers | {"python": platform.python_version()}
