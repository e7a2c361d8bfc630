"""Every picture, with matplotlib. Images come as float (N, 3, H, W) in [0, 1], results as numbers.

Each function writes one PNG. Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from torch import Tensor

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DOTS_PER_INCH = 110  # sharp enough on a page, and small enough to commit
ROWS_FONT_SIZE = 13  # points: rows are 10 inches wide and more, and a page shrinks them to 7 or so


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _check_images(images: Tensor) -> None:
    """Raise ValueError unless they are (N, 3, H, W) in [0, 1]."""
    low, high = images.min().item(), images.max().item()
    if images.dim() != 4 or images.shape[1] != 3 or not (low >= 0 and high <= 1):
        raise ValueError(
            f"a figure takes images (N, 3, H, W) in [0, 1], not {tuple(images.shape)} "
            f"from {low:.3g} to {high:.3g}: map them with vqgan.images.to_unit"
        )


def _side_by_side(images: Tensor, gap: int = 2) -> np.ndarray:
    """(N, 3, H, W) -> one strip (H, N W + gaps, 3) with white gaps of `gap` pixels."""
    N, _, H, W = images.shape
    strip = np.ones((H, N * (W + gap) - gap, 3), dtype=np.float32)
    for i, image in enumerate(images.detach().float().cpu().permute(0, 2, 3, 1).numpy()):
        strip[:, i * (W + gap) : i * (W + gap) + W] = image
    return strip


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
        axes = figure.add_axes(
            (
                label_width / figure.get_figwidth(),
                1 - (0.45 + (i + 1) * row_height - 0.06) / total_height,
                strip_width / figure.get_figwidth(),
                (row_height - 0.06) / total_height,
            )
        )
        # Pixels stay squares: at this size, smoothing would hide the very blur that is shown.
        axes.imshow(strip, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        place = {"transform": axes.transAxes, "ha": "right", "va": "center"}
        axes.text(-0.09 / strip_width, 0.5, label, fontsize=ROWS_FONT_SIZE, **place)  # 0.09 inches
    _save(figure, path)


def image_grid(path: Path, images: Tensor, *, title: str, columns: int = 12) -> None:
    """Images (N, 3, H, W) in rows of `columns`, unlabelled."""
    image_rows(path, [("", chunk) for chunk in images.split(columns)], title=title)


def _plot_axes(figure: Figure, places: tuple[int, int, int], *, xlabel: str, ylabel: str) -> Axes:
    axes = figure.add_subplot(*places)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _line(rows: Sequence) -> dict:
    """Style of a curve; of few rows the points are marked, since one alone makes no line."""
    return {"linewidth": 1.4, "marker": "o" if len(rows) < 10 else "", "markersize": 3}


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
        terms = tuple(key for key in rows[0] if key not in ("step", "epoch"))
        panels.setdefault(terms if share else (name, *terms), []).append(name)
    figure = Figure(figsize=(5.0 * len(panels) + 0.5, 3.8), layout="constrained")
    figure.suptitle(title)
    for number, names in enumerate(panels.values(), start=1):
        terms = [key for key in logs[names[0]][0] if key not in ("step", "epoch")]
        axes = _plot_axes(
            figure, (1, len(panels), number), xlabel="epoch", ylabel=ylabels[names[0]]
        )
        # A sweep has too many lines for every term: the whole loss of each model is shown.
        shown = terms if len(names) == 1 else terms[:1]
        for i, name in enumerate(names):
            rows = logs[name]
            epochs = [row["epoch"] for row in rows]
            for j, term in enumerate(shown):
                label = name if len(shown) == 1 else f"{name}: {term}"
                colour = COLOURS[(i if len(names) > 1 else j) % len(COLOURS)]
                values = [row[term] for row in rows]
                axes.plot(epochs, values, label=label, color=colour, **_line(rows))
        values = np.array([row[term] for name in names for row in logs[name] for term in shown])
        if (values > 0).all() and values.max() > 20 * np.median(values):
            axes.set_yscale("log")  # the first rows would press the others flat
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


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
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    figure.suptitle(title)
    axes = _plot_axes(figure, (1, 1, 1), xlabel="epoch", ylabel="nats a code")
    for i, (name, points) in enumerate((("training", rows), ("validation", validation))):
        epochs, losses = ([point[key] for point in points] for key in ("epoch", "loss"))
        style = _line(points) | ({"marker": "o", "markersize": 4} if name == "validation" else {})
        axes.plot(epochs, losses, label=name, color=COLOURS[i], zorder=3 + i, **style)
    for i, (name, value) in enumerate(baselines.items()):
        axes.axhline(
            value,
            color=COLOURS[2 + i],
            linestyle="--",
            linewidth=1.2,
            label=f"{name}: {value:.2f}",
        )
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def adversarial(
    path: Path,
    rows: Sequence[Mapping[str, float]],
    *,
    learns_from: float,
    used_from: float,
    title: str,
) -> None:
    """The game by epoch: quality, the discriminator, lambda.

    Args:
        rows: of a log with an adversary, as in log.csv.
        learns_from, used_from: epochs at which the discriminator starts to learn, and is used.
    """
    figure = Figure(figsize=(14.0, 3.8), layout="constrained")
    figure.suptitle(title)
    panels = (  # from when on there is something to show
        ("what the generator is asked for", ("reconstruction", "perceptual"), 0),
        ("mean output of the discriminator", ("real", "fake"), learns_from),
        ("lambda", ("lambda",), used_from),
    )
    for number, (ylabel, terms, start) in enumerate(panels, start=1):
        axes = _plot_axes(figure, (1, len(panels), number), xlabel="epoch", ylabel=ylabel)
        shown = [row for row in rows if row["epoch"] > start]
        epochs = [row["epoch"] for row in shown]
        for i, term in enumerate(terms):
            if term in rows[0]:
                values = [row[term] for row in shown]
                axes.plot(epochs, values, label=term, color=COLOURS[i], **_line(shown))
        axes.axvline(learns_from, color="0.4", linestyle=":", label="discriminator starts to learn")
        axes.axvline(used_from, color="0.4", linestyle="--", label="is used")
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def metric_by_batch_size(
    path: Path, results: Mapping[str, Mapping[int, float]], *, ylabel: str, title: str
) -> None:
    """One line a model over the batch sizes: {"VAE": {16: 0.61, 64: 0.60}, ...}."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    figure.suptitle(title)
    axes = _plot_axes(figure, (1, 1, 1), xlabel="batch size", ylabel=ylabel)
    for i, (name, values) in enumerate(results.items()):
        sizes = sorted(values)
        axes.plot(
            sizes,
            [values[size] for size in sizes],
            label=name,
            color=COLOURS[i % len(COLOURS)],
            marker="os^D"[i % 4],
        )
        for size in sizes:
            axes.annotate(
                f"{values[size]:.3f}",
                (size, values[size]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    _save(figure, path)


def codebook_usage(path: Path, counts: Mapping[str, Tensor], *, title: str) -> None:
    """How often each code is chosen, codes sorted from the most to the least frequent.

    Args:
        counts: for each model the counts (K,) over a whole set.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    figure.suptitle(title)
    axes = _plot_axes(
        figure, (1, 1, 1), xlabel="code, from the most frequent", ylabel="share of all places"
    )
    for i, (name, count) in enumerate(counts.items()):
        share = np.sort((count.double() / count.sum()).numpy())[::-1]
        axes.plot(np.arange(1, len(share) + 1), share, color=COLOURS[i % len(COLOURS)], label=name)
    axes.axhline(
        1 / len(share), color="0.4", linestyle="--", linewidth=1, label="all codes alike (1/K)"
    )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.legend(frameon=False)
    _save(figure, path)


def rate_distortion(path: Path, curves: Mapping[str, Sequence[Mapping]], *, title: str) -> None:
    """Bits an image against error and SSIM, one curve a model.

    Args:
        curves: for each label its points, {"bits_per_image", "nmse", "ssim", "label"}; points are
            joined in the order of their bits, and labelled where "label" is not empty.
    """
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    figure.suptitle(title)
    # The last is where a label stands clear of its curve: above a falling, below a rising one.
    panels = (
        ("nmse", "normalised MSE (lower is better)", "log", (4, 5)),
        ("ssim", "SSIM, Wang et al. 2004 (higher is better)", "linear", (5, -9)),
    )
    for number, (key, ylabel, scale, label_offset) in enumerate(panels, start=1):
        axes = _plot_axes(figure, (1, 2, number), xlabel="bits per image", ylabel=ylabel)
        for i, (name, points) in enumerate(curves.items()):
            points = sorted(points, key=lambda point: point["bits_per_image"])
            bits = [point["bits_per_image"] for point in points]
            values = [point[key] for point in points]
            colour = COLOURS[i % len(COLOURS)]
            style = {"color": colour, "marker": "os^DvPX"[i % 7], "markersize": 5}
            axes.plot(bits, values, label=name, linewidth=1.2, **style)
            for point in points:
                axes.annotate(
                    point["label"],
                    (point["bits_per_image"], point[key]),
                    xytext=label_offset,
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
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
    _save(figure, path)
