"""The study: a VAE and a VQ-VAE trained on the same images, measured and pictured side by side.

    python train_vqvae.py                                    CIFAR-10, 40 epochs of both
    python train_vqvae.py --data shapes --epochs 6           drawn shapes: minutes on a CPU
    python train_vqvae.py --batch-sizes 16 32 64 128 256     the sweep over batch sizes
    python train_vqvae.py --resume                           go on after an interruption

The setting is that of Zhao, Xie, Tang, "VQ-VAE for image generation on CIFAR-10" (UC Davis): both
models with Adam, learning rate 5e-4, 40 epochs. The loss and the loop come first, the flags last.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan import metrics, report
from vqgan.arguments import (
    common_parser,
    non_negative_float,
    open_run,
    parse_arguments,
    positive_int,
    run_script,
)
from vqgan.device import autocast, has_fused_optimizers, prepare_model
from vqgan.errors import InputError
from vqgan.evaluation import evaluate_autoencoder
from vqgan.training import Run, Session
from vqgan.vae import LIKELIHOODS, VAE
from vqgan.vqvae import VQVAE


def training_losses(model: nn.Module, x: Tensor, variance: float) -> dict[str, Tensor]:
    """The loss and its terms, each (); x is (B, 3, H, W) in [-1, 1]."""
    output = model(x)
    if isinstance(model, VAE):
        # Sums over pixels and latent dimensions, means over the batch: nats per image.
        return {
            "loss": output.loss,
            "negative log-likelihood": output.negative_log_likelihood,
            "KL": output.kl.mean(),
        }
    # Means over all elements. Divided by the variance, the error of one mean grey is 1.
    reconstruction = F.mse_loss(output.reconstruction.float(), x) / variance
    return {
        "loss": reconstruction + output.loss,
        "reconstruction": reconstruction,
        "quantizer": output.loss,
    }


def train(
    model: nn.Module, arguments: dict, name: str, *, run: Run, batch_size: int, lr: float
) -> Session:
    """Train to the last epoch, from the checkpoint if there is one.

    Args:
        arguments: the model's constructor arguments.
        name: the subfolder of the run.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=has_fused_optimizers(run.device))
    session = Session(
        run,
        name,
        model=model,
        arguments=arguments,
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
    """Train each model, measure it, and put all of them into one table and the same figures."""
    check_arguments(args)
    run = open_run(args, batch_sizes=args.batch_sizes)
    sessions, results, counts = {}, {}, {}
    for batch_size in dict.fromkeys(args.batch_sizes):  # each once
        for model_name in args.models:
            several = len(args.batch_sizes) > 1
            name = f"{model_name}-batch{batch_size}" if several else model_name
            torch.manual_seed(args.seed)  # each model's own start, whatever was trained before it
            model, arguments = build_model(model_name, args)
            prepare_model(model, run.device, compile=args.compile)
            session = train(model, arguments, name, run=run, batch_size=batch_size, lr=args.lr)
            results[name], counts[name] = evaluate_autoencoder(model, run)
            results[name] |= session.summary
            sessions[name] = session

    run.write_metrics(results)
    titled = {report.study_title(name): result for name, result in results.items()}
    report.print_table(titled, report.STUDY_COLUMNS)
    report.draw_study(run, sessions, results, counts)
    print(f"metrics.json, logs, checkpoints and pictures are in {run.out}")


def check_arguments(args: argparse.Namespace) -> None:
    """Stop before anything is written where flags do not fit each other."""
    halvings = [4] if "vae" in args.models else []
    halvings += [args.num_downsamples] if "vqvae" in args.models else []
    factor = 2 ** max(halvings)
    if args.image_size % factor or args.image_size < metrics.SSIM_WINDOW:
        raise InputError(
            f"--image-size {args.image_size} does not fit: the models need a multiple of {factor}, "
            f"and SSIM at least {metrics.SSIM_WINDOW}"
        )
    if args.quantizer == "gradient" and not args.restart_dead:
        raise InputError(
            "--no-restart-dead is for --quantizer ema, the only one that restarts dead codes: "
            "leave it out"
        )


def build_model(name: str, args: argparse.Namespace) -> tuple[VAE | VQVAE, dict]:
    """The model and its constructor arguments, which its checkpoint keeps."""
    if name == "vae":
        arguments = {
            "image_size": args.image_size,
            "likelihood": args.likelihood,
            "kl_weight": args.kl_weight,
        }
        return VAE(**arguments), arguments
    arguments = {
        "image_size": args.image_size,
        "num_embeddings": args.num_embeddings,
        "num_downsamples": args.num_downsamples,
        "quantizer": args.quantizer,
        "data_start": args.data_start,
        "restart_dead": args.restart_dead,
    }
    return VQVAE(**arguments), arguments


def parse() -> argparse.Namespace:
    """The flags; several --batch-sizes or --models are trained one after the other."""
    parser = common_parser(
        "Train a VAE and a VQ-VAE on the same images and compare them.",
        out="runs/study",
        epochs=40,
        lr=5e-4,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=("vae", "vqvae"), default=["vae", "vqvae"], help="to train")
    add(
        "--batch-sizes",
        "--batch-size",
        nargs="+",
        type=positive_int,
        default=[128],
        help="several train each model once for each",
    )
    vae = parser.add_argument_group("VAE").add_argument
    vae(
        "--likelihood",
        choices=LIKELIHOODS,
        default="optimal",
        help="what an error costs: see vqgan/vae.py",
    )
    vae(
        "--kl-weight",
        type=non_negative_float,
        default=1.0,
        help="1: the bound; more: fewer bits, more blur",
    )
    vqvae = parser.add_argument_group("VQ-VAE").add_argument
    on_off = argparse.BooleanOptionalAction
    vqvae("--quantizer", choices=("ema", "gradient"), default="ema", help="what moves the codes")
    vqvae("--num-embeddings", type=positive_int, default=512, help="K, codes in the codebook")
    vqvae("--num-downsamples", type=positive_int, default=2, help="2: 8x8 codes of 32x32; 1: 16x16")
    vqvae("--data-start", action=on_off, default=True, help="codes start from the first batch")
    vqvae("--restart-dead", action=on_off, default=True, help="codes nobody chooses move (ema)")
    return parse_arguments(parser)


if __name__ == "__main__":
    run_script(parse, main)
