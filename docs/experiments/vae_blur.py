"""Why a VAE blurs, in three pictures.

    python docs/experiments/vae_blur.py --data data/cifar10-images

reads the two VAEs of the study (runs/study and runs/study-fixed: docs/results/README.md has their
commands) and writes, in docs/results/vae_blur/:

    average.png        a star that may be in any of several places, and the best single answer
    reconstructions.png  test images through both VAEs, from the mean and from a sampled latent
    dimensions.png     bits in each of the 128 dimensions of their latents
    metrics.json       the numbers in these pictures, and what a perfect Bernoulli decoder pays
"""

import argparse
import json

import torch
import torch.nn.functional as F
from _common import flags_of_runs, model_folder, results_of, show, write_metrics
from matplotlib.figure import Figure
from torch import Tensor

from vqgan import figures
from vqgan.data import eval_batches, load_dataset
from vqgan.images import from_uint8, to_unit
from vqgan.metrics import nats_to_bits
from vqgan.pretrained import load_model
from vqgan.script import run_script
from vqgan.training import Stopwatch
from vqgan.vae import VAE, reparameterize

OUT = results_of(__file__)
RUNS = {"study-fixed": "VAE, squared error", "study": "VAE, optimal scale"}
TRANSFORMS = (1, 4, 5, 7, 8, 9)  # test images
BATCH_SIZE = 500
STAR = 10  # test image of the drawn shapes: a yellow star on red
SHIFT = 3  # pixels that the star may be moved, in each direction
SHOWN = ((0, 0), (-3, 0), (3, 0), (0, -3), (0, 3))
USED_ABOVE = 0.1  # bits that a dimension carries on average to be called used


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch()
    shapes = load_dataset("shapes")
    average = draw_average(shapes.test_images[STAR])
    data = load_dataset(args.data)
    x = from_uint8(data.test_images[list(TRANSFORMS)])
    rows, bits, models = [("original", to_unit(x))], {}, {}
    for folder, title in RUNS.items():
        model = load_model(model_folder(args.runs / folder, "vae"))
        bits[title] = bits_by_dimension(model, data.test_images)
        mean, log_var = model.encode(x)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        label = f"{bits[title].sum():.0f} bits"
        sampled = model.decode(reparameterize(mean, log_var, noise))
        rows.append((f"{label},\nmean latent", to_unit(model.decode(mean))))
        rows.append((f"{label},\nsampled latent", to_unit(sampled)))
        models[folder] = {
            "bits_per_image": bits[title].sum().item(),
            "dimensions": len(bits[title]),
            "dimensions_used": int((bits[title] > USED_ABOVE).sum()),
            "most_bits_in_a_dimension": bits[title].max().item(),
        }
    title = "Two VAEs, and what a sample of the latent changes in the reconstruction"
    figures.image_rows(OUT / "reconstructions.png", rows, title=title)
    draw_dimensions(bits)
    results = {
        "used_above_bits": USED_ABOVE,
        "average": average,
        "perfect_bernoulli_nats": {
            args.data: perfect_bernoulli(data.test_images),
            "shapes": perfect_bernoulli(shapes.test_images),
        },
        "models": models,
    }
    write_metrics(OUT, watch, {"source": args.data, "test_images": len(data.test_images)}, results)
    print(json.dumps(results, indent=2))


def bits_by_dimension(model: VAE, images: Tensor) -> Tensor:
    """Mean over images of the KL of each latent dimension, in bits: (Z,). See vae.kl_divergence."""
    total = torch.zeros(model.latent_shape, dtype=torch.float64)
    for x in eval_batches(images, BATCH_SIZE):
        mean, log_var = (part.double() for part in model.encode(x))
        total += -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(dim=0)
    return nats_to_bits(total / len(images))


def perfect_bernoulli(images: Tensor) -> float:
    """Nats an image of the Bernoulli likelihood when the decoder answers with the image itself."""
    unit = images.double() / 255
    return F.binary_cross_entropy(unit, unit, reduction="sum").item() / len(unit)


def draw_average(image: Tensor) -> dict:
    """The mean of a picture's moved copies, and what answering with it costs, in [-1, 1]."""
    x = from_uint8(image[None])  # (1, 3, 32, 32)
    padded = F.pad(x, (SHIFT,) * 4, mode="reflect")
    side = x.shape[-1]

    def moved(down: int, right: int) -> Tensor:
        top, left = SHIFT - down, SHIFT - right
        return padded[..., top : top + side, left : left + side]

    places = range(-SHIFT, SHIFT + 1)
    copies = torch.cat([moved(down, right) for down in places for right in places])  # (49, ...)
    mean = copies.mean(dim=0, keepdim=True)
    # The error of each sharp copy as the answer, averaged over which copy is the true one.
    pairwise = torch.cdist(copies.flatten(1), copies.flatten(1)).square() / x.numel()
    result = {
        "copies": len(copies),
        "mse_of_the_mean": F.mse_loss(mean.expand_as(copies), copies).item(),
        "mse_of_the_best_copy": pairwise.mean(dim=1).min().item(),
        "mse_of_a_random_copy": pairwise.mean().item(),
    }

    figure = Figure(figsize=(9.6, 2.15))
    size, gap = 0.148, 0.012
    pictures = [moved(*place) for place in SHOWN] + [mean]
    for i, picture in enumerate(pictures):
        is_mean = i == len(SHOWN)
        left = 0.005 + i * (size + gap) + (0.03 if is_mean else 0)
        axes = figure.add_axes((left, 0.13, size, size * 9.6 / 2.15))
        show(axes, to_unit(picture)[0])
        if is_mean:
            axes.set_title(f"the mean of all {len(copies)}", fontsize=12)
        elif i == 2:
            axes.set_title(f"what could have been: 5 of {len(copies)} pictures", fontsize=12)
    figure.savefig(OUT / "average.png", dpi=figures.DOTS_PER_INCH)
    return result


def draw_dimensions(bits: dict[str, Tensor]) -> None:
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for color, (title, values) in zip(figures.COLORS[1::-1], bits.items(), strict=True):
        used = int((values > USED_ABOVE).sum())
        label = f"{title}: {values.sum():.0f} bits, {used} dimensions used"
        values = values.sort(descending=True).values
        axes.plot(range(1, len(values) + 1), values, color=color, label=label)
    axes.set_xlabel("dimension of the latent, from the one with the most bits")
    axes.set_ylabel("bits per image")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=11)
    figure.savefig(OUT / "dimensions.png", dpi=figures.DOTS_PER_INCH)


if __name__ == "__main__":
    run_script(flags_of_runs("Draw why a VAE blurs.").parse_args, main, resumable=False)
