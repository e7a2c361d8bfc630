"""Codebooks side by side: one network, and each quantizer of chapter "Codebooks since 2017".

    python docs/experiments/codebooks.py --data data/cifar10-images

reads the runs of `docs/results/codebooks/run.sh`: a VQ-VAE for each row of the table
(runs/codebooks/ROW) with its transformer (runs/codebooks/prior-ROW), short runs with smaller and
larger codebooks (runs/codebooks-sweep/QUANTIZER-K), and two VQGANs (runs/vqgan-QUANTIZER). A run
that is missing is left out.

The time of a training step is measured here, forward and backward at batch 128 in bfloat16 on the
CPU. The models take turns, so a slow spell of the machine hits all of them.

Writes, in docs/results/codebooks/:

    prices.png        the error of each codebook, by the price of its tokens with a transformer
    utilization.png   the fraction of codes that are used and the error, by the size of the codebook
    metrics.json      of each run
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import CPU, flags_of_runs, read_metrics, results_of, write_metrics
from matplotlib.ticker import ScalarFormatter
from torch import Tensor

from vqgan import figures
from vqgan.data import load_dataset
from vqgan.device import autocast
from vqgan.images import from_uint8
from vqgan.script import run_script
from vqgan.training import Stopwatch
from vqgan.vqvae import VQVAE

OUT = results_of(__file__)
ROWS = {
    "ema": "EMA",
    "gradient": "gradient",
    "ema-cosine": "EMA, cosine",
    "gradient-cosine": "gradient, cosine",
    "ema-rotation": "EMA, rotation",
    "simvq": "SimVQ",
    "simvq-8": "SimVQ, 8 dimensions",
    "fsq": "FSQ",
    "lfq": "LFQ",
    "residual-3x8": "residual, 3 of 8",
    "residual-2x512": "residual, 2 of 512",
    "ema-unguarded": "EMA, no guards",
    "gradient-unguarded": "gradient, no guards",
    # To tell why others are as they are: few dimensions alone, two levels alone, and rotation where
    # codes die.
    "ema-16": "EMA, 16 dimensions",
    "fsq-binary": "FSQ, two levels",
    "gradient-rotation": "gradient, rotation",
}
SWEPT = {"ema": "EMA", "fsq": "FSQ", "simvq": "SimVQ", "lfq": "LFQ"}
SIZES = (64, 512, 4096, 16_384)  # of the codebooks; runs of the largest take a GPU
VQGANS = ("vqgan-ema", "vqgan-fsq")
KEYS = ("nmse", "psnr", "ssim", "codes_used", "perplexity", "bits_per_image", "epochs")
VQGAN_KEYS = (*KEYS, "perceptual", "frechet", "class_accuracy")
BATCH_SIZE, ROUNDS = 128, 7


def is_finished(run: Path) -> bool:
    return (run / "metrics.json").exists()


def tokenizer_row(run: Path) -> dict:
    """What a run says of its VQ-VAE."""
    metadata = read_metrics(run)
    (result,) = metadata["models"].values()
    row = {key: result[key] for key in (*KEYS, "model_args")}
    row["num_embeddings"] = VQVAE(**row["model_args"]).num_embeddings  # FSQ's is a product near K
    row["utilization"] = row["codes_used"] / row["num_embeddings"]
    return row | {key: metadata[key] for key in ("command", "device", "seconds")}


def prior_row(run: Path) -> dict:
    """What a run says of its transformer: the price of the tokens, and the class of samples."""
    if not is_finished(run):
        return {}
    metadata = read_metrics(run)
    result = metadata["models"]["transformer"]
    return {
        "prior_bits_per_image": result["bits_per_image"],
        "nats_per_token": result["nats_per_token"],
        "class_accuracy": result["class_accuracy"],
        "frechet": result["frechet"],
        "prior_epochs": result["epochs"],
        "prior_command": metadata["command"],
    }


def vqgan_row(run: Path) -> dict:
    """What a run says of its VQGAN."""
    metadata = read_metrics(run)
    row = {key: metadata["models"]["vqgan"][key] for key in VQGAN_KEYS}
    return row | {key: metadata[key] for key in ("command", "device", "seconds")}


def milliseconds_per_step(models: Mapping[str, VQVAE], x: Tensor) -> dict[str, float]:
    """The median time of forward and backward for each model, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            start = time.perf_counter()
            with autocast(CPU, torch.bfloat16):
                output = model(x)
            loss = F.mse_loss(output.reconstruction.float(), x) + output.loss
            loss.backward()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def draw_prices(path: Path, rows: Mapping[str, Mapping]) -> None:
    """A point for each row that has a transformer; those of one kind share a color."""
    figure = figures.new_figure(9.5, 4.8, "What the tokens cost, and what is lost")
    xlabel, ylabel = "bits per image with a transformer", "normalized MSE (lower is better)"
    axes = figures.plot_axes(figure, 1, 1, xlabel=xlabel, ylabel=ylabel)
    kinds = list(dict.fromkeys(name.split("-")[0] for name in rows))
    counts = dict.fromkeys(kinds, 0)
    for name, row in rows.items():
        if "prior_bits_per_image" in row:
            kind = name.split("-")[0]
            style = {"color": figures.COLORS[kinds.index(kind)], "marker": "osD^v"[counts[kind]]}
            point = (row["prior_bits_per_image"], row["nmse"])
            axes.plot(*point, linestyle="", label=ROWS[name], **style)
            counts[kind] += 1
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), **figures.LEGEND)
    figures.save_figure(figure, path)


def draw_utilization(path: Path, swept: Mapping[str, Mapping]) -> None:
    """The fraction of codes that the test images use, one line per quantizer."""
    figure = figures.new_figure(9.5, 4.2, "Larger codebooks, two epochs each")
    labels = {"utilization": "fraction of codes used", "nmse": "normalized MSE (lower is better)"}
    for number, (key, ylabel) in enumerate(labels.items(), start=1):
        xlabel = "K, the number of codes"
        axes = figures.plot_axes(figure, number, 2, xlabel=xlabel, ylabel=ylabel)
        sizes: set[int] = set()
        for i, (kind, label) in enumerate(SWEPT.items()):
            found = {K: swept[f"{kind}-{K}"] for K in SIZES if f"{kind}-{K}" in swept}
            values = [row[key] for row in found.values()]
            axes.plot([*found], values, label=label, color=figures.COLORS[i], marker="os^D"[i])
            sizes |= found.keys()
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(sizes), labels=[f"{K:,}" for K in sorted(sizes)])
        axes.set_xticks([], minor=True)
        if key == "nmse":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
        else:
            axes.set_ylim(0, 1.05)
            axes.legend(loc="lower left", **figures.LEGEND)
    figures.save_figure(figure, path)


def main(args: argparse.Namespace) -> None:
    watch, data = Stopwatch(), load_dataset(args.data)
    rows: dict[str, dict] = {}
    models: dict[str, VQVAE] = {}
    for name in ROWS:
        run = args.runs / "codebooks" / name
        if not is_finished(run):
            print(f"left out: there is no finished run {run}")
            continue
        rows[name] = tokenizer_row(run) | prior_row(run.with_name(f"prior-{name}"))
        models[name] = VQVAE(**rows[name]["model_args"])
    x = from_uint8(data.train_images[:BATCH_SIZE])
    for name, milliseconds in milliseconds_per_step(models, x).items():
        rows[name]["milliseconds_per_step"] = milliseconds
    names = [f"{kind}-{K}" for kind in SWEPT for K in SIZES]
    runs = {name: args.runs / "codebooks-sweep" / name for name in names}
    swept = {name: tokenizer_row(run) for name, run in runs.items() if is_finished(run)}
    draw_prices(OUT / "prices.png", rows)
    draw_utilization(OUT / "utilization.png", swept)
    about_data = {"source": args.data, "test_images": len(data.test_images)}
    runs = {name: args.runs / name for name in VQGANS}
    vqgans = {name: vqgan_row(run) for name, run in runs.items() if is_finished(run)}
    results = {"models": rows | vqgans, "sweep": swept}
    write_metrics(OUT, watch, about_data, results, dtype=torch.bfloat16)
    for name, row in rows.items():
        bits, accuracy = row.get("prior_bits_per_image"), row.get("class_accuracy")
        cells = [ROWS[name], f"[`codebooks/{name}`](results/codebooks/metrics.json)"]
        cells += [f"{row['codes_used']} of {row['num_embeddings']}", f"{row['perplexity']:.0f}"]
        cells += [f"{row['nmse']:.4f}", f"{row['psnr']:.2f}", f"{row['ssim']:.3f}"]
        cells += [f"{row['milliseconds_per_step']:.0f}", f"{row['bits_per_image']:,.0f}"]
        cells += ["" if bits is None else f"{bits:.0f}"]
        cells += ["" if accuracy is None else f"{accuracy:.1%}"]
        print("| " + " | ".join(cells) + " |")
    print(f"two pictures and metrics.json are in {OUT}")


if __name__ == "__main__":
    run_script(
        flags_of_runs("Compare the quantizers in one network.").parse_args, main, resumable=False
    )
