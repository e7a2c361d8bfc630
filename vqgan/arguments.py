"""The flags of the scripts and of the command, checked where they enter.

Errors of library functions name arguments, as in `image_size=30`; `script.run_script` shows a user
`--image-size 30` instead.
"""

import argparse
import itertools
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vqgan import distributed
from vqgan.codebooks import DEFAULTS, QUANTIZERS
from vqgan.data import NUM_TRAIN, TrainLoader, load_dataset, pixel_variance
from vqgan.device import choose_device, choose_precision
from vqgan.errors import InputError, file_input, user_input
from vqgan.files import lock_folder, read_json, unused_path, write_json
from vqgan.gradient_estimators import GRADIENT_ESTIMATORS
from vqgan.images import MAX_IMAGE_SIZE
from vqgan.masked import DEFAULT_STEPS
from vqgan.pretrained import checkpoint_path, init_weights, load_tokenizer
from vqgan.sampling import check_sampling
from vqgan.training import Run
from vqgan.vqvae import VQAutoencoder

PRECISIONS = ("auto", "fp32", "bf16")  # of the network's matrix multiplications
# Flags that a resume may change, because the run is still the same one.
SAMPLING = {"temperature", "top_k", "top_p", "guidance", "num_samples", "steps"}
MAY_CHANGE_ON_RESUME = {"device", "compile", "checkpoint_every", "epochs", "data_root", "rfid"}
MAY_CHANGE_ON_RESUME |= SAMPLING


def _number(kind: type, is_valid: Callable, expected: str, highest: int = 10**9) -> Callable:
    """An argparse type for valid numbers, whose error says what was `expected`.

    By default no number is higher than what a machine could hold or finish.
    """

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (abs(value) <= highest and is_valid(value)):  # false for NaN
            wanted = f"a number of at most {highest:,}" if value > highest else expected
            raise argparse.ArgumentTypeError(f"{wanted} was expected, not {text!r:.40}")
        return value

    return parse


positive_int = _number(int, lambda value: value >= 1, "a whole number of at least 1")
# A side in pixels, or a number of images that are shown at once.
small_int = _number(int, lambda v: v >= 1, "a whole number of at least 1", highest=MAX_IMAGE_SIZE)
# torch takes seeds of 63 bits.
seed_int = _number(int, lambda v: v >= 0, "a whole number of at least 0", highest=2**63 - 1)
non_negative_int = _number(int, lambda value: value >= 0, "a whole number of at least 0")
positive_float = _number(float, lambda value: value > 0, "a number above 0")
non_negative_float = _number(float, lambda value: value >= 0, "a number of at least 0")
fraction = _number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def path_text(text: str) -> str:
    """An argparse type for paths. An empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("a path was expected, not '' (an unset variable?)")
    return text


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default in the help except None."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help if action.default is None else super()._get_help_string(action)
        return text or ""


# Of each parser. An abbreviation could mean another flag as soon as one is added.
PARSER_OPTIONS: dict[str, Any] = {"formatter_class": HelpFormatter, "allow_abbrev": False}


def common_parser(
    description: str, *, out: str, epochs: int, lr: float, required: str = ""
) -> argparse.ArgumentParser:
    """A parser of the flags that mean the same in every script."""
    usage = f"%(prog)s {required}[flags]   (--help lists them)"
    parser = argparse.ArgumentParser(description=description, usage=usage, **PARSER_OPTIONS)
    add = parser.add_argument
    sources = "cifar10, shapes, textures, or a folder of images"
    add("--data", type=path_text, default="cifar10", help=sources)
    add("--data-root", type=path_text, default="data", help="where CIFAR-10 is or is downloaded to")
    add("--image-size", type=small_int, default=32, help="side in pixels, of a folder's images")
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
    add("--out", type=path_text, default=out, help="run folder, where everything is written")
    start = "trained model to start from: its weights and codebook; the optimizer is new"
    add("--init-from", type=path_text, metavar="CHECKPOINT", help=start)
    add("--resume", action="store_true", help="continue the run in --out, with the flags it had")
    return parser


def quantizer_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the codebook. Those that are not given follow the model's defaults."""
    add = parser.add_argument_group("codebook (flags not given follow the model)").add_argument
    on_off = argparse.BooleanOptionalAction
    add("--quantizer", choices=QUANTIZERS, help="kind of codebook (codebooks.py); usually ema")
    add("--num-embeddings", type=positive_int, help="K, entries of the codebook")
    add("--embedding-dim", type=positive_int, help="D, dimension of a codebook entry")
    add("--levels", nargs="+", type=positive_int, help="levels per dimension, of fsq")
    add("--num-rounds", type=non_negative_int, help="codes per position, of residual")
    add("--cosine", action=on_off, help="unit length for vectors and codes, of ema and gradient")
    help = "gradient from decoder to encoder, of learned codebooks"
    add("--gradient-estimator", choices=GRADIENT_ESTIMATORS, help=help)
    add("--data-init", action=on_off, help="initialize codes from the first batch (usually on)")
    add("--restart-dead-codes", action=on_off, help="move unused codebook entries (usually on)")


def quantizer_args(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a quantizer that were given.

    Raises:
        InputError: D or K is given, and follows from another flag.
    """
    names = ("quantizer", "num_embeddings", "embedding_dim", *DEFAULTS)
    given = {name: getattr(args, name, None) for name in names}  # (no flag sets beta)
    given = {name: value for name, value in given.items() if value is not None}
    if "embedding_dim" in given and args.quantizer in ("fsq", "lfq"):
        source = "--num-embeddings, as log2 K" if args.quantizer == "lfq" else "its --levels"
        raise InputError(f"--embedding-dim of {args.quantizer} follows from {source}: leave it out")
    if "num_embeddings" in given and args.levels:
        raise InputError("--num-embeddings is the product of --levels: give one of the two")
    return given


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; with --resume, flags that are not given keep the run's values.

    Also sets `command`, the command line that started the run (and those that changed it).

    Raises:
        InputError: --resume without a run in --out, or with a flag that would make it another run;
            without --resume, a run in --out that has a checkpoint or is of another script.
    """
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    args = parser.parse_args()
    folder = Path(args.out)
    stored = read_flags(parser, folder / "config.json")
    if not args.resume:
        results = ("metrics.json", "checkpoint.pt", "*/checkpoint.pt")
        if any([*folder.glob(name)] for name in results):
            raise InputError(f"{folder} holds a run already: add --resume, or give another --out")
        args.command = command
        return args
    if not stored:
        raise InputError(f"--resume: there is no run in {folder}: check --out")
    # Flags that are newer than the run had their default values.
    newer = vars(args).keys() - stored.keys() - {"out", "resume"}
    stored |= {name: parser.get_default(name) for name in newer}
    parser.set_defaults(**stored)
    args = parser.parse_args()
    if args.precision == "auto":
        args.precision = stored["precision"]  # what auto chose when the run began
    changed = {name for name, value in stored.items() if getattr(args, name) != value}
    # A folder of images may have moved. (That the images are the same, `data.TrainLoader` checks.)
    may_change = MAY_CHANGE_ON_RESUME | ({"data"} if Path(args.data or "").is_dir() else set())
    for name in sorted(changed - may_change):
        raise InputError(
            f"--resume: the run in {args.out} has --{name.replace('_', '-')} {stored[name]}, not "
            f"{getattr(args, name)}: leave the flag out, or start a new run in another --out"
        )
    if args.epochs < stored["epochs"]:
        raise InputError(f"--epochs {args.epochs}: give {stored['epochs']} or more, as the run had")
    if changed & ({"epochs"} | SAMPLING):
        args.command = f"{args.command} && {command}"  # both led to the results
    return args


def read_flags(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """Read the flags of a run from its config.json; {} if there is none.

    Raises:
        InputError: it is of another script, or a value is none that the command line would take.
    """
    if not path.exists():
        return {}
    stored, actions = read_json(path), {action.dest: action for action in parser._actions}
    command = stored.pop("command", None)
    if command is None or not {"epochs", "precision"} <= stored.keys() <= actions.keys():
        raise InputError(f"{path.parent} holds a run of another script: give another --out")
    for name, value in stored.items():
        action, values = actions[name], value if isinstance(value, list) else [value]
        with file_input(f"{path} says {name} = {value!r:.40}", ": repair it"):
            if action.nargs == 0 or value is None:  # --flip and the like; a flag without a value
                is_valid = isinstance(value, bool) or (value is action.default is None)
            else:  # as if it were typed
                typed = [str(item) for item in values]
                is_given = bool(typed) or action.nargs == "*"
                is_valid = is_given and parser._get_values(action, typed) == value
            if not is_valid:
                raise ValueError("not a value of this flag")
    return stored | {"command": command}


def open_run(args: argparse.Namespace, *, batch_sizes: list[int]) -> Run:
    """Choose the device, write config.json, load the images."""
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    args.precision = "bf16" if dtype == torch.bfloat16 else "fp32"  # a resumed run keeps it
    config = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
    if getattr(args, "init_config", None) and not args.init_from:
        raise InputError("--init-config is about --init-from, which was not given: give both")
    out, source = Path(args.out), Path(args.data)
    if source.is_dir() and source.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"--out {out} lies in --data {source}, and would become data: move it")
    lock = lock_folder(out)
    if args.init_from and not args.resume:
        checkpoint_path(args.init_from)  # a missing file stops here, not after an hour
    if distributed.is_main() and not args.resume:  # early: a run killed while it reads can resume
        if (out / "config.json").exists():  # what a killed start left is not this run's
            for name in ("tokenizer", "classifier", "eval_classifier"):
                if Path(getattr(args, name, None) or "") != out / f"{name}.pt":  # no flag names it
                    (out / f"{name}.pt").unlink(missing_ok=True)
        write_json(out / "config.json", config)
    sizes = {"image_size": args.image_size, "num_rendered": args.num_rendered}
    data = load_dataset(args.data, root=args.data_root, seed=args.seed, **sizes)
    if args.limit:
        data = data.first(args.limit)
    for batch_size in batch_sizes:  # one that is too large stops here, not after hours
        TrainLoader(data.train_images, batch_size)
    print(f"{len(data.train_images)} training and {len(data.test_images)} test images, {device}")
    variance = pixel_variance(data.train_images)
    metadata = {name: getattr(args, name) for name in ("data", "image_size", "command")}
    flags = ("epochs", "seed", "flip", "checkpoint_every", "resume")
    options = {flag: getattr(args, flag) for flag in flags}
    return Run(out, data, variance, device, dtype, metadata, config=config, lock=lock, **options)


def init_from(model: nn.Module, args: argparse.Namespace, folder: Path) -> None:
    """Start from the weights of --init-from, unless a resumed run goes on from its own."""
    if args.init_from and not (args.resume and (folder / "checkpoint.pt").exists()):
        init_weights(model, args.init_from, getattr(args, "init_config", None))


def open_tokenizer(args: argparse.Namespace) -> tuple[VQAutoencoder, dict]:
    """Load the tokenizer and its checkpoint; sets --data and --image-size from it if not given."""
    if args.tokenizer is None:
        raise InputError("--tokenizer is missing: give --tokenizer runs/vqgan/checkpoint.pt")
    own_copy = Path(args.out) / "tokenizer.pt"  # a resumed run keeps its tokenizer
    path = own_copy if args.resume and own_copy.exists() else args.tokenizer
    tokenizer, state = load_tokenizer(path)
    is_other = args.other_data or args.resume  # whose images may have moved
    for name, flag in (("data", "--data"), ("image_size", "--image-size")):
        given, own = getattr(args, name), state["metadata"].get(name)
        if given is None and own is None:
            raise InputError(f"{args.tokenizer} does not say its {name}: give {flag}")
        if given is None:
            setattr(args, name, own)
        elif own is not None and Path(str(own)) != Path(str(given)) and not is_other:
            raise InputError(f"{flag} {given}, but the tokenizer has {own}: add --other-data")
    with user_input():
        tokenizer.check_resolution(args.image_size, args.image_size)
    tokenizer.image_size = args.image_size  # with --other-data it may be another size
    return tokenizer, state


def sampling_settings(
    args: argparse.Namespace, num_embeddings: int, seq_len: int
) -> list[dict[str, Any]]:
    """Every combination of the sampling flags, as keyword arguments of a prior's `sample`."""
    values = {"guidance": args.guidance, "temperature": args.temperature}
    values |= {"top_k": args.top_k or [None], "top_p": args.top_p or [None]}
    if args.prior == "masked":
        values |= {"steps": args.steps or [min(DEFAULT_STEPS, seq_len)]}
        if max(values["steps"]) > seq_len:
            raise InputError(f"--steps {max(values['steps'])}: give 1 to {seq_len}, the tokens")
    settings = [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())]
    for setting in settings:
        with user_input():
            check_sampling(num_embeddings, **setting)
    if args.num_samples == 1:
        raise InputError("--num-samples 1: a Fréchet distance needs two or more images")
    if set(args.guidance) != {1.0} and (args.condition == "none" or args.condition_drop == 0):
        raise InputError("--guidance needs a --condition, and a --condition-drop above 0")
    return settings


def sampling_flags(add, *, count: int, out: str) -> None:
    """The flags of a command that generates images."""
    add("checkpoint", type=path_text, metavar="CHECKPOINT", help="of train_transformer.py")
    add("--class", dest="classes", nargs="+", metavar="NAME", help="classes to generate")
    add("--caption", nargs="+", metavar="TEXT", help='captions, as in "small red star on blue"')
    add("--count", type=small_int, default=count, help="images per class or caption")
    add("--temperature", type=non_negative_float, default=1.0, help="temperature; 0 is greedy")
    add("--top-k", type=int, help="sample from the k most likely tokens only")
    add("--top-p", type=positive_float, help="sample from the top tokens of this total probability")
    add("--guidance", type=non_negative_float, default=1.0, help="guidance scale; 1 is no guidance")
    add("--steps", type=positive_int, help="rounds of a masked transformer (default: 10)")
    add("--seed", type=seed_int, default=0, help="random seed; another one gives other images")
    tokenizer = "tokenizer (default: tokenizer.pt next to CHECKPOINT)"
    add("--tokenizer", type=path_text, metavar="FILE", help=tokenizer)
    output_flags(add, "PNG to write", default=out)


def output_flags(add, what: str, *, default: str) -> None:
    """The flags of a command that runs a model, and writes to `default` or its next unused name."""
    add("--out", type=path_text, help=f"{what} (default: {default}, or its next unused name)")
    add("--device", default="auto", help="device to compute on: auto, cpu, cuda, cuda:1 or mps")


def output_path(out: str | None, default: str, images: Sequence[str | Path] = ()) -> Path:
    """The path to write: --out, or else the default or its next unused name.

    Raises:
        InputError: another suffix than the default's, or one of the images that are read.
    """
    if out is None:
        return unused_path(Path(default))
    path, suffix = Path(out), Path(default).suffix
    if suffix and path.suffix.lower() != suffix:
        raise InputError(f"--out {out}: a name that ends in {suffix} was expected")
    if path.exists() and any(path.samefile(image) for image in images if Path(image).exists()):
        raise InputError(f"--out {out} is one of the images and would be overwritten: give another")
    return path
