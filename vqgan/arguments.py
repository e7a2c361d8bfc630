"""The flags of the scripts and of the command, checked where they enter.

Errors of library functions name arguments, as in `image_size=30`; `run_script` shows a user
`--image-size 30` instead.
"""

import argparse
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vqgan.data import NUM_TRAIN, TrainLoader, load_dataset, pixel_variance
from vqgan.device import choose_device, choose_precision
from vqgan.errors import InputError, user_input
from vqgan.files import write_json
from vqgan.pretrained import load_tokenizer
from vqgan.sampling import check_sampling
from vqgan.training import Run
from vqgan.vqvae import VQAutoencoder

PRECISIONS = ("auto", "fp32", "bf16")  # of the network's matrix multiplications
# Flags that a resume may change, because the run is still the same one.
MAY_CHANGE_ON_RESUME = {"device", "compile", "checkpoint_every", "epochs", "data_root", "rfid"}
MAY_CHANGE_ON_RESUME |= {"temperature", "top_k", "top_p", "guidance", "num_samples"}


def _number(kind: type, is_valid: Callable, expected: str) -> Callable[[str], float]:
    """An argparse type for finite and valid numbers, whose error says what was `expected`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_valid(value)):
            raise argparse.ArgumentTypeError(f"{expected} was expected, not {text!r}")
        return value

    return parse


positive_int = _number(int, lambda value: value >= 1, "a whole number of at least 1")
# torch takes seeds of 63 bits.
seed_int = _number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
non_negative_int = _number(int, lambda value: value >= 0, "a whole number of at least 0")
positive_float = _number(float, lambda value: value > 0, "a number above 0")
non_negative_float = _number(float, lambda value: value >= 0, "a number of at least 0")
fraction = _number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default in the help except None."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help if action.default is None else super()._get_help_string(action)
        return text or ""


def common_parser(
    description: str, *, out: str, epochs: int, lr: float, required: str = ""
) -> argparse.ArgumentParser:
    """A parser of the flags that mean the same in every script."""
    usage = f"%(prog)s {required}[flags]   (--help lists them)"
    parser = argparse.ArgumentParser(
        description=description, usage=usage, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", default="cifar10", help="cifar10, shapes, textures, or a folder of images")
    add("--data-root", default="data", help="folder that CIFAR-10 is in, or is downloaded to")
    add("--image-size", type=positive_int, default=32, help="side in pixels, of a folder's images")
    add("--limit", type=positive_int, help="use only this many training and as many test images")
    add("--num-rendered", type=positive_int, default=NUM_TRAIN, help="training images to render")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="random mirror images")
    add("--epochs", type=positive_int, default=epochs, help="passes over the training images")
    add("--lr", type=positive_float, default=lr, help="learning rate of Adam (peak, if scheduled)")
    add("--seed", type=seed_int, default=0, help="random seed of weights, data order and rendering")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    add("--precision", choices=PRECISIONS, default="auto", help="auto is bf16 where it is fast")
    add("--compile", action="store_true", help="torch.compile: minutes to start, then faster steps")
    add("--checkpoint-every", type=positive_int, default=200, help="steps between two checkpoints")
    add("--out", default=out, help="run folder, where everything is written")
    add("--resume", action="store_true", help="continue the run in --out, with the flags it had")
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; with --resume, flags that are not given keep the run's values.

    Also sets `command`, the command line that started the run (and those that changed it).

    Raises:
        InputError: --resume without a run in --out, or with a flag that would make it another run;
            a checkpoint in --out without --resume.
    """
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    args = parser.parse_args()
    folder = Path(args.out)
    if not args.resume:
        if [*folder.glob("checkpoint.pt"), *folder.glob("*/checkpoint.pt")]:
            raise InputError(f"{folder} holds a run already: add --resume, or give another --out")
        args.command = command
        return args
    try:
        stored = json.loads((folder / "config.json").read_text())
        is_ours = {"command", "epochs", "precision"} <= stored.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"--resume: no run in {folder} ({error}): check --out") from error
    if not is_ours or not stored.keys() <= vars(args).keys() | {"command"}:
        raise InputError(f"--resume: --out {folder} is not a run of this script: name one that is")
    # Flags that are newer than the run had their default values.
    newer = vars(args).keys() - stored.keys() - {"out", "resume"}
    stored |= {name: parser.get_default(name) for name in newer}
    parser.set_defaults(**stored)
    args = parser.parse_args()
    if args.precision == "auto":
        args.precision = stored["precision"]  # what auto chose when the run began
    changed = {name for name, value in stored.items() if getattr(args, name) != value}
    for name in sorted(changed - MAY_CHANGE_ON_RESUME):
        raise InputError(
            f"--resume: the run in {args.out} has --{name.replace('_', '-')} {stored[name]}, not "
            f"{getattr(args, name)}: leave the flag out, or start a new run in another --out"
        )
    if args.epochs < stored["epochs"]:
        raise InputError(f"--epochs {args.epochs}: give {stored['epochs']} or more, as the run had")
    if changed & {"epochs", "temperature", "top_k", "top_p", "guidance", "num_samples"}:
        args.command = f"{args.command} && {command}"  # both led to the results
    return args


def open_run(args: argparse.Namespace, *, batch_sizes: list[int]) -> Run:
    """Choose the device, write config.json, load the images."""
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    args.precision = "bf16" if dtype == torch.bfloat16 else "fp32"  # a resumed run keeps it
    config = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
    out = Path(args.out)
    if not args.resume:  # early, so that a run killed while it reads its data can be resumed
        write_json(out / "config.json", config)
    sizes = {"image_size": args.image_size, "num_rendered": args.num_rendered}
    data = load_dataset(args.data, root=args.data_root, seed=args.seed, **sizes)
    if args.limit:
        data = data.first(args.limit)
    for batch_size in batch_sizes:  # one that is too large stops here, not after hours
        TrainLoader(data.train_images, batch_size)
    if args.resume:  # perhaps with more epochs, now that all checks passed
        write_json(out / "config.json", config)
    print(f"{len(data.train_images)} training and {len(data.test_images)} test images, {device}")
    flags = ("epochs", "seed", "flip", "checkpoint_every", "resume")
    metadata = {name: getattr(args, name) for name in ("data", "image_size", "command")}
    variance = pixel_variance(data.train_images)
    return Run(out, data, variance, device, dtype, metadata, **{f: getattr(args, f) for f in flags})


def open_tokenizer(args: argparse.Namespace) -> tuple[VQAutoencoder, dict]:
    """Load the tokenizer and its checkpoint; sets --data and --image-size from it if not given."""
    if args.tokenizer is None:
        raise InputError("--tokenizer is missing: give --tokenizer runs/vqgan/checkpoint.pt")
    own_copy = Path(args.out) / "tokenizer.pt"  # a resumed run keeps its tokenizer
    path = own_copy if args.resume and own_copy.exists() else args.tokenizer
    tokenizer, state = load_tokenizer(path)
    for name, flag in (("data", "--data"), ("image_size", "--image-size")):
        given, own = getattr(args, name), state["metadata"].get(name)
        if given is None and own is None:
            raise InputError(f"{args.tokenizer} does not say its {name}: give {flag}")
        if given is None:
            setattr(args, name, own)
        elif own is not None and Path(str(own)) != Path(str(given)) and not args.other_data:
            raise InputError(f"{flag} {given}, but the tokenizer has {own}: add --other-data")
    with user_input():
        tokenizer.check_resolution(args.image_size, args.image_size)
    tokenizer.image_size = args.image_size  # with --other-data it may be another size
    return tokenizer, state


def sampling_settings(args: argparse.Namespace, num_embeddings: int) -> list[dict]:
    """Every combination of the sampling flags, as keyword arguments of `GPT.sample`."""
    values = {"guidance": args.guidance, "temperature": args.temperature}
    values |= {"top_k": args.top_k or [None], "top_p": args.top_p or [None]}
    settings = [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())]
    for setting in settings:
        with user_input():
            check_sampling(num_embeddings, **setting)
    if args.num_samples == 1:
        raise InputError("--num-samples 1: a Frechet distance needs two or more images")
    if set(args.guidance) != {1.0} and (args.condition == "none" or args.condition_drop == 0):
        raise InputError("--guidance needs a --condition, and a --condition-drop above 0")
    return settings


def png_path(out: str, images: Sequence[str] = ()) -> Path:
    """The path of the PNG to write, which must not be one of the images that are read."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {out}: a name that ends in .png was expected")
    if path.exists() and any(path.samefile(image) for image in images if Path(image).exists()):
        raise InputError(f"--out {out} is one of the images and would be overwritten: give another")
    return path


def run_script(
    parse: Callable[[], argparse.Namespace],
    main: Callable[[argparse.Namespace], None],
    *,
    resumable: bool = True,
) -> None:
    """Run main(parse()); a user's mistake ends it with one line and exit status 1.

    `resumable` says whether the script knows --resume.
    """
    flags: set[str] = set()
    try:
        args = parse()
        flags = set(vars(args))
        main(args)
    except InputError as error:
        sys.exit(f"error: {name_flags(str(error), flags)}")
    except RuntimeError as error:
        # CUDA raises a separate class for this, the CPU only another message.
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
        sys.exit(f"error: {error}: is there room, and permission to write? Saved files are intact")
    except KeyboardInterrupt:
        resume = "; --resume continues from the last checkpoint, or from the start without one"
        sys.exit("stopped" + (resume if resumable else ""))


def name_flags(message: str, flags: set[str]) -> str:
    """Name arguments as a user gave them: "image_size=30" -> "--image-size 30"."""

    def flag(match: re.Match) -> str:
        name = match[1]
        return f"--{name.replace('_', '-')} " if name in flags else match[0]

    return re.sub(r"(?<![^\s(:])([a-z]\w*)=", flag, message)
