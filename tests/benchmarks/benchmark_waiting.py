"""Threads that wait for each other, spinning or asleep, alone and beside other programs.

    python tests/benchmarks/benchmark_waiting.py

OpenMP's threads spin while they wait (the default), spin a little and then sleep (as the scripts
set it), or sleep at once (PASSIVE). Each setting trains the VQ-VAE in a process of its own, on an
idle machine and beside busy loops that take every core twice. Ratios carry over to other machines,
times do not.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "default": {"OMP_WAIT_POLICY": ""},
    "30,000 spins": {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": "30000"},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
}
REPEATS = 3  # of which the fastest counts
# torch comes first, so that the package cannot set the policy.
STEPS = """
import time, torch
from vqgan.vqvae import VQVAE
torch.manual_seed(0)
model, x = VQVAE(), torch.rand(64, 3, 32, 32) * 2 - 1
optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, fused=True)
def step():
    output = model(x)
    optimizer.zero_grad()
    ((output.reconstruction - x).square().mean() + output.loss).backward()
    optimizer.step()
for _ in range(3):
    step()
start = time.perf_counter()
for _ in range(10):
    step()
print((time.perf_counter() - start) / 10)
"""


def seconds_per_step(setting: dict[str, str]) -> float:
    environment = {k: v for k, v in (os.environ | setting).items() if v or k not in setting}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    print(f"{os.cpu_count()} cores, seconds per training step of 64 images")
    for num_busy in (0, 2 * (os.cpu_count() or 1)):
        busy = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)
        ]
        try:
            times = {
                name: min(seconds_per_step(setting) for _ in range(REPEATS))
                for name, setting in SETTINGS.items()
            }
        finally:
            for process in busy:
                process.kill()
        print(f"beside {num_busy} busy loops:")
        for name, seconds in times.items():
            print(f"    {name:12} {seconds:.3f} s, {seconds / times['default']:.2f} of the default")


if __name__ == "__main__":
    main()
