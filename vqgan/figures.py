"""Every figure, drawn with matplotlib from images, float (N, 3, H, W) in [0, 1], and numbers.

Each function writes one PNG. The colors are Okabe and Ito's, which color-blind readers tell apart.
"""

import io
import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vqgan.files import write_atomically

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# The first font that has a letter draws it; those behind the first are for Chinese and the like.
FONTS = ["DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC"]
FONTS += ["Hiragino Sans", "WenQuanYi Micro Hei", "Arial Unicode MS"]
DOTS_PER_INCH = 110  # sharp enough on a page, and small enough to commit
ROWS_FONT_SIZE = 13  # points; rows are 10 inches wide or more, and a page shrinks them to about 7
# White, so that no line runs through the words of a legend.
LEGEND: dict[str, Any] = {"fontsize": 9, "framealpha": 1.0, "edgecolor": "none"}


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure with a title; width and height are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the PNG whole or not at all, with labels in any alphabet that the fonts have."""
    installed = {font.name for font in font_manager.fontManager.ttflist}  # others cause warnings
    for text in figure.findobj(Text):
        text.set_fontfamily([family for family in FONTS if family in installed])
        text.set_parse_math(False)  # a class may be called US$
        text.set_text(text.get_text().encode(errors="replace").decode())
    buffer = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    if any("missing from font" in str(warning.message) for warning in caught):
        print(f"{path}: no font here has all of its letters; Noto Sans CJK would, once installed")
    write_atomically(Path(path), buffer.getvalue())


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


def image_rows(path: str | Path, rows: Sequence[tuple[str, Tensor]], *, title: str) -> None:
    """Draw rows of images, for example originals over reconstructions.

    Args:
        rows: from top to bottom, each with a label of one or more lines and images (N, 3, H, W).
    """
    for _, images in rows:
        _check_images(images)
    strips = [_side_by_side(images) for _, images in rows]
    height, width = strips[0].shape[0], max(strip.shape[1] for strip in strips)
    # Lengths are in inches. A label is as wide as its longest line and a margin.
    longest = max(len(line) for label, _ in rows for line in label.split("\n"))
    label_width = 0.0085 * ROWS_FONT_SIZE * longest + 0.15
    # The width of the page, or less for few images: three dots for a pixel, and the title's room.
    images_width = min(9.0, max(0.1 * len(title), 3 * width / DOTS_PER_INCH))
    row_height = images_width * height / width + 0.06
    top = 0.23 + 0.22 * len(title.split("\n"))
    total_height = row_height * len(rows) + top
    figure = Figure(figsize=(label_width + images_width + 0.1, total_height))
    figure.suptitle(title, y=1 - 0.1 / total_height, va="top", fontsize=ROWS_FONT_SIZE)
    for i, ((label, _), strip) in enumerate(zip(rows, strips, strict=True)):
        strip_width = images_width * strip.shape[1] / width  # a last row may be shorter
        bottom = total_height - top - (i + 1) * row_height + 0.06
        box = (label_width, bottom, strip_width, row_height - 0.06)  # in inches
        size = np.tile(figure.get_size_inches(), 2)  # width, height, width, height
        axes = figure.add_axes(tuple(box / size))
        # Pixels stay squares: at this size, smoothing would hide the very blur that is shown.
        axes.imshow(strip, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        anchor: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "center"}
        axes.text(-0.09 / strip_width, 0.5, label, fontsize=ROWS_FONT_SIZE, **anchor)  # 0.09 inches
    save_figure(figure, path)


def image_grid(path: Path, images: Tensor, *, title: str, columns: int = 12) -> None:
    """Draw images (N, 3, H, W) in rows of `columns`, without labels."""
    image_rows(path, [("", chunk) for chunk in images.split(columns)], title=title)


def plot_axes(
    figure: Figure, panel: int = 1, of: int = 1, rows: int = 1, *, xlabel: str, ylabel: str
) -> Axes:
    """Add the axes of one panel in rows of `of` panels; the first is number 1."""
    axes = figure.add_subplot(rows, of, panel)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _curve(axes: Axes, rows: Sequence[Mapping[str, float]], term: str, **style) -> None:
    """Plot a term by epoch; points of few rows are marked, since one alone makes no line."""
    style = {"linewidth": 1.4, "marker": "o" if len(rows) < 10 else "", "markersize": 3} | style
    rows = [row for row in rows if term in row]  # a resumed run's first rows may lack it
    axes.plot([row["epoch"] for row in rows], [row[term] for row in rows], **style)


def losses(
    path: Path, logs: Mapping[str, Sequence[Mapping]], terms: Sequence[str], *, title: str
) -> None:
    """Plot training losses by epoch: a panel per term, since terms differ in scale.

    Models that have the same terms share panels.

    Args:
        logs: the rows of each model, as in log.csv.
        terms: the terms that are shown of models that have them.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, rows in logs.items():
        groups.setdefault(tuple(term for term in terms if term in rows[0]), []).append(name)
    columns = max(len(shown) for shown in groups)
    # A single panel is wider, so that the title above it is whole.
    figure = new_figure(max(5.6, 3.3 * columns), 2.7 * len(groups) + 0.3, title)
    for row, (shown, names) in enumerate(groups.items()):
        for panel, term in enumerate(shown, start=1 + row * columns):
            unit = "nats per image" if "KL" in shown else "loss"
            axes = plot_axes(figure, panel, columns, len(groups), xlabel="epoch", ylabel=unit)
            axes.set_title(term if len(names) > 1 else f"{names[0]}: {term}", fontsize=10)
            for name, color in zip(names, itertools.cycle(COLORS), strict=False):
                _curve(axes, logs[name], term, label=name, color=color)
            values = np.array([row[term] for name in names for row in logs[name]])
            if (values > 0).all() and values.max() > 20 * np.median(values):
                axes.set_yscale("log")  # or the first rows would flatten the others
            if len(names) > 1:
                axes.legend(**LEGEND)
    save_figure(figure, path)


def token_losses(
    path: Path,
    rows: Sequence[Mapping[str, float]],
    validation: Sequence[Mapping[str, float]],
    baselines: Mapping[str, float],
    *,
    title: str,
) -> None:
    """Plot nats per token by epoch, in training and validation; dashed lines are to be beaten.

    Args:
        rows, validation: {"epoch", "loss"}, as in log.csv.
        baselines: label -> nats per token.
    """
    figure = new_figure(9.0, 4.2, title)
    axes = plot_axes(figure, xlabel="epoch", ylabel="nats per token")
    _curve(axes, rows, "loss", label="training", color=COLORS[0], zorder=3)
    points = {"marker": "o", "markersize": 4, "zorder": 4}
    _curve(axes, validation, "loss", label="validation", color=COLORS[1], **points)
    for i, ((name, value), color) in enumerate(zip(baselines.items(), COLORS[2:], strict=False)):
        # Each has its dashes where the others have gaps, so that equal values are all seen.
        label = f"{name}: {value:.2f}"
        axes.axhline(value, label=label, color=color, linewidth=1.5, linestyle=(2 * i, (2, 4)))
    axes.legend(**LEGEND, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def adversarial(
    path: Path,
    rows: Sequence[Mapping[str, float]],
    disc_start: float,
    gan_start: float,
    *,
    title: str,
) -> None:
    """Plot the adversarial game by epoch: quality, the discriminator, lambda.

    Args:
        rows: as in the log.csv of a model with a discriminator.
        disc_start, gan_start: epochs at which the discriminator starts to learn, and to be used.
    """
    figure = new_figure(11.0, 3.6, title)
    panels = (  # label, terms, and the epoch after which they exist
        ("reconstruction losses", ("reconstruction", "perceptual"), 0),
        ("mean output of the discriminator", ("real", "fake"), disc_start),
        ("lambda", ("lambda",), gan_start),
    )
    for number, (ylabel, terms, start) in enumerate(panels, start=1):
        axes = plot_axes(figure, number, len(panels), xlabel="epoch", ylabel=ylabel)
        shown = [row for row in rows if row["epoch"] > start]
        for term, color in zip(terms, COLORS, strict=False):
            if term in rows[0]:
                _curve(axes, shown, term, label=term, color=color)
        starts = [axes.axvline(disc_start, color="0.4", linestyle=":")]
        starts += [axes.axvline(gan_start, color="0.4", linestyle="--")]
        axes.set_xlim(0, rows[-1]["epoch"])  # the same in all panels
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        if len(terms) > 1:
            axes.legend(**LEGEND)
    names = ("the discriminator starts to learn", "its loss is used")
    figure.legend(starts, names, loc="outside lower center", ncols=2, **LEGEND)
    save_figure(figure, path)


def metric_by_batch_size(
    path: Path, results: Mapping[str, Mapping[int, float]], *, ylabel: str, title: str
) -> None:
    """Plot one line per model over the batch sizes: {"VAE": {16: 0.61, 64: 0.60}, ...}."""
    figure = new_figure(5.6, 3.8, title)
    axes = plot_axes(figure, xlabel="batch size", ylabel=ylabel)
    spread = [value for values in results.values() for value in values.values()]
    near = (max(spread) - min(spread)) / 10  # a label fits between lines that are farther apart
    for (name, values), color, marker in zip(results.items(), COLORS, "os^Dv<>", strict=False):
        sizes = sorted(values)
        y = [values[size] for size in sizes]
        axes.plot(sizes, y, label=name, color=color, marker=marker)
        for size, value in values.items():
            others = (other[size] for other in results.values() if size in other)
            is_below = any(0 < other - value < near for other in others)
            style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "ha": "center"}
            axes.annotate(
                f"{value:.3f}", (size, value), xytext=(0, -15 if is_below else 7), **style
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, labels=[str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.08, y=0.15)  # room for the numbers
    axes.legend(**LEGEND)
    save_figure(figure, path)


def codebook_usage(path: Path, counts: Mapping[str, Tensor], *, title: str) -> None:
    """Plot how often each code is chosen, from the most to the least frequent; no unused ones.

    Args:
        counts: the counts (K,) of each model over a whole set.
    """
    figure = new_figure(6.4, 3.8, title)
    K = max(len(count) for count in counts.values())
    xlabel = f"code, from the most frequent (K = {K:,})"
    axes = plot_axes(figure, xlabel=xlabel, ylabel="fraction of positions")
    for (name, count), color in zip(counts.items(), itertools.cycle(COLORS), strict=False):
        fractions = np.sort((count.double() / count.sum()).numpy())[::-1][: int((count > 0).sum())]
        style: dict[str, Any] = {"color": color, "marker": "o" if len(fractions) < 30 else ""}
        axes.plot(np.arange(1, len(fractions) + 1), fractions, label=name, **style)
    axes.axhline(1 / K, label="uniform (1/K)", color="0.4", linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.legend(**LEGEND)
    save_figure(figure, path)
