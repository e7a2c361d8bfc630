from setuptools import setup

setup(
    name="vqgan",
    version="0.1.0",
    description="VAE and VQ-VAE (next: VQGAN and a transformer prior) in plain PyTorch, to be read",
    license="MIT",
    python_requires=">=3.10",
    packages=["vqgan"],
    install_requires=["torch>=2.5", "torchvision>=0.20", "numpy", "matplotlib", "tqdm"],
    extras_require={
        # The peers whose numbers the tests and benchmarks compare with.
        "test": ["pytest", "ruff", "scikit-image", "vector-quantize-pytorch"],
    },
)
