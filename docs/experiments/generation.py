"""New images of three models side by side: a VAE, and transformers over VQ-VAE and VQGAN codes.

    python docs/experiments/generation.py --data data/cifar10-images

reads the run folders below runs/ that this file names (docs/results/README.md has their commands)
and writes, in docs/results/generation/:

    generation.png   twelve samples of each, below twelve real images
    metrics.json     Frechet distances of samples to the test images, by one yardstick

The transformers were measured by their own runs, with the same yardstick, and of the settings that
these measured the one with the lowest distance counts. The VAE's samples from its prior are
measured here. The images have classes.
"""

import argparse
import json
from pathlib import Path

import torch
from _common import CPU, flags_of_runs, read_metrics, results_of, write_metrics

from vqgan import figures, metrics
from vqgan.arguments import run_script
from vqgan.checkpoint import fingerprint
from vqgan.classifier import load_classifier
from vqgan.data import batches_in_order, load_dataset
from vqgan.errors import InputError
from vqgan.eval_networks import features_of
from vqgan.images import to_unit
from vqgan.pretrained import load_model, load_pair
from vqgan.training import Stopwatch

OUT = results_of(__file__)
YARDSTICK = Path("vqgan/yardstick.pt")
VAE_RUN = Path("study")
TRANSFORMERS = {  # title: run folder
    "VQ-VAE + transformer": Path("transformer-vqvae"),
    "VQGAN + transformer": Path("transformer"),
}
NUM_SAMPLES, NUM_PICTURES, AT_ONCE = 10_000, 12, 500


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    watch, data = Stopwatch(), load_dataset(args.data)
    yardstick, accuracy = load_classifier(args.runs / YARDSTICK, CPU)
    test_features = features_of(yardstick, batches_in_order(data.test_images, AT_ONCE))
    # One image of each class, then of the first classes again.
    labels = torch.arange(NUM_PICTURES) % len(data.class_names)
    rounds = [i // len(data.class_names) for i in range(NUM_PICTURES)]
    real = [int((data.test_labels == y).nonzero()[i]) for y, i in zip(labels, rounds, strict=True)]
    x = next(batches_in_order(data.test_images[real], NUM_PICTURES))
    rows, models = [("test images", to_unit(x))], {}

    vae = load_model(args.runs / VAE_RUN / "vae" / "checkpoint.pt")
    generator = torch.Generator().manual_seed(0)
    samples = [vae.sample(AT_ONCE, generator) for _ in range(NUM_SAMPLES // AT_ONCE)]
    distance = metrics.frechet_distance(features_of(yardstick, samples), test_features)
    models["vae"] = {"run": str(VAE_RUN), "frechet": distance, "num_samples": NUM_SAMPLES}
    rows.append((f"VAE's prior\nFrechet {distance:.2f}", to_unit(samples[0][:NUM_PICTURES])))

    for title, folder in TRANSFORMERS.items():
        pair = load_pair(args.runs / folder / "checkpoint.pt")
        measured = read_metrics(args.runs / folder)
        if measured["yardstick"]["fingerprint"] != fingerprint(yardstick):
            raise InputError(
                f"{args.runs / folder} was measured by another yardstick: run it again with "
                f"--yardstick {args.runs / YARDSTICK}"
            )
        best = min(measured["samples"], key=lambda sample: sample["frechet"])
        floors = {"frechet_floors": measured["frechet_floors"]}
        models[str(folder)] = {"run": str(folder)} | best | floors
        setting = {key: best[key] for key in ("guidance", "temperature", "top_k", "top_p")}
        tokens = pair.transformer.sample(labels[:, None], generator=generator, **setting)
        images = to_unit(pair.tokenizer.decode_tokens(tokens))
        rows.append((f"{title}\nFrechet {best['frechet']:.2f}", images))

    figures.image_rows(
        OUT / "generation.png",
        rows,
        title="New images: the VAE's of no class, the transformers' of the class above them",
    )
    about_data = {"source": args.data, "test_images": len(data.test_images)}
    write_metrics(OUT, watch, about_data, {"yardstick": {"accuracy": accuracy}, "models": models})
    print(json.dumps(models, indent=2))


if __name__ == "__main__":
    run_script(
        flags_of_runs("Compare what three generators make.").parse_args, main, resumable=False
    )
