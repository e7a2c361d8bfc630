"""What the experiments share: their flags, metrics.json, pictures, and what JPEG keeps.

Experiments are run from the root of the repository, and docs/experiments/NAME.py writes
docs/results/NAME/.
"""

import argparse
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout: scripts and package

from vqgan.device import describe_device
from vqgan.files import write_json
from vqgan.training import Stopwatch, versions

CPU = torch.device("cpu")


# --- what is read and written --------------------------------------------------------------------


def results_of(file: str) -> Path:
    """Where the experiment in a file, its `__file__`, writes."""
    return Path("docs/results") / Path(file).stem


def no_flags(description: str) -> argparse.ArgumentParser:
    """Of an experiment that needs no run."""
    return argparse.ArgumentParser(description=description)


def flags_of_runs(description: str) -> argparse.ArgumentParser:
    """Of an experiment that reads finished runs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", required=True, help="the data of the runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    return parser


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def model_folder(run: Path, name: str) -> Path:
    """The folder of a run's model: the run's own if it trained no other."""
    return run / name if (run / name).is_dir() else run


def write_metrics(
    out: Path, watch: Stopwatch, data: dict, results: dict, *, dtype: torch.dtype = torch.float32
) -> None:
    """metrics.json: the results, below what every experiment says of itself.

    Args:
        watch: started when the experiment was.
        data: the source, and which part of it was used.
        dtype: in which it computed, on the CPU.
    """
    metadata = {
        "command": shlex.join(["python", f"docs/experiments/{out.name}.py", *sys.argv[1:]]),
        "data": data,
        "device": describe_device(CPU, dtype),
        "versions": versions(),
        "seconds": round(watch.seconds, 1),
    }
    write_json(out / "metrics.json", metadata | results)


# --- pictures ------------------------------------------------------------------------------------


def show(axes: Axes, image: Tensor) -> None:
    """An image (3, H, W) in [0, 1] without axes, every pixel a square."""
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_axis_off()


def frame(axes: Axes, color: str) -> None:
    """Only a thin line around a picture: no ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(color)


# --- image files ---------------------------------------------------------------------------------


def scan_bytes(jpeg: bytes) -> int:
    """Bytes of a JPEG file's image data: what follows the start-of-scan header, without headers.

    (The headers, some 600 bytes of tables, are the same for every image of a quality.)
    """
    start = jpeg.index(b"\xff\xda")
    header = int.from_bytes(jpeg[start + 2 : start + 4], "big")
    return len(jpeg) - (start + 2 + header) - 2  # the last two are the end-of-image marker


def frame_bytes(webp: bytes) -> int:
    """Bytes of a lossy WebP file's image data, without the container and the frame's header.

    (The container has 20 bytes. The header has 10, which are a tag and the image's size.)
    """
    start = webp.index(b"VP8 ")
    return int.from_bytes(webp[start + 4 : start + 8], "little") - 10


def through_file(images: Tensor, format: str, **options: Any) -> tuple[Tensor, list[bytes]]:
    """What an image format (Pillow's) keeps of uint8 images (N, 3, H, W), and the files."""
    decoded, files = torch.empty_like(images), []
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format, **options)
        files.append(file.getvalue())
        decoded[i] = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    return decoded, files


def through_jpeg(images: Tensor, quality: int) -> tuple[Tensor, list[bytes]]:
    """What JPEG (color at half resolution) keeps of uint8 images (N, 3, H, W), and the files."""
    return through_file(images, "JPEG", quality=quality)
