"""Stage one: a VQGAN learns to turn an image into a grid of codes, and back.

    python train_vqgan.py                                       CIFAR-10
    python train_vqgan.py --data shapes --epochs 2              drawn shapes: minutes on a CPU
    python train_vqgan.py --objectives mse perceptual vqgan     what each term of the loss buys
    python train_vqgan.py --resume                              go on after an interruption

Esser, Rombach, Ommer 2021, arXiv 2012.09841, section 3.1. Three objectives can be trained, on the
same network and for as many steps:

    mse          |x - x_hat|^2 / variance + quantizer                          (eq. 4)
    perceptual   |x - x_hat| / deviation + perceptual distance + quantizer     (eq. 4, as used)
    vqgan        the same + lambda L_GAN, against a discriminator              (eq. 5 to 7)

Each term is a mean; variance and deviation are those of the training pixels, so a reconstruction
term of 1 is about the error of predicting one mean grey. In eq. 4, with sg[.] stopping the
gradient,

    L_VQ = |x - x_hat|^2 + |sg[E(x)] - z_q|^2 + |sg[z_q] - E(x)|^2

the last two are the quantizer's (`quantizer.py`), and section 3.1 puts a perceptual distance in the
place of the first.

The loop comes first, with the generator's and the discriminator's step both in sight; the flags
come last.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgan import metrics, report
from vqgan.arguments import (
    common_parser,
    fraction,
    non_negative_float,
    non_negative_int,
    open_run,
    parse_arguments,
    positive_float,
    positive_int,
    run_script,
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
from vqgan.eval_networks import inception_distance, load_yardstick, perceptual_distance
from vqgan.evaluation import evaluate_autoencoder
from vqgan.images import to_uint8
from vqgan.perceptual import PerceptualDistance
from vqgan.training import Run, Session, evenly_spaced
from vqgan.vqgan import NETWORKS, VQGAN

# The gradients of an adversarial game turn quickly: a short memory (torch's default is 0.9).
ADAM_BETAS = (0.5, 0.99)
ROWS_AT_CLAMP = 5  # rows of the log with lambda at its maximum, before a warning


def reconstruction_terms(
    x: Tensor, x_hat: Tensor, objective: str, distance: PerceptualDistance | None, variance: float
) -> dict[str, Tensor]:
    """How far x_hat is from x, both (B, 3, H, W): each term (), a mean over the batch."""
    if objective == "mse":
        # In units of the variance: 1 is the error of one mean grey.
        return {"reconstruction": F.mse_loss(x_hat, x) / variance}
    terms = {"reconstruction": F.l1_loss(x_hat, x) / math.sqrt(variance)}
    if distance is not None:
        terms["perceptual"] = distance(x, x_hat).mean()
    return terms


def train(
    model: VQGAN,
    arguments: dict,
    objective: str,
    distance: PerceptualDistance | None,
    *,
    run: Run,
    args: argparse.Namespace,
) -> Session:
    """Train to the last epoch, from the checkpoint if there is one.

    Returns the session, whose `kept` is the model to use: the averaged one, if weights are
    averaged.
    """
    device, fused = run.device, has_fused_optimizers(run.device)
    loader = run.loader(args.batch_size)
    total_steps = run.epochs * len(loader)
    disc_start = round(args.adversarial_start * total_steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=ADAM_BETAS, fused=fused)
    optimizers, companions = {"generator": optimizer}, {}
    # The discriminator: a network and an optimizer of its own.
    if objective == "vqgan":
        if args.compile:
            # A compiled backward may reuse its buffers, but lambda goes through the graph first.
            torch._functorch.config.donated_buffer = False
        with torch.random.fork_rng(devices=[]):  # codes start alike with it and without
            discriminator = PatchDiscriminator(
                args.image_size, args.discriminator_channels, args.discriminator_norm
            )
        prepare_model(discriminator, device, compile=False)  # small, and switched twice a step
        discriminator_optimizer = torch.optim.Adam(
            discriminator.parameters(), lr=args.discriminator_lr, betas=ADAM_BETAS, fused=fused
        )
        optimizers["discriminator"] = discriminator_optimizer
        companions["discriminator"] = discriminator
    # Training wanders about in its last steps: the average of the weights is the better network.
    session = Session(
        run,
        objective,
        model=model,
        arguments=arguments,
        optimizers=optimizers,
        loader=loader,
        companions=companions,
        ema_decay=args.average_decay,
        state={
            "disc_start": disc_start,  # step from which on D learns
            "gan_start": disc_start + args.discriminator_warmup,  # and is used
            "progress": [],  # epoch, reconstructions
        },
    )
    state = session.state  # of a resumed run: epochs that are added later do not move the start
    progress_steps = evenly_spaced(total_steps, args.pictures)
    shown = report.shown_images(run)
    zero = torch.zeros((), device=device)  # logged for the game before it starts
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
            # Eq. 6; the factor is not in the paper, but in the authors' code (0.8 there).
            loss = loss + args.adversarial_weight * weight * adversarial
            discriminator.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        # The discriminator's step. x_hat is detached: nothing of it reaches the generator.
        if train_disc:
            with autocast(device, run.dtype):
                real, fake = discriminator(torch.cat([x, x_hat.detach()])).chunk(2)
            discrimination = discriminator_loss(real, fake, args.gan_loss)  # -L_GAN, eq. 5
            discriminator_optimizer.zero_grad(set_to_none=True)
            discrimination.backward()
            discriminator_optimizer.step()

        # The log. All rows have the same terms: 0 before the discriminator takes part.
        losses = {"loss": loss} | terms | {"quantizer": output.loss}
        if objective == "vqgan":
            losses |= {"adversarial": adversarial, "lambda": weight}
            losses |= {"discriminator": zero, "real": zero, "fake": zero}
            if train_disc:
                losses["discriminator"] = discrimination
                losses |= {"real": real.float().mean(), "fake": fake.float().mean()}
        losses["codes"] = metrics.codes_in_batch(output.indices, model.num_embeddings)
        # A row ends where the game changes, so that none averages over steps with and without it.
        row = session.log(losses, end_row=step + 1 in (state["disc_start"], state["gan_start"]))
        if row is not None:
            # Eq. 7 divides by the gradient of L_GAN, which vanishes when D stops learning.
            at_clamp = row.get("lambda", 0) > 0.99 * args.max_lambda
            rows_at_clamp = rows_at_clamp + 1 if at_clamp else 0
            if rows_at_clamp == ROWS_AT_CLAMP:
                session.bar.write(
                    f"warning: lambda stays at its clamp of {args.max_lambda:g} (step {step + 1}): "
                    "has the discriminator stopped learning? 'real' and 'fake' in log.csv tell;"
                    " try a higher --discriminator-lr, or --discriminator-norm spectral"
                )
        if session.step in progress_steps:
            x_hat = report.reconstruct(session.kept, shown)
            state["progress"].append((session.epoch, to_uint8(x_hat)))
            title = f"{report.OBJECTIVES[objective]}: the same test images while it learns"
            path = run.out / objective / "progress.png"
            report.draw_progress(path, state["progress"], title, original=shown)
            model.train()
    return session


def main(args: argparse.Namespace) -> None:
    """Train the network once for each objective, and measure all by the same distances."""
    arguments = network_arguments(args)
    run = open_run(args, batch_sizes=[args.batch_size])
    check_adversary(run, args)
    inception = inception_distance(run.device) if args.rfid else None
    distance, perceptual_accuracy = perceptual_distance(
        run, args.perceptual, epochs=args.classifier_epochs
    )
    yardstick, yardstick_accuracy = load_yardstick(run, epochs=args.yardstick_epochs)

    sessions, results, counts = {}, {}, {}
    for objective in dict.fromkeys(args.objectives):  # each once
        torch.manual_seed(args.seed)  # each its own start, and all the same network
        model = prepare_model(VQGAN(**arguments), run.device, compile=args.compile)
        session = train(model, arguments, objective, distance, run=run, args=args)
        sessions[objective] = session
        results[objective], counts[objective] = evaluate_autoencoder(
            session.kept, run, distance=distance, yardstick=yardstick, inception=inception
        )
        results[objective] |= session.summary

    run.write_metrics(
        results,
        perceptual={"network": args.perceptual, "accuracy": perceptual_accuracy},
        yardstick={"accuracy": yardstick_accuracy},
    )
    columns = report.VQGAN_COLUMNS + (["rfid"] if args.rfid else [])
    titled = {report.OBJECTIVES[name]: result for name, result in results.items()}
    report.print_table(titled, columns)
    report.print_yardstick(yardstick_accuracy, len(run.data.class_names))
    report.draw_vqgan(run, sessions, results, counts)
    print(f"metrics.json, logs, checkpoints and pictures are in {run.out}")


def network_arguments(args: argparse.Namespace) -> dict:
    """The constructor arguments: the named network, the image size, and what flags change.

    Builds the network once, so that sizes that do not fit stop before anything is written.
    """
    names = ["channels", "channel_multipliers", "num_residual_blocks", "attention_resolutions"]
    names += ["latent_channels", "embedding_dim", "num_embeddings", "quantizer"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    arguments = NETWORKS[args.network] | {"resolution": args.image_size} | given
    with user_input(), torch.device("meta"):  # shapes only
        VQGAN(**arguments)
    if args.image_size < metrics.SSIM_WINDOW:
        raise InputError(
            f"--image-size {args.image_size} does not fit: SSIM needs {metrics.SSIM_WINDOW} or more"
        )
    if args.perceptual == "none" and "perceptual" in args.objectives:
        raise InputError(
            "--perceptual none leaves nothing of the objective 'perceptual': "
            "choose classifier or lpips, or leave that objective out"
        )
    return arguments


def check_adversary(run: Run, args: argparse.Namespace) -> None:
    """Refuse a training too short for its adversary: it would be called VQGAN and be none."""
    steps = args.epochs * (len(run.data.train_images) // args.batch_size)
    start = round(args.adversarial_start * steps) + args.discriminator_warmup
    if "vqgan" in args.objectives and start >= steps:
        raise InputError(
            f"the discriminator would be used from step {start} on, but the training has {steps} "
            "steps: give more --epochs, a smaller --discriminator-warmup or --adversarial-start"
        )


def parse() -> argparse.Namespace:
    """The flags, in groups: the network, the perceptual distance, the adversary."""
    parser = common_parser(
        "Train a VQGAN: an image becomes a grid of codes, and back.",
        out="runs/vqgan",
        epochs=20,
        lr=3e-4,
    )
    add = parser.add_argument
    add("--batch-size", type=positive_int, default=64, help="images in a step")
    add(
        "--objectives",
        nargs="+",
        choices=report.OBJECTIVES,
        default=["vqgan"],
        help="what to train; several train one network for each, and compare them",
    )
    add("--average-decay", type=fraction, default=0.999, help="of the weights' average; 0: none")
    add("--pictures", type=positive_int, default=8, help="rows of progress.png")
    add("--rfid", action="store_true", help="also true rFID: Inception, needs the extra 'fid'")

    network = parser.add_argument_group("network (what is not given is the named network's)")
    add = network.add_argument
    add("--network", choices=NETWORKS, default="small", help="see vqgan/vqgan.py")
    add("--channels", type=positive_int, help="width of the first level")
    add("--channel-multipliers", nargs="+", type=positive_int, help="width of each level")
    add("--num-residual-blocks", type=positive_int, help="in a level")
    add("--attention-resolutions", nargs="*", type=positive_int, help="sides with attention")
    add("--latent-channels", type=positive_int, help="on both sides of the quantizer")
    add("--embedding-dim", type=positive_int, help="D, dimensions of a code")
    add("--num-embeddings", type=positive_int, help="K, codes in the codebook")
    add("--quantizer", choices=("ema", "gradient"), help="what moves the codes")

    add = parser.add_argument_group("perceptual distance").add_argument
    add("--perceptual", choices=("classifier", "lpips", "none"), default="classifier", help="whose")
    add("--perceptual-weight", type=non_negative_float, default=1.0, help="beside |x - x_hat|")
    add("--classifier-epochs", type=positive_int, default=3, help="of the perceptual network")
    add("--yardstick-epochs", type=positive_int, default=6, help="of the network that measures")

    add = parser.add_argument_group("adversary").add_argument
    add("--gan-loss", choices=GAN_LOSSES, default="hinge", help="see vqgan/discriminator.py")
    add("--adversarial-weight", type=non_negative_float, default=0.3, help="beside lambda")
    add("--max-lambda", type=positive_float, default=5.0, help="clamp of the adaptive weight")
    add("--adversarial-start", type=fraction, default=0.25, help="share of training before it")
    add("--discriminator-warmup", type=non_negative_int, default=100, help="steps it learns first")
    add("--discriminator-lr", type=positive_float, default=1e-3, help="its own learning rate")
    add("--discriminator-channels", type=positive_int, default=64, help="of its first layer")
    add("--discriminator-norm", choices=NORMS, default="spectral", help="what holds it in bounds")
    return parse_arguments(parser)


if __name__ == "__main__":
    run_script(parse, main)
