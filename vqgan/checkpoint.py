"""Checkpoints: a trained model, and everything that the next training step depends on.

A checkpoint is one file of plain tensors, numbers, strings, lists and dicts (`files.py`): the
model's name and all of its constructor arguments, its weights, and the state of its training. A run
that was killed and resumed ends with the same weights, bit for bit on the same machine, as one that
was not.
"""

import hashlib
import inspect
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vqgan
from vqgan.errors import InputError, file_input
from vqgan.files import load_plain, save_plain
from vqgan.images import MAX_IMAGE_SIZE

# What using a model needs, and what resuming its run needs in addition.
MODEL_KEYS = {"model", "model_args", "weights"}
RUN_KEYS = {"optimizers", "batches", "step", "seconds", "random", "threads"}
# The types of a checkpoint's parts, and of its metadata.
TYPES: dict[str, Any] = {
    "model": str, "model_args": dict, "weights": dict, "optimizers": dict, "extra_state": dict,
    "batches": dict, "step": int, "seconds": int | float, "random": dict, "threads": int,
    "metadata": dict, "data": str, "command": str, "image_size": int, "condition": dict,
    "condition_drop": int | float, "tokenizer": str, "tokenizer_fingerprint": str, "result": dict,
}  # fmt: skip

# Arguments that say how often a layer is repeated. Each repetition has weights of its own.
LAYER_COUNTS = ("n_layer", "num_residual_layers", "num_residual_blocks", "num_downsamples")

# Ends the message about a loss or a weight that is not finite.
DIVERGED = "training has diverged, start again with a lower learning rate; saved files are intact"


# --- writing -------------------------------------------------------------------------------------


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
    for weights in (model.state_dict(), *extra_state.values()):
        if name := not_finite(weights):
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


def not_finite(weights: dict) -> str | None:
    """The name of a tensor that holds NaN or infinity, or None."""
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    return next((n for n, value in tensors.items() if not bool(value.isfinite().all())), None)


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
    state = load_plain(path, remedy=remedy)
    keys = MODEL_KEYS if model_class is None else MODEL_KEYS | RUN_KEYS
    if not isinstance(state, dict) or not keys <= state.keys():
        raise InputError(f"{path} is not a checkpoint of this package: {remedy}")
    check_state(state, path)
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


def check_state(state: dict, path: Path) -> None:
    """Raise InputError for a part of the wrong type, or an image size that no image has."""
    metadata = state.setdefault("metadata", {})
    for name, value in (state | (metadata if isinstance(metadata, dict) else {})).items():
        if not isinstance(value, TYPES.get(name, object)):
            given = f"{reprlib.repr(value):.60}"
            raise InputError(f"{path} is damaged: its {name} is {given}; name another file")
    size = metadata.get("image_size", 1)
    if not 1 <= size <= MAX_IMAGE_SIZE:
        raise InputError(f"{path} has images of {size!s:.9} pixels, and not 1 to {MAX_IMAGE_SIZE}")


def build_on_meta(model_class: type, model_args: dict, weights: dict, path: str | Path) -> Any:
    """Build the model of a file on torch's "meta" device, where weights have shapes and no values.

    So it takes no memory and draws no random numbers. `load_weights` completes it.

    Raises:
        ValueError: it would be larger than its file, where no number of channels or codes can
            exceed the bytes, and no number of layers the tensors. (The constructor raises others.)
    """
    for name, w in weights.items():  # a view can be larger than its data
        if isinstance(w, Tensor) and w.numel() * w.element_size() > w.untyped_storage().nbytes():
            raise ValueError(f"{name} is larger than its data")
    parameters = inspect.signature(model_class).parameters
    num_tensors, num_bytes = len(weights), Path(path).stat().st_size
    for name, value in model_args.items():
        default = parameters[name].default if name in parameters else None
        kind = int | float if isinstance(default, int | float) else str
        if isinstance(default, int | float | str) and not isinstance(value, kind):
            raise ValueError(f"{name} is {reprlib.repr(value):.60}")
        most = num_tensors if name in LAYER_COUNTS else num_bytes
        numbers = value if isinstance(value, list | tuple) else [value]
        if len(numbers) > num_tensors or any(isinstance(n, int) and n > most for n in numbers):
            raise ValueError(f"{name} is larger than the file allows")
    with torch.device("meta"):
        return model_class(**model_args)


def load_weights(model: nn.Module, weights: dict) -> None:
    """Load a file's weights into a model of `build_on_meta`.

    Raises:
        RuntimeError, ValueError: they do not fit, or hold NaN or infinity.
    """
    model.load_state_dict(weights, assign=True)
    if name := not_finite(weights):
        raise ValueError(f"{name} is not finite")


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
    advice = ": put the right file back, or start in another folder"
    with file_input("the checkpoint does not fit this run", advice):
        model.load_state_dict(state["weights"])
        for name, part in (extra_state or {}).items():
            part.load_state_dict(state["extra_state"][name])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            for weight, values in optimizer.state.items():
                if any(v.shape not in ((), weight.shape) for v in values.values()):
                    raise ValueError(f"{name} is of another model")  # would crash in a fused step
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
