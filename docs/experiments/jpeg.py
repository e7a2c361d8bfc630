"""Bytes an image: codes beside JPEG, at the same size and at the same quality.

    python docs/experiments/jpeg.py --data data/cifar10-images

needs the runs study, vqgan, transformer and transformer-vqvae (docs/results/README.md has their
commands). Every fifth test image goes through the VQ-VAE, the VQGAN and JPEG at many qualities. Of
these, three are kept: the one whose size is nearest to the VQGAN's codes, and the lowest that
reaches its SSIM, and the share of images that the yardstick still recognises. JPEG's sizes are
without the file's headers, which are the same for all images.

Writes, in docs/results/jpeg/:

    jpeg.png          ten test images through each
    metrics.json      bytes, PSNR, SSIM, Frechet distance, recognised; of JPEG at each quality
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from _common import (
    CPU,
    flags_of_runs,
    read_metrics,
    results_of,
    scan_bytes,
    through_jpeg,
    write_metrics,
)
from torch import Tensor
from tqdm import tqdm

from vqgan import figures, metrics
from vqgan.arguments import run_script
from vqgan.classifier import Classifier, load_classifier
from vqgan.data import batches_in_order, load_dataset
from vqgan.eval_networks import features_of
from vqgan.images import from_uint8, to_uint8, to_unit
from vqgan.pretrained import load_model
from vqgan.training import Stopwatch

OUT = results_of(__file__)
TOKENIZERS = {  # name: its run, and the transformer's that writes its codes
    "vqvae": (Path("study/vqvae"), Path("transformer-vqvae")),
    "vqgan": (Path("vqgan/vqgan"), Path("transformer")),
}
TITLES = {
    "jpeg-size": "JPEG, about the codes' size",
    "vqvae": "VQ-VAE",
    "vqgan": "VQGAN",
    "jpeg-ssim": "JPEG of its SSIM",
    "jpeg-recognised": "JPEG, as often recognised",
}
EVERY = 5  # test images: 2,000 of CIFAR-10's, of all classes
# The test images were saved as JPEG of quality 75 or so. Near that they come back as they were.
QUALITIES = range(1, 51)
NUM_PICTURES = 10
AT_ONCE = 500


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    watch, data = Stopwatch(), load_dataset(args.data)
    images, labels = data.test_images[::EVERY], data.test_labels[::EVERY]
    yardstick, accuracy = load_classifier(args.runs / "vqgan" / "yardstick.pt", CPU)
    judge = Judge(images, labels, yardstick)

    results, pictures = {}, {}
    for name, (run, writer) in TOKENIZERS.items():
        model = load_model(args.runs / run / "checkpoint.pt")
        batches = batches_in_order(images, AT_ONCE)
        pictures[name] = torch.cat([to_uint8(model(x).reconstruction) for x in batches])
        seq_len = model.tokens(from_uint8(images[:1])).shape[1]
        bits = metrics.code_bits(seq_len, model.num_embeddings)
        written = read_metrics(args.runs / writer)
        results[name] = {
            "bytes": bits / 8,
            "bytes_with_transformer": written["models"]["transformer"]["bits_per_image"] / 8,
            # The codebook is moved by averages, and no parameter.
            "weights": sum(p.numel() for p in [*model.parameters(), model.quantizer.codebook]),
        } | judge(pictures[name])

    jpeg = {}
    for quality in tqdm(QUALITIES, desc="JPEG"):
        pictures[quality], files = through_jpeg(images, quality)
        sizes = {
            "bytes": float(np.mean([scan_bytes(file) for file in files])),
            "bytes_of_the_file": float(np.mean([len(file) for file in files])),
        }
        jpeg[quality] = {"quality": quality} | sizes | judge(pictures[quality])
    vqgan = results["vqgan"]
    chosen = {
        "jpeg-size": min(jpeg, key=lambda q: abs(jpeg[q]["bytes"] - vqgan["bytes"])),
        "jpeg-ssim": min(q for q in jpeg if jpeg[q]["ssim"] >= vqgan["ssim"]),
        "jpeg-recognised": min(q for q in jpeg if jpeg[q]["recognised"] >= vqgan["recognised"]),
    }
    results |= {name: jpeg[quality] for name, quality in chosen.items()}
    pictures |= {name: pictures[quality] for name, quality in chosen.items()}

    draw(images, results, pictures)
    about_data = {"source": args.data, "test_images": len(images)}
    content = {"yardstick": {"accuracy": accuracy}, "models": results, "jpeg": list(jpeg.values())}
    write_metrics(OUT, watch, about_data, content)
    print(json.dumps(results, indent=2))


class Judge:
    """What is lost of uint8 images (N, 3, H, W), labels (N,), in the eyes of several measures."""

    def __init__(self, images: Tensor, labels: Tensor, yardstick: Classifier):
        self.images, self.labels, self.yardstick = images, labels, yardstick
        self.features = features_of(yardstick, batches_in_order(images, AT_ONCE))

    def __call__(self, images: Tensor) -> dict[str, float]:
        x, y = to_unit(from_uint8(self.images)), to_unit(from_uint8(images))
        features = features_of(self.yardstick, batches_in_order(images, AT_ONCE))
        right = self.yardstick.head(features).argmax(dim=1) == self.labels
        return {
            "psnr": metrics.psnr(x, y).mean().item(),
            "ssim": metrics.ssim(x, y).mean().item(),
            "frechet": metrics.frechet_distance(features, self.features),
            "recognised": right.double().mean().item(),
        }


def draw(images: Tensor, results: dict, pictures: dict) -> None:
    """Some images, spread evenly over the test set, through everything."""
    step = len(images) // NUM_PICTURES
    chosen = list(range(0, step * NUM_PICTURES, step))
    rows = [("original\n3,072 bytes, plain", to_unit(from_uint8(images[chosen])))]
    for name, title in TITLES.items():
        label = f"{title}\n{results[name]['bytes']:.0f} bytes"
        rows.append((label, to_unit(from_uint8(pictures[name][chosen]))))
    figures.image_rows(OUT / "jpeg.png", rows, title="The same test images, and their bytes")


if __name__ == "__main__":
    run_script(flags_of_runs("Compare codes with JPEG.").parse_args, main, resumable=False)
