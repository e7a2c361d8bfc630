"""Every picture, with matplotlib. Images come as float (N, 3, H, W) in [0, 1], results as numbers.

Each function writes one PNG. Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from torch import Tensor

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DOTS_PER_INCH = 110  # sharp enough on a page, and small enough to commit
ROWS_FONT_SIZE = 13  # points: rows are 10 inches wide and more, and a page shrinks them to 7 or so


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write the PNG, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _check_images(images: Tensor) -> None:
    """Raise ValueError unless they are (N, 3, H, W) in [0, 1]."""
    low, high = images.min().item(), images.max().item()
    if images.dim() != 4 or images.shape[1] != 3 or not (low >= 0 and high <= 1):
        given = f"{tuple(images.shape)} from {low:.3g} to {high:.3g}"
        raise ValueError(f"images must be (N, 3, H, W) in [0, 1], not {given}: see images.to_unit")


def _side_by_side(images: Tensor, gap: int = 2) -> np.ndarray:
    """(N, 3, H, W) -> one strip (H, N W + gaps, 3) with white gaps of `gap` pixels."""
    padded = F.pad(images.detach().float().cpu(), (0, gap), value=1.0)  # (N, 3, H, W + gap)
    return padded.permute(2, 0, 3, 1).flatten(1, 2)[:, :-gap].numpy()


def image_rows(path: Path, rows: Sequence[tuple[str, Tensor]], *, title: str) -> None:
    """Rows of images: originals over reconstructions, say.

    Args:
        rows: from the top, each a label, of a line or more, and its images (N, 3, H, W).
    """
    for _, images in rows:
        _check_images(images)
    strips = [_side_by_side(images) for _, images in rows]
    height, width = strips[0].shape[0], max(strip.shape[1] for strip in strips)
    # In inches: the longest line of a label, and a margin.
    longest = max(len(line) for label, _ in rows for line in label.split("\n"))
    label_width = 0.0085 * ROWS_FONT_SIZE * longest + 0.15
    picture_width = 9.0
    row_height = picture_width * height / width + 0.06
    total_height = row_height * len(rows) + 0.45
    figure = Figure(figsize=(label_width + picture_width + 0.1, total_height))
    figure.suptitle(title, y=1 - 0.1 / total_height, va="top", fontsize=ROWS_FONT_SIZE)
    for i, ((label, _), strip) in enumerate(zip(rows, strips, strict=True)):
        strip_width = picture_width * strip.shape[1] / width  # a last row may be shorter
        bottom = total_height - 0.45 - (i + 1) * row_height + 0.06
        box = (label_width, bottom, strip_width, row_height - 0.06)  # in inches
        size = np.tile(figure.get_size_inches(), 2)  # width, height, width, height
        axes = figure.add_axes(tuple(box / size))
        # Pixels stay squares: at this size, smoothing would hide the very blur that is shown.
        axes.imshow(strip, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        place: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "center"}
        axes.text(-0.09 / strip_width, 0.5, label, fontsize=ROWS_FONT_SIZE, **place)  # 0.09 inches
    save_figure(figure, path)


def image_grid(path: Path, images: Tensor, *, title: str, columns: int = 12) -> None:
    """Images (N, 3, H, W) in rows of `columns`, unlabelled."""
    image_rows(path, [("", chunk) for chunk in images.split(columns)], title=title)


def plot_axes(figure: Figure, panel: int = 1, of: int = 1, *, xlabel: str, ylabel: str) -> Axes:
    """The axes of one panel in a row of them, from 1."""
    axes = figure.add_subplot(1, of, panel)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _curve(axes: Axes, rows: Sequence[Mapping[str, float]], term: str, **style) -> None:
    """A term by epoch; of few rows the points are marked, since one alone makes no line."""
    style = {"linewidth": 1.4, "marker": "o" if len(rows) < 10 else "", "markersize": 3} | style
    axes.plot([row["epoch"] for row in rows], [row[term] for row in rows], **style)


def losses(
    path: Path,
    logs: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    ylabels: Mapping[str, str],
    title: str,
    share: bool = True,
) -> None:
    """Training losses by epoch.

    Args:
        logs: for each model its rows, as in log.csv.
        ylabels: for each model the unit of its losses.
        share: models whose rows have the same terms share a panel (a sweep).
    """
    panels: dict[tuple[str, ...], list[str]] = {}
    for name, rows in logs.items():
        key = tuple(key for key in rows[0] if key not in ("step", "epoch"))
        panels.setdefault(key if share else (name, *key), []).append(name)
    figure = new_figure(5.0 * len(panels) + 0.5, 3.8, title)
    for number, names in enumerate(panels.values(), start=1):
        terms = [key for key in logs[names[0]][0] if key not in ("step", "epoch")]
        ylabel = ylabels[names[0]]
        axes = plot_axes(figure, number, len(panels), xlabel="epoch", ylabel=ylabel)
        # A sweep has too many lines for every term: the whole loss of each model is shown.
        shown = terms if len(names) == 1 else terms[:1]
        curves = [(name, term) for name in names for term in shown]
        for (name, term), colour in zip(curves, itertools.cycle(COLOURS), strict=False):
            label = name if len(shown) == 1 else f"{name}: {term}"
            _curve(axes, logs[name], term, label=label, color=colour)
        values = np.array([row[term] for name in names for row in logs[name] for term in shown])
        if (values > 0).all() and values.max() > 20 * np.median(values):
            axes.set_yscale("log")  # the first rows would press the others flat
        axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def code_losses(
    path: Path,
    rows: Sequence[Mapping[str, float]],
    validation: Sequence[Mapping[str, float]],
    baselines: Mapping[str, float],
    *,
    title: str,
) -> None:
    """Nats a code by epoch: training, validation, and dashed lines that a model must get below.

    Args:
        rows, validation: {"epoch", "loss"}, as in log.csv.
        baselines: label -> nats a code.
    """
    figure = new_figure(9.0, 4.2, title)
    axes = plot_axes(figure, xlabel="epoch", ylabel="nats per token")
    _curve(axes, rows, "loss", label="training", color=COLOURS[0], zorder=3)
    points = {"marker": "o", "markersize": 4, "zorder": 4}
    _curve(axes, validation, "loss", label="validation", color=COLOURS[1], **points)
    for (name, value), colour in zip(baselines.items(), COLOURS[2:], strict=False):
        style: dict[str, Any] = {"color": colour, "linestyle": "--", "linewidth": 1.2}
        axes.axhline(value, label=f"{name}: {value:.2f}", **style)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def adversarial(
    path: Path,
    rows: Sequence[Mapping[str, float]],
    disc_start: float,
    gan_start: float,
    *,
    title: str,
) -> None:
    """The game by epoch: quality, the discriminator, lambda.

    Args:
        rows: of a log with a discriminator, as in log.csv.
        disc_start, gan_start: epochs at which the discriminator starts to learn, and is used.
    """
    figure = new_figure(14.0, 3.8, title)
    panels = (  # from when on there is something to show
        ("reconstruction losses", ("reconstruction", "perceptual"), 0),
        ("mean output of the discriminator", ("real", "fake"), disc_start),
        ("lambda", ("lambda",), gan_start),
    )
    for number, (ylabel, terms, start) in enumerate(panels, start=1):
        axes = plot_axes(figure, number, len(panels), xlabel="epoch", ylabel=ylabel)
        shown = [row for row in rows if row["epoch"] > start]
        for term, colour in zip(terms, COLOURS, strict=False):
            if term in rows[0]:
                _curve(axes, shown, term, label=term, color=colour)
        axes.axvline(disc_start, color="0.4", linestyle=":", label="discriminator starts to learn")
        axes.axvline(gan_start, color="0.4", linestyle="--", label="is used")
        axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def metric_by_batch_size(
    path: Path, results: Mapping[str, Mapping[int, float]], *, ylabel: str, title: str
) -> None:
    """One line a model over the batch sizes: {"VAE": {16: 0.61, 64: 0.60}, ...}."""
    figure = new_figure(5.6, 3.8, title)
    axes = plot_axes(figure, xlabel="batch size", ylabel=ylabel)
    above: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "fontsize": 8}
    for (name, values), colour, marker in zip(results.items(), COLOURS, "os^Dv<>", strict=False):
        sizes = sorted(values)
        y = [values[size] for size in sizes]
        axes.plot(sizes, y, label=name, color=colour, marker=marker)
        for size in sizes:
            axes.annotate(f"{values[size]:.3f}", (size, values[size]), ha="center", **above)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    save_figure(figure, path)


def codebook_usage(path: Path, counts: Mapping[str, Tensor], *, title: str) -> None:
    """How often each code is chosen, codes sorted from the most to the least frequent.

    Args:
        counts: for each model the counts (K,) over a whole set.
    """
    figure = new_figure(6.4, 3.8, title)
    axes = plot_axes(figure, xlabel="code, from the most frequent", ylabel="share of all positions")
    for (name, count), colour in zip(counts.items(), itertools.cycle(COLOURS), strict=False):
        share = np.sort((count.double() / count.sum()).numpy())[::-1]
        axes.plot(np.arange(1, len(share) + 1), share, color=colour, label=name)
    style: dict[str, Any] = {"color": "0.4", "linestyle": "--", "linewidth": 1}
    axes.axhline(1 / len(share), label="all codes alike (1/K)", **style)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.legend(frameon=False)
    save_figure(figure, path)
