"""Stage two: a transformer learns to write the codes of a trained VQ-VAE or VQGAN.

    python train_transformer.py --tokenizer runs/vqgan/vqgan/checkpoint.pt      by class
    python train_transformer.py --tokenizer ... --condition caption             by words
    python train_transformer.py --tokenizer ... --condition image --condition-image edges
    python train_transformer.py --resume                                        go on

Esser, Rombach, Ommer 2021, arXiv 2012.09841, section 3.2. The images become codes once; the
transformer sees nothing else. With a condition c (`conditions.py`) and the N codes s of an image,

    L = -1/N sum_i log p(s_i | s_<i, c)      nats a code                        (eq. 9, 10)

Read `main`, then `load_corpus`, then `train`, then `evaluate`.
"""

import argparse
import copy
import hashlib
import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from vqgan import figures, metrics
from vqgan.classifier import Classifier, features_of, load_classifier, make_yardstick
from vqgan.conditions import (
    KINDS,
    NO_CONDITION,
    PICTURES,
    Condition,
    caption_condition,
    class_condition,
    image_condition,
)
from vqgan.data import (
    Batches,
    ImageDataset,
    batches_in_order,
    evaluation_batch,
    from_uint8,
    to_uint8,
    to_unit,
)
from vqgan.errors import InputError
from vqgan.loading import fingerprint, load_tokenizer
from vqgan.shapes import colours_of
from vqgan.training import (
    HelpFormatter,
    Log,
    Run,
    Stopwatch,
    about_run,
    add_common_arguments,
    autocast,
    fraction,
    load_checkpoint,
    non_negative_float,
    non_negative_int,
    open_run,
    parse_arguments,
    positive_float,
    positive_int,
    prepare_model,
    print_table,
    read_log,
    restore,
    run_script,
    save_checkpoint,
    save_model,
    save_plain,
    write_metrics,
)
from vqgan.transformer import GPT, check_sampling, describe_sampling
from vqgan.vqvae import VQAutoencoder

# Of GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix B): a memory of twenty steps for the size
# of gradients, gradients of norm 1 at most, a last learning rate of a tenth of the highest.
ADAM_BETAS, MAX_GRADIENT_NORM, LAST_LR = (0.9, 0.95), 1.0, 0.1
LOG_EVERY = 50  # steps averaged in a row of log.csv
NUM_PICTURES = 12  # samples in a row of progress.png, images in completions.png
SAMPLES_A_ROW = 8  # of samples.png
MOST_CACHED = 2**28  # numbers in the keys and values of sampling, 1 GiB
MOST_LOGITS = 2**26  # in validation, 256 MiB
BASELINES = {  # titles of `metrics.code_baselines`
    "uniform": "every code alike (ln K)",
    "single": "frequencies of codes",
    "left": "given the code to the left",
}
COLUMNS = {  # of the printed table of samples
    "guidance": ("guidance", ".3g"),
    "temperature": ("temperature", ".3g"),
    "top_k": ("top-k", "d"),
    "top_p": ("top-p", ".3g"),
    "frechet": ("Frechet", ".3f"),
    "recognised": ("recognised", ".1%"),
    "prompt_right": ("prompt", ".1%"),
    "seconds": ("seconds", ".0f"),
}


def parse() -> argparse.Namespace:
    """The flags, in groups: the condition, the network, the samples that are measured."""
    parser = argparse.ArgumentParser(
        description="Train a transformer to write the codes of images.",
        formatter_class=HelpFormatter,
        usage="%(prog)s --tokenizer CHECKPOINT [flags]   (--help lists them)",
        allow_abbrev=False,
    )
    add_common_arguments(parser, out="runs/transformer", epochs=10, lr=1e-3)
    parser.set_defaults(data=None, image_size=None)  # not given: the tokenizer's
    add = parser.add_argument
    add(
        "--tokenizer",
        metavar="CHECKPOINT",
        help="checkpoint.pt of a VQ-VAE or VQGAN; its --data and --image-size are the default",
    )
    add(
        "--other-data",
        action="store_true",
        help="take a tokenizer that was trained on other images than --data",
    )
    add("--batch-size", type=positive_int, default=64, help="images in a step")
    add("--warmup", type=non_negative_int, default=100, help="steps to the full learning rate")
    add("--weight-decay", type=non_negative_float, default=0.1, help="of matrices")
    add("--pictures", type=positive_int, default=6, help="rows of progress.png")
    add(
        "--yardstick",
        metavar="FILE",
        help="yardstick.pt of another run; not given: the tokenizer's, or a new one",
    )
    add("--yardstick-epochs", type=positive_int, default=6, help="of a new one")

    add = parser.add_argument_group("condition").add_argument
    add("--condition", choices=KINDS, default="class", help="what the codes depend on")
    add("--condition-image", choices=PICTURES, default="edges", help="for --condition image")
    add(
        "--condition-drop",
        type=fraction,
        default=0.1,
        help="share of steps' conditions that are not told, so that guidance works",
    )

    add = parser.add_argument_group("network").add_argument
    add("--n-layer", type=positive_int, default=6, help="blocks")
    add("--n-head", type=positive_int, default=8, help="attention heads of a block")
    add("--n-embd", type=positive_int, default=256, help="width")
    add("--dropout", type=fraction, default=0.1, help="share of activations dropped in training")

    add = parser.add_argument_group(
        "samples that are measured (several values: every combination)"
    ).add_argument
    add("--num-samples", type=positive_int, help="how many; not given: one for each test image")
    add("--guidance", nargs="+", type=non_negative_float, default=[1.0], help="1: none")
    add("--temperature", nargs="+", type=non_negative_float, default=[1.0], help="0: greedy")
    add("--top-k", nargs="+", type=positive_int, help="of the likeliest codes only")
    add("--top-p", nargs="+", type=positive_float, help="of the likeliest codes of this mass only")
    return parse_arguments(parser)


class Corpus(NamedTuple):
    """What the transformer learns from, and what makes pictures of its codes again.

    Sequences are condition and codes end to end, int32 (images, views, C + N). Training images
    have two views, as they are and mirrored, or one without --flip; test images have one.
    """

    tokenizer: VQAutoencoder
    condition: Condition
    train: Tensor
    test: Tensor

    @property
    def test_tokens(self) -> Tensor:
        """Conditions of the test images, (images, C) int64."""
        return self.test[:, 0, : self.condition.length].long()

    @property
    def test_codes(self) -> Tensor:
        """(images, N) int64."""
        return self.test[:, 0, self.condition.length :].long()


def main() -> None:
    """Images become codes, the transformer learns to write them, and what it writes is measured."""
    args = parse()
    tokenizer, tokenizer_state = tokenizer_of(args)
    settings = sampling_settings(args, tokenizer.quantizer.num_embeddings)
    grid_size = grid_of(tokenizer, args.image_size)
    run = open_run(args, batch_sizes=[args.batch_size])
    condition = condition_of(args, run.data, tokenizer, grid_size)
    arguments = network_arguments(args, tokenizer, grid_size, condition)
    save_model(run.out / "tokenizer.pt", tokenizer_state)  # what the checkpoint cannot do without
    prepare_model(tokenizer, run.device, compile=False)
    yardstick, yardstick_accuracy = yardstick_of(run, args)

    corpus = load_corpus(run, tokenizer, condition, args)
    baselines = metrics.code_baselines(
        corpus.train[..., condition.length :].reshape(-1, *grid_size).long(),
        corpus.test_codes.view(-1, *grid_size),
        tokenizer.quantizer.num_embeddings,
    )
    for name, nats in baselines.items():
        print(f"{nats:.3f} nats a code: {BASELINES[name]}")

    about = about_run(args) | {
        "condition": condition.to_dict(),
        "condition_drop": args.condition_drop,
        "tokenizer": str(args.tokenizer),
        "tokenizer_fingerprint": fingerprint(tokenizer),
    }
    torch.manual_seed(args.seed)
    model = prepare_model(GPT(**arguments), run.device, compile=args.compile)
    model, history, seconds = train(model, arguments, about, corpus, run=run, args=args)

    result, samples, floors = evaluate(model, corpus, yardstick, settings, run=run, args=args)
    result |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "best_epoch": history.best["epoch"],
        "arguments": arguments,
        "seconds": round(seconds, 1),
    }
    write_metrics(
        run,
        args,
        {"transformer": result},
        condition=condition.to_dict(),
        baselines=baselines,
        validation=history.validation,
        frechet_floors=floors,
        yardstick={
            "accuracy": yardstick_accuracy,
            "fingerprint": None if yardstick is None else fingerprint(yardstick),
        },
        samples=samples,
    )
    print(
        f"{result['nats_per_code']:.3f} nats a code on the test images (after epoch "
        f"{result['best_epoch']}): an arithmetic coder would spend {result['bits_per_image']:.0f} "
        f"bits an image, and plain codes are {result['plain_bits_per_image']:.0f}"
    )
    if samples:
        print_table({f"samples {i}": sample for i, sample in enumerate(samples, 1)}, COLUMNS)
        for name, distance in floors.items():
            print(f"Frechet distance of {name} to the test images: {distance:.3f}")
        print(f"(the yardstick recognises {yardstick_accuracy:.1%} of the test images)")
    draw_pictures(run, model, corpus, settings[0], baselines, history)
    print(f"metrics.json, log, checkpoint and pictures are in {run.out}")


# --- what is given -------------------------------------------------------------------------------


def tokenizer_of(args: argparse.Namespace) -> tuple[VQAutoencoder, dict]:
    """The tokenizer and its checkpoint; sets --data and --image-size to its own if not given."""
    if args.tokenizer is None:
        raise InputError(
            "--tokenizer was not given: name the checkpoint.pt of a VQ-VAE or VQGAN, as in "
            "--tokenizer runs/vqgan/vqgan/checkpoint.pt"
        )
    own_copy = Path(args.out) / "tokenizer.pt"  # a run that began goes on with the same one
    path = own_copy if args.resume and own_copy.exists() else args.tokenizer
    tokenizer, state = load_tokenizer(path)
    for name, flag in (("data", "--data"), ("image_size", "--image-size")):
        given, own = getattr(args, name), state["about"].get(name)
        if given is None and own is None:
            raise InputError(f"{args.tokenizer} does not say its {name}: give {flag}")
        if given is None:
            setattr(args, name, own)
        elif own is not None and Path(str(own)) != Path(str(given)) and not args.other_data:
            raise InputError(
                f"{flag} {given}: the tokenizer {args.tokenizer} was trained with {own}; leave "
                "the flag out, name another tokenizer, or add --other-data to use this one"
            )
    return tokenizer, state


def grid_of(tokenizer: VQAutoencoder, image_size: int) -> tuple[int, int]:
    """(h, w) of the codes of an image."""
    tokenizer.check_sides(image_size, image_size)
    side = image_size // 2**tokenizer.num_downsamples
    return side, side


def sampling_settings(args: argparse.Namespace, num_embeddings: int) -> list[dict]:
    """Every combination of the sampling flags, as keyword arguments of `GPT.sample`."""
    settings = [
        dict(zip(("guidance", "temperature", "top_k", "top_p"), values, strict=True))
        for values in itertools.product(
            args.guidance, args.temperature, args.top_k or [None], args.top_p or [None]
        )
    ]
    for setting in settings:
        check_sampling(num_embeddings, **setting)
    if args.num_samples == 1:
        raise InputError("--num-samples 1: a Frechet distance takes at least two, give more")
    if args.condition == "none" and any(guidance != 1 for guidance in args.guidance):
        raise InputError(
            "--guidance exaggerates a condition, and --condition is none: leave it out"
        )
    if args.condition_drop == 0 and any(guidance != 1 for guidance in args.guidance):
        raise InputError(
            "--guidance needs a model that knows what is likely without its condition: leave "
            "--condition-drop at a number above 0"
        )
    return settings


def condition_of(
    args: argparse.Namespace,
    data: ImageDataset,
    tokenizer: VQAutoencoder,
    grid_size: tuple[int, int],
) -> Condition:
    """What --condition asks for, with the names or words of the data; refused where it has none."""
    if args.condition == "class":
        if data.train_labels is None or not data.class_names:
            raise InputError(
                "--condition class needs labelled images: give class folders (DIR/<class>/*), or "
                "--condition none"
            )
        return class_condition(data.class_names)
    if args.condition == "caption":
        if data.train_captions is None:
            raise InputError(
                f"--condition caption needs captions, and {args.data} has none: give --data shapes "
                "(and its tokenizer), or --condition class"
            )
        condition = caption_condition(data.train_captions)
        condition.of_captions(data.test_captions)  # with --limit a word may be in the test set only
        return condition
    if args.condition == "image":
        return image_condition(args.condition_image, tokenizer.quantizer.num_embeddings, grid_size)
    return NO_CONDITION


def network_arguments(
    args: argparse.Namespace,
    tokenizer: VQAutoencoder,
    grid_size: tuple[int, int],
    condition: Condition,
) -> dict:
    """The transformer's constructor arguments, tried once: sizes that do not fit stop here."""
    arguments = {
        "num_embeddings": tokenizer.quantizer.num_embeddings,
        "grid_size": list(grid_size),
        "condition_vocabulary": condition.vocabulary,
        "condition_length": condition.length,
        "n_layer": args.n_layer,
        "n_head": args.n_head,
        "n_embd": args.n_embd,
        "dropout": args.dropout,
    }
    with torch.device("meta"):  # shapes only
        GPT(**arguments)
    return arguments


def yardstick_of(run: Run, args: argparse.Namespace) -> tuple[Classifier | None, float | None]:
    """The given yardstick, the one in the tokenizer's run folder, or a new one."""
    if run.data.train_labels is None or len(run.data.test_images) < 2:  # it says why not
        return make_yardstick(run, epochs=args.yardstick_epochs, flip=args.flip, resume=args.resume)
    folder = Path(args.tokenizer).parent
    candidates = [folder / "yardstick.pt", folder.parent / "yardstick.pt"]
    path = next((path for path in candidates if path.exists() and not args.other_data), None)
    if args.yardstick is not None:
        path = Path(args.yardstick)
    if path is None:
        return make_yardstick(run, epochs=args.yardstick_epochs, flip=args.flip, resume=args.resume)
    yardstick, share = load_classifier(path, run.device)
    if yardstick.head.out_features != len(run.data.class_names):
        raise InputError(
            f"{path} tells {yardstick.head.out_features} classes apart, and {args.data} has "
            f"{len(run.data.class_names)}: name another --yardstick"
        )
    return yardstick, share


# --- images become codes, once -----------------------------------------------------------------


def load_corpus(
    run: Run, tokenizer: VQAutoencoder, condition: Condition, args: argparse.Namespace
) -> Corpus:
    """Codes of all images, from codes.pt if it has them already: the tokenizer takes a while."""
    data = run.data
    key = hashlib.sha256()
    for part in (fingerprint(tokenizer), str(args.flip), condition.picture or ""):
        key.update(part.encode())
    for images in (data.train_images, data.test_images):
        _update_with_images(key, images)
    key = key.hexdigest()
    path = run.out / "codes.pt"
    try:
        codes = torch.load(path, weights_only=True)
        is_current = codes["key"] == key
    except Exception:  # no file yet, or a damaged one: torch raises many types
        is_current = False
    if not is_current:
        picture = PICTURES.get(condition.picture)
        codes = {
            "key": key,
            "train": encode(data.train_images, tokenizer, picture, flip=args.flip, run=run),
            "test": encode(data.test_images, tokenizer, picture, flip=False, run=run),
        }
        save_plain(path, codes)
    train, test = codes["train"], codes["test"]
    if condition.kind != "image":  # whose codes stand before the image's already
        train = _prepend(condition, data.train_labels, data.train_captions, train)
        test = _prepend(condition, data.test_labels, data.test_captions, test)
    return Corpus(tokenizer, condition, train, test)


def _update_with_images(digest, images) -> None:
    """Take images into a hash: those in memory by their pixels, files by name and size."""
    if isinstance(images, Tensor):
        digest.update(images.contiguous().numpy().data)
    else:
        for path in images.paths:
            digest.update(f"{path} {path.stat().st_size} {images.image_size}\n".encode())


def _prepend(
    condition: Condition, labels: Tensor | None, captions: list[str] | None, codes: Tensor
) -> Tensor:
    """The tokens of labels or captions before codes (images, views, N): (images, views, C + N)."""
    if condition.kind == "class":
        tokens = labels[:, None]
    elif condition.kind == "caption":
        tokens = condition.of_captions(captions)
    else:
        tokens = condition.of_nothing(len(codes))
    tokens = tokens[:, None].expand(-1, codes.shape[1], -1)
    return torch.cat([tokens.to(codes.dtype), codes], dim=2)


@torch.no_grad()
def encode(images, tokenizer: VQAutoencoder, picture, *, flip: bool, run: Run) -> Tensor:
    """Codes of all images: int32 (images, views, N), before them the codes of picture(image)."""
    codes = []
    progress = tqdm(desc="encoding", total=len(images), unit="img", unit_scale=True)
    for x in batches_in_order(images, evaluation_batch(images[0].shape[-1]), device=run.device):
        views = []
        for view in (x, x.flip(3)) if flip else (x,):
            parts = (view,) if picture is None else (picture(view), view)
            grids = [tokenizer.encode(part).indices.flatten(1) for part in parts]
            views.append(torch.cat(grids, dim=1))
        codes.append(torch.stack(views, dim=1).int().cpu())
        progress.update(len(x))
    progress.close()
    return torch.cat(codes)


class CodeBatches(Batches):
    """Shuffled batches of sequences (images, views, C + N): each gives out (B, C + N) int64.

    Of each image the mirrored view or the other, by the flip that `Batches` draws.
    """

    def make_batch(self, sequences: Tensor, row: Tensor, mirrored: Tensor) -> Tensor:
        """One view of each image: (B, views, C + N), and (B,) which are mirrored -> (B, C + N)."""
        views = mirrored.long()  # all 0 without --flip
        return sequences[torch.arange(len(sequences), device=sequences.device), views].long()


# --- training ------------------------------------------------------------------------------------


class History:
    """What a run remembers besides weights: its validation losses, and samples on the way."""

    def __init__(self):
        self.validation: list[dict] = []  # {"epoch", "loss"}, nats a code
        self.pictures: list[tuple[float, Tensor]] = []  # epoch, uint8 (N, 3, H, W)

    @property
    def best(self) -> dict:
        """The first row of the lowest loss."""
        return min(self.validation, key=lambda row: row["loss"])

    def state_dict(self) -> dict:
        """For the checkpoint."""
        return {"validation": self.validation, "pictures": self.pictures}

    def load_state_dict(self, state: dict) -> None:
        """From the checkpoint."""
        self.validation, self.pictures = state["validation"], state["pictures"]


def learning_rate(step: int, *, highest: float, warmup: int, total: int) -> float:
    """Linear up to the highest, then half a cosine down to LAST_LR of it (steps from 0).

    A resume with more epochs goes on along the longer cosine, so its rate rises again first.
    """
    if step < warmup:
        return highest * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    return highest * (LAST_LR + (1 - LAST_LR) * cosine)


def attention_kernel(device: torch.device) -> AbstractContextManager:
    """On a CPU, attention as plain products: to train on short sequences, the fused one is slower.

    (With dropout torch does so by itself.) Elsewhere torch chooses.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def train(
    model: GPT,
    arguments: dict,
    about: dict,
    corpus: Corpus,
    *,
    run: Run,
    args: argparse.Namespace,
) -> tuple[GPT, History, float]:
    """Train to the last epoch, from the checkpoint if there is one.

    Returns the model of the epoch with the lowest validation loss, the history, the seconds.
    """
    device, C = run.device, corpus.condition.length
    # A start token says nothing that could be left out.
    drop = 0.0 if corpus.condition.kind == "none" else args.condition_drop
    batches = CodeBatches(
        corpus.train, args.batch_size, device=device, seed=args.seed, flip=args.flip
    )
    total_steps = args.epochs * len(batches)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(args.weight_decay),
        lr=args.lr,
        betas=ADAM_BETAS,
        fused=device.type in ("cpu", "cuda"),
    )
    # A transformer that trains on begins to recite the training images: the best epoch is kept.
    best = copy.deepcopy(model).requires_grad_(False).eval()  # what is measured and kept
    history = History()
    companions = {"last": model, "history": history}  # which training goes on with

    # The start, or the last checkpoint of a run that was cut off.
    step, seconds = 0, 0.0
    checkpoint = run.out / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        state = load_checkpoint(checkpoint, model="GPT", arguments=arguments)
        restore(
            state,
            model=best,
            optimizers={"adamw": optimizer},
            batches=batches,
            companions=companions,
        )
        step, seconds = state["step"], state["seconds"]
    log = Log(run.out / "log.csv", resume_at=step)
    picture_steps = {round(total_steps * i / args.pictures) for i in range(1, args.pictures + 1)}
    pictured = corpus.test_tokens[:NUM_PICTURES].to(device)

    model.train()
    watch = Stopwatch(seconds)
    progress = tqdm(
        desc="transformer", total=total_steps * args.batch_size, initial=step * args.batch_size,
        unit="img", unit_scale=True, mininterval=0.5,
    )  # fmt: skip
    while step < total_steps:
        for batch in batches:  # one epoch, or the rest of it after a resume
            tokens, indices = batch[:, :C], batch[:, C:]  # (B, C), (B, N)
            # Some conditions are not told: p(s) is learned beside p(s | c), which guidance needs.
            dropped = torch.rand(len(tokens), 1, device=device) < drop
            tokens = tokens.masked_fill(dropped, model.nothing)
            # The step: L of eq. 10, and its gradient, cut where it is too long.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, highest=args.lr, warmup=args.warmup, total=total_steps
                )
            with autocast(device, run.dtype), attention_kernel(device):
                loss = model.loss(tokens, indices)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            step += 1
            log.record(step, {"loss": loss, "gradient": norm})

            # On the way: validation, a row of progress.png, a row of the log, a checkpoint.
            if step % len(batches) == 0:  # an epoch is over
                nats = validation_loss(model, corpus, device, run.dtype)
                history.validation.append({"epoch": step // len(batches), "loss": nats})
                if history.best is history.validation[-1]:
                    best.load_state_dict(model.state_dict())
                progress.write(f"epoch {step // len(batches)}: validation {nats:.4f} nats a code")
            if step in picture_steps:
                codes = model.sample(pictured, generator=torch.Generator().manual_seed(0))
                x = to_uint8(decode(corpus.tokenizer, codes))
                history.pictures.append((step / len(batches), x))
                draw_progress(run.out / "progress.png", history)
            checkpoint_is_due = step % args.checkpoint_every == 0 or step == total_steps
            if step % LOG_EVERY == 0 or checkpoint_is_due:
                row = log.write_row(epoch=step / len(batches))
                progress.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
            if checkpoint_is_due:
                seconds = watch.seconds
                save_checkpoint(
                    checkpoint,
                    model=best if history.validation else model,
                    arguments=arguments,
                    optimizers={"adamw": optimizer},
                    batches=batches,
                    step=step,
                    seconds=seconds,
                    companions=companions,
                    about=about,
                )
            progress.update(args.batch_size)
    progress.close()
    return best, history, seconds


@torch.no_grad()
def validation_loss(model: GPT, corpus: Corpus, device: torch.device, dtype: torch.dtype) -> float:
    """Mean loss over the test codes, nats a code. The model's mode is left as it was."""
    was_training = model.training
    model.eval()
    at_once = min(250, max(1, MOST_LOGITS // (model.num_codes * model.num_embeddings)))
    tokens, codes = corpus.test_tokens.split(at_once), corpus.test_codes.split(at_once)
    total = torch.zeros((), device=device)
    for part_tokens, part_codes in zip(tokens, codes, strict=True):
        with autocast(device, dtype):
            loss = model.loss(part_tokens.to(device), part_codes.to(device))
        total += loss * len(part_codes)
    model.train(was_training)
    return total.item() / len(corpus.test)


# --- what came of it -----------------------------------------------------------------------------


def evaluate(
    model: GPT,
    corpus: Corpus,
    yardstick: Classifier | None,
    settings: list[dict],
    *,
    run: Run,
    args: argparse.Namespace,
) -> tuple[dict, list[dict], dict[str, float]]:
    """What codes cost, in float32; samples at each setting; and floors of their distance.

    The costs are of the test images, after the epoch that was best on them: a little too good, as
    any choice is. They are those of a decoder that knows the condition.
    """
    nats = validation_loss(model, corpus, run.device, torch.float32)
    bits = metrics.nats_to_bits(nats * model.num_codes)
    result = {
        "nats_per_code": nats,
        "bits_per_image": bits,  # of an ideal arithmetic coder
        "plain_bits_per_image": metrics.code_bits(*model.grid_size, model.num_embeddings),
        "compression": 3 * 8 * args.image_size**2 / bits,  # of three channels of 8 bits
        "frechet": None,
        "recognised": None,
    }
    if yardstick is None:
        return result, [], {}
    test_features, floors = frechet_floors(yardstick, corpus.tokenizer, run)
    num_samples = args.num_samples or len(run.data.test_images)
    samples = [
        measure_samples(model, corpus, setting, num_samples, yardstick, test_features, run=run)
        for setting in settings
    ]
    return result | {key: samples[0][key] for key in ("frechet", "recognised")}, samples, floors


@torch.no_grad()
def decode(tokenizer: VQAutoencoder, codes: Tensor) -> Tensor:
    """Grids (M, h, w) -> images (M, 3, H, W), about [-1, 1], on the CPU."""
    at_once = evaluation_batch(codes.shape[1] * 2**tokenizer.num_downsamples)
    return torch.cat([tokenizer.decode_indices(part).cpu() for part in codes.split(at_once)])


@torch.no_grad()
def frechet_floors(
    yardstick: Classifier, tokenizer: VQAutoencoder, run: Run
) -> tuple[Tensor, dict[str, float]]:
    """Features of the test images; and what samples cannot be expected to get below.

    Reconstructions of the test images: what the tokenizer loses. Training images, as many: what
    two sets of real images differ by.
    """

    def batches(images):
        return batches_in_order(images, evaluation_batch(images[0].shape[-1]), device=run.device)

    test, train = run.data.test_images, run.data.train_images[: len(run.data.test_images)]
    features = features_of(yardstick, batches(test))
    reconstructed = features_of(yardstick, (tokenizer(x).reconstruction for x in batches(test)))
    real = features_of(yardstick, batches(train))
    return features, {
        "reconstructions": metrics.frechet_distance(reconstructed, features),
        "training images": metrics.frechet_distance(real, features),
    }


@torch.no_grad()
def measure_samples(
    model: GPT,
    corpus: Corpus,
    setting: dict,
    num_samples: int,
    yardstick: Classifier,
    test_features: Tensor,
    *,
    run: Run,
) -> dict:
    """Samples under the conditions of the test images, in their order, beside the test images."""
    watch = Stopwatch()
    data, generator = run.data, torch.Generator().manual_seed(0)
    chosen = torch.arange(num_samples) % len(corpus.test)  # around again, if there are more
    tokens = corpus.test_tokens[chosen].to(run.device)
    # Keys and values of every block and position, twice with guidance.
    cached = 2 * 2 * len(model.blocks) * model.position_table.numel()
    features, colours = [], []
    progress = tqdm(desc="sampling", total=num_samples, unit="img", unit_scale=True)
    for part in tokens.split(min(500, max(1, MOST_CACHED // cached))):
        x = decode(corpus.tokenizer, model.sample(part, generator=generator, **setting))
        features.append(features_of(yardstick, x.split(evaluation_batch(x.shape[-1]))))
        if corpus.condition.kind == "caption":
            colours += colours_of(to_uint8(x).numpy())
        progress.update(len(part))
    progress.close()
    features = torch.cat(features)
    predicted = yardstick.head(features.to(run.device)).argmax(dim=1).cpu()
    right = predicted == data.test_labels[chosen]
    result = setting | {
        "num_samples": num_samples,
        "frechet": metrics.frechet_distance(features, test_features),
        "recognised": None if corpus.condition.kind == "none" else right.double().mean().item(),
        "colour_right": None,
        "prompt_right": None,
    }
    if corpus.condition.kind == "caption":
        # "small red star on blue": its second and fifth word.
        asked = [tuple(data.test_captions[i].split()[1::3]) for i in chosen.tolist()]
        colour_right = torch.tensor([a[0] == b[0] for a, b in zip(asked, colours, strict=True)])
        result["colour_right"] = colour_right.double().mean().item()
        result["prompt_right"] = (right & colour_right).double().mean().item()
    return result | {"seconds": round(watch.seconds, 1)}


# --- pictures ------------------------------------------------------------------------------------


def draw_progress(path: Path, history: History) -> None:
    """Samples on the way, a row for each time."""
    figures.image_rows(
        path,
        [(f"epoch {epoch:.3g}", to_unit(from_uint8(x))) for epoch, x in history.pictures],
        title="Samples while it learns: the same conditions, the same random numbers",
    )


def draw_pictures(
    run: Run,
    model: GPT,
    corpus: Corpus,
    setting: dict,
    baselines: dict[str, float],
    history: History,
) -> None:
    """Every picture of the run but progress.png, which is drawn on the way.

    Args:
        setting: keyword arguments of `GPT.sample`, for all samples.
        baselines: of `metrics.code_baselines`.
    """
    figures.code_losses(
        run.out / "losses.png",
        read_log(run.out / "log.csv"),
        history.validation,
        {BASELINES[name]: value for name, value in baselines.items()},
        title="What a code costs, and what it would cost without a transformer",
    )
    generator, how = torch.Generator().manual_seed(1), describe_sampling(setting)

    def sample(tokens: Tensor, **more) -> Tensor:
        codes = model.sample(tokens.to(run.device), generator=generator, **setting, **more)
        return to_unit(decode(corpus.tokenizer, codes))

    # samples.png: what is asked for on the left or above, and several samples of it.
    condition, path = corpus.condition, run.out / "samples.png"
    x = next(batches_in_order(run.data.test_images[:NUM_PICTURES], NUM_PICTURES))
    tokens = corpus.test_tokens[: len(x)]
    if condition.kind == "none":
        images = sample(condition.of_nothing(4 * NUM_PICTURES))
        figures.image_grid(path, images, title=f"Samples ({how})")
    elif condition.kind == "image":
        picture = PICTURES[condition.picture](x)
        rows = [("original", to_unit(x)), (condition.picture, to_unit(picture))]
        rows += [(f"sample {i}", sample(tokens)) for i in (1, 2, 3)]
        figures.image_rows(path, rows, title=f"Samples given {condition.picture} ({how})")
    else:
        names = condition.names if condition.kind == "class" else run.data.test_captions
        ask = condition.of_classes if condition.kind == "class" else condition.of_captions
        rows = [(name, sample(ask([name] * SAMPLES_A_ROW))) for name in names[:10]]
        figures.image_rows(path, rows, title=f"Samples by {condition.kind} ({how})")

    # completions.png: the codes of the upper half are given, -1 stands for those to be written.
    h, w = model.grid_size
    known = corpus.test_codes[: len(x)].view(-1, h, w).clone()
    known[:, h // 2 :] = -1
    given = to_unit(x)
    given[:, :, h // 2 * (given.shape[2] // h) :] = 0.5  # grey: what is to be written
    rows = [("original", to_unit(x)), ("given", given)]
    rows += [(f"completion {i}", sample(tokens, known=known)) for i in (1, 2, 3)]
    title = f"Lower halves written below the codes of upper halves ({how})"
    figures.image_rows(run.out / "completions.png", rows, title=title)


if __name__ == "__main__":
    run_script(main)
