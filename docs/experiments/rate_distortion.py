"""The two pictures that compare several runs of train_vqvae.py on the same test images.

    python docs/experiments/rate_distortion.py --data data/cifar10-images

reads the run folders below runs/ that `RUNS` names (docs/results/README.md has their commands) and
writes, in docs/results/rate_distortion/:

    ladder.png            the same images through each model, from the fewest bits to the most
    rate_distortion.png   bits per image against error and SSIM, with JPEG as the landmark
    points.json           the numbers of the chart, and of docs/ssim.md
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from _common import flags_of_runs, model_folder, read_metrics, results_of, scan_bytes, through_jpeg
from matplotlib.ticker import ScalarFormatter

from vqgan import figures, metrics
from vqgan.data import eval_batches, load_dataset
from vqgan.files import write_json
from vqgan.images import from_uint8, to_unit
from vqgan.pretrained import load_model
from vqgan.script import run_script

OUT = results_of(__file__)
JPEG_QUALITIES = (10, 20, 30, 40, 50)
NUM_SHOWN = 12

# Curves of the chart: label -> {label of the point: (run folder, model)}.
RUNS = {
    "VAE, KL weight w, 4 epochs": {
        f"w = {weight}": (f"rate/vae-kl{weight}", "vae") for weight in ("0.1", "0.3")
    },
    "VAE, w = 1, 40 epochs": {"": ("study-fixed", "vae")},
    "VAE, optimal scale, 40 epochs": {"": ("study", "vae")},
    "VQ-VAE, 8x8 of K codes, 4 epochs": {
        f"K = {size}": (f"rate/vqvae-8x8-k{size}", "vqvae") for size in (32, 128)
    },
    "VQ-VAE, 8x8 of 512, 40 epochs": {"": ("study", "vqvae")},
    "VQ-VAE, 16x16 of 512, 5 epochs": {"": ("grid16", "vqvae")},
}
LADDER = {
    "VAE, squared error": ("study-fixed", "vae"),
    "VAE, optimal scale": ("study", "vae"),
    "VQ-VAE, 8x8 codes": ("study", "vqvae"),
    "VQ-VAE, 16x16 codes": ("grid16", "vqvae"),
}


def measured(folder: Path, name: str) -> dict:
    return read_metrics(folder)["models"][name]


def point(result: dict, label: str) -> dict:
    """A point of the chart: what the bits transmit, which for a VAE is a sample, not the mean."""
    return {
        "label": label,
        "bits_per_image": result["bits_per_image"],
        "nmse": result["nmse_sampled"],
        "ssim": result["ssim_sampled"],
    }


def jpeg_point(images: torch.Tensor, quality: int, variance: float) -> dict:
    """A point of the chart: what JPEG of this quality keeps."""
    decoded, files = through_jpeg(images, quality)
    x, y = from_uint8(images), from_uint8(decoded)
    return {
        "label": f"q = {quality}",
        "bits_per_image": float(np.mean([8 * scan_bytes(file) for file in files])),
        "nmse": metrics.normalized_mse(x, y, variance).mean().item(),
        "ssim": metrics.ssim(to_unit(x), to_unit(y)).mean().item(),
    }


def variances(images: torch.Tensor) -> dict[str, float]:
    """Mean variance of uint8 images, in [0, 1], in SSIM's windows, whole images, and the set."""
    x = images.double() / 255
    in_windows = metrics.gaussian_mean(x * x) - metrics.gaussian_mean(x).square()
    return {
        "in a window of SSIM": in_windows.mean().item(),
        "in a whole image": x.flatten(2).var(dim=2, unbiased=False).mean().item(),
        "in the whole set": x.var(unbiased=False).item(),
    }


@torch.no_grad()
def draw_ladder(runs: Path, images: torch.Tensor) -> None:
    x = next(eval_batches(images[:NUM_SHOWN], NUM_SHOWN))
    rows = []
    for label, (folder, name) in LADDER.items():
        model = load_model(model_folder(runs / folder, name))
        result = measured(runs / folder, name)
        bits = result["bits_per_image"]
        label = f"{label}\n{bits:,.0f} bits, SSIM {result['ssim']:.2f}"
        rows.append((bits, label, to_unit(model(x).reconstruction)))
    rows = [("original\n24,576 bits", to_unit(x))] + [
        row[1:] for row in sorted(rows, key=lambda row: row[0])
    ]
    figures.image_rows(
        OUT / "ladder.png", rows, title="The same test images, from the fewest bits to the most"
    )


def draw_rate_distortion(
    path: Path, curves: Mapping[str, Sequence[Mapping]], *, title: str
) -> None:
    """Bits an image against error and SSIM, one curve a model.

    Args:
        curves: for each label its points, {"bits_per_image", "nmse", "ssim", "label"}; points are
            joined in the order of their bits, and labelled where "label" is not empty.
    """
    figure = figures.new_figure(11.0, 4.8, title)
    # The last is where a label stands clear of its curve: above a falling, below a rising one.
    panels = (
        ("nmse", "normalised MSE (lower is better)", "log", (4, 5)),
        ("ssim", "SSIM, Wang et al. 2004 (higher is better)", "linear", (5, -9)),
    )
    for number, (key, ylabel, scale, label_offset) in enumerate(panels, start=1):
        axes = figures.plot_axes(figure, number, 2, xlabel="bits per image", ylabel=ylabel)
        for i, (name, points) in enumerate(curves.items()):
            points = sorted(points, key=lambda point: point["bits_per_image"])
            bits = [point["bits_per_image"] for point in points]
            values = [point[key] for point in points]
            color = figures.COLORS[i % len(figures.COLORS)]
            style = {"color": color, "marker": "os^DvPX"[i % 7], "markersize": 5}
            axes.plot(bits, values, label=name, linewidth=1.2, **style)
            for point in points:
                axes.annotate(
                    point["label"],
                    (point["bits_per_image"], point[key]),
                    xytext=label_offset,
                    textcoords="offset points",
                    fontsize=7,
                    color=color,
                )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_yscale(scale)
        if scale == "log":
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
            axes.tick_params(axis="y", which="minor", labelsize=8)
        if number == 1:
            axes.legend(frameon=False, fontsize=9)
    figures.save_figure(figure, path)


def main(args: argparse.Namespace) -> None:
    data = load_dataset(args.data)
    variance = read_metrics(args.runs / "study")["data"]["variance"]
    curves = {
        label: [point(measured(args.runs / f, name), text) for text, (f, name) in runs.items()]
        for label, runs in RUNS.items()
    }
    curves["JPEG, without headers"] = [
        jpeg_point(data.test_images, quality, variance) for quality in JPEG_QUALITIES
    ]
    draw_rate_distortion(
        OUT / "rate_distortion.png", curves, title="What a bit buys (10,000 test images)"
    )
    write_json(OUT / "points.json", {"curves": curves, "variance": variances(data.test_images)})
    draw_ladder(args.runs, data.test_images)
    print(f"ladder.png, rate_distortion.png and points.json are in {OUT}")


if __name__ == "__main__":
    run_script(
        flags_of_runs("Draw the pictures that compare several runs.").parse_args,
        main,
        resumable=False,
    )
