"""Stage one: a VQGAN learns to encode an image as a grid of indices and to decode it again.

    python train_vqgan.py                                       CIFAR-10
    python train_vqgan.py --data shapes --epochs 2              rendered shapes, minutes on a CPU
    python train_vqgan.py --objectives mse perceptual vqgan     what each term of the loss adds
    python train_vqgan.py --resume                              continue after an interruption

Esser, Rombach, Ommer 2021, arXiv 2012.09841, section 3.1. Three objectives can be trained, with
the same network and the same number of steps:

    mse          |x - x_hat|^2 / variance + quantizer                          (eq. 4)
    perceptual   |x - x_hat| / deviation + perceptual distance + quantizer     (eq. 4, as used)
    vqgan        the same + lambda L_GAN, against a discriminator              (eq. 5 to 7)

Each term is a mean; variance and deviation are those of the training pixels, so a reconstruction
term of 1 is about the error of always predicting their mean. In eq. 4, where sg[.] stops the
gradient,

    L_VQ = |x - x_hat|^2 + |sg[E(x)] - z_q|^2 + |sg[z_q] - E(x)|^2

the last two terms are the quantizer's (`quantizer.py`), and section 3.1 replaces the first by a
perceptual distance.

The loop comes first, with the steps of the generator and the discriminator; the flags come last.
"""

# First, so that waiting threads soon sleep (vqgan/__init__.py).
import vqgan  # isort: skip  # noqa: F401

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgan import metrics, report
from vqgan.arguments import (
    common_parser,
    fraction,
    init_from,
    non_negative_float,
    non_negative_int,
    open_run,
    parse_arguments,
    positive_float,
    positive_int,
    quantizer_args,
    quantizer_flags,
)
from vqgan.device import autocast, has_fused_optimizers, prepare_model
from vqgan.discriminator import (
    GAN_LOSSES,
    NORMS,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from vqgan.errors import InputError, user_input
from vqgan.eval_networks import inception_distance, load_eval_classifier, perceptual_distance
from vqgan.evaluation import evaluate_autoencoder
from vqgan.images import to_uint8
from vqgan.perceptual import PerceptualDistance
from vqgan.script import run_script
from vqgan.training import Run, Session, evenly_spaced
from vqgan.vqgan import NETWORKS, VQGAN

# A short memory (torch's default is 0.9), because adversarial gradients change quickly.
ADAM_BETAS = (0.5, 0.99)
ROWS_AT_CLAMP = 5  # rows of the log with lambda at its maximum, before a warning


def reconstruction_terms(
    x: Tensor, x_hat: Tensor, objective: str, distance: PerceptualDistance | None, variance: float
) -> dict[str, Tensor]:
    """Distances from x to x_hat, both (B, 3, H, W); each term is a mean over the batch, ()."""
    if objective == "mse":
        # In units of the variance, 1 is the error of predicting the mean of all pixels.
        return {"reconstruction": F.mse_loss(x_hat, x) / variance}
    terms = {"reconstruction": F.l1_loss(x_hat, x) / math.sqrt(variance)}
    if distance is not None:
        terms["perceptual"] = distance(x, x_hat).mean()
    return terms


def train(
    model: VQGAN,
    model_args: dict,
    folder: Path,
    objective: str,
    distance: PerceptualDistance | None,
    *,
    run: Run,
    args: argparse.Namespace,
) -> Session:
    """Train to the last epoch, from the last checkpoint if the run is resumed.

    Returns the session, whose `eval_model` is the model to use: the one with averaged weights, if
    they are averaged.
    """
    device, fused = run.device, has_fused_optimizers(run.device)
    loader = run.loader(args.batch_size)
    disc_start = round(args.disc_start * (run.epochs * len(loader)))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=ADAM_BETAS, fused=fused)
    optimizers, extra_state = {"generator": optimizer}, {}
    # The discriminator is a separate network with a separate optimizer.
    if objective == "vqgan":
        if args.compile:
            # A compiled backward may reuse its buffers, but lambda backpropagates first.
            torch._functorch.config.donated_buffer = False
        with torch.random.fork_rng(devices=[]):  # the codebook starts the same without it
            discriminator = PatchDiscriminator(args.image_size, args.disc_channels, args.disc_norm)
        prepare_model(discriminator, device, compile=False)  # small, and frozen in each step
        discriminator_optimizer = torch.optim.Adam(
            discriminator.parameters(), lr=args.disc_lr, betas=ADAM_BETAS, fused=fused
        )
        optimizers["discriminator"] = discriminator_optimizer
        extra_state["discriminator"] = discriminator
    # The last steps wander about, so the average of the weights is the better network.
    session = Session(
        run,
        folder,
        model=model,
        model_args=model_args,
        optimizers=optimizers,
        loader=loader,
        extra_state=extra_state,
        model_ema_decay=args.model_ema_decay,
        state={
            "disc_start": disc_start,  # step from which the discriminator D is trained
            "gan_start": disc_start + args.disc_warmup,  # step from which its loss is used
            "progress": [],  # (epoch, reconstructions)
        },
    )
    state = session.state  # when resumed with more epochs, the start does not move
    progress_steps = evenly_spaced(session.total_steps, args.progress_rows)
    shown = report.shown_images(run)
    zero = torch.zeros((), device=device)  # logged for D before it starts
    rows_at_clamp = 0

    for step, x in session:  # resumes, shows the bar, saves when due
        train_disc = objective == "vqgan" and step >= state["disc_start"]
        use_disc = train_disc and step >= state["gan_start"]

        # The generator's step: encoder, codebook and decoder; the discriminator only scores.
        with autocast(device, run.dtype):
            output = model(x)
        x_hat = output.reconstruction.float()
        terms = reconstruction_terms(x, x_hat, objective, distance, run.variance)
        perceptual = args.perceptual_weight * terms.get("perceptual", zero)
        reconstruction = terms["reconstruction"] + perceptual  # L_rec of eq. 7
        loss = reconstruction + output.loss  # L_VQ, eq. 4
        adversarial, weight = zero, zero
        if use_disc:
            discriminator.requires_grad_(False)
            with autocast(device, run.dtype):
                logits = discriminator(x_hat)
            adversarial = generator_loss(logits, args.gan_loss)  # L_GAN, eq. 5
            weight = adaptive_weight(
                reconstruction, adversarial, model.last_layer, maximum=args.max_lambda
            )  # lambda, eq. 7
            # Eq. 6; the weight is not in the paper but in the authors' code (0.8 there).
            loss = loss + args.adversarial_weight * weight * adversarial
            discriminator.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        # The discriminator's step. x_hat is detached, so no gradient reaches the generator.
        if train_disc:
            with autocast(device, run.dtype):
                real, fake = discriminator(torch.cat([x, x_hat.detach()])).chunk(2)
            discrimination = discriminator_loss(real, fake, args.gan_loss)  # -L_GAN, eq. 5
            discriminator_optimizer.zero_grad(set_to_none=True)
            discrimination.backward()
            discriminator_optimizer.step()

        # All rows of the log have the same terms, 0 before the discriminator takes part.
        losses = {"loss": loss} | terms | {"quantizer": output.loss}
        if objective == "vqgan":
            losses |= {"adversarial": adversarial, "lambda": weight}
            losses |= {"discriminator": zero, "real": zero, "fake": zero}
            if train_disc:
                losses["discriminator"] = discrimination
                losses |= {"real": real.float().mean(), "fake": fake.float().mean()}
        losses["codes_used"] = metrics.codes_used(output.indices, model.num_embeddings)
        # A row ends where the loss changes, so that no row averages steps with and without GAN.
        row = session.log(losses, end_row=step + 1 in (state["disc_start"], state["gan_start"]))
        if row is not None:
            # Eq. 7 divides by the gradient of L_GAN, which vanishes when D stops learning.
            at_clamp = row.get("lambda", 0) > 0.99 * args.max_lambda
            rows_at_clamp = rows_at_clamp + 1 if at_clamp else 0
            if rows_at_clamp == ROWS_AT_CLAMP:
                session.bar.write(
                    f"warning: lambda stays at its clamp of {args.max_lambda:g} (step {step + 1}): "
                    "has the discriminator stopped learning? Compare 'real' and 'fake' in log.csv;"
                    " try a higher --disc-lr or --disc-norm spectral"
                )
        if session.step in progress_steps:
            x_hat = report.reconstruct(session.eval_model, shown)
            state["progress"].append((session.epoch, to_uint8(x_hat)))
            title = f"{report.OBJECTIVES[objective]}: the same test images during training"
            path = session.folder / "progress.png"
            report.save_progress_figure(path, state["progress"], title, original=shown)
            model.train()
    return session


def main(args: argparse.Namespace) -> None:
    """Train the network once per objective, and evaluate all with the same metrics."""
    model_args = network_args(args)
    run = open_run(args, batch_sizes=[args.batch_size])
    check_discriminator(run, args)
    inception = inception_distance(run.device) if args.rfid else None
    distance, perceptual_accuracy = perceptual_distance(
        run, args.perceptual, epochs=args.classifier_epochs
    )
    eval_classifier, eval_accuracy = load_eval_classifier(run, epochs=args.eval_classifier_epochs)

    sessions, results, counts = {}, {}, {}
    for objective in dict.fromkeys(args.objectives):  # each objective once
        torch.manual_seed(args.seed)  # the same initial network
        model = prepare_model(VQGAN(**model_args), run.device, compile=args.compile)
        # A run of one model has no subfolder.
        folder = run.out if len(set(args.objectives)) == 1 else run.out / objective
        init_from(model, args, folder)
        session = train(model, model_args, folder, objective, distance, run=run, args=args)
        sessions[objective] = session
        results[objective], counts[objective] = evaluate_autoencoder(
            session.eval_model,
            run,
            distance=distance,
            eval_classifier=eval_classifier,
            inception=inception,
        )
        results[objective] |= session.summary

    run.write_metrics(
        results,
        perceptual={"network": args.perceptual, "accuracy": perceptual_accuracy},
        eval_classifier={"accuracy": eval_accuracy},
    )
    columns = report.VQGAN_COLUMNS + (["rfid"] if args.rfid else [])
    titled = {report.OBJECTIVES[name]: result for name, result in results.items()}
    report.print_table(titled, columns)
    report.print_eval_classifier(eval_accuracy, len(run.data.class_names))
    report.save_vqgan_figures(run, sessions, results, counts)
    print(f"metrics.json, logs, checkpoints and figures are in {run.out}")


def network_args(args: argparse.Namespace) -> dict:
    """The constructor arguments: those of --network, the image size, and what flags change.

    Builds the network once, so that an impossible size is reported before anything is written.
    """
    names = ["channels", "channel_multipliers", "num_residual_blocks", "attention_resolutions"]
    names += ["latent_channels"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    model_args = NETWORKS[args.network] | {"resolution": args.image_size} | given
    model_args |= quantizer_args(args)
    with user_input(), torch.device("meta"):  # shapes only
        VQGAN(**model_args)
    if args.image_size < metrics.SSIM_WINDOW:
        raise InputError(
            f"--image-size {args.image_size} does not fit: SSIM needs {metrics.SSIM_WINDOW} or more"
        )
    if args.perceptual == "none" and "perceptual" in args.objectives:
        raise InputError(
            "--perceptual none contradicts the objective 'perceptual': "
            "choose classifier or lpips, or leave that objective out"
        )
    return model_args


def check_discriminator(run: Run, args: argparse.Namespace) -> None:
    """Raise InputError if the training ends before the discriminator is used."""
    steps = args.epochs * (len(run.data.train_images) // args.batch_size)
    start = round(args.disc_start * steps) + args.disc_warmup
    if "vqgan" in args.objectives and start >= steps:
        raise InputError(
            f"the discriminator would be used from step {start} on, but the training has {steps} "
            "steps: give more --epochs, a smaller --disc-warmup or --disc-start"
        )


def parse() -> argparse.Namespace:
    """Parse the flags, in groups: network, perceptual distance, discriminator."""
    about = "Train a VQGAN, which encodes an image as a grid of codebook indices and decodes it."
    parser = common_parser(about, out="runs/vqgan", epochs=20, lr=3e-4)
    add = parser.add_argument
    add("--batch-size", type=positive_int, default=64, help="images per step")
    add(
        "--objectives",
        nargs="+",
        choices=report.OBJECTIVES,
        default=["vqgan"],
        help="objective to train; with several, one network is trained for each to compare them",
    )
    add("--init-config", metavar="FILE", help="config of --init-from if it is the authors'")
    add("--model-ema-decay", type=fraction, default=0.999, help="EMA decay of weights; 0 is no EMA")
    add("--progress-rows", type=positive_int, default=8, help="rows of progress.png")
    add("--rfid", action="store_true", help="also measure rFID with Inception (extra 'fid')")

    network = parser.add_argument_group("network (flags that are not given follow --network)")
    add = network.add_argument
    add("--network", choices=NETWORKS, default="small", help="a network of vqgan/vqgan.py")
    add("--channels", type=positive_int, help="number of channels, which each level multiplies")
    add("--channel-multipliers", nargs="+", type=positive_int, help="channel multiplier per level")
    add("--num-residual-blocks", type=positive_int, help="residual blocks per level")
    add("--attention-resolutions", nargs="*", type=positive_int, help="side lengths with attention")
    add("--latent-channels", type=positive_int, help="channels before and after quantization")
    quantizer_flags(parser)

    add = parser.add_argument_group("perceptual distance").add_argument
    networks = ("classifier", "lpips", "none")
    add("--perceptual", choices=networks, default="classifier", help="network that compares images")
    add("--perceptual-weight", type=non_negative_float, default=1.0, help="weight of that distance")
    add("--classifier-epochs", type=positive_int, default=3, help="epochs of perceptual network")
    add("--eval-classifier-epochs", type=positive_int, default=6, help="epochs of the evaluator")

    add = parser.add_argument_group("discriminator").add_argument
    add("--gan-loss", choices=GAN_LOSSES, default="hinge", help="form of the adversarial loss")
    add("--adversarial-weight", type=non_negative_float, default=0.3, help="factor of lambda L_GAN")
    add("--max-lambda", type=positive_float, default=5.0, help="clamp of adaptive weight lambda")
    add("--disc-start", type=fraction, default=0.25, help="fraction of training before it starts")
    add("--disc-warmup", type=non_negative_int, default=100, help="steps it learns before its use")
    add("--disc-lr", type=positive_float, default=1e-3, help="learning rate of the discriminator")
    add("--disc-channels", type=positive_int, default=64, help="channels of its first layer")
    add("--disc-norm", choices=NORMS, default="spectral", help="normalization of its layers")
    return parse_arguments(parser)


if __name__ == "__main__":
    run_script(parse, main)
