"""The study: VAEs and a VQ-VAE are trained on the same images and compared.

    python train_vqvae.py                                    CIFAR-10, 40 epochs of both
    python train_vqvae.py --data shapes --epochs 6           rendered shapes, minutes on a CPU
    python train_vqvae.py --batch-sizes 16 32 64 128 256     a sweep over batch sizes
    python train_vqvae.py --models vae-spatial vqvae         of one network, two bottlenecks
    python train_vqvae.py --models vqvae --quantizer fsq     another codebook (vqgan/codebooks.py)
    python train_vqvae.py --models vqvae2                    two levels of codes
    python train_vqvae.py --resume                           continue after an interruption

The setting is that of Zhao, Xie, Tang, "VQ-VAE for image generation on CIFAR-10" (UC Davis): both
models are trained with Adam at a learning rate of 5e-4 for 40 epochs. The loss and the loop come
first, the flags last.
"""

# First, so that waiting threads soon sleep (vqgan/__init__.py).
import vqgan  # isort: skip  # noqa: F401

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgan import metrics, report
from vqgan.arguments import (
    common_parser,
    init_from,
    non_negative_float,
    open_run,
    parse_arguments,
    positive_int,
    quantizer_args,
    quantizer_flags,
)
from vqgan.device import autocast, has_fused_optimizers, prepare_model
from vqgan.errors import InputError, user_input
from vqgan.evaluation import evaluate_autoencoder
from vqgan.script import run_script
from vqgan.training import Run, Session
from vqgan.vae import LIKELIHOODS, VAE, GaussianAutoencoder, SpatialVAE
from vqgan.vqvae import VQVAE, VQAutoencoder
from vqgan.vqvae2 import VQVAE2


def training_losses(
    model: GaussianAutoencoder | VQAutoencoder, x: Tensor, variance: float
) -> dict[str, Tensor]:
    """The loss and its terms, each (), for x (B, 3, H, W) in [-1, 1]."""
    output = model(x)
    if isinstance(model, GaussianAutoencoder):
        # Each term is summed over pixels or latent dimensions and averaged over the batch: nats
        # per image.
        return {
            "loss": output.loss,
            "negative log-likelihood": output.negative_log_likelihood,
            "KL": output.kl.mean(),
        }
    # Each term is a mean over all elements; predicting the mean of all pixels has an error of 1.
    reconstruction = F.mse_loss(output.reconstruction.float(), x) / variance
    return {
        "loss": reconstruction + output.loss,
        "reconstruction": reconstruction,
        "quantizer": output.loss,
        "codes_used": metrics.codes_used(output.indices, model.num_embeddings),
    }


def train(
    model: GaussianAutoencoder | VQAutoencoder,
    model_args: dict,
    folder: Path,
    *,
    run: Run,
    batch_size: int,
    lr: float,
) -> Session:
    """Train to the last epoch, from the last checkpoint if the run is resumed.

    Args:
        model_args: the model's constructor arguments.
        folder: folder for checkpoint.pt and log.csv.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=has_fused_optimizers(run.device))
    session = Session(
        run,
        folder,
        model=model,
        model_args=model_args,
        optimizers={"adam": optimizer},
        loader=run.loader(batch_size),
    )
    for _, x in session:  # resumes, shows the bar, saves when due
        with autocast(run.device, run.dtype):
            losses = training_losses(model, x, run.variance)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        optimizer.step()
        session.log(losses)
    return session


def main(args: argparse.Namespace) -> None:
    """Train and evaluate each model, and compare all of them in one table and in figures."""
    check_arguments(args)
    run = open_run(args, batch_sizes=args.batch_sizes)
    sessions, results, counts = {}, {}, {}
    for batch_size in dict.fromkeys(args.batch_sizes):  # each size once
        for model_name in dict.fromkeys(args.models):
            several = len(set(args.batch_sizes)) > 1
            name = f"{model_name}-batch{batch_size}" if several else model_name
            torch.manual_seed(args.seed)  # the same start, whatever was trained before
            model, model_args = build_model(model_name, args)
            prepare_model(model, run.device, compile=args.compile)
            # A run of one model has no subfolder.
            is_single = len(set(args.models)) == 1 and not several
            folder = run.out if is_single else run.out / name
            init_from(model, args, folder)
            session = train(model, model_args, folder, run=run, batch_size=batch_size, lr=args.lr)
            results[name], counts[name] = evaluate_autoencoder(model, run)
            results[name] |= session.summary
            sessions[name] = session

    run.write_metrics(results)
    titled = {report.study_title(name): result for name, result in results.items()}
    report.print_table(titled, report.STUDY_COLUMNS)
    report.save_study_figures(run, sessions, results, counts)
    print(f"metrics.json, logs, checkpoints and figures are in {run.out}")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError before anything is written if flags do not fit each other."""
    downsamples = [4] if "vae" in args.models else []
    downsamples += [args.num_downsamples] if {*args.models} - {"vae"} else []
    times = max(downsamples)
    if args.image_size % 2**times or args.image_size < metrics.SSIM_WINDOW:
        raise InputError(
            f"--image-size {args.image_size} does not fit: {times} downsamples need a multiple of "
            f"2^{times}, and SSIM at least {metrics.SSIM_WINDOW}"
        )
    if "vqvae2" in args.models and (args.num_downsamples < 2 or args.num_rounds is not None):
        raise InputError("vqvae2 has two grids: it needs --num-downsamples 2 and no --num-rounds")
    # (The flags of a run that is resumed are in its config.json, where older ones have them all.)
    has_codebook = args.resume or bool({*args.models} - {"vae", "vae-spatial"})
    for name in quantizer_args(args) if not has_codebook else ():
        models = " and ".join(args.models)
        raise InputError(f"--{name.replace('_', '-')}: {models} has no codebook, leave it out")
    with user_input(), torch.device("meta"):  # shapes only
        for name in args.models:
            build_model(name, args)


def build_model(
    name: str, args: argparse.Namespace
) -> tuple[GaussianAutoencoder | VQAutoencoder, dict]:
    """The model and its constructor arguments, which its checkpoint keeps."""
    model_args = {
        "image_size": args.image_size,
        "likelihood": args.likelihood,
        "kl_weight": args.kl_weight,
    }
    if name == "vae":
        return VAE(**model_args), model_args
    if name == "vae-spatial":
        model_args["num_downsamples"] = args.num_downsamples
        return SpatialVAE(**model_args), model_args
    model_args = {"image_size": args.image_size, "num_downsamples": args.num_downsamples}
    model_args |= quantizer_args(args)
    if name == "vqvae":
        return VQVAE(**model_args), model_args
    model_args["num_downsamples"] -= 1  # of the fine grid; the coarse one is that of the VQ-VAE
    return VQVAE2(**model_args), model_args


def parse() -> argparse.Namespace:
    """Parse the flags; several --batch-sizes or --models are trained one after the other."""
    parser = common_parser(
        "Train VAEs and a VQ-VAE on the same images and compare them.",
        out="runs/study",
        epochs=40,
        lr=5e-4,
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        choices=report.STUDY_TITLES,
        default=["vae", "vqvae"],
        help="models to train and compare; vae-spatial is a VAE with the VQ-VAE's network",
    )
    add(
        "--batch-sizes",
        "--batch-size",
        nargs="+",
        type=positive_int,
        default=[128],
        help="images per step; given several, each model is trained once with each",
    )
    vae = parser.add_argument_group("VAEs").add_argument
    vae(
        "--likelihood",
        choices=LIKELIHOODS,
        default="optimal",
        help="distribution of the pixels, which defines the reconstruction error (vqgan/vae.py)",
    )
    vae(
        "--kl-weight",
        type=non_negative_float,
        default=1.0,
        help="weight of the KL term; 1 is the ELBO, a larger weight gives fewer bits and more blur",
    )
    help = "2 turns 32x32 pixels into 8x8 (of all but vae; of vqvae2's coarse grid)"
    add("--num-downsamples", type=positive_int, default=2, help=help)
    quantizer_flags(parser)
    return parse_arguments(parser)


if __name__ == "__main__":
    run_script(parse, main)
