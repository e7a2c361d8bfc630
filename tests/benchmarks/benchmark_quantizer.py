"""Quantizer, forward and EMA update, against vector-quantize-pytorch: time and peak memory.

    python tests/benchmarks/benchmark_quantizer.py

16,384 vectors of 64 dimensions (a batch of 256 grids of 8x8) on the CPU in float32, K = 512 and
K = 16,384. The peer also in its leaner setting: no memory is ours to compare if it computes more.
"""

import functools
import importlib.metadata

import torch
from timing import environment, median_seconds, peak_extra_mebibytes

from vqgan.quantizer import EMAVectorQuantizer

DIMENSIONS = 64
BATCH_SIZE, SIDE = 256, 8  # 16,384 vectors


def prepare(name: str, num_embeddings: int, device: str = "cpu", batch_size: int = BATCH_SIZE):
    """A call that quantizes one batch and updates the codebook."""
    torch.manual_seed(0)
    z_e = torch.randn(batch_size, DIMENSIONS, SIDE, SIDE, device=device)
    if name == "ours":
        quantizer = EMAVectorQuantizer(num_embeddings, DIMENSIONS, data_init=False)
    else:
        from vector_quantize_pytorch import VectorQuantize

        quantizer = VectorQuantize(
            dim=DIMENSIONS,
            codebook_size=num_embeddings,
            decay=0.99,
            commitment_weight=0.25,
            accept_image_fmap=True,
            threshold_ema_dead_code=1,
        )
    return functools.partial(quantizer.to(device).train(), z_e)


def main() -> None:
    version = importlib.metadata.version("vector-quantize-pytorch")
    print(f"{environment()}; peer: vector-quantize-pytorch {version}")
    print(f"{'K':>6} {'':>6} {'ms':>9} {'extra MiB':>10}")
    for num_embeddings, rounds in ((512, 15), (16_384, 3)):
        names = ("ours", "peer")
        times = median_seconds({name: prepare(name, num_embeddings) for name in names}, rounds)
        memory = {
            name: peak_extra_mebibytes(
                functools.partial(prepare, num_embeddings=num_embeddings), name
            )
            for name in names
        }
        for name in names:
            print(f"{num_embeddings:>6} {name:>6} {1000 * times[name]:>9.1f} {memory[name]:>10.0f}")
        print(
            f"{num_embeddings:>6}  ratio {times['peer'] / times['ours']:>8.1f}x "
            f"{memory['peer'] / memory['ours']:>9.1f}x"
        )


if __name__ == "__main__":
    main()
