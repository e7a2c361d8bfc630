"""What is in a codebook: every code as the decoder paints it, and where some of them occur.

    python docs/experiments/codebook_gallery.py --data data/cifar10-images

reads the VQ-VAE of runs/fair/vqvae-8x8-k512-seed0 (docs/results/README.md has its command),
or of --checkpoint. A code is drawn as the middle of a decoded grid that holds no other
code, for at the borders the decoder sees padding. Writes, in docs/results/codebook_gallery/:

    codebook_gallery.png   all codes, gray ones first and then by hue; six, and where they occur
    metrics.json           how many codes are of one color, striped in a direction, or patterned
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from _common import results_of, show, write_metrics
from matplotlib.colors import rgb_to_hsv
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from vqgan.figures import DOTS_PER_INCH
from vqgan.image_folder import read_image
from vqgan.images import from_uint8, to_unit
from vqgan.metrics import CodebookUsage
from vqgan.pretrained import load_model
from vqgan.script import run_script
from vqgan.training import Stopwatch
from vqgan.vqvae import VQAutoencoder

OUT = results_of(__file__)
CHECKPOINT = Path("runs/fair/vqvae-8x8-k512-seed0")
TEST_IMAGES = 200  # of each class
BATCH_SIZE = 100
GRAY = 0.15  # saturation below which a code has no hue
PLAIN = 0.05  # standard deviation in [0, 1], within a code's pixels, below which it is one color
STRIPED = 3.0  # times as much variance from row to row as from column to column, or the reverse
ROWS = 16  # of the gallery
FOLLOWED = 2  # codes of each kind that are looked for in test images,
MIN_COUNT = 100  # of those that occur so often
KINDS = ("one color", "horizontal stripes", "vertical stripes")
PATCHES, AROUND = 6, 12  # of each code; pixels


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    watch, model = Stopwatch(), load_model(args.checkpoint)
    pixels = model.image_size // model.grids[0][0]  # of a code, 4
    painted = paint(model)  # (K, 3, H, W)
    middle = (painted.shape[-1] // 2 // pixels - 1) * pixels
    tiles = painted[:, :, middle:, middle:][:, :, : 2 * pixels, : 2 * pixels]  # four copies
    kinds = [kind(tile) for tile in tiles]

    images = torch.stack([torch.tensor(read_image(path, model.image_size)) for path in args.images])
    x = from_uint8(images)
    indices = torch.cat([model.encode(part).indices for part in x.split(BATCH_SIZE)])  # (M, h, w)
    usage = CodebookUsage(model.num_embeddings)
    usage.update(indices)
    counts = torch.bincount(indices.flatten(), minlength=model.num_embeddings)
    # The most striking codes of each kind: in their color, or in their stripes.
    colors = tiles.mean(dim=(2, 3))  # (K, 3)
    vividness = colors.amax(dim=1) - colors.amin(dim=1)
    contrast = tiles.std(dim=(2, 3)).mean(dim=1)
    followed = {}
    for name in KINDS:
        of_kind = [k for k in range(len(tiles)) if kinds[k] == name and counts[k] >= MIN_COUNT]
        striking = vividness if name == "one color" else contrast
        of_kind.sort(key=lambda k: striking[k].item(), reverse=True)
        followed |= dict.fromkeys(of_kind[:FOLLOWED], name)
    patches = {code: where_it_occurs(code, indices, to_unit(x), pixels) for code in followed}
    draw(tiles, patches, pixels)
    results = {
        "checkpoint": str(args.checkpoint),
        "num_embeddings": model.num_embeddings,
        "codes_used": usage.codes_used,
        "perplexity": usage.perplexity,
        "kinds": {name: kinds.count(name) for name in sorted(set(kinds))},
        "followed": {str(code): [name, int(counts[code])] for code, name in followed.items()},
    }
    write_metrics(OUT, watch, {"source": args.data, "test_images": len(images)}, results)
    print(json.dumps(results, indent=2))


def paint(model: VQAutoencoder) -> Tensor:
    """A decoded grid of each code alone, (K, 3, H, W) in [0, 1]."""
    codes = torch.arange(model.num_embeddings)[:, None, None].expand(-1, *model.grids[0])
    return to_unit(torch.cat([model.decode_indices(part) for part in codes.split(BATCH_SIZE)]))


def kind(tile: Tensor) -> str:
    """What a code's pixels (3, H, W) look like."""
    if tile.std(dim=(1, 2)).mean() < PLAIN:
        return "one color"
    by_row, by_column = (tile.mean(dim=axis).var(dim=1).mean() for axis in (2, 1))
    if by_row > STRIPED * by_column:
        return "horizontal stripes"
    return "vertical stripes" if by_column > STRIPED * by_row else "other patterns"


def where_it_occurs(code: int, indices: Tensor, x: Tensor, pixels: int) -> Tensor:
    """Parts (PATCHES, 3, AROUND, AROUND) of different images, with the code in their middle."""
    margin = (AROUND - pixels) // 2
    places = (indices == code).nonzero()  # (n, 3): image, row, column
    corners = places[:, 1:] * pixels - margin
    fits = ((corners >= 0) & (corners + AROUND <= x.shape[-1])).all(dim=1)
    places, corners = places[fits], corners[fits]
    found = {}
    for i in torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).tolist():
        image, (top, left) = int(places[i, 0]), corners[i].tolist()
        found.setdefault(image, x[image, :, top : top + AROUND, left : left + AROUND])
    return torch.stack([*found.values()][:PATCHES])


def in_order(tiles: Tensor) -> list[int]:
    """All codes in columns of ROWS: first gray ones, then by hue; within a column by brightness."""
    colors = tiles.mean(dim=(2, 3)).numpy()  # (K, 3)
    hue, saturation, _ = rgb_to_hsv(colors).T
    brightness = colors @ np.array([0.299, 0.587, 0.114])
    codes = np.lexsort((brightness, np.where(saturation < GRAY, -1, hue)))
    columns = (codes[i : i + ROWS] for i in range(0, len(codes), ROWS))
    return [int(code) for column in columns for code in column[brightness[column].argsort()]]


# --- drawing -----------------------------------------------------------------------------------


def draw(tiles: Tensor, patches: dict[int, Tensor], pixels: int) -> None:
    """The gallery of all codes, and below it, two in a row, the codes that are followed."""
    width, side, gap, head = 9.6, 0.59, 0.05, 0.36  # inches
    order = in_order(tiles)
    columns = -(-len(order) // ROWS)
    gallery = (width - 0.2) / columns * ROWS
    rows = -(-len(patches) // 2)
    height = head + gallery + head + rows * (side + gap) + 0.1
    figure = Figure(figsize=(width, height))

    def axes(left: float, top: float, w: float, h: float):
        return figure.add_axes((left / width, (height - top - h) / height, w / width, h / height))

    def words(left: float, top: float, text: str, **style) -> None:
        figure.text(left / width, 1 - top / height, text, va="center", fontsize=12, **style)

    size = tiles.shape[-1]
    canvas = torch.ones(3, ROWS * (size + 1), columns * (size + 1))
    for i, code in enumerate(order):
        column, row = divmod(i, ROWS)
        top, left = row * (size + 1), column * (size + 1)
        canvas[:, top : top + size, left : left + size] = tiles[code]
    title = f"All {len(order):,} codes of a VQ-VAE, each as the decoder paints it among its copies"
    words(width / 2, head / 2, title, ha="center")
    show(axes(0.1, head, width - 0.2, gallery), canvas[:, :-1, :-1])

    title = "Six of these codes, and where the encoder chooses them in test images (squares)"
    words(width / 2, 1.5 * head + gallery, title, ha="center")
    for i, (code, parts) in enumerate(patches.items()):
        row, column = divmod(i, 2)
        left, top = 0.1 + column * (width / 2 + 0.1), 2 * head + gallery + row * (side + gap)
        tile = axes(left, top, side, side)
        show(tile, tiles[code])
        for n, part in enumerate(parts):
            box = axes(left + 0.1 + (n + 1) * (side + gap), top, side, side)
            show(box, part)
            corner = (AROUND - pixels) / 2 - 0.5
            for color, line in (("black", 3.2), ("white", 1.4)):  # seen on any ground
                style = {"fill": False, "edgecolor": color, "linewidth": line}
                box.add_patch(Rectangle((corner, corner), pixels, pixels, **style))
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / "codebook_gallery.png", dpi=DOTS_PER_INCH)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw what is in a codebook.")
    parser.add_argument("--data", required=True, help="a folder with test/<class>/*")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="of a VQ-VAE or VQGAN")
    args = parser.parse_args()
    classes = sorted(path for path in (Path(args.data) / "test").iterdir() if path.is_dir())
    args.images = [path for folder in classes for path in sorted(folder.iterdir())[:TEST_IMAGES]]
    return args


if __name__ == "__main__":
    run_script(parse, main, resumable=False)
