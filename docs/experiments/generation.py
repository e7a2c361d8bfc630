"""New images of three models side by side: a VAE, and transformers over VQ-VAE and VQGAN codes.

    python docs/experiments/generation.py --data data/cifar10-images

reads the run folders below runs/ that this file names (docs/results/README.md has their commands)
and writes, in docs/results/generation/:

    generation.png   twelve samples of each, below twelve real images
    metrics.json     Fréchet distances of samples to the test images, by one evaluation classifier

The transformers were measured by their runs, with the same evaluation classifier. Of the
settings that these measured, the one with the lowest distance counts. The VAE's samples from its
prior are measured here. The images have classes.
"""

import argparse
import json
from pathlib import Path

import torch
from _common import CPU, flags_of_runs, model_folder, read_metrics, results_of, write_metrics

from vqgan import figures, metrics
from vqgan.checkpoint import fingerprint
from vqgan.classifier import load_classifier
from vqgan.data import eval_batches, load_dataset
from vqgan.errors import InputError
from vqgan.eval_networks import extract_features
from vqgan.images import to_unit
from vqgan.pretrained import load_model, load_pipeline
from vqgan.script import run_script
from vqgan.training import Stopwatch

OUT = results_of(__file__)
EVAL_CLASSIFIER = Path("vqgan/eval_classifier.pt")
VAE_RUN = Path("study")
TRANSFORMERS = {  # title: run folder
    "VQ-VAE + transformer": Path("transformer-vqvae"),
    "VQGAN + transformer": Path("transformer"),
}
NUM_SAMPLES, NUM_SHOWN, BATCH_SIZE = 10_000, 12, 500


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    watch, data = Stopwatch(), load_dataset(args.data)
    eval_classifier, accuracy = load_classifier(args.runs / EVAL_CLASSIFIER, CPU)
    test_features = extract_features(eval_classifier, eval_batches(data.test_images, BATCH_SIZE))
    # One image of each class, then of the first classes again.
    labels = torch.arange(NUM_SHOWN) % len(data.class_names)
    rounds = [i // len(data.class_names) for i in range(NUM_SHOWN)]
    real = [int((data.test_labels == y).nonzero()[i]) for y, i in zip(labels, rounds, strict=True)]
    x = next(eval_batches(data.test_images[real], NUM_SHOWN))
    rows, models = [("test images", to_unit(x))], {}

    vae = load_model(model_folder(args.runs / VAE_RUN, "vae"))
    generator = torch.Generator().manual_seed(0)
    samples = [vae.sample(BATCH_SIZE, generator) for _ in range(NUM_SAMPLES // BATCH_SIZE)]
    distance = metrics.frechet_distance(extract_features(eval_classifier, samples), test_features)
    models["vae"] = {"run": str(VAE_RUN), "frechet": distance, "num_samples": NUM_SAMPLES}
    rows.append((f"VAE (without classes)\nFréchet {distance:.2f}", to_unit(samples[0][:NUM_SHOWN])))

    for title, folder in TRANSFORMERS.items():
        pipeline = load_pipeline(args.runs / folder / "checkpoint.pt")
        measured = read_metrics(args.runs / folder)
        if measured["eval_classifier"]["fingerprint"] != fingerprint(eval_classifier):
            raise InputError(
                f"{args.runs / folder} was measured by another eval_classifier: run it again with "
                f"--eval-classifier {args.runs / EVAL_CLASSIFIER}"
            )
        best = min(measured["samples"], key=lambda sample: sample["frechet"])
        references = {"reference_frechet": measured["reference_frechet"]}
        models[str(folder)] = {"run": str(folder)} | best | references
        setting = {key: best[key] for key in ("guidance", "temperature", "top_k", "top_p")}
        tokens = pipeline.transformer.sample(labels[:, None], generator=generator, **setting)
        images = to_unit(pipeline.tokenizer.decode_tokens(tokens))
        rows.append((f"{title}\nFréchet {best['frechet']:.2f}", images))

    figures.image_rows(
        OUT / "generation.png",
        rows,
        title="Test images, and new images by three generators",
    )
    about_data = {"source": args.data, "test_images": len(data.test_images)}
    write_metrics(
        OUT, watch, about_data, {"eval_classifier": {"accuracy": accuracy}, "models": models}
    )
    print(json.dumps(models, indent=2))


if __name__ == "__main__":
    run_script(
        flags_of_runs("Compare what three generators make.").parse_args, main, resumable=False
    )
