"""Files that are whole or not there: checkpoints, and what else a run writes.

A checkpoint is one file of plain tensors, numbers, strings, lists and dicts: the model's name and
all of its constructor arguments, its weights, and everything that the next training step depends
on. It is read with `weights_only=True`, so nothing in it is run. A run that was killed and resumed
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

MODEL_KEYS = {"model", "arguments", "weights"}  # what a model can be used with
RUN_KEYS = {"optimizers", "batches", "step", "seconds", "random", "threads"}  # and a run goes on

# After a loss or a weight that is not finite.
DIVERGED = "training has diverged; what was saved before is whole: start again with a lower lr"


# --- writing -------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the file, then rename: a kill or a full disk leaves the old one whole."""
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
    """Indented, so that people can read it too; whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def save_plain(path: Path, state: dict) -> None:
    """Write plain tensors, numbers, strings, lists and dicts, whole or not at all."""
    buffer = io.BytesIO()  # torch.save reports a full disk as something other than an OSError
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def save_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    arguments: dict,
    optimizers: Mapping[str, torch.optim.Optimizer],
    batches,
    step: int,
    seconds: float,
    companions: dict | None = None,
    about: dict | None = None,
) -> None:
    """Everything that the next step depends on.

    Args:
        arguments: the model's constructor arguments; defaults that are left out are written too.
        batches: a `data.Batches`, or anything else with a `state_dict`.
        step: optimizer steps taken.
        seconds: of training so far.
        companions: what else training goes on with, by name (a discriminator, say): anything with
            a `state_dict`.
        about: what else is to be known of the model: its data, image size and command, say.

    Raises:
        InputError: a weight is not finite any more; the old checkpoint stays.
    """
    companions = {name: part.state_dict() for name, part in (companions or {}).items()}
    weights = [model.state_dict(), *companions.values()]
    for name, value in (item for state in weights for item in state.items()):
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise InputError(f"{name} is not finite after step {step}: {DIVERGED}")
    state = {
        "model": type(model).__name__,
        "arguments": all_arguments(type(model), arguments),
        "weights": model.state_dict(),
        "companions": companions,
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "batches": batches.state_dict(),
        "step": step,
        "seconds": seconds,
        "random": random_state(),
        "threads": torch.get_num_threads(),
        "about": about or {},
        "code_version": vqgan.__version__,
    }
    save_plain(path, state)


def all_arguments(model_class: type[nn.Module], arguments: dict) -> dict:
    """Constructor arguments with the defaults written out.

    So a default that changes later does not change a model that was saved before.

    Raises:
        TypeError: an argument that the constructor does not have, or one that it lacks.
    """
    bound = inspect.signature(model_class).bind(**arguments)
    bound.apply_defaults()
    return dict(bound.arguments)


def save_model(path: Path, state: dict, *, half: bool = False) -> None:
    """Write what a model is used with, of a checkpoint's state (`load_checkpoint`).

    `half`: the weights in half precision: a file of half the size, equal to about three digits.
    """
    weights = dict(state["weights"])
    if half:
        weights |= {name: w.half() for name, w in weights.items() if is_float(w)}
    keys = ("model", "arguments", "about", "step", "seconds", "code_version")
    save_plain(path, {key: state[key] for key in keys if key in state} | {"weights": weights})


def is_float(value: object) -> bool:
    """Whether an entry of a state dict is a tensor of floats: what can be rounded or averaged."""
    return isinstance(value, Tensor) and value.is_floating_point()


# --- reading -------------------------------------------------------------------------------------


def load_checkpoint(
    path: Path,
    *,
    model_class: type[nn.Module] | None = None,
    arguments: dict | None = None,
    remedy: str = "put a copy of it back, or move it away to train this model from the start",
) -> dict:
    """Read a checkpoint, on the CPU.

    To use a model: `pretrained.load_model`.

    Args:
        model_class, arguments: what the checkpoint must be of for a run to go on with it; if not
            given, it may be one that can only be used (`save_model`).
        remedy: what to do when the file is not a checkpoint, for the error.

    Raises:
        InputError: not a checkpoint of this package, one that carries code, or of another model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about odd formats: the error says enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle's, zipfile's and torch's own, of many types
        # torch says "unsupported" of a pickle with code, and of a file that is no pickle.
        code = "it is something else, or carries code, which was not run"
        reason = code if "unsupported" in str(error).lower() else "damaged?"
        raise InputError(f"{path} is no checkpoint of plain data ({reason}): {remedy}") from error
    keys = MODEL_KEYS if model_class is None else MODEL_KEYS | RUN_KEYS
    if not isinstance(state, dict) or not keys <= state.keys():
        raise InputError(f"{path} is not a checkpoint of this package: {remedy}")
    state["arguments"] = _present_arguments(state)
    if model_class is not None:
        name, wanted = model_class.__name__, all_arguments(model_class, arguments or {})
        if (state["model"], state["arguments"]) != (name, wanted):
            raise InputError(
                f"{path} is of {state['model']}({_call(state['arguments'])}), but this run trains "
                f"{name}({_call(wanted)}): move it away, or start in another folder"
            )
    return state


def _present_arguments(state: dict) -> dict:
    """The constructor arguments of a file, also of one from before an argument had its name."""
    arguments = dict(state["arguments"])
    if state["model"] == "GPT" and "grid_size" in arguments:  # a transformer knew its grid
        h, w = arguments.pop("grid_size")
        arguments["seq_len"] = h * w
    if state["model"] == "VQVAE":  # a VQ-VAE did not know the size of its images
        arguments.setdefault("image_size", (state.get("about") or {}).get("image_size", 32))
    return arguments


def _call(arguments: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def restore(
    state: dict,
    *,
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    batches,
    companions: dict | None = None,
) -> None:
    """Put a checkpoint's state back into what `save_checkpoint` took it from."""
    try:
        model.load_state_dict(state["weights"])
        for name, part in (companions or {}).items():
            part.load_state_dict(state["companions"][name])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        advice = "put the right one back, or start in another folder"
        raise InputError(f"the checkpoint does not fit this run ({reason}): {advice}") from error
    batches.load_state_dict(state["batches"])
    set_random_state(state["random"])
    if state["threads"] != torch.get_num_threads():
        print(
            f"warning: this run had {state['threads']} threads, not {torch.get_num_threads()}: sums"
            " are rounded in another order, so the weights will not be the same bit for bit"
        )


def random_state() -> dict[str, Tensor]:
    """States of the global generators, from which a training step draws."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # asking would initialize it, on a run that uses the CPU
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put back what `random_state` gave; the state of a device that is not here is left out."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, whichever file they came from: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
