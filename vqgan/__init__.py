"""VQ-VAE, VQGAN and a transformer prior in plain PyTorch. One concept a file, named by it."""

__version__ = "0.1.0"
