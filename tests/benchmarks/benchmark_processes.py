"""A short training by one process and by two of them, each with one thread on the CPU.

    python tests/benchmarks/benchmark_processes.py

The VQ-VAE of the study on drawn shapes in float32, at two batch sizes: one epoch of 4,000 images by
train_vqvae.py, as torchrun starts it. They take turns, and the best of two counts, since what else
runs on a machine can only make it slower. With two cores, twice as many images per second would be
the most.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import environment

ROOT = Path(__file__).parents[2]
IMAGES, ROUNDS = 4000, 2
FLAGS = f"--data shapes --num-rendered {IMAGES} --models vqvae --epochs 1 --device cpu"


def seconds(processes: int, batch_size: int) -> float:
    """Of the training alone, as metrics.json has it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), str(ROOT / "train_vqvae.py")]
        command += [*FLAGS.split(), "--precision", "fp32", "--out", folder]
        command += ["--batch-sizes", str(batch_size)]
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=os.environ | threads, check=True, capture_output=True)
        (result,) = json.loads((Path(folder) / "metrics.json").read_text())["models"].values()
        return result["seconds"]


def main() -> None:
    print(environment())
    print(f"{'batch':>6} {'1 process':>12} {'2 processes':>12} {'ratio':>6}")
    for batch_size in (128, 512):
        rounds = [[seconds(count, batch_size) for count in (1, 2)] for _ in range(ROUNDS)]
        one, two = (IMAGES / min(times) for times in zip(*rounds, strict=True))
        print(f"{batch_size:>6} {one:>8.0f}/s {two:>10.0f}/s {two / one:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
