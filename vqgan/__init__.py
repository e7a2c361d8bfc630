"""VAE and VQ-VAE (next: VQGAN and a transformer prior) in plain PyTorch. One concept a file."""

__version__ = "0.1.0"
