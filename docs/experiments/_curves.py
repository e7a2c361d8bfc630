"""The curves of finished runs, drawn again from what is committed of them.

    python docs/experiments/_curves.py docs/results/vqgan docs/results/transformer

draws losses.png of each folder, and adversarial.png of a VQGAN, from its logs and its metrics.json,
by the functions that the scripts draw them with.
"""

import argparse
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

from _common import read_metrics

import train_transformer
import train_vqgan
from vqgan import figures, report
from vqgan.script import run_script
from vqgan.training import read_log


def flags(script, command: str) -> argparse.Namespace:
    """Every flag that a run was first started with, defaults too."""
    with patch.object(sys, "argv", shlex.split(command.split(" && ")[0])[1:]):
        return script.parse()


def draw_autoencoders(folder: Path, metrics: dict) -> None:
    is_study = "train_vqvae.py" in metrics["command"]
    names = report.in_order(metrics["models"]) if is_study else list(metrics["models"])
    logs = {name: read_log(folder / f"{name}-log.csv") for name in names}
    titles = {
        name: report.study_title(name) if is_study else report.OBJECTIVES[name] for name in names
    }
    terms = report.STUDY_TERMS if is_study else report.VQGAN_TERMS
    titled = {titles[name]: rows for name, rows in logs.items()}
    figures.losses(folder / "losses.png", titled, terms, title="Training losses")
    if "vqgan" in logs:
        args, last = flags(train_vqgan, metrics["command"]), logs["vqgan"][-1]
        start = args.disc_start * args.epochs
        starts = (start, start + args.disc_warmup * last["epoch"] / last["step"])
        path = folder / "adversarial.png"
        figures.adversarial(path, logs["vqgan"], *starts, title="The adversarial game")


def draw_transformer(folder: Path, metrics: dict) -> None:
    args = flags(train_transformer, metrics["command"])
    title = report.token_losses_title(args.condition, args.condition_drop, metrics["command"])
    titled = {report.BASELINES[name]: value for name, value in metrics["baselines"].items()}
    losses = (read_log(folder / "log.csv"), metrics["validation"], titled)
    figures.token_losses(folder / "losses.png", *losses, title=title)


def main(args: argparse.Namespace) -> None:
    for folder in args.folders:
        metrics = read_metrics(folder)
        is_transformer = "train_transformer.py" in metrics["command"]
        draw = draw_transformer if is_transformer else draw_autoencoders
        draw(folder, metrics)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw curves again.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders of docs/results")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(parse, main, resumable=False)
