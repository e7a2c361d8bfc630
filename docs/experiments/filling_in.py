"""A GPT and masked transformers over the same tokens: their price, samples by rounds, and holes.

    python docs/experiments/filling_in.py --data data/cifar10-images

reads the runs of `docs/results/filling_in/run.sh`, for drawn shapes and for CIFAR-10: a GPT
(runs/filling_in/SET-gpt), a masked transformer of as many epochs (SET-masked), one that was trained
longer (SET-masked-long), and for the shapes two that differ in the loss. A run that is missing is
left out.

A masked transformer can generate in a GPT's order, too, and then it has an exact price: it is
measured beside the bound, which averages over all orders.

Holes are filled in 1,000 test images, once each, with the condition dropped. The error inside of a
hole is that of a sample, and the original is one of many right answers. The seam is the mean
absolute step across a border of the hole, over the same in the original: 1 is seamless.

Writes, in docs/results/filling_in/:

    steps.png          class accuracy and Fréchet distance of samples, by the number of rounds
    shapes.png         holes in drawn shapes, and three fillings of each by both
    cifar10.png        the same for photographs
    metrics.json       what was measured
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from _common import flags_of_runs, read_metrics, results_of, write_metrics
from torch import Tensor

from vqgan import completion, figures, metrics
from vqgan.classifier import Classifier, load_classifier
from vqgan.completion import complete, missing_tokens, paint_over, paste
from vqgan.data import ImageDataset, eval_batches, load_dataset, pixel_variance
from vqgan.eval_networks import extract_features
from vqgan.evaluation import decode_tokens
from vqgan.images import from_uint8, to_unit
from vqgan.masked import MaskedTransformer
from vqgan.pretrained import Pipeline, load_pipeline
from vqgan.script import run_script
from vqgan.training import Stopwatch
from vqgan.vqvae import VQAutoencoder

OUT, CPU = results_of(__file__), torch.device("cpu")
SETS = {"shapes": "drawn shapes", "cifar10": "CIFAR-10"}
CLASSIFIERS = {"shapes": "filling_in/shapes-gpt", "cifar10": "codebooks"}
MODELS = {
    "gpt": "GPT",
    "masked": "masked",
    "masked-long": "masked, longer training",
    "masked-uniform": "masked, uniform schedule",
    "masked-all": "masked, loss on all tokens",
}
FILLERS = ("gpt", "masked", "masked-long")  # whose fillings are shown and measured
LONGEST = {"shapes": "masked-long", "cifar10": "masked"}  # whose confidence is varied
HOLES = {  # x0, y0, x1, y1 in pixels: a quarter of an image, and two halves
    "center": (8, 8, 24, 24),
    "upper-half": (0, 0, 32, 16),
    "lower-half": (0, 16, 32, 32),
}
NUM_TEST, NUM_PRICED, NUM_SHOWN, FILLINGS = 1000, 150, 8, 3
TIMED_BATCHES, TIMED_STEPS, REPETITIONS = (1, 16), (8, 12), 5
# Of the noise on the confidence: none, the paper's, more, and so much that any token may be kept.
CHOICES, CHOICE_STEPS = {"none": 0.0, "paper": 4.5, "more": 12.0, "random": 1e4}, 12
BATCH_SIZE = 250
BEST: dict[str, Callable] = {"class_accuracy": max, "frechet": min}
MAX_STEPS = 12  # rounds that are still few


def hole_of(box: tuple[int, int, int, int], size: int) -> Tensor:
    """The pixels of a box, (H, W) bool."""
    x0, y0, x1, y1 = box
    hole = torch.zeros(size, size, dtype=torch.bool)
    hole[y0:y1, x0:x1] = True
    return hole


def steps_across(x: Tensor, box: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """The mean absolute step across each border of a box that lies inside images (B, 3, H, W)."""
    x0, y0, x1, y1 = box
    inside_x, inside_y = slice(x0, x1), slice(y0, y1)
    size, steps = x.shape[-1], {}
    if y0 > 0:
        steps["upper"] = x[:, :, y0, inside_x] - x[:, :, y0 - 1, inside_x]
    if y1 < size:
        steps["lower"] = x[:, :, y1, inside_x] - x[:, :, y1 - 1, inside_x]
    if x0 > 0:
        steps["left"] = x[:, :, inside_y, x0] - x[:, :, inside_y, x0 - 1]
    if x1 < size:
        steps["right"] = x[:, :, inside_y, x1] - x[:, :, inside_y, x1 - 1]
    return {side: step.abs().mean() for side, step in steps.items()}


@torch.no_grad()
def fill(pipeline: Pipeline, x: Tensor, box: tuple, seed: int = 0) -> Tensor:
    """Fill a hole in images (B, 3, H, W), with the original around it."""
    hole, generator = hole_of(box, x.shape[-1]), torch.Generator().manual_seed(seed)
    parts = []
    for part in x.split(BATCH_SIZE):
        parts.append(paste(part, complete(pipeline, part, hole, generator=generator), hole))
    return torch.cat(parts)


def fill_with_ring(pipeline: Pipeline, x: Tensor, box: tuple) -> Tensor:
    """Fill a hole, and generate all tokens beside it, too, which have seen its paint."""

    def missing(hole: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        wider = [
            F.max_pool2d(part.view(1, *grid).float(), kernel_size=3, stride=1, padding=1)
            for part, grid in zip(
                missing_tokens(hole, grids).split([h * w for h, w in grids]), grids, strict=True
            )
        ]
        return torch.cat([part.flatten().bool() for part in wider])

    with patch.object(completion, "missing_tokens", missing):
        return fill(pipeline, x, box)


@torch.no_grad()
def measure_holes(
    fill: Callable[[Tensor, tuple], Tensor], data: ImageDataset, classifier: Classifier
) -> dict:
    """Error, SSIM, class accuracy and seams of filled holes, by hole.

    Error and SSIM are those inside of the hole. The class is that of the whole image, most of which
    is the original. Inside of images (B, 3, H, W), `fill` replaces what is in a box.
    """
    x, labels = from_uint8(data.test_images[:NUM_TEST]), data.test_labels[:NUM_TEST]
    variance, results = pixel_variance(data.train_images), {}
    for name, box in HOLES.items():
        filled = fill(x, box)
        x0, y0, x1, y1 = box
        part, original = (images[:, :, y0:y1, x0:x1] for images in (filled, x))
        unit, original_unit = to_unit(part), to_unit(original)
        logits = torch.cat([classifier(batch) for batch in filled.split(BATCH_SIZE)])
        before = steps_across(x, box)
        seams = {f"seam_{s}": (v / before[s]).item() for s, v in steps_across(filled, box).items()}
        results[name] = seams | {
            "nmse": metrics.normalized_mse(original, part, variance).mean().item(),
            "ssim": metrics.ssim(original_unit, unit).mean().item(),
            "class_accuracy": (logits.argmax(dim=1) == labels).double().mean().item(),
        }
    return results


def fillings_to_compare(tokenizer: VQAutoencoder) -> dict[str, Callable]:
    """What no transformer made: the original, its reconstruction, and the mean of the border."""

    def reconstructed(x: Tensor, box: tuple) -> Tensor:
        x_hat = torch.cat([tokenizer(part).reconstruction for part in x.split(BATCH_SIZE)])
        return paste(x, x_hat, hole_of(box, x.shape[-1]))

    return {
        "original": lambda x, box: x,
        "reconstruction": reconstructed,
        "paint": lambda x, box: paint_over(x, hole_of(box, x.shape[-1])),
    }


@torch.no_grad()
def raster_nats(pipeline: Pipeline, data: ImageDataset) -> float:
    """The nats per token of a masked transformer that generates token after token, as a GPT does.

    Position i is predicted with the tokens before it in view, and all others masked.
    """
    transformer = pipeline.transformer
    tokens = pipeline.tokenizer.tokens(from_uint8(data.test_images[:NUM_PRICED]))  # (B, N)
    N, losses = tokens.shape[1], []
    positions = torch.arange(N)
    hidden = positions >= positions[:, None]  # (N, N): row i hides i and those behind it
    for label, s in zip(data.test_labels[:NUM_PRICED], tokens, strict=True):
        logits = transformer(label.expand(N, 1), torch.where(hidden, transformer.mask_token, s))
        losses.append(F.cross_entropy(logits[positions, positions], s))
    return torch.stack(losses).mean().item()


@torch.no_grad()
def measure_choices(pipeline: Pipeline, data: ImageDataset, classifier: Classifier) -> dict:
    """Class accuracy and Fréchet distance of samples, by the temperature of the confidence."""
    labels, results = data.test_labels[:NUM_TEST], {}
    features = extract_features(classifier, eval_batches(data.test_images))
    for name, choice in CHOICES.items():
        settings = {"steps": CHOICE_STEPS, "choice_temperature": choice, "guidance": 2.0}
        generator, images = torch.Generator().manual_seed(0), []
        for condition in labels[:, None].split(BATCH_SIZE):
            tokens = pipeline.transformer.sample(condition, generator=generator, **settings)
            images.append(decode_tokens(pipeline.tokenizer, tokens))
        predicted = torch.cat([classifier(x).argmax(dim=1) for x in images])
        frechet = metrics.frechet_distance(extract_features(classifier, images), features)
        accuracy = (predicted == labels).double().mean().item()
        results[name] = settings | {"class_accuracy": accuracy, "frechet": frechet}
    return results


def seconds_per_image(pipelines: Mapping[str, Pipeline]) -> dict[str, dict[str, float]]:
    """The median time of a few samplings, which take turns, by model, batch size and rounds."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(REPETITIONS):
        for model, pipeline in pipelines.items():
            is_masked = isinstance(pipeline.transformer, MaskedTransformer)
            for batch_size in TIMED_BATCHES:
                condition = torch.zeros(batch_size, 1, dtype=torch.int64)
                for steps in TIMED_STEPS if is_masked else (None,):
                    settings = {"steps": steps} if steps else {}
                    start = time.perf_counter()
                    pipeline.transformer.sample(condition, **settings)
                    name = f"batch {batch_size}" + (f", {steps} rounds" if steps else "")
                    times[model, name].append((time.perf_counter() - start) / batch_size)
    seconds: dict[str, dict[str, float]] = defaultdict(dict)
    for (model, name), values in times.items():
        seconds[model][name] = statistics.median(values)
    return seconds


def read_run(run: Path) -> dict:
    """The price of a run's transformer, and its samples at the guidance that is best for each."""
    metadata = read_metrics(run)
    result = metadata["models"]["transformer"]
    keys = ("nats_per_token", "nats_per_token_standard_error", "nats_per_token_is_bound")
    keys = (*keys, "bits_per_image", "epochs", "best_epoch", "seconds")
    row = {key: result[key] for key in keys}
    row["nats_per_token_by_epoch"] = [epoch["loss"] for epoch in metadata["validation"]]
    row["samples"] = samples = metadata["samples"]
    few = [sample for sample in samples if sample.get("steps", 0) <= MAX_STEPS]  # or a GPT's
    for key, best in BEST.items():
        row[key] = best(sample[key] for sample in few)
        by_steps: dict[str, list[float]] = defaultdict(list)
        for sample in samples:
            by_steps[str(sample.get("steps", "all"))].append(sample[key])
        row[f"{key}_by_rounds"] = {steps: best(values) for steps, values in by_steps.items()}
    edit = {"edit": "the loss of run.sh, on all tokens"} if run.name.endswith("-all") else {}
    return row | edit | {key: metadata[key] for key in ("command", "device")}


def draw_steps(path: Path, results: Mapping[str, Mapping]) -> None:
    """A row of panels per data set: class accuracy and Fréchet distance, by rounds."""
    figure = figures.new_figure(10.0, 7.0, "Samples by the number of rounds, at the best guidance")
    measures = {"class_accuracy": "class accuracy", "frechet": "Fréchet distance"}
    panels = [(name, key) for name in SETS for key in measures]
    for number, (name, key) in enumerate(panels, start=1):
        labels = {"xlabel": "rounds", "ylabel": f"{measures[key]}, {SETS[name]}"}
        axes = figures.plot_axes(figure, number, 2, rows=len(SETS), **labels)
        for i, model in enumerate(FILLERS):
            row = results.get(f"{name}-{model}")
            if row is None:
                continue
            best = row[f"{key}_by_rounds"]
            style: dict[str, Any] = {"label": MODELS[model], "color": figures.COLORS[i]}
            if "all" in best:
                axes.axhline(best["all"], linestyle="--", **style)
            else:
                axes.plot([int(s) for s in best], [*best.values()], marker="o", **style)
        axes.set_xscale("log", base=2)
        ticks = [2**i for i in range(7)]
        axes.set_xticks(ticks, labels=map(str, ticks))
        axes.set_ylim(bottom=0)
        if number == 1:
            axes.legend(loc="lower right", **figures.LEGEND)
    figures.save_figure(figure, path)


def draw_holes(path: Path, pipelines: Mapping[str, Pipeline], x: Tensor, title: str) -> None:
    """The originals, the hole, and a few fillings by each model."""
    box = HOLES["center"]
    hole = hole_of(box, x.shape[-1])
    rows = [("original", to_unit(x)), ("hole", to_unit(x).masked_fill(hole, 0.5))]
    for model, pipeline in pipelines.items():
        for i in range(FILLINGS):
            rows.append((MODELS[model] if i == 0 else "", to_unit(fill(pipeline, x, box, seed=i))))
    figures.image_rows(path, rows, title=title)


def main(args: argparse.Namespace) -> None:
    watch, results = Stopwatch(), {}

    def add(name: str, parts: dict[str, dict]) -> None:
        results.update({f"{name}-{part}": values for part, values in parts.items()})

    for name, title in SETS.items():
        data = load_dataset("shapes" if name == "shapes" else args.data)
        classifier, _ = load_classifier(args.runs / CLASSIFIERS[name] / "eval_classifier.pt", CPU)
        pipelines: dict[str, Pipeline] = {}
        for model in MODELS:
            run = args.runs / "filling_in" / f"{name}-{model}"
            if not (run / "metrics.json").exists():
                print(f"left out: there is no finished run {run}")
                continue
            row = results[f"{name}-{model}"] = read_run(run)
            if model in FILLERS:
                pipeline = pipelines[model] = load_pipeline(run)
                add(f"{name}-{model}", measure_holes(partial(fill, pipeline), data, classifier))
                if isinstance(pipeline.transformer, MaskedTransformer):
                    row["raster_nats_per_token"] = raster_nats(pipeline, data)
            rounds = [r for r in row["samples"] if r["guidance"] == 3 and "steps" in r]
            add(f"{name}-{model}-rounds", {str(r["steps"]): r for r in rounds})
            print(name, model, f"{watch.seconds:.0f} s", flush=True)
        for model in ("gpt", "masked"):
            ring = measure_holes(partial(fill_with_ring, pipelines[model]), data, classifier)
            add(f"{name}-{model}-ring", ring)
        longest = LONGEST[name]
        choices = measure_choices(pipelines[longest], data, classifier)
        add(f"{name}-{longest}-choice", choices)
        for other, filling in fillings_to_compare(pipelines["gpt"].tokenizer).items():
            add(f"{name}-{other}", measure_holes(filling, data, classifier))
        for model, seconds in seconds_per_image(pipelines).items():
            results[f"{name}-{model}"]["seconds_per_image"] = seconds
        shown = next(eval_batches(data.test_images[:NUM_SHOWN], NUM_SHOWN))
        draw_holes(OUT / f"{name}.png", pipelines, shown, f"Holes in {title}, filled three times")
    draw_steps(OUT / "steps.png", results)
    write_metrics(OUT, watch, {"source": args.data, "test_images": NUM_TEST}, {"models": results})
    print(f"three pictures and metrics.json are in {OUT}")


if __name__ == "__main__":
    run_script(
        flags_of_runs("Compare a GPT with a masked transformer.").parse_args, main, resumable=False
    )
