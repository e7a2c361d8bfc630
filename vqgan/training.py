"""What every training needs besides its mathematics: the run, its sessions and the log.

Each script has its own loop, which takes its steps from a session:

    session = Session(run, folder, model=model, ...)
    for step, x in session:                  # resumes, shows the bar, saves when due
        loss = ...
        session.log({"loss": loss, ...})     # ends the step

A run folder holds

    config.json     the flags of the run
    <model>/        checkpoint.pt and log.csv; no subfolder if only one model is trained
    metrics.json    the results, measured at the end
    *.png           figures

A run that was killed and resumed ends with the same weights as one that was not (`checkpoint.py`).
Log rows written after its last checkpoint are cut on resume, because they are written again.
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
from typing import IO, Any

import torch
import torchvision
from torch import Tensor, nn

import vqgan
from vqgan import distributed
from vqgan.checkpoint import DIVERGED, all_model_args, load_checkpoint, restore, save_checkpoint
from vqgan.console import progress_bar
from vqgan.data import ImageDataset, TrainLoader
from vqgan.device import describe_device
from vqgan.errors import InputError, file_input
from vqgan.files import write_atomically, write_json

LOG_EVERY = 50  # steps averaged into one row of log.csv


@dataclass(frozen=True)
class Run:
    """What all models of a run share."""

    out: Path
    data: ImageDataset
    variance: float  # of the training pixels in [-1, 1]
    device: torch.device
    dtype: torch.dtype  # of the network's matrix multiplications
    metadata: dict  # data, image_size and command, for checkpoints
    epochs: int
    seed: int
    flip: bool
    checkpoint_every: int  # in steps
    resume: bool
    config: dict | None = None  # the flags, for config.json
    lock: IO | None = None  # on the run folder, as long as it is open

    def loader(
        self, batch_size: int, *, seed: int | None = None, labels: Tensor | None = None
    ) -> TrainLoader:
        """Shuffled batches of the training images, with their labels if `labels` are given."""
        options: dict[str, Any] = {"device": self.device, "labels": labels, "flip": self.flip}
        options["seed"] = self.seed if seed is None else seed
        return TrainLoader(self.data.train_images, batch_size, **options)

    def write_metrics(self, models: dict[str, dict], **more) -> None:
        """Write metrics.json: the results of each model, data, device, versions, and `more`."""
        data = {"source": self.metadata["data"], "variance": self.variance}
        data["training_images"] = len(self.data.train_images)
        data["test_images"] = len(self.data.test_images)
        content = {
            "command": self.metadata["command"],
            "data": data,
            "device": describe_device(self.device, self.dtype),
            "processes": distributed.num_processes(),
            "versions": versions(),
            "seconds": sum(result["seconds"] for result in models.values()),
        }
        write_json(self.out / "metrics.json", content | more | {"models": models})


class TrainState(dict):
    """A dictionary that is saved in checkpoints."""

    def state_dict(self) -> dict:
        """The content for a checkpoint: plain numbers, strings, lists and tensors."""
        return dict(self)

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises `ValueError` for other types."""
        for name, value in self.items():
            if not isinstance(state[name], type(value)):
                raise ValueError(f"its {name} is of another type")
        self.update(state)


class Session:
    """The training of one model: an iterator over its steps that does the bookkeeping.

        for step, batch in session:     # step: the number of steps taken before
            ...                         # gradients and optimizers
            session.log(losses)         # ends the step
            ...                         # from here on, session.step and session.epoch count it

    It continues from the last checkpoint if the run is resumed, shows a progress bar, writes the
    rows of log.csv, stops when a loss is not finite, and saves a checkpoint when one is due.

    Args:
        folder: the folder of checkpoint.pt and log.csv: the run's folder or one inside it.
        model_args: the model's constructor arguments.
        loader: the batches, shuffled anew in each epoch.
        state: what the script remembers between steps besides weights (plain numbers, lists and
            tensors); it is available as `session.state`, also after a resume.
        extra_state: further parts of the training by name: anything with a `state_dict`.
        eval_model: the model that is evaluated and saved, if it is not the trained one.
        model_ema_decay: decay of a moving average of the weights (`ModelEMA`); 0 keeps no average.
        metadata: facts about the model for its checkpoints, in addition to the run's.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        *,
        model: nn.Module,
        model_args: dict,
        optimizers: Mapping[str, torch.optim.Optimizer],
        loader: TrainLoader,
        state: dict | None = None,
        extra_state: dict | None = None,
        eval_model: nn.Module | None = None,
        model_ema_decay: float = 0.0,
        metadata: dict | None = None,
    ):
        self.model, self.steps_per_epoch, self.batch_size = model, len(loader), loader.batch_size
        self.epochs, self.total_steps = run.epochs, run.epochs * len(loader)
        self.checkpoint_every = run.checkpoint_every
        self.model_ema = ModelEMA(model, model_ema_decay) if model_ema_decay else None
        self.eval_model: Any = self.model_ema.model if self.model_ema else (eval_model or model)
        self.state = TrainState(state or {})
        extra_state = {"state": self.state} | (extra_state or {})
        if self.eval_model is not model:
            extra_state["trained"] = model
        self.parts: dict[str, Any] = {"optimizers": optimizers, "extra_state": extra_state}
        self.parts["batches"] = loader
        distributed.average_gradients(optimizers.values())
        metadata = run.metadata | {"processes": distributed.num_processes()} | (metadata or {})
        self.metadata: dict[str, Any] = {"model_args": model_args, "metadata": metadata}

        # Start at step 0, or at the last checkpoint of an interrupted run.
        self.step, self.seconds = 0, 0.0
        self.folder, self.checkpoint = folder, folder / "checkpoint.pt"
        if run.resume and self.checkpoint.exists():
            saved = load_checkpoint(self.checkpoint, model_class=type(model), model_args=model_args)
            restore(saved, model=self.eval_model, **self.parts)
            self.step, self.seconds = saved["step"], saved["seconds"]
            before, now = saved["metadata"].get("processes", 1), metadata["processes"]
            if before != now:
                print(f"trained by {before} processes so far, and now by {now}: other rounding")
        if run.resume and run.config:  # perhaps with more epochs, now that all checks passed
            write_json(run.out / "config.json", run.config)
        self.log_file = Log(folder / "log.csv", resume_at=self.step)
        self.rows = self.log_file.rows
        self.bar = progress_bar(
            desc=folder.name, total=self.total_steps * loader.batch_size,
            initial=self.step * loader.batch_size, unit="img", unit_scale=True,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.model.train()
        stopwatch = Stopwatch(self.seconds)
        with self.bar:
            while self.step < self.total_steps:
                for batch in self.parts["batches"]:  # one epoch, or the rest of it after a resume
                    step = self.step
                    yield step, batch
                    if self.step != step + 1:
                        raise RuntimeError("each step of a session ends with one session.log()")
                    if self.save_is_due:
                        self.seconds = stopwatch.seconds
                        state = self.parts | self.metadata
                        state |= {"step": self.step, "seconds": self.seconds}
                        save_checkpoint(self.checkpoint, model=self.eval_model, **state)
                    self.bar.update(self.batch_size)
        self.parts.clear()  # the optimizers' and the loader's memory is free for the next model

    def log(self, losses: dict[str, Tensor], *, end_row: bool = False) -> dict | None:
        """End a step. Returns the row of log.csv that ends with it, or None.

        Args:
            losses: scalars () on the device, by the same names in every step; the progress bar
                shows "loss".
            end_row: end the row with this step, so that no row averages across a change.
        """
        self.step += 1
        if self.model_ema:
            self.model_ema.update(self.model, self.step)
        self.log_file.record(self.step, losses)
        # A checkpoint ends a row, so that a resume begins with a new one.
        if not (self.step % LOG_EVERY == 0 or self.save_is_due or end_row):
            return None
        row = self.log_file.write_row(epoch=self.epoch)
        shown = [name for name in ("loss", "codes_used") if name in row]
        self.bar.set_postfix({name: f"{row[name]:.4g}" for name in shown}, refresh=False)
        return row

    @property
    def summary(self) -> dict:
        """What metrics.json says about the training."""
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "model_args": all_model_args(type(self.model), self.metadata["model_args"]),
            "seconds": round(self.seconds, 1),
        }

    @property
    def epoch(self) -> float:
        """Epochs trained so far, 2.5 in the middle of the third."""
        return self.step / self.steps_per_epoch

    @property
    def save_is_due(self) -> bool:
        """Whether a checkpoint will be saved after this step."""
        return self.step % self.checkpoint_every == 0 or self.step == self.total_steps


def evenly_spaced(total_steps: int, count: int) -> set[int]:
    """`count` evenly spaced steps from 1 to `total_steps`, including the last."""
    count = min(count, total_steps)
    return {round(total_steps * i / count) for i in range(1, count + 1)}


class ModelEMA:
    """A copy of a model whose weights and buffers are moving averages of the model's.

        ema = d ema + (1 - d) weights,   d = min(decay, (1 + t) / (10 + t)) at step t

    so that the random weights of the beginning are forgotten soon. The last steps wander about, and
    the average lies in their middle. The codebook is averaged too, to fit the averaged encoder.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in the model's weights after training step `step`, where 1 is the first."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(_floats(self.model), _floats(model), 1 - decay)  # all in one kernel
        # What has no average is copied, such as whether a codebook is initialized. Loading is not
        # strict, because the averaged floats are left out.
        others = {n: v for n, v in model.state_dict().items() if not v.is_floating_point()}
        self.model.load_state_dict(others, strict=False)


def _floats(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


# --- the log -------------------------------------------------------------------------------------


class Log:
    """A CSV file of losses, averaged between two rows, and the check that they are finite.

    `record` keeps a step's losses on the device, `write_row` reads them: the loop waits for the
    GPU once per row, not once per step.
    """

    def __init__(self, path: Path, *, resume_at: int):
        """Start a log, or continue one after step `resume_at`; rows beyond it are cut."""
        self.path = path
        self.pending: list[tuple[int, dict[str, Tensor]]] = []
        rows = read_log(path) if resume_at > 0 else []
        self.rows = [row for row in rows if row["step"] <= resume_at]
        self._write()

    def record(self, step: int, losses: dict[str, Tensor]) -> None:
        """Keep the losses of one step, each (), on the device."""
        self.pending.append((step, {name: loss.detach() for name, loss in losses.items()}))

    def write_row(self, epoch: float) -> dict[str, float]:
        """Append the averages of what was recorded since the last row, and return them.

        Raises:
            InputError: a loss is not finite; the message names the step and the term.
        """
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack(list(losses.values())) for _, losses in self.pending])
        # (steps, terms): here the loop waits for the GPU, and for the other processes.
        values = distributed.mean(values).cpu().double()
        for (step, _), terms in zip(self.pending, values.tolist(), strict=True):
            # The sum comes last: it is not finite whenever a term is not.
            for name, value in sorted(zip(names, terms, strict=True), key=lambda x: x[0] == "loss"):
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
            terms = list(dict.fromkeys(term for row in self.rows for term in row))
            writer = csv.DictWriter(content, fieldnames=terms, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        write_atomically(self.path, content.getvalue().encode())


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv, {"step", "epoch", "loss", ...}; empty if there is no file."""
    if not path.exists():
        return []
    with file_input(f"{path} is not a log of numbers", ": repair it or move it away"):
        # An older row lacks a term that is logged since then.
        return [
            {"step": int(row.pop("step")), "epoch": float(row.pop("epoch"))}
            | {name: float(value) for name, value in row.items() if value != ""}
            for row in csv.DictReader(io.StringIO(path.read_text()))
        ]


class Stopwatch:
    """Measures the seconds of training, including those before a resume."""

    def __init__(self, seconds_before: float = 0.0):
        self.start = time.perf_counter() - seconds_before

    @property
    def seconds(self) -> float:
        """Seconds up to now."""
        return time.perf_counter() - self.start


def versions() -> dict[str, str]:
    """The versions that results may depend on, for metrics.json."""
    numbers = {"vqgan": vqgan.__version__, "torch": torch.__version__}
    return numbers | {"torchvision": torchvision.__version__, "python": platform.python_version()}
