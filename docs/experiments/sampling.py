"""What each way to sample does to the pictures, drawn with the same random numbers every time.

    python docs/experiments/sampling.py --data data/cifar10-images

needs a class-conditional transformer beside its tokenizer and an evaluation classifier: those of
runs/transformer and runs/vqgan (docs/results/README.md has their commands). Every reader has
another pair:

    python docs/experiments/sampling.py --checkpoint shapes --data shapes --classes ring star

Writes, in docs/results/sampling/:

    temperature.png, top_k.png, top_p.png, guidance.png   a row for each value
    given.png        upper halves continued, and lower halves that could not be foreseen
    conditions.png   edges, gray and small copies of images, and their reconstructions
    metrics.json     what was measured beside them
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import CPU, results_of, write_metrics
from torch import Tensor

from vqgan import figures
from vqgan.classifier import Classifier, load_classifier
from vqgan.conditions import TRANSFORMS
from vqgan.data import load_dataset
from vqgan.evaluation import decode_tokens
from vqgan.image_folder import read_image
from vqgan.images import from_uint8, to_unit
from vqgan.metrics import CodebookUsage, psnr
from vqgan.pretrained import Pipeline, load_pipeline
from vqgan.sampling import sample_sliding_window
from vqgan.script import run_script
from vqgan.training import Stopwatch

OUT = results_of(__file__)
CHECKPOINT = "runs/transformer/checkpoint.pt"
FAMILIES = {  # of settings: the file's name, and the values of its rows (None: all codes)
    "temperature": (0.0, 0.5, 0.8, 1.0, 1.2),
    "top_k": (10, 50, 100, 300, None),
    "top_p": (0.5, 0.8, 0.9, 0.95, None),
    "guidance": (1.0, 2.0, 3.0, 5.0),
}
DRAWN = 6  # pictures of each class in a row
MEASURED = 30  # samples of each class that are measured
TEST_IMAGES = 20  # of each class
GIVEN, CONDITIONS = 10, 9  # test images in given.png and conditions.png
TIMED = 16  # grids that are generated with the cache and without
BATCH_SIZE = 100


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw what each way to sample does.")
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument(
        "--eval-classifier", type=Path, default=Path("runs/vqgan/eval_classifier.pt")
    )
    parser.add_argument("--data", required=True, help="shapes, or a folder with test/<class>/*")
    parser.add_argument("--classes", nargs=2, default=["horse", "ship"], help="that are drawn")
    return parser.parse_args()


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    watch, pipeline, eval_classifier, accuracy = (
        Stopwatch(),
        load_pipeline(args.checkpoint),
        None,
        None,
    )
    if args.checkpoint == CHECKPOINT:
        eval_classifier, accuracy = load_classifier(args.eval_classifier, CPU)
    images, labels = test_images(args.data, pipeline)
    x = from_uint8(images)  # (M, 3, H, W)
    tokens = torch.cat([pipeline.tokenizer.tokens(part) for part in x.split(BATCH_SIZE)])  # (M, N)

    samples = {
        family: draw_family(pipeline, family, values, args.classes, eval_classifier)
        for family, values in FAMILIES.items()
    }
    results = {
        "eval_classifier": {"accuracy": accuracy},
        "codes": pipeline.transformer.num_embeddings,
        "test_perplexity": usage(pipeline, tokens).perplexity,
        "test_nats_per_token": nats(pipeline, labels[:, None], tokens).mean().item(),
        "samples": samples,
        "given": draw_given(pipeline, x, labels, tokens),
        "class": worth_of_the_class(pipeline, labels, tokens),
        "cache": time_the_cache(pipeline),
    }
    draw_conditions(pipeline, x)
    results["cpu_seconds"] = round(time.process_time(), 1)
    write_metrics(OUT, watch, {"source": args.data, "test_images": len(images)}, results)
    print(json.dumps(results, indent=2))


def test_images(source: str, pipeline: Pipeline) -> tuple[Tensor, Tensor]:
    """The first images of each class, uint8 (M, 3, H, W), and their labels (M,).

    Of a folder only these files are read.
    """
    if Path(source).is_dir():
        images, labels = [], []
        for label, name in enumerate(pipeline.condition.names):
            for path in sorted((Path(source) / "test" / name).iterdir())[:TEST_IMAGES]:
                images.append(torch.tensor(read_image(path, pipeline.tokenizer.image_size)))
                labels.append(label)
        return torch.stack(images), torch.tensor(labels)
    data = load_dataset(source)
    chosen = [
        (data.test_labels == label).nonzero().flatten()[:TEST_IMAGES]
        for label in range(len(data.class_names))
    ]
    chosen = torch.cat(chosen)
    return data.test_images[chosen], data.test_labels[chosen]


def usage(pipeline: Pipeline, tokens: Tensor) -> CodebookUsage:
    counted = CodebookUsage(pipeline.transformer.num_embeddings)
    counted.update(tokens)
    return counted


def nats(pipeline: Pipeline, condition: Tensor, tokens: Tensor) -> Tensor:
    """-log p of each token given its condition and those before it: (M, C), (M, N) -> (M, N)."""
    costs = []
    for part, wanted in zip(condition.split(BATCH_SIZE), tokens.split(BATCH_SIZE), strict=True):
        logits = pipeline.transformer(part, wanted)  # (M, N, K)
        costs.append(F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"))
    return torch.cat(costs)


# --- a row for each value ------------------------------------------------------------------------


def draw_family(
    pipeline: Pipeline,
    family: str,
    values: tuple,
    classes: list[str],
    eval_classifier: Classifier | None,
) -> list[dict]:
    """One picture, with a row for each value of a setting; and what was measured of each."""
    names = pipeline.condition.names
    shown = pipeline.condition.encode_classes([name for name in classes for _ in range(DRAWN)])
    measured = pipeline.condition.encode_classes([name for name in names for _ in range(MEASURED)])
    rows, results = [], []
    K = pipeline.transformer.num_embeddings
    values = [value for value in values if family != "top_k" or value is None or value <= K]
    for value in values:
        setting = {family: value}
        tokens = pipeline.transformer.sample(
            measured, generator=torch.Generator().manual_seed(1), **setting
        )
        counted = usage(pipeline, tokens)
        result = setting | {
            "num_samples": len(tokens),
            "different": len(tokens.unique(dim=0)),
            "nats_per_token": nats(pipeline, measured, tokens).mean().item(),
            "codes_used": counted.codes_used,
            "perplexity": counted.perplexity,
            "class_accuracy": None,
        }
        label = f"{family.replace('_', '-')} {'all' if value is None else f'{value:g}'}"
        if eval_classifier is not None:
            x = decode_tokens(pipeline.tokenizer, tokens)
            predicted = torch.cat(
                [eval_classifier(part).argmax(dim=1) for part in x.split(BATCH_SIZE)]
            )
            result["class_accuracy"] = (predicted == measured[:, 0]).double().mean().item()
            label += f"\nclass accuracy {result['class_accuracy']:.0%}"
        results.append(result)
        # The same numbers in every row: what differs is the setting alone.
        tokens = pipeline.transformer.sample(
            shown, generator=torch.Generator().manual_seed(0), **setting
        )
        rows.append((label, to_unit(decode_tokens(pipeline.tokenizer, tokens))))
    title = f"Samples of {classes[0]} (left) and {classes[1]} (right); "
    title += "all rows have the same random numbers"
    figures.image_rows(OUT / f"{family}.png", rows, title=title)
    return results


# --- what is given -------------------------------------------------------------------------------


def draw_given(pipeline: Pipeline, x: Tensor, labels: Tensor, tokens: Tensor) -> dict:
    """Upper halves that are continued, and lower halves under which nothing was foreseen."""
    h, w = pipeline.tokenizer.grids[0]
    rows, pixels = h // 2, pipeline.tokenizer.image_size // h
    half = rows * w  # tokens of the upper half
    condition = labels[:, None]
    upper, lower = tokens.clone(), tokens.clone()
    upper[:, half:], lower[:, :half] = -1, -1

    def complete(given: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        parts = zip(condition.split(BATCH_SIZE), given.split(BATCH_SIZE), strict=True)
        return torch.cat(
            [pipeline.transformer.sample(c, given=g, generator=generator) for c, g in parts]
        )

    def decoded(tokens: Tensor) -> Tensor:
        return to_unit(decode_tokens(pipeline.tokenizer, tokens))

    below, above = complete(upper), complete(lower)
    shown = torch.arange(0, len(x), len(x) // GIVEN)[:GIVEN]
    given_above, given_below = to_unit(x[shown]), to_unit(x[shown])
    given_above[:, :, rows * pixels :] = 0.5
    given_below[:, :, : rows * pixels] = 0.5
    figures.image_rows(
        OUT / "given.png",
        [
            ("original", to_unit(x[shown])),
            ("given upper half", given_above),
            ("generated below it", decoded(below[shown])),
            ("given lower half", given_below),
            ("generated above it", decoded(above[shown])),
        ],
        title="Test images of which the transformer is given a half",
    )
    grayed = x.clone()
    grayed[:, :, rows * pixels :] = 0.0
    upper_alone = torch.cat([pipeline.tokenizer.tokens(part) for part in grayed.split(BATCH_SIZE)])
    changed = (upper_alone != tokens)[:, :half].unflatten(1, (rows, w))
    changed = changed.double().mean(dim=(0, 2))  # of each row of codes
    cost = {
        name: nats(pipeline, condition, sequences)[:, half:].mean().item()
        for name, sequences in {
            "real lower half below its real upper half": tokens,
            "generated lower half below a real upper half": below,
            "real lower half below a generated upper half": above,
        }.items()
    }
    # The same codes, decoded above other codes than their own.
    kept = [images[:, :, : rows * pixels] for images in (decoded(tokens), decoded(below))]
    return {
        "nats_per_token": cost,
        "upper_codes_changed_if_lower_pixels_are_gray": changed.tolist(),
        "psnr_of_upper_pixels_above_other_codes": psnr(*kept).mean().item(),
        "psnr_of_reconstructions": psnr(to_unit(x), decoded(tokens)).mean().item(),
    }


# --- what a class is worth -----------------------------------------------------------------------


def worth_of_the_class(pipeline: Pipeline, labels: Tensor, tokens: Tensor) -> dict:
    """What codes cost under each class, and under none; and which class makes them likeliest."""
    classes = range(len(pipeline.condition.names))
    by_class = torch.stack(
        [nats(pipeline, torch.full_like(labels, c)[:, None], tokens).sum(dim=1) for c in classes],
        dim=1,
    )  # nats an image, (M, classes)
    dropped = torch.full_like(labels, pipeline.transformer.null_token)[:, None]
    own = by_class.gather(1, labels[:, None])
    others = (by_class.sum(dim=1, keepdim=True) - own) / (len(classes) - 1)
    N = pipeline.transformer.seq_len
    return {
        "nats_per_token": {
            "conditioned": own.mean().item() / N,
            "condition dropped": nats(pipeline, dropped, tokens).mean().item(),
            "conditioned on a wrong class": others.mean().item() / N,
        },
        "likeliest_class_is_right": (by_class.argmin(dim=1) == labels).double().mean().item(),
    }


def time_the_cache(pipeline: Pipeline) -> dict:
    """The same grids, by a loop that keeps keys and values and by one that reads all again."""
    (h, w), N = pipeline.tokenizer.grids[0], pipeline.transformer.seq_len
    condition = torch.zeros(TIMED, 1, dtype=torch.int64)

    def seconds(sample: Callable) -> tuple[float, Tensor]:
        start = time.process_time()
        tokens = sample(generator=torch.Generator().manual_seed(0))
        return time.process_time() - start, tokens.flatten(1)

    with_cache, tokens = seconds(partial(pipeline.transformer.sample, condition))
    window = partial(
        sample_sliding_window, pipeline.transformer, pipeline.tokenizer, condition, h, w
    )
    without, same = seconds(window)
    return {
        "grids": TIMED,
        "positions_with": N,
        "positions_without": N * (N + 1) // 2,
        "cpu_seconds_with": with_cache,
        "cpu_seconds_without": without,
        "codes_that_agree": (tokens == same).double().mean().item(),
    }


# --- pictures of pictures ------------------------------------------------------------------------


def draw_conditions(pipeline: Pipeline, x: Tensor) -> None:
    x = x[torch.arange(TEST_IMAGES // 2, len(x), len(x) // CONDITIONS)[:CONDITIONS]]
    rows = [("original", to_unit(x))]
    for name, picture_of in TRANSFORMS.items():
        picture = picture_of(x)
        rows.append((name, to_unit(picture)))
        rows.append(
            (f"{name},\nreconstructed", to_unit(pipeline.tokenizer(picture).reconstruction))
        )
    title = "What a transformer can be conditioned on, and what the tokenizer keeps of it"
    figures.image_rows(OUT / "conditions.png", rows, title=title)


if __name__ == "__main__":
    run_script(parse, main, resumable=False)
