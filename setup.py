from setuptools import setup

setup(
    name="vqgan",
    version="0.1.0",
    description="VAE, VQ-VAE, VQGAN and a transformer over their codes, in plain PyTorch",
    license="MIT",
    python_requires=">=3.10",
    packages=["vqgan"],
    package_data={"vqgan": ["pretrained/*/*.pt"]},
    entry_points={"console_scripts": ["vqgan = vqgan.cli:command_line"]},
    install_requires=["torch>=2.10", "torchvision>=0.25", "numpy", "matplotlib", "tqdm"],
    extras_require={
        # The peers whose numbers the tests and benchmarks compare with.
        "test": [
            "pytest",
            "ruff",
            "scikit-image",
            "vector-quantize-pytorch",
            "lpips",
            "torchmetrics",
            "transformers",
        ],
        # The site, built by `sphinx-build -W docs docs/_build`; and what its tests open it with,
        # beside Debian's chromium.
        "docs": ["sphinx>=9", "myst-parser", "furo", "latex2mathml"],
        "browser": ["playwright"],
        # The tutorial, docs/tutorial.ipynb, and its test.
        "notebook": ["notebook", "nbclient", "ipykernel"],
        "benchmark": ["diffusers", "transformers"],
        # The published heads of LPIPS; true rFID, with Inception's weights.
        "lpips": ["lpips"],
        "fid": ["torchmetrics[image]"],
    },
)
