"""What a classifier learns from pictures that a transformer wrote, and what from real ones.

    python docs/experiments/synthetic.py --data data/cifar10-images

The same small classifier is trained on each set, until it has seen 200,000 images, and tested on
the real test images. The sets: real images, many and few; the tokenizer's reconstructions of
them; as many samples of the transformer, of the same classes; and half real, half samples. It needs
the run runs/transformer (docs/results/README.md has its command). Samples are kept in
runs/synthetic/ and not drawn again. Writes docs/results/synthetic/metrics.json.
"""

import argparse
import json
from pathlib import Path

import torch
from _common import CPU, results_of, write_metrics
from torch import Tensor
from tqdm import tqdm

from vqgan.checkpoint import fingerprint
from vqgan.classifier import train_classifier
from vqgan.data import TrainLoader, eval_batches, load_dataset
from vqgan.device import choose_precision
from vqgan.errors import InputError
from vqgan.eval_networks import CLASSIFIER_BATCH_SIZE, accuracy
from vqgan.files import save_plain
from vqgan.images import to_uint8
from vqgan.pretrained import Pipeline, load_pipeline
from vqgan.script import run_script
from vqgan.training import Stopwatch

OUT = results_of(__file__)
CHECKPOINT = Path("runs/transformer/checkpoint.pt")
SAMPLES = Path("runs/synthetic")
FEW = (1_000, 5_000)
GUIDANCE = (1.0, 2.0)
IMAGES_SEEN = 200_000  # by each classifier: four epochs of CIFAR-10's 50,000
WIDTH = 16  # of the classifier's first stage, as in train_vqgan.py
BATCH_SIZE = 500


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a classifier on samples, test it on images."
    )
    parser.add_argument("--data", required=True, help="the data of the run")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    watch, dtype = Stopwatch(), choose_precision("auto", CPU)
    data, pipeline = load_dataset(args.data), load_pipeline(CHECKPOINT)
    if tuple(pipeline.condition.names) != tuple(data.class_names):
        raise InputError(
            f"{CHECKPOINT} writes {', '.join(pipeline.condition.names)}, and {args.data} has "
            f"{', '.join(data.class_names)}: give the data of that run"
        )
    real, labels = data.train_images, data.train_labels
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))  # of all classes
    sets = {f"real-{few}": (real[order[:few]], labels[order[:few]]) for few in FEW}
    sets |= {"real": (real, labels), "reconstructions": (reconstruct(pipeline, real), labels)}
    for guidance in GUIDANCE:
        sets[f"guidance-{guidance:g}"] = (write(pipeline, labels, guidance), labels)
    samples, _ = sets[f"guidance-{GUIDANCE[-1]:g}"]
    sets["both"] = (torch.cat([real, samples]), torch.cat([labels, labels]))

    models = {}
    for name, (images, names) in sets.items():
        classifier = train_classifier(
            TrainLoader(images, CLASSIFIER_BATCH_SIZE, labels=names),
            num_classes=len(data.class_names),
            width=WIDTH,
            epochs=IMAGES_SEEN // len(images),
            seed=0,
            device=CPU,
            dtype=dtype,
            name=name,
        )
        share = accuracy(classifier, data, CPU)
        models[name] = {"training_images": len(images), "accuracy": share}
        print(f"{name}: {share:.1%} of the test images")
    about_data = {"source": args.data, "test_images": len(data.test_images)}
    results = {"images_seen": IMAGES_SEEN, "models": models}
    write_metrics(OUT, watch, about_data, results, dtype=dtype)
    print(json.dumps(models, indent=2))


@torch.no_grad()
def reconstruct(pipeline: Pipeline, images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> what is left of them after the tokenizer, in the same form."""
    batches = tqdm(list(eval_batches(images, BATCH_SIZE)), desc="reconstructions")
    return torch.cat([to_uint8(pipeline.tokenizer(x).reconstruction) for x in batches])


@torch.no_grad()
def write(pipeline: Pipeline, labels: Tensor, guidance: float) -> Tensor:
    """One sample for each label, uint8 (N, 3, H, W)."""
    path = SAMPLES / f"{fingerprint(pipeline.transformer)[:8]}-guidance-{guidance:g}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)["images"]
    generator, images = torch.Generator().manual_seed(0), []
    for classes in tqdm(labels.split(BATCH_SIZE), desc=f"samples, guidance {guidance:g}"):
        tokens = pipeline.transformer.sample(
            classes[:, None], guidance=guidance, generator=generator
        )
        images.append(to_uint8(pipeline.tokenizer.decode_tokens(tokens)))
    save_plain(path, {"images": torch.cat(images)})
    return torch.cat(images)


if __name__ == "__main__":
    run_script(parse, main, resumable=False)
