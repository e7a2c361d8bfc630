"""`vqgan`, or `python -m vqgan`: use trained models without writing code.

    vqgan sample CHECKPOINT --class cat       generate new images with a transformer
    vqgan complete CHECKPOINT IMAGE           generate a part of an image
    vqgan reconstruct CHECKPOINT IMAGE...     encode and decode images with a model
    vqgan encode CHECKPOINT IMAGE...          compress images to a few dozen bytes each
    vqgan decode INDICES                      turn these files back into images
    vqgan info CHECKPOINT                     describe a checkpoint
    vqgan export CHECKPOINT                   write a small copy of a transformer's run to share
    vqgan demo                                open a page to change codes, generate and fill holes

CHECKPOINT is the checkpoint.pt of a run, or the name of a model that comes with the package.
"""

import argparse
import json
from contextlib import suppress

from vqgan import cli_demo, cli_sample, cli_tokenizer, pretrained
from vqgan.arguments import PARSER_OPTIONS, output_path, path_text
from vqgan.checkpoint import fingerprint, save_model
from vqgan.errors import InputError
from vqgan.files import read_json
from vqgan.script import run_script


def info_flags(add) -> None:
    """The flags of `vqgan info`."""
    add("checkpoint", type=path_text, metavar="CHECKPOINT", help="checkpoint of any model")


def info(args: argparse.Namespace) -> None:
    """Describe a checkpoint: its model, training data and time, and results."""
    state = pretrained.read_checkpoint(args.checkpoint)
    metadata = state["metadata"]
    parameters = sum(p.numel() for p in pretrained.build_model(state, args.checkpoint).parameters())
    print(f"{state['model']}, {parameters:,} parameters")
    for name, value in state["model_args"].items():
        print(f"    {name}: {value}")
    if "condition" in metadata:
        condition = pretrained.load_condition(state, args.checkpoint)
        names = ", ".join(name for name in condition.names if name)
        print(f"condition: {condition.kind} ({names or condition.transform or 'one start token'})")
        print(f"tokenizer: {metadata.get('tokenizer')}")
    if metadata:
        data, size, command = (metadata.get(name) for name in ("data", "image_size", "command"))
        print(f"trained on {data}, {size} pixels: {command}")
    if {"step", "seconds"} <= state.keys():
        print(f"{state['step']:,} steps, {state['seconds'] / 60:.1f} minutes")
    of_samples = ("frechet", "class_accuracy") if "condition" in metadata else ()
    for name, value in _result(args.checkpoint, state).items():
        if isinstance(value, int | float):
            note = " (of samples at the command's first setting)" if name in of_samples else ""
            print(f"    {name}: {value if isinstance(value, int) else f'{value:.6g}'}{note}")


def _result(checkpoint: str, state: dict) -> dict:
    """The results of a model, from its checkpoint or from the metrics.json of its run."""
    if "result" in state["metadata"]:
        return state["metadata"]["result"]
    folder = pretrained.checkpoint_path(checkpoint).parent
    model_args = json.loads(json.dumps(state["model_args"]))  # with lists, as in metrics.json
    # The run's own folder if it trained one model, else a folder inside it.
    for run, name in ((folder, None), (folder.parent, folder.name)):
        with suppress(Exception):  # no file, or one that holds anything
            models = read_json(run / "metrics.json")["models"]
            result = models[name] if name else next(iter(models.values()))
            if result["model_args"] == model_args:  # a tokenizer.pt is not of the run it lies in
                return result
    print("(no metrics.json: the run was not finished, or is in another folder)")
    return {}


def export_flags(add) -> None:
    """The flags of `vqgan export`."""
    add("checkpoint", type=path_text, metavar="CHECKPOINT", help="of train_transformer.py")
    add("--out", type=path_text, help="new folder (default: exported, or its next unused name)")


def export(args: argparse.Namespace) -> None:
    """Write a transformer and its tokenizer to share, in half precision and without optimizers."""
    pipeline, out = pretrained.load_pipeline(args.checkpoint), output_path(args.out, "exported")
    path = pretrained.checkpoint_path(args.checkpoint)
    for file in ("checkpoint.pt", "tokenizer.pt"):
        if (out / file).exists():
            raise InputError(f"--out {out} holds a {file} already: name another folder")
    state = pretrained.read_checkpoint(path)
    tokenizer_state = pretrained.read_checkpoint(path.with_name("tokenizer.pt"))
    save_model(out / "tokenizer.pt", tokenizer_state, half=True)
    tokenizer, _ = pretrained.load_tokenizer(out / "tokenizer.pt")  # rounded: another fingerprint
    result = _result(args.checkpoint, state)
    state["metadata"] |= {"tokenizer_fingerprint": fingerprint(tokenizer), "result": result}
    save_model(out / "checkpoint.pt", state, half=True)
    size = sum((out / name).stat().st_size for name in ("tokenizer.pt", "checkpoint.pt"))
    print(f"{type(pipeline.tokenizer).__name__} and transformer, {size / 1e6:.1f} MB: {out}")


# Each command is a function, whose name and first line of the docstring a user sees, with the
# function that adds its flags.
COMMANDS = {
    cli_sample.sample: cli_sample.sample_flags,
    cli_sample.complete: cli_sample.complete_flags,
    cli_tokenizer.reconstruct: cli_tokenizer.reconstruct_flags,
    cli_tokenizer.encode: cli_tokenizer.encode_flags,
    cli_tokenizer.decode: cli_tokenizer.decode_flags,
    info: info_flags,
    export: export_flags,
    cli_demo.demo: cli_demo.demo_flags,
}


def parse() -> argparse.Namespace:
    """The command and its flags."""
    parser = argparse.ArgumentParser(
        prog="vqgan",
        description="Use trained models. CHECKPOINT is the checkpoint.pt of a run, or the name of "
        f"a model that comes with the package: {', '.join(pretrained.PRETRAINED)}.",
        epilog="The scripts that train models (train_*.py) are in the repository of this package.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function, add_flags in COMMANDS.items():
        name, help = function.__name__, (function.__doc__ or "").splitlines()[0].rstrip(".")
        subparser = commands.add_parser(name, help=help, description=help, **PARSER_OPTIONS)
        add_flags(subparser.add_argument)
        subparser.set_defaults(function=function)
    return parser.parse_args()


def command_line() -> None:
    """Run the installed command `vqgan`."""
    run_script(parse, lambda args: args.function(args), resumable=False)
