"""Stage two: a transformer learns to write the codes of a trained VQ-VAE or VQGAN.

    python train_transformer.py --tokenizer runs/vqgan/checkpoint.pt      by class
    python train_transformer.py --tokenizer ... --condition caption             by words
    python train_transformer.py --tokenizer ... --condition image --condition-image edges
    python train_transformer.py --resume                                        go on

Esser, Rombach, Ommer 2021, arXiv 2012.09841, section 3.2. The images become tokens once; the
transformer sees nothing else. With a condition c (`conditions.py`) and the N tokens s of an image,

    L = -1/N sum_i log p(s_i | s_<i, c)      nats per token                     (eq. 9, 10)

The loop comes first, with the schedule and the validation; then what is given; the flags last.
"""

import argparse
import copy
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqgan import metrics, report
from vqgan.arguments import (
    common_parser,
    fraction,
    non_negative_float,
    non_negative_int,
    open_run,
    open_tokenizer,
    parse_arguments,
    positive_float,
    positive_int,
    run_script,
    sampling_settings,
)
from vqgan.checkpoint import fingerprint, save_model
from vqgan.conditions import KINDS, TRANSFORMS
from vqgan.device import autocast, has_fused_optimizers, prepare_model
from vqgan.errors import user_input
from vqgan.eval_networks import load_eval_classifier
from vqgan.evaluation import decode_tokens, evaluate_samples
from vqgan.images import to_uint8
from vqgan.sampling import eval_mode
from vqgan.tokens import TokenDataset, TokenLoader, build_condition, load_tokens
from vqgan.training import Run, Session, evenly_spaced
from vqgan.transformer import GPT
from vqgan.vqvae import VQAutoencoder

# Of GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix B): a memory of twenty steps for the size
# of gradients, gradients of norm 1 at most, a last learning rate of a tenth of the highest.
ADAM_BETAS, MAX_GRADIENT_NORM, LAST_LR = (0.9, 0.95), 1.0, 0.1
MAX_LOGITS = 2**26  # in validation, 256 MiB


def train(
    model: GPT,
    model_args: dict,
    tokenizer: VQAutoencoder,
    dataset: TokenDataset,
    metadata: dict,
    *,
    run: Run,
    args: argparse.Namespace,
) -> Session:
    """Train to the last epoch, from the checkpoint if there is one.

    Returns the session, whose `eval_model` is that of the epoch with the lowest validation loss.

    Args:
        model_args: the model's constructor arguments.
        metadata: what the checkpoint says of the model.
    """
    device = run.device
    loader = TokenLoader(dataset, args.batch_size, device=device, seed=run.seed, flip=run.flip)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(args.weight_decay),
        lr=args.lr,
        betas=ADAM_BETAS,
        fused=has_fused_optimizers(device),
    )
    # A transformer that trains on begins to recite the training images: the best epoch is kept.
    best = copy.deepcopy(model).requires_grad_(False).eval()
    session = Session(
        run,
        run.out,
        model=model,
        model_args=model_args,
        optimizers={"adamw": optimizer},
        loader=loader,
        eval_model=best,
        state={"validation": [], "progress": []},  # {"epoch", "loss"}; epoch and samples
        metadata=metadata,
    )
    validation, progress = session.state["validation"], session.state["progress"]
    progress_steps = evenly_spaced(session.total_steps, args.progress_rows)
    shown = dataset.test_conditions[: report.NUM_SHOWN].to(device)
    # A start token says nothing that could be left out.
    drop = 0.0 if dataset.condition.kind == "none" else args.condition_drop

    for step, (condition, tokens) in session:  # resumes, shows the bar, saves when due
        # Some conditions are dropped: p(s) is learned beside p(s | c), which guidance needs.
        dropped = torch.rand(len(condition), 1, device=device) < drop
        condition = condition.masked_fill(dropped, model.null_token)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, highest=args.lr, warmup=args.warmup, total=session.total_steps
            )
        # The step: L of eq. 10, and its gradient, cut where it is too long.
        with autocast(device, run.dtype), attention_kernel(device):
            loss = model.loss(condition, tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        session.log({"loss": loss, "gradient": norm})

        # On the way: validation after every epoch, a row of progress.png.
        if session.step % len(loader) == 0:
            nats = validation_loss(model, dataset, device, run.dtype)
            validation.append({"epoch": session.step // len(loader), "loss": nats})
            if nats <= best_epoch(validation)["loss"]:
                best.load_state_dict(model.state_dict())
            session.bar.write(f"epoch {session.epoch:.0f}: validation {nats:.4f} nats per token")
        elif session.save_is_due and not validation:
            best.load_state_dict(model.state_dict())  # nothing to choose from yet
        if session.step in progress_steps:
            samples = model.sample(shown, generator=torch.Generator().manual_seed(0))
            progress.append((session.epoch, to_uint8(decode_tokens(tokenizer, samples))))
            title = "Samples while it learns: the same conditions, the same random numbers"
            report.save_progress_figure(run.out / "progress.png", progress, title)
    return session


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


@torch.no_grad()
def validation_loss(
    model: GPT, dataset: TokenDataset, device: torch.device, dtype: torch.dtype
) -> float:
    """Mean loss over the test images, nats per token. The model's mode is left as it was."""
    chunk_size = min(250, max(1, MAX_LOGITS // (model.seq_len * model.num_embeddings)))
    conditions = dataset.test_conditions.split(chunk_size)
    total = torch.zeros((), device=device)
    with eval_mode(model):
        for condition, tokens in zip(
            conditions, dataset.test_tokens.split(chunk_size), strict=True
        ):
            with autocast(device, dtype):
                loss = model.loss(condition.to(device), tokens.to(device))
            total += loss * len(tokens)
    return total.item() / len(dataset.test)


def best_epoch(validation: list[dict]) -> dict:
    """The entry with the lowest loss, the first of several."""
    return min(validation, key=lambda row: row["loss"])


def main(args: argparse.Namespace) -> None:
    """Images become tokens, the transformer learns them, and what it generates is measured."""
    tokenizer, tokenizer_state = open_tokenizer(args)
    settings = sampling_settings(args, tokenizer.num_embeddings)
    run = open_run(args, batch_sizes=[args.batch_size])
    condition = build_condition(args.condition, run.data, tokenizer, transform=args.condition_image)
    grid = tokenizer.grids[0]
    model_args = {
        "num_embeddings": tokenizer.num_embeddings,
        "seq_len": math.prod(grid),
        "condition_vocabulary": condition.vocabulary,
        "condition_length": condition.length,
    }
    model_args |= {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "dropout")}
    with user_input(), torch.device("meta"):  # sizes that do not fit stop here
        GPT(**model_args)
    save_model(run.out / "tokenizer.pt", tokenizer_state)  # what the checkpoint cannot do without
    prepare_model(tokenizer, run.device, compile=False)
    beside = None if args.other_data else Path(args.tokenizer).parent
    eval_classifier, eval_accuracy = load_eval_classifier(
        run, epochs=args.eval_classifier_epochs, file=args.eval_classifier, folder=beside
    )
    dataset = load_tokens(run, tokenizer, condition)
    train_tokens = dataset.train[..., condition.length :].reshape(-1, *grid).long()
    test_tokens = dataset.test_tokens.view(-1, *grid)
    baselines = metrics.token_baselines(train_tokens, test_tokens, tokenizer.num_embeddings)
    report.print_baselines(baselines)

    torch.manual_seed(args.seed)
    model = prepare_model(GPT(**model_args), run.device, compile=args.compile)
    metadata = {
        "condition": condition.to_dict(),
        "condition_drop": args.condition_drop,
        "tokenizer": str(args.tokenizer),
        "tokenizer_fingerprint": fingerprint(tokenizer),
    }
    session = train(model, model_args, tokenizer, dataset, metadata, run=run, args=args)
    prior, validation = session.eval_model, session.state["validation"]

    # In float32, under the condition, after the epoch that was best on these same test images: so
    # the price is selected on them, and slightly optimistic.
    nats = validation_loss(prior, dataset, run.device, torch.float32)
    samples, references = evaluate_samples(
        prior, tokenizer, dataset, settings, eval_classifier, num_samples=args.num_samples, run=run
    )
    result = report.price(nats, prior, args.image_size) | session.summary
    result["best_epoch"] = best_epoch(validation)["epoch"]
    result |= {key: samples[0][key] if samples else None for key in ("frechet", "class_accuracy")}
    run.write_metrics(
        {"transformer": result},
        condition=condition.to_dict(),
        baselines=baselines,
        validation=validation,
        reference_frechet=references,
        eval_classifier={
            "accuracy": eval_accuracy,
            "fingerprint": None if eval_classifier is None else fingerprint(eval_classifier),
        },
        samples=samples,
    )
    report.print_transformer(result, samples, references)
    report.print_eval_classifier(eval_accuracy, len(run.data.class_names))
    report.save_transformer_figures(run, session, tokenizer, dataset, settings[0], baselines)
    print(f"metrics.json, log, checkpoint and pictures are in {run.out}")


def parse() -> argparse.Namespace:
    """The flags, in groups: the condition, the network, the samples that are measured."""
    parser = common_parser(
        "Train a transformer to write the codes of images.",
        out="runs/transformer",
        epochs=10,
        lr=1e-3,
        required="--tokenizer CHECKPOINT ",
    )
    parser.set_defaults(data=None, image_size=None)  # not given: the tokenizer's
    add = parser.add_argument
    add(
        "--tokenizer",
        metavar="CHECKPOINT",
        help="checkpoint.pt of a VQ-VAE or VQGAN; its --data and --image-size are the default",
    )
    add("--other-data", action="store_true", help="its training images may be others than --data")
    add("--batch-size", type=positive_int, default=64, help="images in a step")
    add("--warmup", type=non_negative_int, default=100, help="steps to the full learning rate")
    add("--weight-decay", type=non_negative_float, default=0.1, help="of matrices")
    add("--progress-rows", type=positive_int, default=6, help="rows of progress.png")
    add(
        "--eval-classifier",
        metavar="FILE",
        help="of another run; default: the tokenizer's, or a new one",
    )
    add("--eval-classifier-epochs", type=positive_int, default=6, help="of a new one")

    add = parser.add_argument_group("condition").add_argument
    add("--condition", choices=KINDS, default="class", help="what the codes depend on")
    add("--condition-image", choices=TRANSFORMS, default="edges", help="for --condition image")
    add("--condition-drop", type=fraction, default=0.1, help="share dropped, for guidance")

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


if __name__ == "__main__":
    run_script(parse, main)
