"""VAE, VQ-VAE and VQGAN (next: a transformer prior) in plain PyTorch. One concept a file."""

__version__ = "0.1.0"
