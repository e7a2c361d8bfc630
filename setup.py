import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent

setup(
    name="vqgan",
    version=re.search(r'__version__ = "(.*)"', (HERE / "vqgan" / "__init__.py").read_text("utf-8"))[
        1
    ],
    description="VAE, VQ-VAE, VQGAN and a minGPT-style prior in plain PyTorch, to be read",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The vqgan maintainers",
    license="MIT",
    keywords="vae vq-vae vqgan vector-quantization transformer generative-models pytorch education",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=["vqgan"],
    package_data={"vqgan": ["py.typed", "pretrained/*/*.pt"]},
    entry_points={"console_scripts": ["vqgan = vqgan.cli:command_line"]},
    install_requires=["torch>=2.10", "torchvision>=0.25", "numpy", "matplotlib", "tqdm"],
    extras_require={
        # The peers whose numbers the tests and benchmarks compare with.
        "test": [
            "pytest",
            "ruff",
            "mypy",
            "types-tqdm",
            "pyyaml",
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
        # The page of `vqgan demo`.
        "demo": ["gradio>=6"],
        "benchmark": ["diffusers", "transformers"],
        # LPIPS as published; true rFID, with Inception's weights; configs of the VQGAN's authors.
        "lpips": ["lpips"],
        "fid": ["torchmetrics[image]"],
        "yaml": ["pyyaml"],
    },
)
