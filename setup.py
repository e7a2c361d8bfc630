from setuptools import setup

setup(
    name="vqgan",
    version="0.1.0",
    description="VAE, VQ-VAE and VQGAN (next: a transformer prior) in plain PyTorch, to be read",
    license="MIT",
    python_requires=">=3.10",
    packages=["vqgan"],
    install_requires=["torch>=2.6", "torchvision>=0.21", "numpy", "matplotlib", "tqdm"],
    extras_require={
        # The peers whose numbers the tests and benchmarks compare with.
        "test": [
            "pytest",
            "ruff",
            "scikit-image",
            "vector-quantize-pytorch",
            "lpips",
            "torchmetrics",
        ],
        "benchmark": ["diffusers"],
        # The published heads of LPIPS; true rFID, with Inception's weights.
        "lpips": ["lpips"],
        "fid": ["torchmetrics[image]"],
    },
)
