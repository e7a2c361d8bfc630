"""VAE against VQ-VAE at the same price: one network, two bottlenecks, three priors.

    python docs/experiments/fair_comparison.py --data data/cifar10-images

reads the run folders that `CURVES` names below runs/fair/, each of a single model of
train_vqvae.py, and of its transformer, `prior-` and its name (docs/results/README.md has their
commands). A run that is missing is left out.

The spatial VAE is the VQ-VAE with another bottleneck. Both are priced under each of the priors of
`vqgan/prices.py`, whose tables are fitted to the training images, and the bits are those of the
test images. The error beside a VAE's bits is that of sampled latents, which is what they transmit.
The bits of JPEG and WebP (Pillow's, color at half resolution) leave out what a file has beside its
image data, namely containers, headers and JPEG's tables. Those are optimized for each image, so
leaving them out flatters JPEG.

Writes, in docs/results/fair_comparison/:

    rate_distortion.png   bits per image against error, under the fixed prior and with context
    ladder.png            test images through four of the models, from the fewest bits to the most
    metrics.json          of each run and each model (the mean over its seeds), all three prices
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from _common import (
    flags_of_runs,
    frame_bytes,
    read_metrics,
    results_of,
    scan_bytes,
    through_file,
    write_metrics,
)
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter, ScalarFormatter
from torch import Tensor

from vqgan import figures, metrics, prices
from vqgan.data import eval_batches, load_dataset, pixel_variance
from vqgan.images import from_uint8, to_unit
from vqgan.pretrained import load_model
from vqgan.script import run_script
from vqgan.training import Stopwatch
from vqgan.vae import GaussianAutoencoder, reparameterize
from vqgan.vqvae import VQAutoencoder

OUT = results_of(__file__)
# Curves of the chart: label -> {label of the point: model}. A model's runs are MODEL-seed0, ...
CURVES = {
    "spatial VAE, KL weight w": {
        f"w = {weight}": f"vae-spatial-w{weight}" for weight in ("0.5", "1", "2", "4")
    },
    "VQ-VAE, 8x8 of K codes": {f"K = {K}": f"vqvae-8x8-k{K}" for K in (32, 128, 512)},
    "VQ-VAE, 16x16 of 512 codes": {"": "vqvae-16x16-k512"},
    "VAE (one latent)": {"": "vae"},
}
LADDER = {
    "vae": "VAE (one latent)",
    "vqvae-8x8-k512": "VQ-VAE, 8x8 codes",
    "vae-spatial-w4": "spatial VAE, w = 4",
    "vqvae-16x16-k512": "VQ-VAE, 16x16 codes",
}
NUM_SHOWN = 12
PRICES = ("fixed", "fitted", "context")
PANELS = {
    "fixed": "Fixed prior: N(0, I), uniform codes",
    "context": "With context: a Gaussian with covariances, a transformer",
}
# The test images were saved as JPEG of quality 75 or so. Near that they come back as they were.
QUALITIES = {"JPEG": (5, 10, 15, 20, 30, 40), "WebP": (0, 5, 10, 20, 40, 60)}
FORMATS: dict[str, Callable[[bytes], int]] = {"JPEG": scan_bytes, "WebP": frame_bytes}
HALO = [withStroke(linewidth=3, foreground="white")]  # around labels that cross a line
OPTIONS = {"JPEG": {"optimize": True}, "WebP": {"method": 6}}  # the smallest files


def runs_of(folder: Path, name: str) -> Iterator[Path]:
    """The finished runs of a model, in the order of their seeds."""
    found = [path for path in sorted(folder.glob(f"{name}-seed*")) if is_finished(path)]
    if not found:
        print(f"left out: there is no finished run {folder / name}-seed0")
    yield from found


def is_finished(run: Path) -> bool:
    return (run / "metrics.json").exists()


@torch.no_grad()
def latents(model: GaussianAutoencoder | VQAutoencoder, images: Tensor) -> list[Tensor]:
    """Means and log-variances (N, Z) of a VAE, or indices (N, h, w), of uint8 images."""
    if isinstance(model, VQAutoencoder):
        return [torch.cat([model.encode(x).indices for x in eval_batches(images)])]
    parts = zip(*(model.encode(x) for x in eval_batches(images)), strict=True)
    return [torch.cat([batch.flatten(1) for batch in part]) for part in parts]


def price(run: Path, train_images: Tensor, test_images: Tensor) -> dict:
    """The error of a run's model, and its bits per image under each prior; None is not known."""
    (result,) = read_metrics(run)["models"].values()
    model = load_model(run)
    train, test = latents(model, train_images), latents(model, test_images)
    if isinstance(model, GaussianAutoencoder):
        bits: dict = prices.gaussian_prices(tuple(train), tuple(test))
    else:
        K, prior = model.num_embeddings, run.with_name(f"prior-{run.name}")
        bits = {
            "fixed": metrics.fixed_length_bits(test[0][0].numel(), K),
            "fitted": prices.frequency_bits(train[0], test[0], K),
            "context": None,
        }
        if is_finished(prior):
            bits["context"] = read_metrics(prior)["models"]["transformer"]["bits_per_image"]
        else:
            print(f"left out with context: there is no finished run {prior}")
    measured = {key: result[key] for key in ("nmse_sampled", "ssim_sampled", "nmse", "epochs")}
    return measured | {f"{name}_bits_per_image": bits[name] for name in PRICES}


def mean(results: Sequence[Mapping]) -> dict:
    """The mean of each number over the seeds for which it is known, and their count."""
    known = {key: [r[key] for r in results if r[key] is not None] for key in results[0]}
    means = {key: float(np.mean(values)) if values else None for key, values in known.items()}
    errors = known["nmse_sampled"]
    return means | {"seeds": len(results), "nmse_sampled_range": [min(errors), max(errors)]}


def landmark(images: Tensor, format: str, quality: int, variance: float) -> dict:
    """What an image format of this quality keeps, and its bits."""
    decoded, files = through_file(images, format, quality=quality, **OPTIONS[format])
    x, y = from_uint8(images), from_uint8(decoded)
    return {
        "quality": quality,
        "bits_per_image": float(np.mean([8 * FORMATS[format](file) for file in files])),
        "nmse_sampled": metrics.normalized_mse(x, y, variance).mean().item(),
        "ssim_sampled": metrics.ssim(to_unit(x), to_unit(y)).mean().item(),
    }


@torch.no_grad()
def draw_ladder(path: Path, folder: Path, models: Mapping[str, Mapping], images: Tensor) -> None:
    """Rows of the same test images: what each model makes of what its bits transmit."""
    x = next(eval_batches(images[:NUM_SHOWN], NUM_SHOWN))
    rows = []
    for name in sorted(models.keys() & LADDER, key=lambda n: models[n]["fixed_bits_per_image"]):
        model = load_model(folder / f"{name}-seed0")
        if isinstance(model, GaussianAutoencoder):
            mean, log_var = model.encode(x)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
            x_hat = model.decode(reparameterize(mean, log_var, noise))
        else:
            x_hat = model(x).reconstruction
        bits, error = models[name]["fixed_bits_per_image"], models[name]["nmse_sampled"]
        rows.append((f"{LADDER[name]}\n{bits:,.0f} bits, error {error:.3f}", to_unit(x_hat)))
    title = "Twelve test images, from the fewest bits to the most (fixed prior)"
    figures.image_rows(path, [("original", to_unit(x)), *rows], title=title)


def draw(path: Path, models: Mapping[str, Mapping], landmarks: Mapping[str, list]) -> None:
    """One panel per prior, with the same axes: the bits of each model against its error."""
    title = "One network, two bottlenecks: what a bit buys under two priors"
    figure = figures.new_figure(11.0, 5.2, title)
    panels = []
    for number, (prior, xlabel) in enumerate(PANELS.items(), start=1):
        ylabel = "normalized MSE (lower is better)" if number == 1 else ""
        axes = figures.plot_axes(figure, number, 2, xlabel="bits per image", ylabel=ylabel)
        axes.set_title(xlabel, fontsize=11)
        for i, (format, points) in enumerate(landmarks.items()):
            bits, errors = ([p[key] for p in points] for key in ("bits_per_image", "nmse_sampled"))
            style = {"color": "0.55", "linestyle": ("--", ":")[i], "linewidth": 1.2, "zorder": 1}
            axes.plot(bits, errors, label=f"{format}, without headers", **style)
        for i, (label, names) in enumerate(CURVES.items()):
            key = f"{prior}_bits_per_image"
            points = [
                (models[name][key], models[name]["nmse_sampled"], text)
                for text, name in names.items()
                if models.get(name, {}).get(key) is not None
            ]
            if not points:
                continue
            points.sort()
            bits, errors, _ = zip(*points, strict=True)
            style = {"color": figures.COLORS[i], "marker": "os^D"[i], "markersize": 6}
            axes.plot(bits, errors, label=label, linewidth=1.5, **style)
            # Labels stand off the curves: those of the lower curve to the left, below it.
            side = {"ha": "right", "xytext": (-7, -9)} if i == 0 else {"xytext": (7, 4)}
            for x, y, text in points:
                axes.annotate(
                    text, (x, y), textcoords="offset points", fontsize=9, zorder=1,
                    color=figures.COLORS[i], path_effects=HALO, **side,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks([0.01, 0.02, 0.03, 0.05, 0.1, 0.2])
        panels.append(axes)
    panels[0].legend(loc="lower left", **figures.LEGEND)
    for name in ("xlim", "ylim"):  # both panels show what either holds
        lows, highs = zip(*(axes.properties()[name] for axes in panels), strict=True)
        for axes in panels:
            axes.set(**{name: (min(lows), max(highs))})
    figures.save_figure(figure, path)


def main(args: argparse.Namespace) -> None:
    watch, data, folder = Stopwatch(), load_dataset(args.data), args.runs / "fair"
    runs: dict[str, dict] = {}
    models: dict[str, dict] = {}
    for name in (name for names in CURVES.values() for name in names.values()):
        found = {run.name: run for run in runs_of(folder, name)}
        priced = {n: price(run, data.train_images, data.test_images) for n, run in found.items()}
        if priced:
            models[name] = mean([*priced.values()])
        for n, run in found.items():
            metadata = read_metrics(run)
            runs[n] = priced[n] | {key: metadata[key] for key in ("command", "device", "seconds")}
    variance = pixel_variance(data.train_images)
    landmarks = {
        format: [landmark(data.test_images, format, quality, variance) for quality in qualities]
        for format, qualities in QUALITIES.items()
    }
    draw(OUT / "rate_distortion.png", models, landmarks)
    draw_ladder(OUT / "ladder.png", folder, models, data.test_images)
    about_data = {"source": args.data, "test_images": len(data.test_images)}
    content = {"models": models, "runs": runs, "landmarks": landmarks}
    write_metrics(OUT, watch, about_data, content)
    for name, result in models.items():
        bits = (result[f"{prior}_bits_per_image"] for prior in PRICES)
        columns = ("-" if number is None else f"{number:.0f}" for number in bits)
        print(f"{name:20} {result['nmse_sampled']:.4f}", *(f"{text:>6}" for text in columns))
    print(f"rate_distortion.png, ladder.png and metrics.json are in {OUT}")


if __name__ == "__main__":
    run_script(
        flags_of_runs("Compare VAE and VQ-VAE at the same price.").parse_args,
        main,
        resumable=False,
    )
