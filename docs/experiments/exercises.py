"""The answers to the exercises of the lab (docs/lab.md), measured.

    python docs/experiments/exercises.py                those that are not finished yet
    python docs/experiments/exercises.py greedy ssim    these, again

One function an exercise. Where it trains, it calls the script itself with the flags that the
exercise gives; where the exercise edits the source, it makes the same edit in memory, and says
which line it stands for. What was trained stays in runs/exercises/, and is not trained again.
Writes in docs/results/exercises/ metrics.json, with the command, data, device and seconds of each,
and the pictures. The class accuracy and the Fréchet distance are by the evaluation classifier of
docs/results/shapes-tokenizer, which is trained again, for some minutes, if its run is not there.
"""

import argparse
import functools
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import codebook_plane as plane
import torch
import torch.nn.functional as F
from _common import CPU, model_folder, read_metrics, results_of
from torch import Tensor

import train_transformer
import train_vqgan
import train_vqvae
from vqgan import figures, metrics, tokens
from vqgan.classifier import Classifier, load_classifier
from vqgan.data import eval_batches, load_dataset
from vqgan.device import choose_precision, describe_device
from vqgan.errors import InputError
from vqgan.eval_networks import extract_features, load_eval_classifier
from vqgan.evaluation import decode_tokens
from vqgan.files import write_json
from vqgan.finite_scalar import LFQ
from vqgan.images import from_uint8, to_unit
from vqgan.pretrained import load_model, load_pipeline, load_tokenizer
from vqgan.script import run_script
from vqgan.shapes import CLASSES, render_shapes
from vqgan.training import Run, Stopwatch, read_log, versions
from vqgan.vqvae import VQVAE

OUT = results_of(__file__)
RUNS = Path("runs/exercises")
NUM_SAMPLES = 1000
PRETRAINED = "vqgan/pretrained/shapes/tokenizer.pt"
SMALL_VQVAE = "--data shapes --epochs 3 --models vqvae"
SMALL_GPT = "--n-layer 2 --n-head 4 --n-embd 128 --dropout 0 --lr 2e-3 --weight-decay 0.01"
SMALL_GPT += " --eval-classifier-epochs 1 --num-samples 100"
SMALL_VQGAN = (
    "--data shapes --epochs 3 --batch-size 32 --lr 2e-3 --perceptual-weight 0.2 --channels 16 "
    "--disc-channels 32"
)


def train(
    script, flags: str, name: str, *, edit: AbstractContextManager | None = None, words: str = ""
) -> dict:
    """Run a script's main() as a shell would, under an edit; the results of its one model.

    A run that is finished is not started again; one that was cut off goes on.
    """
    folder = RUNS / name
    if not (folder / "metrics.json").exists():
        file = Path(script.__file__).name
        command = [file, *flags.split(), "--out", str(folder)]
        command += ["--resume"] if (folder / "config.json").exists() else []
        with patch.object(sys, "argv", command), edit or nullcontext():
            script.main(script.parse())
    content = read_metrics(folder)
    (result,) = content["models"].values()
    metadata = {key: content[key] for key in ("command", "data", "device")}
    for key in ("baselines", "validation"):
        metadata |= {key: content[key]} if key in content else {}
    return metadata | ({"edit": words} if words else {}) | result


def checkpoint(name: str, model: str) -> Path:
    return model_folder(RUNS / name, model) / "checkpoint.pt"


def earlier(name: str, model: str, command: str) -> Path:
    """The checkpoint of a run whose results are committed, but not its weights."""
    path = model_folder(Path("runs") / name, model) / "checkpoint.pt"
    if not path.exists():
        raise InputError(f"{path} is not there: run first: {command} --out runs/{name}")
    return path


def measured(watch: Stopwatch, what: str, **results) -> dict:
    """An entry that no script wrote."""
    return {
        "command": what,
        "data": {"source": "shapes", "test_images": 2000},
        "device": describe_device(CPU, torch.float32),
        "seconds": round(watch.seconds, 1),
    } | results


def test_batches() -> list[Tensor]:
    return list(eval_batches(load_dataset("shapes").test_images, 500))


# --- codebooks since 2017 ----------------------------------------------------------------------


def levels() -> dict:
    """512 codes of FSQ on three grids: few dimensions of many levels, or many of two."""
    grids = {"fsq-32x16": "32 16", "fsq-8x8x8": "8 8 8", "fsq-2-nine-times": " ".join(9 * "2")}
    flags = f"{SMALL_VQVAE} --quantizer fsq --levels"
    return {name: train(train_vqvae, f"{flags} {grid}", name) for name, grid in grids.items()}


def no_entropy() -> dict:
    """LFQ with its entropies and without, which no flag gives: LFQ.entropy_weight = 0.0."""
    flags, edit = f"{SMALL_VQVAE} --quantizer lfq", patch.object(LFQ, "entropy_weight", 0.0)
    without = train(train_vqvae, flags, "lfq-no-entropy", edit=edit, words="entropy_weight = 0.0")
    return {"lfq": train(train_vqvae, flags, "lfq"), "lfq-no-entropy": without}


def few_dimensions() -> dict:
    """SimVQ's codes in 64 dimensions and in 8."""
    flags = f"{SMALL_VQVAE} --quantizer simvq --embedding-dim"
    return {f"simvq-{D}": train(train_vqvae, f"{flags} {D}", f"simvq-{D}") for D in (64, 8)}


def rounds() -> dict:
    """Residual codes: how evenly each of three rounds uses the table of eight that they share."""
    flags = f"{SMALL_VQVAE} --quantizer residual --num-rounds 3 --num-embeddings 8"
    result = train(train_vqvae, flags, "residual-3x8")
    tokenizer, _ = load_tokenizer(RUNS / "residual-3x8")
    with torch.no_grad():
        tokens = torch.cat([tokenizer.tokens(x) for x in test_batches()])  # (images, 3 x 64)
    usages = [metrics.CodebookUsage(8) for _ in range(3)]
    for usage, part in zip(usages, tokens.chunk(3, dim=1), strict=True):
        usage.update(part)
    return {"residual-3x8": result | {"perplexity_of_round": [u.perplexity for u in usages]}}


# --- the codebook ------------------------------------------------------------------------------


def how_many_codes() -> dict:
    """K of 16 and 4,096; 512 is docs/results/guards-both."""
    return {
        f"k{K}": train(train_vqvae, f"{SMALL_VQVAE} --num-embeddings {K}", f"k{K}")
        for K in (16, 4096)
    }


@torch.no_grad()
def distance_to_codes(path: Path) -> dict:
    """How far vectors lie from their codes over the test set, and how large they are."""
    model = load_model(path)
    z_e = torch.cat([model.encoder(x) for x in test_batches()])  # (N, D, h, w)
    z_q = torch.cat([model.quantizer(part).z_q for part in z_e.split(500)])
    error = F.mse_loss(z_q, z_e).item()
    return {"commitment": error, "commitment_by_variance": error / z_e.var().item()}


def no_commitment() -> dict:
    """beta = 0, which no flag gives: build_model returns VQVAE(**model_args, beta=0.0)."""
    edit = patch.object(train_vqvae, "VQVAE", lambda **model_args: VQVAE(**model_args, beta=0.0))
    words = "train_vqvae.py, build_model: return VQVAE(**model_args, beta=0.0), arguments"
    usual = earlier("guards-both", "vqvae", f"python train_vqvae.py {SMALL_VQVAE}")
    results = {"beta-0.25": measured(Stopwatch(), "of guards-both", **distance_to_codes(usual))}
    for name, flags in (
        ("beta-0", SMALL_VQVAE),
        ("beta-0-gradient", f"{SMALL_VQVAE} --quantizer gradient"),
    ):
        result = train(train_vqvae, flags, name, edit=edit, words=words)
        log = read_log(RUNS / name / "log.csv")
        result["quantizer_in_log"] = [row["quantizer"] for row in log]
        results[name] = result | distance_to_codes(checkpoint(name, "vqvae"))
    return results


def encoder_gradient(x: Tensor) -> float:
    """Size of the gradient that the reconstruction error of a new VQ-VAE sends to its encoder."""
    torch.manual_seed(0)
    model = VQVAE().train()
    loss = F.mse_loss(model(x).reconstruction, x)
    first = model.encoder[0].weight
    (gradient,) = torch.autograd.grad(loss, [first], allow_unused=True)
    return 0.0 if gradient is None else gradient.norm().item()


def no_straight_through() -> dict:
    """gradient_estimators.py: `return z_e + (z_q - z_e).detach()` becomes `return z_q`."""
    estimators = {"straight-through": lambda z_e, z_q: z_q}
    edit = patch.dict("vqgan.quantizer.GRADIENT_ESTIMATORS", estimators)
    words = "vqgan/gradient_estimators.py, straight_through: return z_q"
    name = "no-straight-through"
    result = train(train_vqvae, SMALL_VQVAE, name, edit=edit, words=words)
    x = test_batches()[0][:128]
    result["encoder_gradient_with"] = encoder_gradient(x)
    with patch.dict("vqgan.quantizer.GRADIENT_ESTIMATORS", estimators):
        result["encoder_gradient_without"] = encoder_gradient(x)
    log = read_log(RUNS / name / "log.csv")
    result["quantizer_in_log"] = [row["quantizer"] for row in log]
    model = load_model(checkpoint(name, "vqvae"))
    with torch.no_grad():
        vectors = torch.cat([model.encoder(part) for part in test_batches()])
    vectors = vectors.transpose(0, 1).flatten(1)  # (D, N)
    spread = (vectors - vectors.mean(dim=1, keepdim=True)).norm(dim=0).mean()
    result["spread_of_vectors"] = (spread / vectors.norm(dim=0).mean()).item()
    usual = load_model(earlier("guards-both", "vqvae", f"python train_vqvae.py {SMALL_VQVAE}"))
    with torch.no_grad():
        x = x[:12]
        rows = [("original", to_unit(x))]
        rows += [("straight-through", to_unit(usual(x).reconstruction))]
        rows += [("without", to_unit(model(x).reconstruction))]
    title = "A VQ-VAE with the straight-through step and without, three epochs each"
    figures.image_rows(OUT / "no_straight_through.png", rows, title=title)
    return {name: result}


def dead_codes() -> dict:
    """Where codes go that no vector chooses, without restarts: those of codebook_plane.py."""
    watch, steps, results = Stopwatch(), (340, 800, 1600, 2000, 2600), {}
    for name in ("ema-start-only", "gradient"):
        codes, _ = plane.train(plane.MODELS[name], steps[-1])
        indices = plane.nearest_indices(plane.test_points(steps[0]), codes[steps[0]])
        dead = [k for k in range(plane.K) if k not in indices]
        results[name] = {
            "dead": dead,
            "codes_used": [plane.measure(codes[step], step)["codes_used"] for step in steps],
            "positions_of_the_dead": [codes[step, dead].tolist() for step in steps],
        }
    what = f"codebook_plane.train for {steps[-1]} steps"
    data = {"source": "points in the plane", "points_a_step": plane.POINTS}
    return {"dead-codes": measured(watch, what, data=data, steps=steps, **results)}


# --- the VAE and the VQGAN -----------------------------------------------------------------------


def no_kl() -> dict:
    """A VAE that pays nothing for its bits; docs/results/shapes has it with the KL."""
    flags = "--data shapes --epochs 6 --models vae --kl-weight 0"
    result = train(train_vqvae, flags, "no-kl")
    shutil.copy(RUNS / "no-kl" / "vae_samples.png", OUT / "no_kl_samples.png")
    model = load_model(checkpoint("no-kl", "vae"))
    with torch.no_grad():
        clouds = [model.encode(x) for x in test_batches()]
    mean, log_var = (torch.cat(parts) for parts in zip(*clouds, strict=True))  # (N, Z)
    result["deviation_of_means"] = mean.std(dim=0).mean().item()
    result["mean_scale_of_a_cloud"] = (0.5 * log_var).exp().mean().item()
    return {"no-kl": result}


def early_discriminator() -> dict:
    """A discriminator that is used from the first step; docs/results/shapes-vqgan starts late."""
    command = f"python train_vqgan.py {SMALL_VQGAN} --disc-start 0.5"
    late = earlier("shapes-vqgan", "vqgan", command)
    flags = f"{SMALL_VQGAN} --disc-start 0 --disc-warmup 0 --eval-classifier-epochs 1"
    result = train(train_vqgan, flags, "early-discriminator")
    for key in (
        "frechet",
        "class_accuracy",
    ):  # by a classifier of one epoch: measured again below
        result.pop(key)
    data, eval_classifier = load_dataset("shapes"), load_eval_classifier_of_shapes()
    x = from_uint8(data.test_images[:12])
    rows = [("original", to_unit(x))]
    labels = (("late", "from the middle on"), ("early", "from the first step"))
    for name, label in labels:
        path = late if name == "late" else checkpoint("early-discriminator", "vqgan")
        model = load_model(path)
        rows.append((label, to_unit(model(x).reconstruction)))
        logits = torch.cat([eval_classifier(model(part).reconstruction) for part in test_batches()])
        right = logits.argmax(dim=1) == data.test_labels
        result[f"class_accuracy_{name}"] = right.double().mean().item()
    title = "A VQGAN of drawn shapes, three epochs: when the discriminator is used"
    figures.image_rows(OUT / "early_discriminator.png", rows, title=title)
    log = read_log(RUNS / "early-discriminator" / "log.csv")
    keys = ("epoch", "reconstruction", "perceptual", "real", "fake", "lambda", "codes_used")
    result["log"] = [{key: row[key] for key in keys} for row in log]
    return {"early-discriminator": result}


# --- a measure ---------------------------------------------------------------------------------


@torch.no_grad()
def ssim() -> dict:
    """SSIM of the same reconstructions, with its range given rightly and wrongly."""
    watch = Stopwatch()
    model, _ = load_tokenizer(PRETRAINED)
    values = {"right": [], "constants_for_range_2": [], "minus_one_to_one": [], "bytes": []}
    for x in test_batches():
        x, y = to_unit(x), to_unit(model(x).reconstruction)
        values["right"].append(metrics.ssim(x, y))
        with patch.multiple(metrics, SSIM_C1=0.02**2, SSIM_C2=0.06**2):
            values["constants_for_range_2"].append(metrics.ssim(x, y))
        with patch.object(metrics, "_require_unit_range"):  # which refuses the next two
            values["minus_one_to_one"].append(metrics.ssim(2 * x - 1, 2 * y - 1))
            values["bytes"].append(metrics.ssim(255 * x, 255 * y))
    means = {name: torch.cat(parts).mean().item() for name, parts in values.items()}
    edits = {
        "constants_for_range_2": "SSIM_C1, SSIM_C2 = 0.02**2, 0.06**2",
        "minus_one_to_one": "2 x - 1 for both images, no _require_unit_range",
        "bytes": "255 x for both images, no _require_unit_range",
    }
    what = f"metrics.ssim of the reconstructions of {PRETRAINED}"
    return {"ssim": measured(watch, what, **means, edits=edits)}


# --- the transformer ---------------------------------------------------------------------------


def shuffle_within(codes: Tensor) -> Tensor:
    """Each image's codes in an order of their own: (images, augmentations, N) -> the same."""
    return codes.gather(2, torch.rand(codes.shape).argsort(dim=2))


def shuffle_across(codes: Tensor) -> Tensor:
    """All codes of all images in one heap, dealt out again."""
    return codes.flatten()[torch.randperm(codes.numel())].view_as(codes)


def shuffled() -> dict:
    """vqgan/tokens.py, load_tokens: codes are shuffled before the condition is prepended."""
    results, prepend = {}, tokens._prepend
    for name, shuffle in (
        ("in-order", None),
        ("shuffled-within", shuffle_within),
        ("shuffled-across", shuffle_across),
    ):
        edit, words = None, ""
        if shuffle is not None:

            def prepend_shuffled(condition, labels, captions, codes, shuffle=shuffle):
                return prepend(condition, labels, captions, shuffle(codes))

            edit = patch.object(tokens, "_prepend", prepend_shuffled)
            words = f"vqgan/tokens.py, load_tokens: {shuffle.__name__} before _prepend"
        flags = f"--tokenizer {PRETRAINED} --epochs 2 {SMALL_GPT}"
        torch.manual_seed(0)
        results[name] = train(train_transformer, flags, name, edit=edit, words=words)
    return results


def few_images() -> dict:
    """A transformer that sees 500 images sixty times."""
    flags = f"--tokenizer {PRETRAINED} --limit 500 --epochs 60 {SMALL_GPT}"
    result = train(train_transformer, flags, "few-images")
    shutil.copy(RUNS / "few-images" / "losses.png", OUT / "few_images.png")
    rows = read_log(RUNS / "few-images" / "log.csv")
    result["last_training_loss"] = rows[-1]["loss"]
    return {"few-images": result}


@torch.enable_grad()  # it may have to be trained, where all else only samples
def load_eval_classifier_of_shapes() -> Classifier:
    """That of docs/results/shapes-tokenizer, or the same trained again."""
    folder = Path("runs/shapes-tokenizer")
    if (folder / "eval_classifier.pt").exists():
        return load_classifier(folder / "eval_classifier.pt", CPU)[0]
    run = Run(
        out=RUNS,
        data=load_dataset("shapes"),
        variance=0.0,  # this one is of no use to a classifier, nor are those below
        device=CPU,
        dtype=choose_precision("auto", CPU),
        metadata={},
        epochs=0,
        seed=0,
        flip=True,
        checkpoint_every=1,
        resume=True,
    )
    return load_eval_classifier(run, epochs=12)[0]


def samples_of(pipeline, labels: Tensor, **setting) -> tuple[Tensor, Tensor]:
    """Codes (M, N) and images (M, 3, H, W) of the classes, from a generator of seed 0."""
    generator, codes = torch.Generator().manual_seed(0), []
    for part in labels.split(500):
        codes.append(pipeline.transformer.sample(part[:, None], generator=generator, **setting))
    codes = torch.cat(codes)
    return codes, decode_tokens(pipeline.tokenizer, codes)


def evaluate(eval_classifier: Classifier, codes: Tensor, images: Tensor, labels: Tensor) -> dict:
    """What the classifier makes of samples, and how much they differ among themselves."""
    features = extract_features(eval_classifier, images.split(500))
    usage = metrics.CodebookUsage(256)
    usage.update(codes)
    test = load_dataset("shapes").test_images
    predicted = eval_classifier.head(features).argmax(dim=1)
    return {
        "num_samples": len(codes),
        "class_accuracy": (predicted == labels).double().mean().item(),
        "frechet": metrics.frechet_distance(
            features, extract_features(eval_classifier, eval_batches(test, 500))
        ),
        "distinct_pictures": len(codes.unique(dim=0)),
        "codes_used": usage.codes_used,
        "perplexity": usage.perplexity,
    }


@torch.no_grad()
def sampling(name: str, settings: list[dict], shown: list[str], title: str) -> dict:
    """1,000 samples of the pair that comes with the package, as many of each class, by setting."""
    pipeline, eval_classifier, results = (
        load_pipeline("shapes"),
        load_eval_classifier_of_shapes(),
        {},
    )
    labels = torch.arange(NUM_SAMPLES) % len(CLASSES)
    places = torch.tensor([CLASSES.index(shape) for shape in shown]).repeat_interleave(4)
    rows = []
    for setting in settings:
        watch = Stopwatch()
        codes, images = samples_of(pipeline, labels, **setting)
        results_of_setting = evaluate(eval_classifier, codes, images, labels)
        ((flag, value),) = setting.items()
        results[f"{flag}-{value:g}".replace(".", "_")] = measured(
            watch, f"vqgan sample shapes --{flag} {value:g}", **setting, **results_of_setting
        )
        rows.append((f"{flag} {value:g}", to_unit(samples_of(pipeline, places, **setting)[1])))
    figures.image_rows(OUT / f"{name}.png", rows, title=title)
    return results


def greedy() -> dict:
    settings = [{"temperature": value} for value in (0.0, 0.5, 1.0, 1.5)]
    title = "Four draws each of star, ring and heart, by temperature"
    return sampling("greedy", settings, ["star", "ring", "heart"], title)


def guidance() -> dict:
    settings = [{"guidance": value} for value in (0.0, 1.0, 3.0, 10.0)]
    title = "Four draws each of star, ring and heart, by guidance"
    return sampling("guidance", settings, ["star", "ring", "heart"], title)


EXERCISES: dict[str, Callable[[], dict]] = {
    "ssim": ssim,
    "no_commitment": no_commitment,
    "how_many_codes": how_many_codes,
    "no_straight_through": no_straight_through,
    "dead_codes": dead_codes,
    "no_kl": no_kl,
    "shuffled": shuffled,
    "few_images": few_images,
    "greedy": greedy,
    "guidance": guidance,
    "early_discriminator": early_discriminator,
    "levels": levels,
    "no_entropy": no_entropy,
    "few_dimensions": few_dimensions,
    "rounds": rounds,
}


def read_results() -> dict:
    is_there = (OUT / "metrics.json").exists()
    return read_metrics(OUT) if is_there else {"finished": {}, "models": {}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the answers to the exercises.")
    parser.add_argument("exercises", nargs="*", help="do these again; not given: what is missing")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    for name in args.exercises:
        if name not in EXERCISES:
            raise InputError(f"there is no exercise {name!r}: there are {', '.join(EXERCISES)}")
    OUT.mkdir(parents=True, exist_ok=True)
    drawn_once = functools.cache(render_shapes)  # for all of them
    for name, exercise in EXERCISES.items():
        content = read_results()
        if name not in args.exercises and (args.exercises or name in content["finished"]):
            continue
        print(f"--- {name}", flush=True)
        with patch("vqgan.data.render_shapes", drawn_once):
            models = exercise()
        models = {key: {"versions": versions()} | result for key, result in models.items()}
        content = read_results()  # again: another process may have done another exercise
        content = {
            "command": "python docs/experiments/exercises.py",
            "device": describe_device(CPU, choose_precision("auto", CPU)),
            "finished": content["finished"] | {name: list(models)},
            "models": content["models"] | models,
        }
        write_json(OUT / "metrics.json", content)
    print(f"metrics.json and the pictures are in {OUT}")


if __name__ == "__main__":
    run_script(parse, main, resumable=False)
