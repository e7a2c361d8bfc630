"""Stage two: a transformer learns to write the codes of a trained VQ-VAE or VQGAN.

    python train_transformer.py --tokenizer runs/vqgan/vqgan/checkpoint.pt      by class
    python train_transformer.py --tokenizer ... --condition caption             by words
    python train_transformer.py --tokenizer ... --condition image --picture edges
    python train_transformer.py --resume                                        go on

Esser, Rombach, Ommer 2021, arXiv 2012.09841, section 3.2. The images become codes once; the
transformer sees nothing else. With a condition c (`conditions.py`) and the N codes s of an image,

    L = -1/N sum_i log p(s_i | s_<i, c)      nats a code                        (eq. 11)

Read `main`, then `encode`, then `train`, then `evaluate`.
"""

import argparse
import copy
import hashlib
import itertools
import math
import pickle
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

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
from vqgan.transformer import GPT, check_sampling
from vqgan.vqvae import VQAutoencoder

# Of GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix B): a memory of twenty steps for the size
# of gradients, gradients of norm 1 at most, a last learning rate of a tenth of the highest.
ADAM_BETAS, MAX_GRADIENT_NORM, LAST_LR = (0.9, 0.95), 1.0, 0.1
LOG_EVERY = 50  # steps averaged in a row of log.csv
NUM_PICTURES = 12  # samples in a row of progress.png, images in completions.png
SAMPLES_A_ROW = 8  # of samples.png
SAMPLES_AT_ONCE = 500
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
    parser = argparse.ArgumentParser(
        description="Train a transformer to write the codes of images.",
        formatter_class=HelpFormatter,
        usage="%(prog)s --tokenizer CHECKPOINT [flags]   (--help lists them)",
        allow_abbrev=False,
    )
    add_common_arguments(parser, out="runs/transformer", epochs=10, lr=1e-3)
    # Not given: those of the tokenizer.
    parser.set_defaults(data=None, image_size=None)
    add = parser.add_argument
    add("--tokenizer", metavar="CHECKPOINT", help="checkpoint.pt of a VQ-VAE or VQGAN")
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
    add("--picture", choices=PICTURES, default="edges", help="for --condition image: of what")
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


def main() -> None:
    args = parse()
    tokenizer, tokenizer_state = tokenizer_of(args)
    check_same_tokenizer(args, tokenizer)
    settings = sampling_settings(args, tokenizer.quantizer.num_embeddings)
    grid_size = grid_of(tokenizer, args.image_size)
    run = open_run(args, batch_sizes=[args.batch_size])
    condition = condition_of(args, run.data, tokenizer, grid_size)
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
    with torch.device("meta"):
        GPT(**arguments)  # sizes that cannot be stop here, not after minutes
    save_model(run.out / "tokenizer.pt", tokenizer_state)  # what the checkpoint cannot do without
    prepare_model(tokenizer, run.device, compile=False)
    yardstick, yardstick_accuracy = yardstick_of(run, args)

    train_sequences, test_sequences = sequences(run, tokenizer, condition, args)
    C = condition.length
    baselines = metrics.code_baselines(
        train_sequences[..., C:].reshape(-1, *grid_size).long(),
        test_sequences[:, 0, C:].reshape(-1, *grid_size).long(),
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
    model, history, seconds = train(
        model,
        arguments,
        about,
        train_sequences,
        test_sequences,
        tokenizer,
        condition,
        run=run,
        args=args,
    )

    floors, samples = {}, []
    nats = validation_loss(model, test_sequences, run.device, torch.float32)
    if yardstick is not None:
        test_features, floors = frechet_floors(yardstick, tokenizer, run)
        for setting in settings:
            samples.append(
                measure_samples(
                    model, tokenizer, condition, test_sequences, setting, yardstick, test_features,
                    run=run, num_samples=args.num_samples or len(run.data.test_images),
                )
            )  # fmt: skip
    pixels = 3 * args.image_size**2
    num_codes = grid_size[0] * grid_size[1]
    bits = metrics.nats_to_bits(nats * num_codes)
    result = {
        "nats_per_code": nats,
        "bits_per_image": bits,
        "plain_bits_per_image": metrics.code_bits(*grid_size, tokenizer.quantizer.num_embeddings),
        "compression": 8 * pixels / bits,  # of 8 bits a pixel and channel
        "frechet": samples[0]["frechet"] if samples else None,
        "recognised": samples[0]["recognised"] if samples else None,
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
        yardstick={"accuracy": yardstick_accuracy},
        samples=samples,
    )
    print(
        f"{nats:.3f} nats a code on the test images (epoch {history.best['epoch']}): an arithmetic "
        f"coder would spend {bits:.0f} bits an image, and plain codes "
        f"{result['plain_bits_per_image']:.0f}"
    )
    if samples:
        print_table({f"samples {i + 1}": sample for i, sample in enumerate(samples)}, COLUMNS)
        for name, distance in floors.items():
            print(f"Frechet distance of {name} to the test images: {distance:.3f}")
        print(f"(the yardstick recognises {yardstick_accuracy:.1%} of the test images)")
    draw_pictures(run, model, tokenizer, condition, test_sequences, settings[0], baselines, history)
    print(f"metrics.json, log, checkpoint and pictures are in {run.out}")


# --- what is given -------------------------------------------------------------------------------


def tokenizer_of(args: argparse.Namespace) -> tuple[VQAutoencoder, dict]:
    """The tokenizer and its checkpoint; sets --data and --image-size to its own if not given."""
    if args.tokenizer is None:
        raise InputError(
            "--tokenizer was not given: name the checkpoint.pt of a VQ-VAE or VQGAN, as in "
            "--tokenizer runs/vqgan/vqgan/checkpoint.pt"
        )
    tokenizer, state = load_tokenizer(args.tokenizer)
    about = state["about"]
    for name, flag in (("data", "--data"), ("image_size", "--image-size")):
        given, own = getattr(args, name), about.get(name)
        if given is None and own is None:
            raise InputError(f"{args.tokenizer} does not say its {name}: give {flag}")
        if given is None:
            setattr(args, name, own)
        elif own not in (None, given) and not args.other_data:
            raise InputError(
                f"{flag} {given}: the tokenizer {args.tokenizer} was trained with {own}; leave "
                "the flag out, name another tokenizer, or add --other-data to use this one"
            )
    return tokenizer, state


def check_same_tokenizer(args: argparse.Namespace, tokenizer: VQAutoencoder) -> None:
    """For --resume, before anything in the run folder is replaced."""
    checkpoint = Path(args.out) / "checkpoint.pt"
    if not args.resume or not checkpoint.exists():
        return
    about = load_checkpoint(checkpoint).get("about", {})
    if about.get("tokenizer_fingerprint") != fingerprint(tokenizer):
        raise InputError(
            f"--resume: {args.tokenizer} has other weights than when the run began: put the "
            "old ones back, or start a new run in another --out"
        )


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
        return caption_condition(data.train_captions)
    if args.condition == "image":
        return image_condition(args.picture, tokenizer.quantizer.num_embeddings, grid_size)
    return NO_CONDITION


def yardstick_of(run: Run, args: argparse.Namespace) -> tuple[Classifier | None, float | None]:
    """The given yardstick, the one in the tokenizer's run folder, or a new one."""
    if run.data.train_labels is None or len(run.data.test_images) < 2:  # it says why not
        return make_yardstick(run, epochs=args.yardstick_epochs, flip=args.flip, resume=args.resume)
    folder = Path(args.tokenizer).parent
    beside = [folder / "yardstick.pt", folder.parent / "yardstick.pt"]
    beside = [path for path in beside if path.exists() and not args.other_data]
    for path in [Path(args.yardstick)] if args.yardstick is not None else beside:
        yardstick, share = load_classifier(path, run.device)
        classes = yardstick.head.out_features
        if classes != len(run.data.class_names):
            raise InputError(
                f"{path} tells {classes} classes apart, and {args.data} has "
                f"{len(run.data.class_names)}: name another --yardstick"
            )
        return yardstick, share
    return make_yardstick(run, epochs=args.yardstick_epochs, flip=args.flip, resume=args.resume)


# --- images become codes, once -----------------------------------------------------------------


def sequences(
    run: Run, tokenizer: VQAutoencoder, condition: Condition, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Condition and codes of every image, end to end: int32 (images, views, C + N), twice.

    Training images have two views, as they are and mirrored, or one without --flip; test images
    have one. The codes are kept in codes.pt, since the tokenizer takes a while.
    """
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
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):  # none yet, or damaged
        codes = {}
    if codes.get("key") != key:
        picture = PICTURES.get(condition.picture)
        codes = {
            "key": key,
            "train": encode(data.train_images, tokenizer, picture, flip=args.flip, run=run),
            "test": encode(data.test_images, tokenizer, picture, flip=False, run=run),
        }
        save_plain(path, codes)
    train, test = codes["train"], codes["test"]
    if condition.kind == "image":
        return train, test  # the picture's codes stand before the image's already
    return (
        _prepend(tokens_of(condition, data.train_labels, data.train_captions, len(train)), train),
        _prepend(tokens_of(condition, data.test_labels, data.test_captions, len(test)), test),
    )


def _update_with_images(digest, images) -> None:
    """Take images into a hash: those in memory by their pixels, files by name and size."""
    if isinstance(images, Tensor):
        digest.update(images.contiguous().numpy().data)
    else:
        for path in images.paths:
            digest.update(f"{path} {path.stat().st_size}\n".encode())


def tokens_of(
    condition: Condition, labels: Tensor | None, captions: list[str] | None, count: int
) -> Tensor:
    """(count, C) tokens of labels or captions, or start tokens."""
    if condition.kind == "class":
        return labels[:, None]
    if condition.kind == "caption":
        return condition.of_captions(captions)
    return condition.of_nothing(count)


def _prepend(tokens: Tensor, codes: Tensor) -> Tensor:
    """tokens (M, C), codes (M, views, N) -> (M, views, C + N)."""
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

    def make_batch(self, images: Tensor, row: Tensor, mirrored: Tensor) -> Tensor:
        views = mirrored.long()  # all 0 without --flip
        return images[torch.arange(len(images), device=images.device), views].long()


# --- training ------------------------------------------------------------------------------------


class History:
    """What a run remembers besides weights: its validation losses, and samples on the way."""

    def __init__(self):
        self.validation: list[dict] = []  # {"epoch", "loss"}, nats a code
        self.pictures: list[tuple[float, Tensor]] = []  # epoch, uint8 (N, 3, H, W)

    @property
    def best(self) -> dict:
        return min(self.validation, key=lambda row: row["loss"])

    def state_dict(self) -> dict:
        return {"validation": self.validation, "pictures": self.pictures}

    def load_state_dict(self, state: dict) -> None:
        self.validation, self.pictures = state["validation"], state["pictures"]


def learning_rate(step: int, *, highest: float, warmup: int, total: int) -> float:
    """Linear up to the highest, then half a cosine down to LAST_LR of it (steps from 0)."""
    if step < warmup:
        return highest * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    return highest * (LAST_LR + (1 - LAST_LR) * cosine)


def attention_kernel(device: torch.device) -> AbstractContextManager:
    """On a CPU, attention as plain products: at these lengths torch's fused kernel is the slower.

    (195 against 144 images a second on two cores, 64 codes, bfloat16, no dropout.) Elsewhere
    torch chooses.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def train(
    model: GPT,
    arguments: dict,
    about: dict,
    train_sequences: Tensor,
    test_sequences: Tensor,
    tokenizer: VQAutoencoder,
    condition: Condition,
    *,
    run: Run,
    args: argparse.Namespace,
) -> tuple[GPT, History, float]:
    """Train to the last epoch, from the checkpoint if there is one.

    Returns the model of the epoch with the lowest validation loss, the history, the seconds.
    """
    device, C = run.device, condition.length
    batches = CodeBatches(
        train_sequences, args.batch_size, device=device, seed=args.seed, flip=args.flip
    )
    total_steps = args.epochs * len(batches)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(args.weight_decay),
        lr=args.lr,
        betas=ADAM_BETAS,
        fused=device.type in ("cpu", "cuda"),
    )
    best = copy.deepcopy(model).requires_grad_(False).eval()  # what is measured and kept
    history = History()
    companions = {"last": model, "history": history}  # which training goes on with

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
    pictured = test_sequences[:NUM_PICTURES, 0, :C].long().to(device)  # conditions

    model.train()
    watch = Stopwatch(seconds)
    progress = tqdm(
        desc="transformer", total=total_steps * args.batch_size, initial=step * args.batch_size,
        unit="img", unit_scale=True, mininterval=0.5,
    )  # fmt: skip
    while step < total_steps:
        for batch in batches:  # one epoch, or the rest of it after a resume
            tokens, indices = batch[:, :C], batch[:, C:]  # (B, C), (B, N)
            dropped = torch.rand(len(tokens), 1, device=device) < args.condition_drop
            tokens = tokens.masked_fill(dropped, model.nothing)
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

            if step % len(batches) == 0:  # an epoch is over
                nats = validation_loss(model, test_sequences, device, run.dtype)
                history.validation.append({"epoch": step // len(batches), "loss": nats})
                if history.best is history.validation[-1]:
                    best.load_state_dict(model.state_dict())
                progress.write(f"epoch {step // len(batches)}: validation {nats:.4f} nats a code")
            if step in picture_steps:
                codes = model.sample(pictured, generator=torch.Generator().manual_seed(0))
                x = to_uint8(decode(tokenizer, codes))
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
def validation_loss(
    model: GPT, test_sequences: Tensor, device: torch.device, dtype: torch.dtype
) -> float:
    """Mean loss over the test codes, nats a code. The model's mode is left as it was."""
    was_training = model.training
    model.eval()
    C, total = model.condition_length, 0.0
    for batch in test_sequences[:, 0].split(250):
        batch = batch.long().to(device)
        with autocast(device, dtype):
            total += model.loss(batch[:, :C], batch[:, C:]).item() * len(batch)
    model.train(was_training)
    return total / len(test_sequences)


# --- samples -------------------------------------------------------------------------------------


@torch.no_grad()
def decode(tokenizer: VQAutoencoder, codes: Tensor) -> Tensor:
    """Grids (M, h, w) -> images (M, 3, H, W), about [-1, 1], on the CPU."""
    return torch.cat(
        [tokenizer.decode_indices(part).cpu() for part in codes.split(SAMPLES_AT_ONCE)]
    )


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
    tokenizer: VQAutoencoder,
    condition: Condition,
    test_sequences: Tensor,
    setting: dict,
    yardstick: Classifier,
    test_features: Tensor,
    *,
    run: Run,
    num_samples: int,
) -> dict:
    """Samples under the conditions of the test images, in their order, beside the test images."""
    watch = Stopwatch()
    data, generator = run.data, torch.Generator().manual_seed(0)
    chosen = torch.arange(num_samples) % len(test_sequences)  # around again, if there are more
    tokens = test_sequences[chosen, 0, : condition.length].long().to(run.device)
    features, images = [], []
    progress = tqdm(desc="sampling", total=num_samples, unit="img", unit_scale=True)
    for part in tokens.split(SAMPLES_AT_ONCE):
        x = decode(tokenizer, model.sample(part, generator=generator, **setting))
        features.append(features_of(yardstick, [x]))
        images.append(to_uint8(x))
        progress.update(len(part))
    progress.close()
    features = torch.cat(features)
    predicted = yardstick.head(features.to(run.device)).argmax(dim=1).cpu()
    right = predicted == data.test_labels[chosen]
    result = setting | {
        "num_samples": num_samples,
        "frechet": metrics.frechet_distance(features, test_features),
        "recognised": right.double().mean().item() if condition.kind != "none" else None,
        "colour_right": None,
        "prompt_right": None,
    }
    if condition.kind == "caption":
        asked = [tuple(data.test_captions[i].split()[1::3]) for i in chosen.tolist()]
        seen = colours_of(torch.cat(images).numpy())
        colour_right = torch.tensor([a[0] == b[0] for a, b in zip(asked, seen, strict=True)])
        result["colour_right"] = colour_right.double().mean().item()
        result["prompt_right"] = (right & colour_right).double().mean().item()
    return result | {"seconds": round(watch.seconds, 1)}


# --- pictures ------------------------------------------------------------------------------------


def draw_progress(path: Path, history: History) -> None:
    figures.image_rows(
        path,
        [(f"epoch {epoch:.3g}", to_unit(from_uint8(x))) for epoch, x in history.pictures],
        title="Samples while it learns: the same conditions, the same random numbers",
    )


def draw_pictures(
    run: Run,
    model: GPT,
    tokenizer: VQAutoencoder,
    condition: Condition,
    test_sequences: Tensor,
    setting: dict,
    baselines: dict[str, float],
    history: History,
) -> None:
    """Every picture of the run but progress.png, which is drawn on the way."""
    figures.code_losses(
        run.out / "losses.png",
        read_log(run.out / "log.csv"),
        history.validation,
        {BASELINES[name]: value for name, value in baselines.items()},
        title="What a code costs, and what it would cost without a transformer",
    )
    generator = torch.Generator().manual_seed(1)

    def sample(tokens: Tensor, **more) -> Tensor:
        tokens = tokens.long().to(run.device)
        codes = model.sample(tokens, generator=generator, **setting, **more)
        return to_unit(decode(tokenizer, codes))

    x = next(batches_in_order(run.data.test_images[:NUM_PICTURES], NUM_PICTURES))
    C = condition.length
    tokens = test_sequences[: len(x), 0, :C]
    described = ", ".join(f"{name} {value:g}" for name, value in setting.items() if value)
    if condition.kind == "none":
        samples = sample(condition.of_nothing(4 * NUM_PICTURES))
        figures.image_grid(run.out / "samples.png", samples, title=f"Samples ({described})")
    elif condition.kind == "image":
        rows = [
            ("original", to_unit(x)),
            (condition.picture, to_unit(PICTURES[condition.picture](x))),
        ]
        rows += [(f"sample {i}", sample(tokens)) for i in (1, 2, 3)]
        title = f"Samples given {condition.picture} ({described})"
        figures.image_rows(run.out / "samples.png", rows, title=title)
    else:
        names = condition.names if condition.kind == "class" else run.data.test_captions
        ask = condition.of_classes if condition.kind == "class" else condition.of_captions
        rows = [(name, sample(ask([name] * SAMPLES_A_ROW))) for name in names[:10]]
        title = f"Samples by {condition.kind} ({described})"
        figures.image_rows(run.out / "samples.png", rows, title=title)

    h, w = model.grid_size
    codes = test_sequences[: len(x), 0, C:].long().view(-1, h, w).to(run.device)
    known = codes.clone()
    known[:, h // 2 :] = -1
    given = to_unit(x)
    given[:, :, given.shape[2] // 2 :] = 0.5  # grey: what is to be written
    rows = [("original", to_unit(x)), ("given", given)]
    rows += [(f"completion {i}", sample(tokens, known=known)) for i in (1, 2, 3)]
    title = f"Lower halves written below the codes of upper halves ({described})"
    figures.image_rows(run.out / "completions.png", rows, title=title)


if __name__ == "__main__":
    run_script(main)
