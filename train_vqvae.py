"""The study: a VAE and a VQ-VAE trained on the same images, measured and pictured side by side.

    python train_vqvae.py                                    CIFAR-10, 40 epochs of both
    python train_vqvae.py --data shapes --epochs 6           drawn shapes: minutes on a CPU
    python train_vqvae.py --batch-sizes 16 32 64 128 256     the sweep over batch sizes
    python train_vqvae.py --resume                           go on after an interruption

The setting is that of Zhao, Xie, Tang, "VQ-VAE for image generation on CIFAR-10" (UC Davis): both
models with Adam, learning rate 5e-4, 40 epochs. Read `main`, then `train`, then `evaluate`.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vqgan import figures, metrics
from vqgan.data import (
    Batches,
    ImageDataset,
    batches_in_order,
    evaluation_batch,
    to_unit,
)
from vqgan.errors import InputError
from vqgan.training import (
    HelpFormatter,
    Log,
    Run,
    Stopwatch,
    about_run,
    add_common_arguments,
    autocast,
    load_checkpoint,
    non_negative_float,
    open_run,
    parse_arguments,
    positive_int,
    prepare_model,
    print_table,
    read_log,
    restore,
    run_script,
    save_checkpoint,
    write_metrics,
)
from vqgan.vae import LIKELIHOODS, VAE, reparameterise
from vqgan.vqvae import VQVAE

LOG_EVERY = 50  # steps averaged in a row of log.csv
NUM_PICTURES = 12  # test images in the pictures
COLUMNS = {  # of the printed table
    "nmse": ("norm. MSE", ".4f"),
    "psnr": ("PSNR/dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "ssim_whole_image": ("SSIM whole", ".4f"),
    "perplexity": ("perplexity", ".1f"),
    "codes_used": ("codes used", "d"),
    "bits_per_image": ("bits/image", ".0f"),
    "seconds": ("seconds", ".0f"),
}


def parse() -> argparse.Namespace:
    """The flags; several --batch-sizes or --models are trained one after the other."""
    parser = argparse.ArgumentParser(
        description="Train a VAE and a VQ-VAE on the same images and compare them.",
        formatter_class=HelpFormatter,
        usage="%(prog)s [flags]   (--help lists them)",
        allow_abbrev=False,
    )
    add_common_arguments(parser, out="runs/study", epochs=40, lr=5e-4)
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


def main() -> None:
    """Train each model, measure it, and put all of them into one table and the same pictures."""
    args = parse()
    check_arguments(args)
    run = open_run(args, batch_sizes=args.batch_sizes)

    results, counts, logs, models = {}, {}, {}, {}
    for batch_size in dict.fromkeys(args.batch_sizes):  # each once
        for name in args.models:
            key = name if len(args.batch_sizes) == 1 else f"{name}-batch{batch_size}"
            torch.manual_seed(args.seed)  # each model's own start, whatever was trained before it
            model, arguments = build_model(name, args)
            prepare_model(model, run.device, compile=args.compile)
            seconds = train(
                model, arguments, folder=run.out / key, run=run, batch_size=batch_size, args=args
            )
            results[key], counts[key] = evaluate(model, run.data, run.variance, run.device)
            results[key] |= {
                "parameters": sum(p.numel() for p in model.parameters()),
                "batch_size": batch_size,
                "epochs": args.epochs,
                "arguments": arguments,
                "seconds": round(seconds, 1),
            }
            logs[key], models[key] = read_log(run.out / key / "log.csv"), model

    write_metrics(run, args, results)
    print_table({title_of(key): result for key, result in results.items()}, COLUMNS)
    draw_pictures(run.out, run.data, models, results, counts, logs, run.device)
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


def build_model(name: str, args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """The model and its constructor arguments, which its checkpoint keeps."""
    if name == "vae":
        arguments = {
            "image_size": args.image_size,
            "likelihood": args.likelihood,
            "kl_weight": args.kl_weight,
        }
        return VAE(**arguments), arguments
    arguments = {
        "num_embeddings": args.num_embeddings,
        "num_downsamples": args.num_downsamples,
        "quantizer": args.quantizer,
        "data_start": args.data_start,
        "restart_dead": args.restart_dead,
    }
    return VQVAE(**arguments), arguments


def training_losses(model: nn.Module, x: Tensor, variance: float) -> dict[str, Tensor]:
    """The loss and its terms, each (); x is (B, 3, H, W) in [-1, 1]."""
    output = model(x)
    if isinstance(model, VAE):
        # Sums over pixels and latent dimensions, means over the batch: nats an image.
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
    model: nn.Module,
    arguments: dict,
    *,
    folder: Path,
    run: Run,
    batch_size: int,
    args: argparse.Namespace,
) -> float:
    """Train to the last epoch, from the checkpoint if there is one; return the seconds it took.

    `arguments` are the model's constructor's, for its checkpoint; `args` are the command line's.
    """
    batches = Batches(
        run.data.train_images, batch_size, device=run.device, seed=args.seed, flip=args.flip
    )
    optimizer = torch.optim.Adam(
        model.parameters(), lr=args.lr, fused=run.device.type in ("cpu", "cuda")
    )
    total_steps = args.epochs * len(batches)

    # The start, or the last checkpoint of a run that was cut off.
    step, seconds = 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        state = load_checkpoint(checkpoint, model=type(model).__name__, arguments=arguments)
        restore(state, model=model, optimizers={"adam": optimizer}, batches=batches)
        step, seconds = state["step"], state["seconds"]
    log = Log(folder / "log.csv", resume_at=step)

    model.train()
    watch = Stopwatch(seconds)
    progress = tqdm(
        desc=folder.name, total=total_steps * batch_size, initial=step * batch_size, unit="img",
        unit_scale=True, mininterval=0.5,
    )  # fmt: skip
    while step < total_steps:
        for x in batches:  # one epoch, or the rest of it after a resume
            # The step. Which loss each of the two models minimises, `training_losses` says.
            with autocast(run.device, run.dtype):
                losses = training_losses(model, x, run.variance)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimizer.step()
            step += 1

            # What is kept of it. A checkpoint ends a row, so that a resume begins with a new one.
            log.record(step, losses)
            checkpoint_is_due = step % args.checkpoint_every == 0 or step == total_steps
            if step % LOG_EVERY == 0 or checkpoint_is_due:
                row = log.write_row(epoch=step / len(batches))
                progress.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
            if checkpoint_is_due:
                seconds = watch.seconds
                save_checkpoint(
                    checkpoint,
                    model=model,
                    arguments=arguments,
                    optimizers={"adam": optimizer},
                    batches=batches,
                    step=step,
                    seconds=seconds,
                    about=about_run(args),
                )
            progress.update(batch_size)
    progress.close()
    return seconds


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageDataset, variance: float, device: torch.device
) -> tuple[dict, Tensor | None]:
    """Errors and bits over the whole test set, in float32; and how often each code is used, (K,).

    A VAE is measured twice: with z at the mean of q(z|x), the usual reconstruction, and with a
    sampled z ("..._sampled"), for it is a sample that the bits of the KL can transmit.
    """
    model.eval()
    is_vae = isinstance(model, VAE)
    usage = None if is_vae else metrics.CodebookUsage(model.quantizer.num_embeddings)
    generator = torch.Generator().manual_seed(0)  # its own: evaluation must not disturb training
    per_image = defaultdict(list)
    batch_size = evaluation_batch(data.test_images[0].shape[-1])
    for x in batches_in_order(data.test_images, batch_size, device=device):
        output = model(x)
        reconstruction = output.reconstruction.cpu()
        if is_vae:
            per_image["kl"].append(output.kl.cpu())
            mean, log_var = model.encode(x)
            noise = torch.randn(mean.shape, generator=generator).to(device)
            sampled = model.decode(reparameterise(mean, log_var, noise)).cpu()
        else:
            usage.update(output.indices)
            grid = output.indices.shape[1:]
            sampled = reconstruction  # a code is not random
        x = x.cpu()
        quality = metrics.reconstruction_quality(x, reconstruction, variance)
        quality["nmse_sampled"] = metrics.normalised_mse(x, sampled, variance)
        quality["ssim_sampled"] = metrics.ssim(to_unit(x), to_unit(sampled))
        for name, values in quality.items():
            per_image[name].append(values)
    result = {name: torch.cat(values).mean().item() for name, values in per_image.items()}
    if is_vae:
        bits = metrics.nats_to_bits(result.pop("kl"))
        return result | {
            "perplexity": None,
            "codes_used": None,
            "bits_per_image": bits,
            "entropy_bits_per_image": None,
        }, None
    return result | {
        "perplexity": usage.perplexity,
        "codes_used": usage.codes_used,
        "bits_per_image": metrics.code_bits(*grid, model.quantizer.num_embeddings),
        "entropy_bits_per_image": grid.numel() * usage.entropy,
    }, usage.counts


TITLES = {"vae": "VAE", "vqvae": "VQ-VAE"}


def title_of(run: str) -> str:
    """ "vqvae-batch16" -> "VQ-VAE, batch 16"."""
    name, _, batch_size = run.partition("-batch")
    return TITLES[name] + (f", batch {batch_size}" if batch_size else "")


@torch.no_grad()
def draw_pictures(
    out: Path,
    data: ImageDataset,
    models: dict[str, nn.Module],
    results: dict[str, dict],
    counts: dict[str, Tensor | None],
    logs: dict[str, list[dict]],
    device: torch.device,
) -> None:
    """Every picture of the run; each dict has an entry for each model that was trained."""
    # The same images through every model, each with what it spends on one.
    x = next(batches_in_order(data.test_images[:NUM_PICTURES], NUM_PICTURES, device=device))
    rows = [("original", to_unit(x))]
    for run, model in models.items():
        label = f"{title_of(run)}\n{results[run]['bits_per_image']:.0f} bits"
        rows.append((label, to_unit(model(x).reconstruction)))
    figures.image_rows(
        out / "reconstructions.png",
        rows,
        title="Test images and what each model keeps of them (a VAE: decoded from the mean)",
    )
    figures.losses(
        out / "losses.png",
        {title_of(run): log for run, log in logs.items() if log},
        ylabels={
            title_of(run): "nats per image" if isinstance(model, VAE) else "mean over all elements"
            for run, model in models.items()
        },
        title="Training losses",
    )
    # Codes are the VQ-VAE's only.
    usage = {}
    for run, count in counts.items():
        if count is not None:
            used, perplexity = results[run]["codes_used"], results[run]["perplexity"]
            usage[f"{title_of(run)}: {used} used, perplexity {perplexity:.0f}"] = count
    if usage:
        figures.codebook_usage(
            out / "codebook_usage.png", usage, title="How often each code is used (test set)"
        )
    # A sweep over batch sizes: one line a model.
    if len({result["batch_size"] for result in results.values()}) > 1:
        by_model = defaultdict(dict)
        for run, result in results.items():
            by_model[TITLES[run.partition("-")[0]]][result["batch_size"]] = result["ssim"]
        epochs = next(iter(results.values()))["epochs"]
        figures.metric_by_batch_size(
            out / "ssim_by_batch_size.png",
            by_model,
            ylabel="SSIM on the test set (Wang et al. 2004)",
            title=f"SSIM by batch size, {epochs} epochs each\n"
            "(equal epochs are not equal steps: small batches take more)",
        )
    # What a VAE can do without a second model: its prior writes images, and latents can be mixed.
    pairs = len(x) // 2  # the first half of the images on the left, the second on the right
    x0, x1 = x[:pairs], x[pairs : 2 * pairs]
    for run, model in models.items():
        if isinstance(model, VAE):
            samples = model.sample(48, generator=torch.Generator().manual_seed(0))
            figures.image_grid(
                out / f"{run}_samples.png", to_unit(samples), title="Samples from the VAE's prior"
            )
        if isinstance(model, VAE) and pairs:
            between = model.interpolate(x0, x1, steps=8)  # (6, 8, 3, H, W)
            strips = torch.cat([x0[:, None], between, x1[:, None]], dim=1)
            figures.image_rows(
                out / f"{run}_interpolations.png",
                [("", to_unit(strip)) for strip in strips],
                title="First and last column: test images. Between them: the VAE's latent space",
            )


if __name__ == "__main__":
    run_script(main)
