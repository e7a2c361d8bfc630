"""VAE, VQ-VAE, VQGAN and a transformer over their tokens in plain PyTorch: one concept per file."""

import os

# Threads that wait for each other sleep. By default they spin, and beside other programs they take
# the very cores that they wait for (tests/benchmarks/benchmark_waiting.py). OpenMP reads this when
# torch is imported, so scripts import this package first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.2.0"  # before the imports: checkpoint.py writes it

from vqgan.pretrained import load_model, load_pipeline
from vqgan.quantizer import EMAVectorQuantizer, VectorQuantizer
from vqgan.transformer import GPT
from vqgan.vae import VAE, SpatialVAE
from vqgan.vqgan import VQGAN
from vqgan.vqvae import VQVAE

__all__ = ["VAE", "SpatialVAE", "VQVAE", "VQGAN", "GPT", "VectorQuantizer", "EMAVectorQuantizer"]
__all__ += ["load_model", "load_pipeline", "__version__"]
