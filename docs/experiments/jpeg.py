"""Bytes an image: codes beside JPEG, at the same size and at the same quality.

    python docs/experiments/jpeg.py --data data/cifar10-images

needs the runs study, vqgan, transformer and transformer-vqvae (docs/results/README.md has their
commands). Every fifth test image goes through the VQ-VAE, the VQGAN and JPEG at many qualities. Of
these, three are kept: the one whose size is nearest to the VQGAN's codes, and the lowest that
reaches its SSIM, and its class accuracy. JPEG's sizes are
without the file's headers, which are the same for all images.

Writes, in docs/results/jpeg/:

    jpeg.png          ten test images through each
    metrics.json      bytes, PSNR, SSIM, Fréchet distance, class accuracy; of JPEG at each quality
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from _common import (
    CPU,
    flags_of_runs,
    model_folder,
    read_metrics,
    results_of,
    scan_bytes,
    through_jpeg,
    write_metrics,
)
from torch import Tensor
from tqdm import tqdm

from vqgan import figures, metrics
from vqgan.classifier import Classifier, load_classifier
from vqgan.data import eval_batches, load_dataset
from vqgan.eval_networks import extract_features
from vqgan.images import from_uint8, to_uint8, to_unit
from vqgan.pretrained import load_model
from vqgan.script import run_script
from vqgan.training import Stopwatch

OUT = results_of(__file__)
TOKENIZERS = {  # name: its run, and that of the transformer over its codes
    "vqvae": (Path("study"), Path("transformer-vqvae")),
    "vqgan": (Path("vqgan"), Path("transformer")),
}
TITLES = {
    "jpeg-size": "JPEG, about the codes' size",
    "vqvae": "VQ-VAE",
    "vqgan": "VQGAN",
    "jpeg-ssim": "JPEG of its SSIM",
    "jpeg-class_accuracy": "JPEG of its class accuracy",
}
EVERY = 5  # test images: 2,000 of CIFAR-10's, of all classes
# The test images were saved as JPEG of quality 75 or so. Near that they come back as they were.
QUALITIES = range(1, 51)
NUM_SHOWN = 10
BATCH_SIZE = 500


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    watch, data = Stopwatch(), load_dataset(args.data)
    images, labels = data.test_images[::EVERY], data.test_labels[::EVERY]
    eval_classifier, accuracy = load_classifier(args.runs / "vqgan" / "eval_classifier.pt", CPU)
    evaluate = Evaluation(images, labels, eval_classifier)

    results, pictures = {}, {}
    for name, (run, transformer) in TOKENIZERS.items():
        model = load_model(model_folder(args.runs / run, name))
        batches = eval_batches(images, BATCH_SIZE)
        pictures[name] = torch.cat([to_uint8(model(x).reconstruction) for x in batches])
        seq_len = model.tokens(from_uint8(images[:1])).shape[1]
        bits = metrics.fixed_length_bits(seq_len, model.num_embeddings)
        measured = read_metrics(args.runs / transformer)
        results[name] = {
            "bytes": bits / 8,
            "bytes_with_transformer": measured["models"]["transformer"]["bits_per_image"] / 8,
            # The codebook is moved by averages, and no parameter.
            "weights": sum(p.numel() for p in [*model.parameters(), model.quantizer.codebook]),
        } | evaluate(pictures[name])

    jpeg = {}
    for quality in tqdm(QUALITIES, desc="JPEG"):
        pictures[quality], files = through_jpeg(images, quality)
        sizes = {
            "bytes": float(np.mean([scan_bytes(file) for file in files])),
            "bytes_of_the_file": float(np.mean([len(file) for file in files])),
        }
        jpeg[quality] = {"quality": quality} | sizes | evaluate(pictures[quality])
    vqgan = results["vqgan"]
    chosen = {
        "jpeg-size": min(jpeg, key=lambda q: abs(jpeg[q]["bytes"] - vqgan["bytes"])),
        "jpeg-ssim": min(q for q in jpeg if jpeg[q]["ssim"] >= vqgan["ssim"]),
        "jpeg-class_accuracy": min(
            q for q in jpeg if jpeg[q]["class_accuracy"] >= vqgan["class_accuracy"]
        ),
    }
    results |= {name: jpeg[quality] for name, quality in chosen.items()}
    pictures |= {name: pictures[quality] for name, quality in chosen.items()}

    draw(images, results, pictures)
    about_data = {"source": args.data, "test_images": len(images)}
    content = {
        "eval_classifier": {"accuracy": accuracy},
        "models": results,
        "jpeg": list(jpeg.values()),
    }
    write_metrics(OUT, watch, about_data, content)
    print(json.dumps(results, indent=2))


class Evaluation:
    """What is lost of uint8 images (N, 3, H, W), labels (N,), by several measures."""

    def __init__(self, images: Tensor, labels: Tensor, eval_classifier: Classifier):
        self.images, self.labels, self.eval_classifier = images, labels, eval_classifier
        self.features = extract_features(eval_classifier, eval_batches(images, BATCH_SIZE))

    def __call__(self, images: Tensor) -> dict[str, float]:
        x, y = to_unit(from_uint8(self.images)), to_unit(from_uint8(images))
        features = extract_features(self.eval_classifier, eval_batches(images, BATCH_SIZE))
        right = self.eval_classifier.head(features).argmax(dim=1) == self.labels
        return {
            "psnr": metrics.psnr(x, y).mean().item(),
            "ssim": metrics.ssim(x, y).mean().item(),
            "frechet": metrics.frechet_distance(features, self.features),
            "class_accuracy": right.double().mean().item(),
        }


def draw(images: Tensor, results: dict, pictures: dict) -> None:
    """Some images, spread evenly over the test set, through everything."""
    step = len(images) // NUM_SHOWN
    chosen = list(range(0, step * NUM_SHOWN, step))
    rows = [("original\n3,072 bytes, plain", to_unit(from_uint8(images[chosen])))]
    for name, title in TITLES.items():
        label = f"{title}\n{results[name]['bytes']:.0f} bytes"
        rows.append((label, to_unit(from_uint8(pictures[name][chosen]))))
    figures.image_rows(OUT / "jpeg.png", rows, title="The same test images, and their bytes")


if __name__ == "__main__":
    run_script(flags_of_runs("Compare codes with JPEG.").parse_args, main, resumable=False)
