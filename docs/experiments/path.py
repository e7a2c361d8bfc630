"""One picture carried through every stage, and one that was never there, as pictures of tensors.

    python docs/experiments/path.py

Needs no run and no data: the pictures are drawn, and the tokenizer and transformer come with the
package. Writes, in docs/results/path/:

    one_picture.png   image -> z_e -> codes -> z_q -> reconstruction, with the tensors' shapes
    new_pictures.png  a class -> codes, generated one after the other -> new images
    metrics.json      the shapes, ranges, sizes and codes of both
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from _common import frame, no_flags, results_of, write_metrics
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from torch import Tensor

from vqgan import metrics
from vqgan.data import load_dataset
from vqgan.images import from_uint8, to_uint8, to_unit
from vqgan.pretrained import load_pipeline
from vqgan.script import run_script
from vqgan.training import Stopwatch
from vqgan.vqvae import VQAutoencoder

OUT = results_of(__file__)
TEST_IMAGE = 6  # a large shape, and a texture behind it
NUM_CHANNELS = 4  # of z_e and z_q that are shown
CLASS, GUIDANCE, SEEDS = "ring", 3.0, (0, 1, 2)
GENERATED = (1, 28, 64)  # codes on the page in each of its figures
COLUMNS = 3
DOTS_PER_INCH = 110
FRAME = "0.6"  # gray
ARROW = {"arrowstyle": "-|>", "color": "0.35", "linewidth": 1.5, "mutation_scale": 16}


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    watch = Stopwatch()
    pipeline = load_pipeline("shapes")
    tokenizer = pipeline.tokenizer
    data = load_dataset("shapes")
    colors = colors_of_codes(tokenizer)

    image = data.test_images[TEST_IMAGE]  # uint8 (3, 32, 32)
    x = from_uint8(image[None])  # (1, 3, 32, 32)
    z_e = tokenizer.encoder(x)  # (1, D, 8, 8)
    z_q, indices, _ = tokenizer.encode(x)  # (1, D, 8, 8), (1, 8, 8)
    x_hat = tokenizer.decode(z_q)  # (1, 3, 32, 32)
    draw_one_picture(image, z_e[0], indices[0], z_q[0], x_hat, colors)

    condition = pipeline.condition.encode_classes([CLASS])  # (1, 1)
    draws = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    generated = torch.cat(
        [pipeline.transformer.sample(condition, guidance=GUIDANCE, generator=g) for g in draws]
    )  # (3, 64)
    new = tokenizer.decode_tokens(generated)  # (3, 3, 32, 32)
    generated = generated.unflatten(1, tokenizer.grids[0])  # (3, 8, 8)
    draw_new_pictures(condition.item(), generated, new, colors)

    K = tokenizer.num_embeddings
    bits = metrics.fixed_length_bits(indices[0].numel(), K)
    quality = metrics.reconstruction_quality(x, x_hat, 1.0)
    results = {
        "caption": data.test_captions[TEST_IMAGE],
        "tensors": {
            name: about(tensor)
            for name, tensor in {
                "image": image,
                "x": x,
                "z_e": z_e,
                "indices": indices,
                "z_q": z_q,
                "reconstruction": x_hat,
                "uint8 reconstruction": to_uint8(x_hat),
                "condition": condition,
                "indices generated": generated,
                "new images": new,
            }.items()
        },
        "codes": K,
        "different_codes": len(indices.unique()),
        "different_codes_generated": len(generated[0].unique()),
        "image_bits": 8 * image.numel(),
        "fixed_length_bits": bits,
        "ssim": quality["ssim"].item(),
        "psnr": quality["psnr"].item(),
        "sampled": {"class": CLASS, "guidance": GUIDANCE, "seeds": list(SEEDS)},
    }
    write_metrics(OUT, watch, {"source": "shapes", "test_image": TEST_IMAGE}, results)
    print(f"one_picture.png, new_pictures.png and metrics.json are in {OUT}")


def about(tensor: Tensor) -> dict:
    low, high = tensor.min().item(), tensor.max().item()
    kind = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": kind, "smallest": low, "largest": high}


def colors_of_codes(tokenizer: VQAutoencoder) -> Tensor:
    """The mean color of a picture that consists of one code alone: (K, 3) in [0, 1]."""
    codes = torch.arange(tokenizer.num_embeddings)
    pictures = tokenizer.decode_indices(codes[:, None, None].expand(-1, 8, 8))
    return to_unit(pictures).mean(dim=(2, 3))


# --- drawing -----------------------------------------------------------------------------------


def show_image(axes: Axes, unit: Tensor) -> None:
    """(3, H, W) in [0, 1], every pixel a square."""
    axes.imshow(unit.permute(1, 2, 0).numpy(), interpolation="nearest")
    frame(axes, FRAME)


def show_codes(axes: Axes, indices: Tensor, colors: Tensor, generated: int | None = None) -> None:
    """A grid of codes (8, 8) with their numbers, each in its color; the first `generated` of it."""
    h, w = indices.shape
    shown = torch.ones(h, w, 3)
    for i, code in enumerate(indices.flatten().tolist()):
        if generated is not None and i >= generated:
            continue
        row, column = divmod(i, w)
        shown[row, column] = colors[code]
        brightness = colors[code] @ torch.tensor([0.299, 0.587, 0.114])
        axes.text(
            column, row, str(code), ha="center", va="center",
            fontsize=8.5, color="black" if brightness > 0.5 else "white",
        )  # fmt: skip
    axes.imshow(shown.numpy(), interpolation="nearest")
    frame(axes, FRAME)
    axes.set_xticks(np.arange(w + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(h + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.75", linewidth=0.6)
    axes.tick_params(which="minor", length=0)


def show_channels(page: "Page", z: Tensor, limit: float) -> None:
    """The first four channels of (D, 8, 8) as maps from blue (-limit) to red (limit)."""
    left, bottom, width, height = page.boxes[page.stage]
    w, h = 0.48 * width, 0.48 * height
    for i in range(NUM_CHANNELS):
        row, column = divmod(i, 2)
        corner = (left + column * (width - w), bottom + (1 - row) * (height - h))
        axes = page.figure.add_axes((*corner, w, h))
        axes.imshow(z[i].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        frame(axes, FRAME)


class Page:
    """Stages in rows of three: square pictures, a title above each, and words below it."""

    def __init__(self, rows: Sequence[str]):
        side, self.gap, margin = 2.45, 1.05, 0.1  # inches
        head, foot, row_title = 0.32, 0.55, 0.42
        width = 2 * margin + COLUMNS * side + (COLUMNS - 1) * self.gap
        row_height = row_title + head + side + foot
        height = len(rows) * row_height + 0.05
        self.figure = Figure(figsize=(width, height))
        self.boxes = []  # left, bottom, width, height as shares of the page
        for row, title in enumerate(rows):
            top = height - row * row_height - row_title
            self.figure.text(
                margin / width, (top + 0.12) / height, title, fontsize=14, fontweight="bold"
            )
            for column in range(COLUMNS):
                left, bottom = margin + column * (side + self.gap), top - head - side
                box = (left / width, bottom / height, side / width, side / height)
                self.boxes.append(box)
        self.inch = (1 / width, 1 / height)
        self.stage = 0

    def axes(self) -> Axes:
        return self.figure.add_axes(self.boxes[self.stage])

    def close_stage(self, title: str, below: str, arrow: str | None) -> None:
        left, bottom, width, height = self.boxes[self.stage]
        x_inch, y_inch = self.inch
        middle = left + width / 2
        text = self.figure.text
        text(middle, bottom + height + 0.1 * y_inch, title, ha="center", fontsize=13)
        text(middle, bottom - 0.1 * y_inch, below, ha="center", va="top", fontsize=11.5)
        if arrow is not None:
            start, end = left + width + 0.08 * x_inch, left + width + (self.gap - 0.08) * x_inch
            y = bottom + height / 2
            patch = FancyArrowPatch(
                (start, y), (end, y), transform=self.figure.transFigure, **ARROW
            )
            self.figure.add_artist(patch)
            text((start + end) / 2, y + 0.12 * y_inch, arrow, ha="center", fontsize=11.5)
        self.stage += 1

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path, dpi=DOTS_PER_INCH)


def draw_one_picture(
    image: Tensor, z_e: Tensor, indices: Tensor, z_q: Tensor, x_hat: Tensor, colors: Tensor
) -> None:
    page = Page(["An image becomes codes", "The codes become an image"])
    limit = z_e[:NUM_CHANNELS].abs().max().item()
    D = len(z_e)
    show_image(page.axes(), image / 255)
    page.close_stage("image", "uint8 (3, 32, 32), 0 to 255,\nas float in [-1, 1]", "encoder")
    show_channels(page, z_e, limit)
    page.close_stage(
        f"z_e: {D} numbers per position", f"float ({D}, 8, 8),\n4 channels of {D}", "nearest\ncode"
    )
    show_codes(page.axes(), indices, colors)
    page.close_stage("indices: one per position", "int64 (8, 8), 0 to 255", None)
    show_codes(page.axes(), indices, colors)
    page.close_stage("indices", "the same", "lookup")
    show_channels(page, z_q, limit)
    page.close_stage(
        "z_q: the codes' vectors", f"float ({D}, 8, 8),\nthe same 4 channels", "decoder"
    )
    show_image(page.axes(), to_unit(x_hat)[0])
    page.close_stage("reconstruction", "float (3, 32, 32), about [-1, 1]", None)
    page.save(OUT / "one_picture.png")


def draw_new_pictures(token: int, generated: Tensor, new: Tensor, colors: Tensor) -> None:
    page = Page(["A transformer generates codes", "The decoder turns them into images"])
    for count in GENERATED:
        show_codes(page.axes(), generated[0], colors, count)
        is_first, is_last = count == GENERATED[0], count == GENERATED[-1]
        page.close_stage(
            f"after {count} code{'' if count == 1 else 's'}",
            f'condition: class "{CLASS}",\ntoken {token}'
            if is_first
            else "int64 (8, 8), 0 to 255"
            if is_last
            else "",
            None if is_last else "next\ncodes",
        )
    for i, image in enumerate(to_unit(new)):
        show_image(page.axes(), image)
        below = "float (3, 32, 32), about [-1, 1]" if i == 0 else "other codes, the same class"
        page.close_stage("new image" if i == 0 else "another draw", below, None)
    page.save(OUT / "new_pictures.png")


if __name__ == "__main__":
    run_script(no_flags("Draw one picture through every stage.").parse_args, main, resumable=False)
