"""What a perceptual distance and a patch discriminator see, and what they bring.

    python docs/experiments/vqgan_pictures.py --data data/cifar10-images

reads the runs runs/objectives and runs/vqgan (docs/results/README.md has their commands) and
writes, in docs/results/vqgan_pictures/:

    closeup.png     a few test images, large, after each objective
    distances.png   a test image spoilt in four ways, and the mean distances of 2,000 images
    patches.png     the discriminator's logits for the patches of an image and its reconstructions
    metrics.json    the means of both over test images
"""

import argparse
import json

import torch
import torch.nn.functional as F
from _common import CPU, flags_of_runs, read_metrics, results_of, show, write_metrics
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from vqgan.checkpoint import load_checkpoint
from vqgan.classifier import load_classifier
from vqgan.data import load_dataset
from vqgan.discriminator import PatchDiscriminator, receptive_field
from vqgan.figures import DOTS_PER_INCH
from vqgan.images import from_uint8, to_unit
from vqgan.metrics import normalized_mse
from vqgan.perceptual import ClassifierDistance
from vqgan.pretrained import load_model
from vqgan.script import run_script
from vqgan.training import Stopwatch

OUT = results_of(__file__)
COLUMNS = {  # of the close-up: title, run folder and model
    "squared error": "objectives/mse",
    "L1 + perceptual": "objectives/perceptual",
    "VQGAN": "objectives/vqgan",
    "VQGAN, 8 epochs": "vqgan/vqgan",
}
CLOSE_UP = (5, 7, 9, 3)  # test images
SPOILT, MAPPED = 5, 7  # test images, in distances.png and in patches.png
NUM_MEASURED = 2000  # test images
BLUR = 1.0  # pixels


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    watch, data = Stopwatch(), load_dataset(args.data)
    images = data.test_images[:NUM_MEASURED]
    models = {
        title: load_model(args.runs / folder / "checkpoint.pt") for title, folder in COLUMNS.items()
    }
    x = from_uint8(images[list(CLOSE_UP)])
    draw_close_up(x, {title: model(x).reconstruction for title, model in models.items()})

    classifier, accuracy = load_classifier(args.runs / "objectives" / "classifier.pt", CPU)
    eval_classifier, _ = load_classifier(args.runs / "objectives" / "eval_classifier.pt", CPU)
    distance = ClassifierDistance(classifier)
    variance = read_metrics(args.runs / "objectives")["data"]["variance"]
    labels, distances = data.test_labels[:NUM_MEASURED], {}
    x = from_uint8(images)
    for title, y in spoil(x).items():
        right = [eval_classifier(part).argmax(dim=1) for part in y.split(500)]
        apart = [distance(a, b) for a, b in zip(x.split(500), y.split(500), strict=True)]
        distances[title] = {
            "nmse": normalized_mse(x, y, variance).mean().item(),
            "perceptual": torch.cat(apart).mean().item(),
            "class_accuracy": (torch.cat(right) == labels).double().mean().item(),
        }
    draw_distances(spoil(x), distances)

    state = load_checkpoint(args.runs / "objectives" / "vqgan" / "checkpoint.pt")
    discriminator = PatchDiscriminator(images.shape[-1])
    discriminator.load_state_dict(state["extra_state"]["discriminator"])
    discriminator.eval()
    scores, maps, originals = {}, {}, logits_of(discriminator, x)
    for title, model in [("original", None), *list(models.items())[:3]]:
        y = x if model is None else torch.cat([model(part).reconstruction for part in x.split(500)])
        logits = logits_of(discriminator, y)
        maps[title] = (y[MAPPED], logits[MAPPED, 0])
        scores[title] = {
            "logit": logits.mean().item(),
            "patches_below_the_original": (logits < originals).double().mean().item(),
        }
    draw_patches(maps)

    results = {
        "perceptual": {"network": "classifier", "accuracy": accuracy},
        "spoilt": distances,
        "discriminator": {
            "receptive_field": receptive_field(1),
            "logits": list(originals.shape[-2:]),
            "scores": scores,
        },
    }
    write_metrics(OUT, watch, {"source": args.data, "test_images": NUM_MEASURED}, results)
    print(json.dumps(results, indent=2))


def spoil(x: Tensor) -> dict[str, Tensor]:
    """Four ways to spoil images in [-1, 1]; all but the shift with the blur's squared error.

    (Which takes some pixels out of the range: to clamp them would spoil the equality.)
    """
    blurred = gaussian_blur(x, 9, BLUR)
    budget = (blurred - x).square().mean(dim=(1, 2, 3), keepdim=True)

    def with_budget(change: Tensor) -> Tensor:
        return x + change * (budget / change.square().mean(dim=(1, 2, 3), keepdim=True)).sqrt()

    side = x.shape[-1]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return {
        "original": x,
        "brighter": with_budget(torch.ones_like(x)),
        "with noise": with_budget(noise),
        "moved by a pixel": F.pad(x, (1, 0, 0, 0), mode="reflect")[..., :side],
        "blurred": blurred,
    }


def logits_of(discriminator: PatchDiscriminator, x: Tensor) -> Tensor:
    """(N, 3, 32, 32) -> (N, 1, 14, 14)."""
    return torch.cat([discriminator(part) for part in x.split(500)])


# --- drawing -----------------------------------------------------------------------------------


class Table:
    """Square pictures in rows and columns, with titles above the columns."""

    def __init__(self, titles: list[str], rows: int, *, side: float, foot: float = 0.05):
        gap, head = 0.06, 0.32  # inches
        self.width = len(titles) * (side + gap) + gap
        self.height = head + rows * (side + gap) + foot
        self.figure = Figure(figsize=(self.width, self.height))
        self.axes = []
        for row in range(rows):
            top = self.height - head - row * (side + gap)
            for column, title in enumerate(titles):
                left = gap + column * (side + gap)
                box = (left / self.width, (top - side) / self.height)
                size = (side / self.width, side / self.height)
                axes = self.figure.add_axes((*box, *size))
                if row == 0:
                    axes.set_title(title, fontsize=12, pad=5)
                self.axes.append(axes)

    def save(self, name: str) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(OUT / name, dpi=DOTS_PER_INCH)


def draw_close_up(x: Tensor, reconstructions: dict[str, Tensor]) -> None:
    columns = {"original": x} | reconstructions
    table = Table(list(columns), len(x), side=1.85)
    axes = iter(table.axes)
    for i in range(len(x)):
        for pictures in columns.values():
            show(next(axes), to_unit(pictures[i]))
    table.save("closeup.png")


def draw_distances(spoilt: dict[str, Tensor], distances: dict[str, dict]) -> None:
    table = Table(list(spoilt), 1, side=1.85, foot=0.84)
    for axes, (title, pictures) in zip(table.axes, spoilt.items(), strict=True):
        show(axes, to_unit(pictures[SPOILT]))
        measured = distances[title]
        text = f"squared error {measured['nmse']:.3f}\nperceptual {measured['perceptual']:.2f}"
        axes.text(0.5, -0.05, text, transform=axes.transAxes, ha="center", va="top", fontsize=11.5)
    words = (
        f"below the images: mean distances from the originals, over {NUM_MEASURED:,} test images"
    )
    table.figure.text(0.5, 0.14 / table.height, words, ha="center", va="center", fontsize=11.5)
    table.save("distances.png")


def draw_patches(maps: dict[str, tuple[Tensor, Tensor]]) -> None:
    table = Table(list(maps), 2, side=2.2, foot=0.62)
    logits = torch.stack([logit for _, logit in maps.values()])
    # Only differences between logits mean something, so white is the middle of those of originals
    # and those of the VQGAN's reconstructions, on which the discriminator was trained.
    middle = (logits[0].mean() + logits[-1].mean()).item() / 2
    limit = (logits - middle).abs().max().item()
    side, patch = len(logits[0]), receptive_field(1)
    for column, (picture, logit) in enumerate(maps.values()):
        axes = table.axes[column]
        show(axes, to_unit(picture))
        # Logit i sees pixels 2 i - 5 to 2 i + 10: three kernels of 4, of which the first has
        # stride 2, each padded by 1.
        first = 2 * (side // 2) - 5 - 0.5
        axes.add_patch(
            Rectangle((first, first), patch, patch, fill=False, edgecolor="black", linewidth=2)
        )
        axes = table.axes[len(maps) + column]
        drawn = axes.imshow(
            logit.numpy(), cmap="RdBu", vmin=middle - limit, vmax=middle + limit,
            interpolation="nearest",
        )  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
        corner = (side // 2 - 0.5, side // 2 - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", lw=2))
    scale = table.figure.add_axes((0.3, 0.32 / table.height, 0.4, 0.13 / table.height))
    table.figure.colorbar(drawn, cax=scale, orientation="horizontal")
    text = table.figure.text
    y = 0.36 / table.height
    text(0.29, y, "lower, for reconstructions", ha="right", va="center", fontsize=11.5)
    text(0.71, y, "higher, for originals", ha="left", va="center", fontsize=11.5)
    table.save("patches.png")


if __name__ == "__main__":
    run_script(
        flags_of_runs("Draw what the parts of a VQGAN's loss see.").parse_args,
        main,
        resumable=False,
    )
