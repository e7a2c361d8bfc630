"""VAE, VQ-VAE, VQGAN and a transformer over their codes, in plain PyTorch. One concept a file."""

__version__ = "0.1.0"
