"""The probabilities of the next code at two positions of a picture, and what is cut from them.

    python docs/experiments/next_code.py

Needs no run and no data: the picture is drawn, and the tokenizer and transformer come with the
package. Writes, in docs/results/next_code/, in seconds:

    next_code.png    the picture so far, and the probabilities of the next code, sorted
    metrics.json     what top-k and top-p keep of them
"""

import argparse
import json

import numpy as np
import torch
from _common import frame, no_flags, results_of, show, write_metrics
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from vqgan.data import load_dataset
from vqgan.figures import COLORS, save_figure
from vqgan.images import from_uint8, to_unit
from vqgan.pretrained import Pipeline, load_pipeline
from vqgan.script import run_script
from vqgan.training import Stopwatch

OUT = results_of(__file__)
TEST_IMAGE = 22  # a large yellow cross on purple
POSITIONS = {"inside the cross": 34, "at its edge": 52}  # in reading order
TOP_K, TOP_P = 10, 0.9
NUM_SHOWN = 150  # codes
HIDDEN = 0.8  # gray: what is not generated yet


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    watch, pipeline, data = Stopwatch(), load_pipeline("shapes"), load_dataset("shapes")
    tokens = pipeline.tokenizer.tokens(from_uint8(data.test_images[TEST_IMAGE][None]))  # (1, N)
    condition = data.test_labels[TEST_IMAGE].view(1, 1)
    probabilities = pipeline.transformer(condition, tokens)[0].softmax(dim=-1)  # (N, K)

    figure, positions = Figure(figsize=(9.0, 5.7)), {}
    for row, (name, position) in enumerate(POSITIONS.items()):
        sorted_p = probabilities[position].sort(descending=True).values  # (K,)
        below = sorted_p.cumsum(dim=0) - sorted_p  # the probability of all likelier codes
        num_kept = int((below < TOP_P).sum())
        positions[name] = {
            "position": position,
            "entropy_nats": -(sorted_p * sorted_p.log()).sum().item(),
            "likeliest": sorted_p[0].item(),
            f"probability_of_top_{TOP_K}": sorted_p[:TOP_K].sum().item(),
            f"codes_of_top_p_{TOP_P:g}": num_kept,
            "probability_not_shown": sorted_p[NUM_SHOWN:].sum().item(),
        }
        draw_picture(figure, row, pipeline, tokens, position)
        draw_probabilities(figure, row, name, sorted_p, num_kept)
    save_figure(figure, OUT / "next_code.png")

    results = {
        "caption": data.test_captions[TEST_IMAGE],
        "num_embeddings": pipeline.transformer.num_embeddings,
        "positions": positions,
    }
    write_metrics(OUT, watch, {"source": "shapes", "test_image": TEST_IMAGE}, results)
    print(json.dumps(results, indent=2))


def draw_picture(
    figure: Figure, row: int, pipeline: Pipeline, tokens: Tensor, position: int
) -> None:
    """The codes before a position, decoded with those behind it, which are then hidden."""
    (h, w), size = pipeline.tokenizer.grids[0], pipeline.tokenizer.image_size
    picture = to_unit(pipeline.tokenizer.decode_tokens(tokens))[0]  # (3, H, W)
    pixels = size // h
    top, left = position // w * pixels, position % w * pixels
    picture[:, top + pixels :] = HIDDEN
    picture[:, top : top + pixels, left:] = HIDDEN
    axes = figure.add_axes((0.01, 0.59 - 0.48 * row, 0.23, 0.35))
    show(axes, picture)
    axes.set_axis_on()
    frame(axes, "0.6")
    corner = (left - 0.5, top - 0.5)
    axes.add_patch(Rectangle(corner, pixels, pixels, fill=False, color=COLORS[1], linewidth=2.5))
    axes.set_title("the picture so far", fontsize=12)


def draw_probabilities(
    figure: Figure, row: int, name: str, sorted_p: Tensor, num_kept: int
) -> None:
    """Both axes are linear, so that areas are probabilities; code k is from k - 1/2 to k + 1/2."""
    percent, edges = 100 * sorted_p.numpy(), np.arange(len(sorted_p) + 1) + 0.5
    axes = figure.add_axes((0.33, 0.59 - 0.48 * row, 0.65, 0.35))
    axes.stairs(percent[:num_kept], edges[: num_kept + 1], fill=True, color=COLORS[0])
    axes.stairs(percent[num_kept:], edges[num_kept:], fill=True, color="0.7")
    axes.axvline(TOP_K + 0.5, color=COLORS[1], linestyle="--", linewidth=1.5)
    axes.set_xlim(0, NUM_SHOWN)
    axes.set_ylim(0, 1.08 * percent[0])
    axes.set_xticks([1, *range(25, NUM_SHOWN + 1, 25)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("probability", fontsize=11)
    if row == 1:
        words = f"the {NUM_SHOWN} likeliest codes of {len(sorted_p)}, sorted"
        axes.set_xlabel(words, fontsize=11)
    axes.set_title(f"{name}: top-p {TOP_P:g} keeps {num_kept} codes (blue)", fontsize=12)
    axes.text(
        TOP_K + 3, percent[0], f"left of the line: top-k {TOP_K},\n"
        f"{percent[:TOP_K].sum():.0f}% of the probability",
        color=COLORS[1], fontsize=11, va="top",
    )  # fmt: skip


if __name__ == "__main__":
    run_script(no_flags("Draw the next code's probabilities.").parse_args, main, resumable=False)
