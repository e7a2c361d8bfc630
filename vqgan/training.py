"""What the training scripts share: device, precision, seed, run folder, log, checkpoint, resume.

Plumbing only: each script has its own loop. A run folder holds

    config.json     the flags of the run
    <model>/        checkpoint.pt and log.csv (of a script that trains one model: no subfolder)
    metrics.json    what was measured at the end
    *.png           pictures

A run that was killed and resumed ends with the same weights, bit for bit on a CPU, as one that was
not: a checkpoint has everything that the next step depends on (weights, optimizers, random states,
the place in the epoch), it replaces its predecessor in one rename, and log rows that a killed run
wrote after its last checkpoint are cut, for they will be written again.
"""

import argparse
import copy
import csv
import io
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

import vqgan
from vqgan.data import NUM_TRAIN, Batches, ImageDataset, load_dataset, pixel_variance
from vqgan.errors import InputError

# --- command line ------------------------------------------------------------------------------

# Flags that a resumed run may have otherwise: it is still the same run.
MAY_CHANGE_ON_RESUME = {"device", "compile", "checkpoint_every", "epochs", "data_root", "rfid"}
MAY_CHANGE_ON_RESUME |= {"temperature", "top_k", "top_p", "guidance", "num_samples"}


def _number(kind: type, is_valid: Callable, wanted: str) -> Callable[[str], float]:
    """An argparse type that takes numbers which are finite and valid, and says what it wanted."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_valid(value)):
            raise argparse.ArgumentTypeError(f"{wanted} was expected, not {text!r}")
        return value

    return parse


positive_int = _number(int, lambda value: value >= 1, "a whole number of at least 1")
# torch takes seeds of 63 bits.
seed_int = _number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
non_negative_int = _number(int, lambda value: value >= 0, "a whole number of at least 0")
positive_float = _number(float, lambda value: value > 0, "a number above 0")
non_negative_float = _number(float, lambda value: value >= 0, "a number of at least 0")
fraction = _number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def add_common_arguments(parser: argparse.ArgumentParser, *, out: str, epochs: int, lr: float):
    """The flags that mean the same in every script."""
    add = parser.add_argument
    add("--data", default="cifar10", help="cifar10, shapes, textures, or a folder of images")
    add("--data-root", default="data", help="where CIFAR-10 is, or is downloaded to")
    add("--image-size", type=positive_int, default=32, help="side in pixels, for a folder")
    add("--limit", type=positive_int, help="only the first N training and test images")
    add("--num-drawn", type=positive_int, default=NUM_TRAIN, help="training shapes or textures")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="random mirror images")
    add("--epochs", type=positive_int, default=epochs, help="passes over the training images")
    add("--lr", type=positive_float, default=lr, help="learning rate of Adam")
    add(
        "--seed",
        type=seed_int,
        default=0,
        help="of weights, order of the images, and drawn shapes",
    )
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the network's products; auto: bf16 where the hardware computes in it",
    )
    add("--compile", action="store_true", help="torch.compile: minutes to start, then faster")
    add("--checkpoint-every", type=positive_int, default=200, help="in optimizer steps")
    add("--out", default=out, help="the run folder")
    add("--resume", action="store_true", help="continue the run in --out with its own flags")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Every default in the help, but "None", which says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; with --resume, flags that are not given are those of the run.

    Also sets `command`, the command line that started the run (and those that changed it).

    Raises:
        InputError: --resume where there is no run, or with a flag that would make it another run;
            no --resume where there is a checkpoint already.
    """
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    args = parser.parse_args()
    config_path = Path(args.out) / "config.json"
    stored = _read_config(config_path) if config_path.exists() else None
    if not args.resume:
        folder = Path(args.out)
        if [*folder.glob("checkpoint.pt"), *folder.glob("*/checkpoint.pt")]:
            raise InputError(
                f"{args.out} holds a run already: continue it with --resume, "
                "or name another folder with --out"
            )
        args.command = command
        return args
    if stored is None:
        raise InputError(
            f"--resume: there is no run in {args.out} (no config.json): "
            "name its folder with --out, or start one without --resume"
        )
    if not set(stored) <= set(vars(args)) | {"command"}:
        raise InputError(
            f"{config_path} does not have this script's flags: is it another script's run? "
            "Name the right folder with --out"
        )
    # Flags that are newer than the run had their defaults.
    newer = vars(args).keys() - stored.keys() - {"out", "resume"}
    stored |= {name: parser.get_default(name) for name in newer}
    parser.set_defaults(**stored)
    args = parser.parse_args()
    if args.precision == "auto":
        args.precision = stored["precision"]  # what auto chose when the run began
    changed = {name for name, value in stored.items() if getattr(args, name) != value}
    for name in sorted(changed - MAY_CHANGE_ON_RESUME):
        raise InputError(
            f"--resume: the run in {args.out} has {name} = {stored[name]}, but "
            f"{getattr(args, name)} was given: leave the flag out, or start a new run in another "
            "--out"
        )
    if args.epochs < stored["epochs"]:
        raise InputError(
            f"--resume: the run in {args.out} has {stored['epochs']} epochs, which can be "
            f"more, but not {args.epochs}"
        )
    if changed & {"epochs", "temperature", "top_k", "top_p", "guidance", "num_samples"}:
        args.command = f"{args.command} && {command}"  # both made the result
    return args


def _read_config(path: Path) -> dict:
    """The flags of a run, as its config.json has them."""
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): repair it, or move it away") from error
    if not isinstance(config, dict) or not {"command", "epochs", "precision"} <= config.keys():
        raise InputError(
            f"{path} was not written by a script of this package: name another folder with --out"
        )
    return config


def run_script(main: Callable[[], None], *, resumable: bool = True) -> None:
    """Run a script's main(); a user's mistake ends it with one line and exit status 1.

    `resumable` says whether the script knows --resume.
    """
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        # CUDA has an error of its own for this, the CPU only a text.
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate" in str(error)):
            raise
        remedy = "give fewer or smaller images"
        if resumable:
            remedy = "--resume, or start again with a smaller --batch-size or a smaller model"
        sys.exit(f"error: out of memory ({str(error).splitlines()[0]}): free memory and {remedy}")
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    except (FileExistsError, NotADirectoryError) as error:
        sys.exit(f"error: {error}: a file is where a folder should be; name another --out")
    except OSError as error:
        sys.exit(
            f"error: {error}: check that the disk has room and the folder can be written, then "
            "--resume (what was written before is whole), or choose another --out"
        )
    except KeyboardInterrupt:
        resume = "; --resume goes on from the last checkpoint, or from the start without one"
        sys.exit("stopped" + (resume if resumable else ""))


# --- the beginning and the end of a run ----------------------------------------------------------


class Run(NamedTuple):
    """What every model of a run has in common."""

    out: Path
    device: torch.device
    dtype: torch.dtype  # of the network's products
    data: ImageDataset
    variance: float  # of the training pixels in [-1, 1]


def open_run(args: argparse.Namespace, *, batch_sizes: list[int]) -> Run:
    """Choose the device, write config.json, load the images."""
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    args.precision = "bf16" if dtype == torch.bfloat16 else "fp32"  # a resumed run keeps it
    config = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
    out = Path(args.out)
    if not args.resume:  # early, so that a run killed while it reads its data can be resumed
        write_json(out / "config.json", config)
    data = load_dataset(
        args.data,
        root=args.data_root,
        image_size=args.image_size,
        seed=args.seed,
        num_drawn=args.num_drawn,
    )
    if args.limit:
        data = data.first(args.limit)
    for batch_size in batch_sizes:  # one that does not fit stops here, not after hours
        Batches(data.train_images, batch_size)
    if args.resume:  # perhaps with more epochs than before, now that nothing refuses them
        write_json(out / "config.json", config)
    print(f"{len(data.train_images)} training and {len(data.test_images)} test images, {device}")
    return Run(out, device, dtype, data, pixel_variance(data.train_images))


def about_run(args: argparse.Namespace) -> dict:
    """What a checkpoint says of its run: the data it was trained on, and by which command."""
    return {"data": args.data, "image_size": args.image_size, "command": args.command}


def write_metrics(run: Run, args: argparse.Namespace, models: dict[str, dict], **more) -> None:
    """metrics.json: what was measured of each model, on which data, by what; and more keys."""
    content = {
        "command": args.command,
        "data": {
            "source": args.data,
            "training_images": len(run.data.train_images),
            "test_images": len(run.data.test_images),
            "variance": run.variance,
        },
        "device": describe_device(run.device, run.dtype),
        "versions": versions(),
        "seconds": sum(result["seconds"] for result in models.values()),
    }
    write_json(run.out / "metrics.json", content | more | {"models": models})


def print_table(results: dict[str, dict], columns: dict[str, tuple[str, str]]) -> None:
    """A line for each result; columns: key -> (heading, format)."""
    width = max(len(name) for name in results)
    print(" " * width, *(f"{heading:>10}" for heading, _ in columns.values()))
    for name, result in results.items():
        values = (
            "-" if result[key] is None else f"{result[key]:{form}}"
            for key, (_, form) in columns.items()
        )
        print(f"{name:{width}}", *(f"{value:>10}" for value in values))


# --- device, precision, seed -------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """ "auto" takes CUDA, then Apple's MPS, then the CPU; any other name is taken as it is."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)  # fails where the machine has no such device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # whose random state is saved, and precision asked for
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise InputError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}): "
            "give auto, cpu, cuda or mps"
        ) from error
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32 for the matrix products of a network (the weights stay float32).

    "auto" takes bf16 where the hardware computes in it: CUDA since Ampere (older cards emulate it,
    slowly, so emulation does not count), and CPUs with AMX or AVX512-BF16 instructions.
    """
    if name == "bf16":
        return torch.bfloat16
    if name == "auto" and device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
    if name == "auto" and device.type == "cpu":
        # Older versions of torch cannot be asked: float32 then.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"):
            return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Matrix products and convolutions in `dtype`; nothing changes for float32."""
    return torch.autocast(
        device_type=device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16
    )


def prepare_model(model: nn.Module, device: torch.device, *, compile: bool) -> nn.Module:
    """Move to the device, channels last (the layout that convolutions are fastest in)."""
    model.to(device, memory_format=torch.channels_last)
    if compile and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise InputError(
            "--compile needs a C++ compiler on a CPU, and none is installed: leave it out"
        )
    if compile:
        model.compile()  # in place: the names in the state dict stay
    return model


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """For metrics.json: what computed this."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        name = capabilities.get("cpu_name") or platform.processor() or platform.machine()
        name = f"{name}, threads: {torch.get_num_threads()}"
    return f"{device.type} ({name}), {'bf16' if dtype == torch.bfloat16 else 'fp32'}"


def versions() -> dict[str, str]:
    """For metrics.json: what numbers may depend on, besides the device."""
    return {
        "vqgan": vqgan.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }


# --- files that are whole or not there ---------------------------------------------------------


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


# --- checkpoints -------------------------------------------------------------------------------

MODEL_KEYS = {"model", "arguments", "weights"}  # what a model can be used with
RUN_KEYS = {"optimizers", "batches", "step", "seconds", "random", "threads"}  # and a run goes on

# What to do after a loss or a weight that is not finite.
START_AGAIN = (
    "Checkpoints written before are kept as they are; start again with a smaller --lr in another "
    "--out"
)


def save_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    arguments: dict,
    optimizers: dict[str, torch.optim.Optimizer],
    batches,
    step: int,
    seconds: float,
    companions: dict | None = None,
    about: dict | None = None,
) -> None:
    """Everything that the next step depends on, as plain tensors, numbers, strings and dicts.

    Args:
        arguments: the model's constructor arguments, from which it can be built again.
        batches: a `data.Batches`, or anything else with a `state_dict`.
        step: optimizer steps taken.
        seconds: of training so far.
        companions: what else training goes on with, by name (a discriminator, say): anything with
            a `state_dict`.
        about: what else is to be known of the model: its data, say (`about_run`).

    Raises:
        InputError: a weight is not finite any more; the old checkpoint stays.
    """
    companions = {name: part.state_dict() for name, part in (companions or {}).items()}
    weights = [model.state_dict(), *companions.values()]
    for name, value in (item for state in weights for item in state.items()):
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise InputError(
                f"{name} is not finite after step {step}: training has diverged. {START_AGAIN}"
            )
    state = {
        "model": type(model).__name__,
        "arguments": arguments,
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


def save_plain(path: Path, state: dict) -> None:
    """Write plain tensors, numbers, strings, lists and dicts, whole or not at all."""
    buffer = io.BytesIO()  # torch.save reports a full disk as something other than an OSError
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def save_model(path: Path, state: dict, *, half: bool = False) -> None:
    """Of a checkpoint's state (`load_checkpoint`) only what the model is used with.

    `half`: the weights in half precision: a file of half the size, equal to about three digits.
    """
    weights = {
        name: value.half() if half and _is_float(value) else value
        for name, value in state["weights"].items()
    }
    keys = ("model", "arguments", "about", "step", "seconds", "code_version")
    kept = {key: state[key] for key in keys if key in state}  # older ones have no "about"
    save_plain(path, kept | {"weights": weights})


def load_checkpoint(
    path: Path,
    *,
    model: str | None = None,
    arguments: dict | None = None,
    remedy: str = "put a copy of it back, or move it away to train this model from the start",
) -> dict:
    """Read a checkpoint, on the CPU, without running any code in it (`weights_only=True`).

    To use a model: `VQVAE(**c["arguments"])`, then `load_state_dict(c["weights"])`.

    Args:
        model, arguments: what the checkpoint must be of for a run to go on with it; if not given,
            it may be one that can only be used (`save_model`).
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
        may_have_code = "unsupported" in str(error).lower()
        code = "it is something else, or carries code, which was not run"
        reason = code if may_have_code else "damaged?"
        raise InputError(
            f"{path} is not a checkpoint of plain data ({reason}): {remedy}"
        ) from error
    keys = MODEL_KEYS if model is None else MODEL_KEYS | RUN_KEYS
    if not isinstance(state, dict) or not keys <= state.keys():
        raise InputError(f"{path} is not a checkpoint of this package: {remedy}")
    if model is not None and (state["model"], state["arguments"]) != (model, arguments):
        raise InputError(
            f"{path} is of {state['model']}({_call(state['arguments'])}), but this run trains "
            f"{model}({_call(arguments)}): move it away, or choose another --out"
        )
    return state


def _call(arguments: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def restore(
    state: dict,
    *,
    model: nn.Module,
    optimizers: dict[str, torch.optim.Optimizer],
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
        raise InputError(
            f"the checkpoint does not fit {state['model']} ({' '.join(str(error).split())}): put a "
            "copy of the right one back, or move it away to train this model from the start"
        ) from error
    batches.load_state_dict(state["batches"])
    set_random_state(state["random"])
    if state["threads"] != torch.get_num_threads():
        print(
            f"warning: this run had {state['threads']} threads and goes on with "
            f"{torch.get_num_threads()}: sums are rounded in another order, so the weights will "
            "not be the same bit for bit"
        )


def random_state() -> dict[str, Tensor]:
    """States of the global generators, from which a training step draws."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # asking would initialise it, on a run that uses the CPU
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


class WeightAverage:
    """A copy of a model whose weights and buffers are moving averages of the model's.

        average = d average + (1 - d) weights,   d = min(decay, (1 + t) / (10 + t)) at step t

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
        state = {name: value for name, value in state.items() if not _is_float(value)}
        self.model.load_state_dict(state, strict=False)


def _floats(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in model.state_dict().values() if _is_float(tensor)]


def _is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# --- log ---------------------------------------------------------------------------------------


class Log:
    """A CSV file of losses, averaged between two rows; and the watch over NaN.

    `record` keeps a step's losses on the device, `write_row` reads them: the loop waits for the
    GPU once a row, not once a step.
    """

    def __init__(self, path: Path, *, resume_at: int):
        """Start a log, or go on after step `resume_at`: rows beyond it are cut."""
        self.path, self.pending = path, []
        rows = read_log(path) if resume_at > 0 else []
        self.rows = [row for row in rows if row["step"] <= resume_at]
        content = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(content, fieldnames=list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        write_atomically(path, content.getvalue().encode())

    def record(self, step: int, losses: dict[str, Tensor]) -> None:
        """Losses of one step, each (), still on the device."""
        self.pending.append((step, {name: loss.detach() for name, loss in losses.items()}))

    def write_row(self, epoch: float) -> dict[str, float]:
        """Average what was recorded since the last row, append it, and return it.

        Raises InputError, and names step and term, where a loss is not finite.
        """
        steps = [step for step, _ in self.pending]
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack(list(losses.values())) for _, losses in self.pending])
        values = values.double().cpu() if values.device.type != "mps" else values.cpu().double()
        for step, row in zip(steps, values.tolist(), strict=True):
            losses = dict(zip(names, row, strict=True))
            # The sum comes last: it is not finite whenever a term is not.
            for name in sorted(names, key=lambda name: name == "loss"):
                if not math.isfinite(losses[name]):
                    raise InputError(
                        f"the loss term {name!r} is {losses[name]} at step {step}: training has "
                        f"diverged. {START_AGAIN}"
                    )
        means = dict(zip(names, values.mean(dim=0).tolist(), strict=True))
        row = {"step": steps[-1], "epoch": round(epoch, 4)}
        row |= {name: float(f"{mean:.6g}") for name, mean in means.items()}
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)
        self.pending = []
        return row


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a log.csv; a last row that a kill cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(whole))
    try:
        return [
            {"step": int(row.pop("step"))} | {k: float(v) for k, v in row.items()} for row in rows
        ]
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
