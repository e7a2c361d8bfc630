"""The study's batch sizes: its two models at five sizes, each for the same number of epochs.

    python docs/experiments/sweep.py --data data/cifar10-images

reads the run folders runs/sweep/MODEL-batchSIZE, each of a single model of train_vqvae.py
(docs/results/sweep/run.sh has their commands). A run that is missing is left out.

Writes, in docs/results/sweep/:

    reconstructions.png      test images through both models, at the smallest and the largest size
    ssim_by_batch_size.png   of both models, by two definitions
    losses.png               the VQ-VAE's training loss by epoch, for each size
    metrics.json             each run's results, and the means of its losses over the last epoch
"""

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
from _common import flags_of_runs, read_metrics, results_of, write_metrics
from torch import Tensor

from vqgan import figures
from vqgan.data import eval_batches, load_dataset
from vqgan.errors import InputError
from vqgan.images import to_unit
from vqgan.pretrained import load_model
from vqgan.script import run_script
from vqgan.training import Stopwatch

OUT = results_of(__file__)
TITLES = {"vae": "VAE", "vqvae": "VQ-VAE"}
BATCH_SIZES = (16, 32, 64, 128, 256)
LOSSES = ("loss", "reconstruction", "quantizer", "negative log-likelihood", "KL")
DEFINITIONS = {"ssim": "standard", "ssim_global": "one window"}
NUM_SHOWN = 12


def epoch_means(log: Path) -> list[dict[str, float]]:
    """The mean of each loss over every epoch, {"epoch": 1, "loss": ..., ...}, of a log.csv."""
    by_epoch = defaultdict(list)
    with log.open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = {key: float(value) for key, value in row.items()}
            # The row at epoch 1.0 is the last of the first epoch.
            by_epoch[math.ceil(numbers["epoch"])].append(numbers)
    return [
        {"epoch": epoch}
        | {key: fmean(row[key] for row in rows) for key in LOSSES if key in rows[0]}
        for epoch, rows in by_epoch.items()
    ]


@torch.no_grad()
def draw_reconstructions(path: Path, runs: dict[str, Path], images: Tensor) -> None:
    """The same test images, uint8 (N, 3, H, W), through each of these models."""
    x = next(eval_batches(images[:NUM_SHOWN], NUM_SHOWN))
    rows = [("original", to_unit(x))]
    rows += [(label, to_unit(load_model(run)(x).reconstruction)) for label, run in runs.items()]
    figures.image_rows(path, rows, title="Test images and their reconstructions, by batch size")


def main(args: argparse.Namespace) -> None:
    watch, data = Stopwatch(), load_dataset(args.data)
    results: dict[str, dict] = {}
    runs: dict[str, Path] = {}
    logs: dict[str, list[dict[str, float]]] = {}
    ssim: dict[str, dict[int, float]] = defaultdict(dict)
    for model, title in TITLES.items():
        for size in BATCH_SIZES:
            name = f"{model}-batch{size}"
            run = args.runs / "sweep" / name
            if not (run / "metrics.json").exists():
                print(f"left out: there is no finished run {run}")
                continue
            metrics, means = read_metrics(run), epoch_means(run / "log.csv")
            (result,) = metrics["models"].values()
            about = {key: metrics[key] for key in ("command", "device")}
            final = {f"final_{key}": value for key, value in means[-1].items()}
            results[name], runs[name] = result | about | final, run
            for key, definition in DEFINITIONS.items():
                ssim[f"{title}, {definition}"][size] = result[key]
            if model == "vqvae":
                logs[f"batch {size}"] = [{k: row[k] for k in ("epoch", "loss")} for row in means]
    epochs = sorted({result["epochs"] for result in results.values()})
    if len(epochs) > 1:
        found = ", ".join(f"{number:g}" for number in epochs)
        raise InputError(f"runs of {found} epochs cannot be compared: train all alike")
    ends = (min(BATCH_SIZES), max(BATCH_SIZES))
    shown = {f"{TITLES[m]}, batch {size}": f"{m}-batch{size}" for m in TITLES for size in ends}
    shown = {label: runs[name] for label, name in shown.items() if name in runs}
    draw_reconstructions(OUT / "reconstructions.png", shown, data.test_images)
    figures.metric_by_batch_size(
        OUT / "ssim_by_batch_size.png",
        ssim,
        ylabel="SSIM on the test set",
        title=f"SSIM by batch size, {epochs[0]:g} epochs each",
    )
    title = "Training loss of the VQ-VAE, by batch size"
    figures.losses(OUT / "losses.png", logs, ("loss",), title=title)
    about_data = {"source": args.data, "test_images": len(data.test_images)}
    write_metrics(OUT, watch, about_data, {"models": results})
    print(f"three pictures and metrics.json are in {OUT}")


if __name__ == "__main__":
    run_script(flags_of_runs("Compare the study's batch sizes.").parse_args, main, resumable=False)
