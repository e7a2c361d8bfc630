"""Stage two: a transformer learns to generate the tokens of a trained VQ-VAE or VQGAN.

    python train_transformer.py --tokenizer runs/vqgan/checkpoint.pt            by class
    python train_transformer.py --tokenizer ... --condition caption             by words
    python train_transformer.py --tokenizer ... --condition image --condition-image edges
    python train_transformer.py --tokenizer ... --prior masked                  any order
    python train_transformer.py --resume                                        continue

Esser, Rombach, Ommer 2021, arXiv 2012.09841, section 3.2. The images are encoded as tokens once;
the transformer sees only these. Its loss, for a condition c (`conditions.py`) and the N tokens s
of an image, is

    L = -1/N sum_i log p(s_i | s_<i, c)      nats per token                     (eq. 9, 10)

A masked transformer (`masked.py`) predicts tokens from any others, in place of those before them.

The loop comes first, with the schedule and the validation; the flags come last.
"""

# First, so that waiting threads soon sleep (vqgan/__init__.py).
import vqgan  # isort: skip  # noqa: F401

import argparse
import copy
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqgan import distributed, metrics, report
from vqgan.arguments import (
    common_parser,
    fraction,
    init_from,
    non_negative_float,
    non_negative_int,
    open_run,
    open_tokenizer,
    parse_arguments,
    path_text,
    positive_float,
    positive_int,
    sampling_settings,
    small_int,
)
from vqgan.checkpoint import fingerprint, save_model
from vqgan.conditions import KINDS, TRANSFORMS, Condition
from vqgan.device import autocast, has_fused_optimizers, prepare_model
from vqgan.errors import InputError, user_input
from vqgan.eval_networks import load_eval_classifier
from vqgan.evaluation import decode_tokens, evaluate_likelihood, evaluate_samples
from vqgan.images import to_uint8
from vqgan.masked import MASK_SCHEDULES, MaskedTransformer
from vqgan.pretrained import checkpoint_path
from vqgan.script import run_script
from vqgan.tokens import TokenDataset, TokenLoader, build_condition, load_tokens
from vqgan.training import Run, Session, evenly_spaced
from vqgan.transformer import GPT
from vqgan.vqvae import VQAutoencoder

# As GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix B): squared gradients are averaged over
# twenty steps, gradients have norm 1 at most, the learning rate ends at a tenth of its peak.
ADAM_BETAS, MAX_GRADIENT_NORM, LAST_LR = (0.9, 0.95), 1.0, 0.1
PRIORS = {"gpt": GPT, "masked": MaskedTransformer}


def train(
    model: GPT | MaskedTransformer,
    model_args: dict,
    tokenizer: VQAutoencoder,
    dataset: TokenDataset,
    metadata: dict,
    *,
    run: Run,
    args: argparse.Namespace,
) -> Session:
    """Train to the last epoch, from the last checkpoint if the run is resumed.

    Returns the session, whose `eval_model` is the model after the epoch with the lowest validation
    loss.

    Args:
        model_args: the model's constructor arguments.
        metadata: facts about the model, which the checkpoint keeps.
    """
    device = run.device
    loader = TokenLoader(dataset, args.batch_size, device=device, seed=run.seed, flip=run.flip)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(args.weight_decay),
        lr=args.lr,
        betas=ADAM_BETAS,
        fused=has_fused_optimizers(device),
    )
    # The best epoch is kept, because longer training begins to memorize the training images.
    best = copy.deepcopy(model).requires_grad_(False).eval()
    session = Session(
        run,
        run.out,
        model=model,
        model_args=model_args,
        optimizers={"adamw": optimizer},
        loader=loader,
        eval_model=best,
        state={"validation": [], "progress": []},  # {"epoch", "loss"}; (epoch, samples)
        metadata=metadata,
    )
    validation, progress = session.state["validation"], session.state["progress"]
    progress_steps = evenly_spaced(session.total_steps, args.progress_rows)
    shown = dataset.test_conditions[: report.NUM_SHOWN].to(device)
    # A start token carries no information that could be dropped.
    drop = 0.0 if dataset.condition.kind == "none" else args.condition_drop

    for step, (condition, tokens) in session:  # resumes, shows the bar, saves when due
        # Some conditions are dropped, to learn p(s) as well as p(s | c), which guidance needs.
        dropped = distributed.part(torch.rand(args.batch_size, 1, device=device)) < drop
        condition = condition.masked_fill(dropped, model.null_token)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, highest=args.lr, warmup=args.warmup, total=session.total_steps
            )
        # The step: L of eq. 10 and its gradient, clipped.
        with autocast(device, run.dtype), attention_kernel(device):
            loss = model.loss(condition, tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        session.log({"loss": loss, "gradient": norm})

        # Validation after every epoch, and the rows of progress.png.
        if session.step % len(loader) == 0:
            nats, _ = evaluate_likelihood(model, dataset, device, run.dtype)
            validation.append({"epoch": session.step // len(loader), "loss": nats})
            if nats <= best_epoch(validation)["loss"]:
                best.load_state_dict(model.state_dict())
            session.bar.write(f"epoch {session.epoch:.0f}: validation {nats:.4f} nats per token")
        elif session.save_is_due and not validation:
            best.load_state_dict(model.state_dict())  # nothing to choose from yet
        if session.step in progress_steps:
            samples = model.sample(shown, generator=torch.Generator().manual_seed(0))
            progress.append((session.epoch, to_uint8(decode_tokens(tokenizer, samples))))
            title = "Samples during training: the same conditions, the same random numbers"
            report.save_progress_figure(run.out / "progress.png", progress, title)
    return session


def learning_rate(step: int, *, highest: float, warmup: int, total: int) -> float:
    """Linear warmup to `highest`, then half a cosine down to LAST_LR of it (steps from 0).

    A resume with more epochs continues on the longer cosine, so its rate first rises again.
    """
    if step < warmup:
        return highest * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    return highest * (LAST_LR + (1 - LAST_LR) * cosine)


def attention_kernel(device: torch.device) -> AbstractContextManager:
    """Plain attention on a CPU, where the fused kernel trains slower on short sequences.

    (With dropout, torch itself uses plain attention.) On other devices torch chooses.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def best_epoch(validation: list[dict]) -> dict:
    """The entry with the lowest loss, or the first of several."""
    return min(validation, key=lambda row: row["loss"])


def main(args: argparse.Namespace) -> None:
    """Encode the images as tokens, train the transformer on them, and evaluate its samples."""
    tokenizer, tokenizer_state = open_tokenizer(args)
    settings = sampling_settings(args, tokenizer.num_embeddings, tokenizer.seq_len)
    run = open_run(args, batch_sizes=[args.batch_size])
    condition = build_condition(args.condition, run.data, tokenizer, transform=args.condition_image)
    model_args = build_model_args(args, tokenizer, condition)
    prior_class = PRIORS[args.prior]
    with user_input(), torch.device("meta"):  # sizes that do not fit raise here
        prior_class(**model_args)
    save_model(run.out / "tokenizer.pt", tokenizer_state)  # decodes the samples later
    prepare_model(tokenizer, run.device, compile=False)
    folder = None if args.other_data else checkpoint_path(args.tokenizer).parent
    eval_classifier, eval_accuracy = load_eval_classifier(
        run, epochs=args.eval_classifier_epochs, file=args.eval_classifier, folder=folder
    )
    dataset = load_tokens(run, tokenizer, condition)
    train_grids = tokenizer.split_tokens(dataset.train_tokens)
    test_grids = tokenizer.split_tokens(dataset.test_tokens)
    baselines = metrics.token_baselines(train_grids, test_grids, tokenizer.num_embeddings)
    report.print_baselines(baselines)

    torch.manual_seed(args.seed)
    model = prepare_model(prior_class(**model_args), run.device, compile=args.compile)
    init_from(model, args, run.out)
    metadata = {
        "condition": condition.to_dict(),
        "condition_drop": args.condition_drop,
        "tokenizer": str(args.tokenizer),
        "tokenizer_fingerprint": fingerprint(tokenizer),
    }
    session = train(model, model_args, tokenizer, dataset, metadata, run=run, args=args)
    prior, validation = session.eval_model, session.state["validation"]

    # In float32, given the condition. The epoch was selected on these same test images, so the
    # loss is slightly optimistic.
    nats = evaluate_likelihood(prior, dataset, run.device, torch.float32)  # and its standard error
    samples, references = evaluate_samples(
        prior, tokenizer, dataset, settings, eval_classifier, num_samples=args.num_samples, run=run
    )
    result = report.price(*nats, prior, args.image_size) | session.summary
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
    print(f"metrics.json, log, checkpoint and figures are in {run.out}")


def build_model_args(
    args: argparse.Namespace, tokenizer: VQAutoencoder, condition: Condition
) -> dict[str, int | float | str]:
    """The constructor arguments of the transformer, which its checkpoint keeps."""
    names = ("n_layer", "n_head", "n_embd", "dropout")
    model_args = {name: getattr(args, name) for name in names} | {
        "num_embeddings": tokenizer.num_embeddings,
        "seq_len": tokenizer.seq_len,
        "condition_vocabulary": condition.vocabulary,
        "condition_length": condition.length,
    }
    if args.prior == "masked":
        model_args["mask_schedule"] = args.mask_schedule
    return model_args


def parse() -> argparse.Namespace:
    """Parse the flags, in groups: condition, network, samples for the evaluation."""
    about, needed = (
        "Train a transformer to generate the tokens of images.",
        "--tokenizer CHECKPOINT ",
    )
    parser = common_parser(about, out="runs/transformer", epochs=10, lr=1e-3, required=needed)
    parser.set_defaults(data=None, image_size=None)  # not given: the tokenizer's
    add = parser.add_argument
    source = "checkpoint.pt of a VQ-VAE or VQGAN; its --data and --image-size are the defaults"
    add("--tokenizer", type=path_text, metavar="CHECKPOINT", help=source)
    add("--other-data", action="store_true", help="allow a tokenizer trained on other --data")
    add("--batch-size", type=positive_int, default=64, help="images per step")
    add("--warmup", type=non_negative_int, default=100, help="steps to the peak learning rate")
    add("--weight-decay", type=non_negative_float, default=0.1, help="weight decay of matrices")
    add("--progress-rows", type=positive_int, default=6, help="rows of progress.png")
    classifier = "evaluation classifier of another run (default: the tokenizer's, or a new one)"
    add("--eval-classifier", type=path_text, metavar="FILE", help=classifier)
    add("--eval-classifier-epochs", type=positive_int, default=6, help="epochs of a new classifier")

    add = parser.add_argument_group("condition").add_argument
    add("--condition", choices=KINDS, default="class", help="what the samples depend on")
    add("--condition-image", choices=TRANSFORMS, default="edges", help="transform to condition on")
    drop = "fraction of conditions that are dropped in training, which guidance needs"
    add("--condition-drop", type=fraction, default=0.1, help=drop)

    add = parser.add_argument_group("network").add_argument
    add("--prior", choices=PRIORS, default="gpt", help="one token after the other, or any order")
    hides = f"how many tokens --prior masked hides in training (default: {MASK_SCHEDULES[0]})"
    add("--mask-schedule", choices=MASK_SCHEDULES, help=hides)
    add("--n-layer", type=small_int, default=6, help="number of blocks")
    add("--n-head", type=positive_int, default=8, help="attention heads per block")
    add("--n-embd", type=positive_int, default=256, help="width of the embeddings")
    add("--dropout", type=fraction, default=0.1, help="dropout probability")

    add = parser.add_argument_group(
        "samples for the evaluation (several values: every combination)"
    ).add_argument
    add("--num-samples", type=positive_int, help="number of samples (default: one per test image)")
    number = non_negative_float
    add("--guidance", nargs="+", type=number, default=[1.0], help="scale of guidance; 1 is none")
    add("--temperature", nargs="+", type=number, default=[1.0], help="temperature; 0 is greedy")
    add("--top-k", nargs="+", type=positive_int, help="sample from the k most likely tokens only")
    add("--top-p", nargs="+", type=positive_float, help="sample from the top tokens of this mass")
    add("--steps", nargs="+", type=positive_int, help="rounds of --prior masked (default: 10)")
    args = parse_arguments(parser)
    for name in ("steps", "mask_schedule"):
        if getattr(args, name) is not None and args.prior != "masked":
            raise InputError(f"--{name.replace('_', '-')} is about --prior masked: leave it out")
    if args.prior == "masked" and args.mask_schedule is None:
        args.mask_schedule = MASK_SCHEDULES[0]
    return args


if __name__ == "__main__":
    run_script(parse, main)
