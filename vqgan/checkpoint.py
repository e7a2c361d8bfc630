"""Files that are written whole or not at all: checkpoints, and what else a run writes.

A checkpoint is one file of plain tensors, numbers, strings, lists and dicts: the model's name and
all of its constructor arguments, its weights, and everything that the next training step depends
on. It is read with `weights_only=True`, so no code in it is run. A run that was killed and resumed
ends with the same weights, bit for bit on the same machine, as one that was not.
"""

import hashlib
import inspect
import io
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import vqgan
from vqgan.errors import InputError

# What using a model needs, and what resuming its run needs in addition.
MODEL_KEYS = {"model", "model_args", "weights"}
RUN_KEYS = {"optimizers", "batches", "step", "seconds", "random", "threads"}

# Ends the message about a loss or a weight that is not finite.
DIVERGED = "training has diverged, start again with a lower learning rate; saved files are intact"


# --- writing -------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it: a kill or a full disk leaves the old file intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON, which people can read too, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def save_plain(path: Path, state: dict) -> None:
    """Write plain tensors, numbers, strings, lists and dicts, whole or not at all."""
    buffer = io.BytesIO()  # on a full disk, torch.save raises something other than OSError
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def save_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    model_args: dict,
    optimizers: Mapping[str, torch.optim.Optimizer],
    batches,
    step: int,
    seconds: float,
    extra_state: dict | None = None,
    metadata: dict | None = None,
) -> None:
    """Save everything that the next step depends on.

    Args:
        model_args: the model's constructor arguments; omitted defaults are saved too.
        batches: a `data.TrainLoader`, or anything else with a `state_dict`.
        step: optimizer steps taken.
        seconds: seconds of training so far.
        extra_state: further parts of the training by name (a discriminator, say): anything with a
            `state_dict`.
        metadata: facts about the model, such as its data, image size and command.

    Raises:
        InputError: a weight is not finite; the old checkpoint stays.
    """
    extra_state = {name: part.state_dict() for name, part in (extra_state or {}).items()}
    weights = [model.state_dict(), *extra_state.values()]
    for name, value in (item for state in weights for item in state.items()):
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise InputError(f"{name} is not finite after step {step}: {DIVERGED}")
    state = {
        "model": type(model).__name__,
        "model_args": all_model_args(type(model), model_args),
        "weights": model.state_dict(),
        "extra_state": extra_state,
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "batches": batches.state_dict(),
        "step": step,
        "seconds": seconds,
        "random": random_state(),
        "threads": torch.get_num_threads(),
        "metadata": metadata or {},
        "code_version": vqgan.__version__,
    }
    save_plain(path, state)


def all_model_args(model_class: type[nn.Module], model_args: dict) -> dict:
    """Constructor arguments with the defaults written out.

    A default that changes later therefore does not change a model that was saved before.

    Raises:
        TypeError: the constructor does not have an argument, or requires one that is missing.
    """
    bound = inspect.signature(model_class).bind(**model_args)
    bound.apply_defaults()
    return dict(bound.arguments)


def save_model(path: Path, state: dict, *, half: bool = False) -> None:
    """Write the part of a checkpoint's state (`load_checkpoint`) that using the model needs.

    `half` rounds the weights to half precision, about three digits, which halves the file.
    """
    weights = dict(state["weights"])
    if half:
        weights |= {name: w.half() for name, w in weights.items() if is_float(w)}
    keys = ("model", "model_args", "metadata", "step", "seconds", "code_version")
    save_plain(path, {key: state[key] for key in keys if key in state} | {"weights": weights})


def is_float(value: object) -> bool:
    """Whether an entry of a state dict is a tensor of floats, which can be rounded or averaged."""
    return isinstance(value, Tensor) and value.is_floating_point()


# --- reading -------------------------------------------------------------------------------------


def load_checkpoint(
    path: Path,
    *,
    model_class: type[nn.Module] | None = None,
    model_args: dict | None = None,
    remedy: str = "put a copy of it back, or move it away to train this model from the start",
) -> dict:
    """Read a checkpoint onto the CPU. (`pretrained.load_model` returns a model.)

    Args:
        model_class, model_args: the model that a run resumes with this checkpoint; if not given,
            the checkpoint may lack the state of the training (`save_model`).
        remedy: what the error advises if the file is not a checkpoint.

    Raises:
        InputError: the file is not a checkpoint of this package, carries code, or holds another
            model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd formats; the error says enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise  # other kinds of OSError are torch's, of a truncated file
    except Exception as error:  # pickle, zipfile and torch raise many types
        # torch says "unsupported" of a pickle with code, and of a file that is no pickle.
        foreign = "it is another kind of file, or carries code, which was not run"
        reason = foreign if "unsupported" in str(error).lower() else "is it damaged?"
        raise InputError(f"{path} is no checkpoint of plain data ({reason}): {remedy}") from error
    keys = MODEL_KEYS if model_class is None else MODEL_KEYS | RUN_KEYS
    if not isinstance(state, dict) or not keys <= state.keys():
        raise InputError(f"{path} is not a checkpoint of this package: {remedy}")
    state.setdefault("metadata", {})
    if model_class is not None:
        name, expected = model_class.__name__, all_model_args(model_class, model_args or {})
        # Arguments newer than the checkpoint had their defaults.
        defaults = {p.name: p.default for p in inspect.signature(model_class).parameters.values()}
        if (state["model"], defaults | state["model_args"]) != (name, expected):
            raise InputError(
                f"{path} is of {state['model']}({_call(state['model_args'])}), but this run trains "
                f"{name}({_call(expected)}): move it away, or start in another folder"
            )
    return state


def _call(model_args: dict) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in model_args.items())


def restore(
    state: dict,
    *,
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    batches,
    extra_state: dict | None = None,
) -> None:
    """Load a checkpoint's state into the objects that `save_checkpoint` took it from."""
    try:
        model.load_state_dict(state["weights"])
        for name, part in (extra_state or {}).items():
            part.load_state_dict(state["extra_state"][name])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        advice = "put the right file back, or start in another folder"
        raise InputError(f"the checkpoint does not fit this run ({reason}): {advice}") from error
    batches.load_state_dict(state["batches"])
    set_random_state(state["random"])
    if state["threads"] != torch.get_num_threads():
        print(
            f"warning: this run had {state['threads']} threads, now {torch.get_num_threads()}: sums"
            " are rounded in another order, so the weights will not be the same bit for bit"
        )


def random_state() -> dict[str, Tensor]:
    """The states of the global random generators, which a training step draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # otherwise reading its state would initialize CUDA
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restore what `random_state` returned, except for a device that this machine lacks."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, whichever file they came from: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        # The extra state is no weight, and was no tensor when the first fingerprints were recorded.
        if not name.endswith("_extra_state"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
