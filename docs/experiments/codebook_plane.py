"""A codebook that can be seen: 16 codes of two dimensions, and points that move.

    python docs/experiments/codebook_plane.py

The points stand for what an encoder puts out: four clusters, of which one ends after a while, and
another begins far away. The quantizers are the package's own. Writes, in
docs/results/codebook_plane/:

    guarded.png     EMA: codes start from data, dead ones are restarted
    unguarded.png   EMA: neither
    gradient.png    codes moved by a gradient, from data (this quantizer restarts none)
    others.png      codes of FSQ, LFQ and SimVQ, which no vector moves on its own
    metrics.json    codes used, perplexity and squared error of these, and of each guard alone
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import frame, no_flags, results_of, write_metrics
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from vqgan.figures import COLORS, new_figure, save_figure
from vqgan.finite_scalar import FSQ, LFQ
from vqgan.metrics import CodebookUsage
from vqgan.quantizer import EMAVectorQuantizer, Quantizer, VectorQuantizer, nearest_indices
from vqgan.script import run_script
from vqgan.simvq import SimVQ
from vqgan.training import Stopwatch

OUT = results_of(__file__)
K, D = 16, 2
STEPS, POINTS = 800, 256  # points in a batch
MOVE_AT = 300  # step at which one cluster ends and another begins
PANELS = (1, 20, 300, 320, 540, 800)  # steps that are drawn
LEARNING_RATE = 0.02  # of the gradient quantizer's Adam: far from the rate of a large network
SEED = 1

CENTRES = torch.tensor([[1.6, 5.6], [5.8, 4.6], [6.2, 1.2], [3.6, 1.0]])
NEW_CENTRE = torch.tensor([9.0, 3.0])  # of the first cluster, after MOVE_AT
SPREAD = 0.42
FRAME = (-2.7, 10.5, -2.5, 7.3)  # of the panels: left, right, bottom, top

MODELS: dict[str, Callable[[], Quantizer]] = {
    "ema": lambda: EMAVectorQuantizer(K, D),
    "ema-start-only": lambda: EMAVectorQuantizer(K, D, restart_dead_codes=False),
    "ema-restart-only": lambda: EMAVectorQuantizer(K, D, data_init=False),
    "ema-unguarded": lambda: EMAVectorQuantizer(K, D, data_init=False, restart_dead_codes=False),
    "gradient": lambda: VectorQuantizer(K, D),
    "gradient-unguarded": lambda: VectorQuantizer(K, D, data_init=False),
}
TRANSFORMS = {
    "ema": ("guarded.png", "EMA. Codes start from data, dead codes are restarted"),
    "ema-unguarded": ("unguarded.png", "EMA. Codes start from noise, dead codes stay dead"),
    "gradient": ("gradient.png", "Codes moved by a gradient. They start from data, none restarts"),
}


def points_at(step: int, count: int, generator: torch.Generator) -> Tensor:
    """What the encoder puts out at a step: (count, 2)."""
    centres = CENTRES.clone()
    if step > MOVE_AT:
        centres[0] = NEW_CENTRE
    of_cluster = torch.randint(len(centres), (count,), generator=generator)
    return centres[of_cluster] + SPREAD * torch.randn(count, D, generator=generator)


def as_grid(points: Tensor) -> Tensor:
    """(N, 2) -> (1, 2, 1, N): as a quantizer takes them, one picture with N places in a row."""
    return points.T[None, :, None]


def train(make: Callable[[], Quantizer], steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Codes after every step (steps + 1, K, 2), and which were restarted in it (steps + 1, K)."""
    torch.manual_seed(SEED)
    quantizer = make().train()
    generator = torch.Generator().manual_seed(SEED)  # the same points for all
    is_ema = isinstance(quantizer, EMAVectorQuantizer)
    optimizer = None if is_ema else torch.optim.Adam(quantizer.parameters(), lr=LEARNING_RATE)
    codes = [quantizer.codebook.detach().clone()]
    restarts = torch.zeros(steps + 1, K, dtype=torch.bool)
    for step in range(1, steps + 1):
        was_started = quantizer.initialized
        counts = quantizer.ema_counts.clone() if is_ema else None
        output = quantizer(as_grid(points_at(step, POINTS, generator)))
        if not is_ema:
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            optimizer.step()
        elif was_started:  # a count that is not the average of old and new was set anew
            chosen = torch.bincount(output.indices.flatten(), minlength=K)
            average = quantizer.decay * counts + (1 - quantizer.decay) * chosen
            restarts[step] = (quantizer.ema_counts - average).abs() > 1e-3
        codes.append(quantizer.codebook.detach().clone())
    return torch.stack(codes), restarts


def test_points(step: int) -> Tensor:
    """Points (10,000, 2) of a step that no codebook was trained on."""
    return points_at(step, 10_000, torch.Generator().manual_seed(SEED + 1))


def measure(codes: Tensor, step: int) -> dict:
    points = test_points(step)
    indices = nearest_indices(points, codes)
    usage = CodebookUsage(K)
    usage.update(indices)
    return {
        "codes_used": usage.codes_used,
        "perplexity": usage.perplexity,
        "mse": F.mse_loss(codes[indices], points).item(),
    }


def main(args: argparse.Namespace) -> None:
    watch, models = Stopwatch(), {}
    for name, make in MODELS.items():
        codes, restarts = train(make)
        models[name] = measure(codes[STEPS], STEPS) | {
            "restarted": int(restarts.sum()),
            "restarted_at": restarts.any(dim=1).nonzero().flatten().tolist(),
            "before_the_move": measure(codes[MOVE_AT], MOVE_AT),
        }
        if name in TRANSFORMS:
            file, title = TRANSFORMS[name]
            draw(OUT / file, codes, restarts, starts_from_data=not make().initialized, title=title)
    data = {"source": "points in the plane", "steps": STEPS, "points_a_step": POINTS}
    results = {"num_embeddings": K, "gradient_learning_rate": LEARNING_RATE, "models": models}
    results["others"] = draw_fixed_grids(OUT / "others.png")
    write_metrics(OUT, watch, data, results)
    print(f"four pictures and metrics.json are in {OUT}")


# --- drawing -----------------------------------------------------------------------------------

ALIVE, REVIVED, DEAD, CELLS = COLORS[0], COLORS[1], "0.25", "0.68"
DOTS_PER_INCH = 110


def draw(
    path: Path, codes: Tensor, restarts: Tensor, *, starts_from_data: bool, title: str
) -> None:
    figure = Figure(figsize=(9.6, 6.15))
    figure.suptitle(title, y=0.99, va="top", fontsize=14)
    before = 0
    for number, step in enumerate(PANELS):
        row, column = divmod(number, 3)
        axes = figure.add_axes((0.01 + 0.331 * column, 0.515 - 0.425 * row, 0.318, 0.36))
        draw_panel(
            axes,
            codes[before : step + 1],
            restarts[before + 1 : step + 1],
            step,
            starts_from_data=starts_from_data,
        )
        before = step
    round_marker = {"marker": "o", "markersize": 7}
    dead = {"color": DEAD, "markerfacecolor": "white", "linestyle": ""} | round_marker
    handles = [
        Line2D([], [], color="0.6", marker=".", linestyle="", label="vectors"),
        Line2D([], [], color=CELLS, linewidth=1, label="borders of cells"),
        Line2D([], [], color=ALIVE, linewidth=1.2, label="code, and its path", **round_marker),
        Line2D([], [], label="dead code", **dead),
    ]
    if restarts.any():
        style = {"color": REVIVED, "linestyle": ":", "label": "dead code, just restarted"}
        handles.append(Line2D([], [], **style, **round_marker))
    figure.legend(
        handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=11
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def draw_fixed_grids(path: Path) -> dict:
    """A panel each for FSQ, LFQ and SimVQ: points of the last step, codes, and their cells.

    FSQ and LFQ have codes around the origin and nothing to learn, so the points are first
    standardized, as an encoder would learn to put them.
    """
    points = test_points(STEPS)
    mean, deviation = points.mean(dim=0), points.std(dim=0)
    standardized = (points - mean) / deviation
    torch.manual_seed(SEED)
    simvq = SimVQ(K, D)
    optimizer = torch.optim.Adam(simvq.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        batch = standardized[torch.randint(len(standardized), (POINTS,))]
        optimizer.zero_grad(set_to_none=True)
        simvq(as_grid(batch)).loss.backward()
        optimizer.step()
    panels = {
        "FSQ, 4 x 4 levels": FSQ([4, 4]),
        "LFQ, 2 bits": LFQ(4),
        "SimVQ, 16 codes": simvq,
    }
    figure = new_figure(9.6, 3.7, "Points in the plane, and the codes that they are replaced by")
    left, right, bottom, top = frame_of_codes = (-2.6, 2.6, -2.6, 2.6)
    x, y = torch.linspace(left, right, 500), torch.linspace(bottom, top, 500)
    plane = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
    results = {}
    for number, (title, quantizer) in enumerate(panels.items()):
        quantizer.eval()
        with torch.no_grad():
            output = quantizer(as_grid(standardized))
            owner = quantizer(as_grid(plane)).indices.view(500, 500)
            codes = quantizer.lookup(torch.arange(quantizer.num_embeddings).view(1, 1, -1))
        used = torch.bincount(output.indices.flatten(), minlength=quantizer.num_embeddings) > 0
        axes = figure.add_axes((0.01 + 0.331 * number, 0.02, 0.318, 0.8))
        draw_borders(axes, owner, frame_of_codes)
        axes.scatter(*standardized[:500].T.numpy(), s=3, color="0.6", linewidths=0, zorder=2)
        for (a, b), is_used in zip(codes[0, :, 0].T.tolist(), used.tolist(), strict=True):
            fill, edge = (ALIVE, "white") if is_used else ("white", DEAD)
            axes.plot(a, b, "o", markersize=7, markerfacecolor=fill, markeredgecolor=edge, zorder=5)
        axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
        frame(axes, "0.8")
        count = f"{int(used.sum())} of {len(used)} codes used"
        axes.set_title(f"{title}: {count}", fontsize=10.5, pad=4)
        results[type(quantizer).__name__] = {"codes_used": int(used.sum()), "codes": len(used)}
    save_figure(figure, path)
    return results


def draw_panel(
    axes: Axes, way: Tensor, restarts: Tensor, step: int, *, starts_from_data: bool
) -> None:
    """Points and codes after a step; `way` (T + 1, K, 2) since the panel before."""
    codes, points = way[-1], test_points(step)
    is_used = torch.bincount(nearest_indices(points, codes), minlength=K) > 0
    left, right, bottom, top = FRAME
    draw_cells(axes, codes)
    axes.scatter(*points[:500].T.numpy(), s=3, color="0.6", linewidths=0, zorder=2)
    for k in range(K):
        jumps = restarts[:, k].nonzero().flatten().tolist()
        color = REVIVED if jumps else ALIVE
        start = 0
        if step == PANELS[0] and starts_from_data:
            jumps = [0]
        for jump in jumps:  # dotted from where the code was to where it is put
            axes.plot(*way[jump : jump + 2, k].T.numpy(), ":", color=color, lw=1.2, zorder=3)
            start = jump + 1
        if is_used[k]:
            axes.plot(*way[start:, k].T.numpy(), color=color, linewidth=1.2, zorder=4)
        x, y = codes[k].tolist()
        fill = color if is_used[k] else "white"
        edge = "white" if is_used[k] else DEAD
        axes.plot(x, y, "o", markersize=7, markerfacecolor=fill, markeredgecolor=edge, zorder=5)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal")
    frame(axes, "0.8")
    axes.set_title(f"step {step}: {int(is_used.sum())} of {K} codes used", fontsize=11.5, pad=4)


def draw_cells(axes: Axes, codes: Tensor) -> None:
    """Borders between the places that are nearest to one code and those nearest to another."""
    left, right, bottom, top = FRAME
    x, y = torch.linspace(left, right, 660), torch.linspace(bottom, top, 490)
    plane = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (490, 660, 2)
    draw_borders(axes, nearest_indices(plane.reshape(-1, 2), codes).view(plane.shape[:2]), FRAME)


def draw_borders(axes: Axes, owner: Tensor, extent: tuple[float, float, float, float]) -> None:
    """Lines where the index of one place, (height, width), is not that of the next."""
    border = torch.zeros_like(owner, dtype=torch.bool)
    border[1:] |= owner[1:] != owner[:-1]
    border[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    picture = torch.ones(*owner.shape, 4)
    picture[..., :3], picture[..., 3] = float(CELLS), border.float()
    axes.imshow(picture.numpy(), extent=extent, origin="lower", zorder=1)


if __name__ == "__main__":
    run_script(no_flags("Draw codebooks in the plane.").parse_args, main, resumable=False)
