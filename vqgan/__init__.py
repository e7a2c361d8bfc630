"""VAE, VQ-VAE, VQGAN and a transformer over their tokens in plain PyTorch: one concept per file."""

__version__ = "0.1.0"  # before the imports: checkpoint.py writes it

from vqgan.pretrained import load_model, load_pipeline
from vqgan.quantizer import EMAVectorQuantizer, VectorQuantizer
from vqgan.transformer import GPT
from vqgan.vae import VAE, SpatialVAE
from vqgan.vqgan import VQGAN
from vqgan.vqvae import VQVAE

__all__ = ["VAE", "SpatialVAE", "VQVAE", "VQGAN", "GPT", "VectorQuantizer", "EMAVectorQuantizer"]
__all__ += ["load_model", "load_pipeline", "__version__"]
