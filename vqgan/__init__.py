"""VAE, VQ-VAE, VQGAN and a transformer over their tokens in plain PyTorch: one concept per file."""

import os

# Threads that wait for each other spin a little and then sleep. By default they spin ten times as
# long, and beside other programs they take the very cores that they wait for
# (tests/benchmarks/benchmark_waiting.py). GNU's OpenMP reads this when torch is imported, so the
# scripts import this package first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

__version__ = "0.2.0"  # before the imports: checkpoint.py writes it

from vqgan.finite_scalar import FSQ, LFQ
from vqgan.masked import MaskedTransformer
from vqgan.pretrained import load_model, load_pipeline
from vqgan.quantizer import EMAVectorQuantizer, VectorQuantizer
from vqgan.residual import ResidualVQ
from vqgan.simvq import SimVQ
from vqgan.transformer import GPT
from vqgan.vae import VAE, SpatialVAE
from vqgan.vqgan import VQGAN
from vqgan.vqvae import VQVAE
from vqgan.vqvae2 import VQVAE2

__all__ = ["VAE", "SpatialVAE", "VQVAE", "VQVAE2", "VQGAN", "GPT", "MaskedTransformer"]
__all__ += ["VectorQuantizer", "EMAVectorQuantizer", "FSQ", "LFQ", "SimVQ", "ResidualVQ"]
__all__ += ["load_model", "load_pipeline", "__version__"]
