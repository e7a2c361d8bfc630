"""Two grids of codes: what VQ-VAE-2's coarse grid holds, and a transformer over both.

    python docs/experiments/hierarchy.py --data shapes

reads the runs of `docs/results/hierarchy/run.sh`: a VQ-VAE-2 and two VQ-VAEs with one grid each
(runs/hierarchy/MODEL), and their transformers (runs/hierarchy/prior-MODEL).

Writes, in docs/results/hierarchy/:

    reconstructions.png   test images, by the coarse tokens, by both, and by those of one grid
    samples.png           what the transformers generate for four classes
    metrics.json          of each model: bits, errors, and its transformer's price and samples
"""

import argparse

import torch
from _common import flags_of_runs, read_metrics, results_of, write_metrics
from torch import Tensor

from vqgan import figures
from vqgan.data import load_dataset
from vqgan.images import from_uint8, to_unit
from vqgan.pretrained import load_pipeline, load_tokenizer
from vqgan.script import run_script
from vqgan.training import Stopwatch
from vqgan.vqvae import VQAutoencoder
from vqgan.vqvae2 import VQVAE2

OUT = results_of(__file__)
MODELS = {
    "flat-8x8": "VQ-VAE, 8x8",
    "flat-16x16": "VQ-VAE, 16x16",
    "vqvae2": "VQ-VAE-2, 8x8 and 16x16",
}
NUM_SHOWN, NUM_CLASSES = 12, 4  # and three samples of each class


def rows_of(label: str, tokenizer: VQAutoencoder, tokens: Tensor) -> list[tuple[str, Tensor]]:
    """The images of tokens; with two grids, first what the coarse ones alone give."""
    rows = []
    if isinstance(tokenizer, VQVAE2):
        rows.append(("VQ-VAE-2, coarse tokens alone", to_unit(tokenizer.decode_coarse(tokens))))
    return [*rows, (label, to_unit(tokenizer.decode_tokens(tokens)))]


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    watch, data = Stopwatch(), load_dataset(args.data)
    x = from_uint8(data.test_images[:NUM_SHOWN])
    rows, sample_rows, results = [("original", to_unit(x))], [], {}
    for name, title in MODELS.items():
        run = args.runs / "hierarchy" / name
        prior_run = run.with_name(f"prior-{name}")
        (result,) = read_metrics(run)["models"].values()
        metadata = read_metrics(prior_run)
        prior = metadata["models"]["transformer"]
        label = f"{title}\n{result['bits_per_image']:,.0f} bits"
        tokenizer, _ = load_tokenizer(run)
        rows += rows_of(label, tokenizer, tokenizer.tokens(x))

        pipeline, generator = load_pipeline(prior_run), torch.Generator().manual_seed(0)
        classes = [
            c for c in data.class_names[:NUM_CLASSES] for _ in range(NUM_SHOWN // NUM_CLASSES)
        ]
        conditions = pipeline.condition.encode_classes(classes)
        tokens = pipeline.transformer.sample(conditions, generator=generator)
        label = f"{title}\n{prior['bits_per_image']:,.0f} bits"
        sample_rows += rows_of(label, pipeline.tokenizer, tokens)
        keys = ("nmse", "psnr", "ssim", "codes_used", "perplexity", "bits_per_image", "epochs")
        results[name] = {key: result[key] for key in keys} | {
            "seq_len": tokenizer.seq_len,
            "prior_bits_per_image": prior["bits_per_image"],
            "nats_per_token": prior["nats_per_token"],
            "class_accuracy": prior["class_accuracy"],
            "frechet": prior["frechet"],
            "prior_seconds": prior["seconds"],
            "prior_epochs": prior["epochs"],
            "command": read_metrics(run)["command"],
            "prior_command": metadata["command"],
        }
    title = "Test images through one grid of codes, and through two (bits at fixed length)"
    figures.image_rows(OUT / "reconstructions.png", rows, title=title)
    shown = ", ".join(data.class_names[:NUM_CLASSES])
    title = f"Samples, three for each of {shown} (bits per test image with the transformer)"
    figures.image_rows(OUT / "samples.png", sample_rows, title=title)
    about_data = {"source": args.data, "test_images": len(data.test_images)}
    write_metrics(OUT, watch, about_data, {"models": results})
    for name, row in results.items():
        print(
            f"{name:10} error {row['nmse']:.4f}, {row['bits_per_image']:.0f} bits, with the "
            f"transformer {row['prior_bits_per_image']:.0f}, class {row['class_accuracy']:.1%}"
        )
    print(f"two pictures and metrics.json are in {OUT}")


if __name__ == "__main__":
    run_script(
        flags_of_runs("Compare one grid of codes with two.").parse_args, main, resumable=False
    )
