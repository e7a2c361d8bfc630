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

each term a mean, variance and deviation those of the training pixels: a reconstruction of 1 is
about the error of one mean grey. In eq. 4, with sg[.] stopping the gradient,

    L_VQ = |x - x_hat|^2 + |sg[E(x)] - z_q|^2 + |sg[z_q] - E(x)|^2

the last two are the quantizer's (`quantizer.py`), and section 3.1 puts a perceptual distance in the
place of the first.

Read `main`, then `train`, where the generator's and the discriminator's step are both in sight.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vqgan import figures, metrics
from vqgan.classifier import (
    Classifier,
    make_yardstick,
    trained_classifier,
)
from vqgan.data import (
    Batches,
    batches_in_order,
    evaluation_batch,
    from_uint8,
    to_uint8,
    to_unit,
)
from vqgan.discriminator import (
    GAN_LOSSES,
    NORMS,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from vqgan.errors import InputError
from vqgan.perceptual import ClassifierDistance, PerceptualDistance, load_lpips
from vqgan.training import (
    HelpFormatter,
    Log,
    Run,
    Stopwatch,
    WeightAverage,
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
    write_metrics,
)
from vqgan.vqgan import NETWORKS, VQGAN

OBJECTIVES = {"mse": "MSE", "perceptual": "L1 + perceptual", "vqgan": "VQGAN"}
# The gradients of an adversarial game turn quickly: a short memory (torch's default is 0.9).
ADAM_BETAS = (0.5, 0.99)
CLASSIFIER_WIDTH, CLASSIFIER_SEED = 16, 0  # other than the yardstick's, see vqgan/classifier.py
LOG_EVERY = 50  # steps averaged in a row of log.csv
NUM_PICTURES = 12  # test images in the pictures
ROWS_AT_CLAMP = 5  # rows of the log with lambda at its maximum, before a warning
COLUMNS = {  # of the printed table
    "nmse": ("norm. MSE", ".4f"),
    "psnr": ("PSNR/dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "perceptual": ("perceptual", ".3f"),
    "frechet": ("Frechet", ".3f"),
    "recognised": ("recognised", ".1%"),
    "codes_used": ("codes used", "d"),
    "perplexity": ("perplexity", ".0f"),
    "seconds": ("seconds", ".0f"),
}


def parse() -> argparse.Namespace:
    """The flags, in groups: the network, the perceptual distance, the adversary."""
    parser = argparse.ArgumentParser(
        description="Train a VQGAN: an image becomes a grid of codes, and back.",
        formatter_class=HelpFormatter,
        usage="%(prog)s [flags]   (--help lists them)",
        allow_abbrev=False,
    )
    add_common_arguments(parser, out="runs/vqgan", epochs=20, lr=3e-4)
    add = parser.add_argument
    add("--batch-size", type=positive_int, default=64, help="images in a step")
    add(
        "--objectives",
        nargs="+",
        choices=OBJECTIVES,
        default=["vqgan"],
        help="what to train; several train one network for each, and compare them",
    )
    add(
        "--average-decay",
        type=fraction,
        default=0.999,
        help="of the moving average of the weights, which is what is measured; 0: none",
    )
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
    add(
        "--adversarial-start",
        type=fraction,
        default=0.25,
        help="fraction of the training after which the discriminator starts to learn",
    )
    add(
        "--discriminator-warmup",
        type=non_negative_int,
        default=100,
        help="steps that it learns before it is used",
    )
    add("--discriminator-lr", type=positive_float, default=1e-3, help="its own learning rate")
    add("--discriminator-channels", type=positive_int, default=64, help="of its first layer")
    add("--discriminator-norm", choices=NORMS, default="spectral", help="what holds it in bounds")
    return parse_arguments(parser)


def main() -> None:
    """Train the network once for each objective, and measure all by the same distances."""
    args = parse()
    arguments = network_arguments(args)
    run = open_run(args, batch_sizes=[args.batch_size])
    check_adversary(run, args)
    inception = metrics.inception_distance(run.device) if args.rfid else None
    distance, perceptual_accuracy = perceptual_distance(run, args)
    yardstick, yardstick_accuracy = make_yardstick(
        run, epochs=args.yardstick_epochs, flip=args.flip, resume=args.resume
    )

    results, counts, logs, models = {}, {}, {}, {}
    for objective in dict.fromkeys(args.objectives):  # each once
        torch.manual_seed(args.seed)  # each its own start, and all the same network
        model = prepare_model(VQGAN(**arguments), run.device, compile=args.compile)
        model, seconds = train(model, arguments, objective, distance, run=run, args=args)
        results[objective], counts[objective] = evaluate(
            model, distance, yardstick, inception, run=run
        )
        results[objective] |= {
            "parameters": sum(p.numel() for p in model.parameters()),
            "batch_size": args.batch_size,
            "epochs": args.epochs,
            "arguments": arguments,
            "seconds": round(seconds, 1),
        }
        logs[objective] = read_log(run.out / objective / "log.csv")
        models[objective] = model

    write_metrics(
        run,
        args,
        results,
        perceptual={"network": args.perceptual, "accuracy": perceptual_accuracy},
        yardstick={"accuracy": yardstick_accuracy},
    )
    columns = COLUMNS | ({"rfid": ("rFID", ".2f")} if args.rfid else {})
    print_table({OBJECTIVES[name]: result for name, result in results.items()}, columns)
    if yardstick is not None:
        print(f"(the yardstick recognises {yardstick_accuracy:.1%} of the originals)")
        if yardstick_accuracy < 2 / len(run.data.class_names):
            print("warning: that is near chance, so its Frechet distance says little; train it on")
            print("more images, or for more --yardstick-epochs")
    draw_pictures(run, models, results, counts, logs, args)
    print(f"metrics.json, logs, checkpoints and pictures are in {run.out}")


def network_arguments(args: argparse.Namespace) -> dict:
    """The constructor arguments: the named network, the image size, and what flags change.

    Builds the network once, so that sizes that do not fit stop before anything is written.
    """
    names = ("channels", "channel_multipliers", "num_residual_blocks", "attention_resolutions")
    names += ("latent_channels", "embedding_dim", "num_embeddings", "quantizer")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    arguments = NETWORKS[args.network] | {"resolution": args.image_size} | given
    with torch.device("meta"):  # shapes only
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


def perceptual_distance(
    run: Run, args: argparse.Namespace
) -> tuple[PerceptualDistance | None, float | None]:
    """The distance that --perceptual names, and the accuracy of its classifier if it has one."""
    if args.perceptual == "none":
        return None, None
    if args.perceptual == "lpips":
        return prepare_model(load_lpips(), run.device, compile=False), None
    classifier, share = trained_classifier(
        run.out / "classifier.pt",
        run,
        width=CLASSIFIER_WIDTH,
        epochs=args.classifier_epochs,
        seed=CLASSIFIER_SEED,
        flip=args.flip,
        resume=args.resume,
    )
    return ClassifierDistance(classifier), share


class History:
    """What a run remembers besides weights: when the adversary starts, and pictures on the way."""

    def __init__(self, adversarial_start: int):
        self.adversarial_start = adversarial_start  # step; kept when epochs are added later
        self.pictures: list[tuple[float, Tensor]] = []  # epoch, uint8 (N, 3, H, W)

    def state_dict(self) -> dict:
        """For the checkpoint."""
        return {"adversarial_start": self.adversarial_start, "pictures": self.pictures}

    def load_state_dict(self, state: dict) -> None:
        """From the checkpoint."""
        self.adversarial_start, self.pictures = state["adversarial_start"], state["pictures"]


def train(
    model: VQGAN,
    arguments: dict,
    objective: str,
    distance: PerceptualDistance | None,
    *,
    run: Run,
    args: argparse.Namespace,
) -> tuple[VQGAN, float]:
    """Train to the last epoch, from the checkpoint if there is one.

    Returns the model to use (the averaged one, if weights are averaged) and the seconds it took.
    """
    folder, device = run.out / objective, run.device
    fused = device.type in ("cpu", "cuda")
    batches = Batches(
        run.data.train_images, args.batch_size, device=device, seed=args.seed, flip=args.flip
    )
    total_steps = args.epochs * len(batches)
    history = History(adversarial_start=round(args.adversarial_start * total_steps))

    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=ADAM_BETAS, fused=fused)
    optimizers, companions = {"generator": optimizer}, {"history": history}
    # The adversary: a network and an optimizer of its own.
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
    average = WeightAverage(model, args.average_decay) if args.average_decay else None
    result = average.model if average else model  # what is measured, pictured and kept
    if average:
        companions["generator"] = model  # which training goes on with

    # The start, or the last checkpoint of a run that was cut off.
    step, seconds = 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        state = load_checkpoint(checkpoint, model="VQGAN", arguments=arguments)
        restore(state, model=result, optimizers=optimizers, batches=batches, companions=companions)
        step, seconds = state["step"], state["seconds"]
    log = Log(folder / "log.csv", resume_at=step)
    picture_steps = {round(total_steps * i / args.pictures) for i in range(1, args.pictures + 1)}
    pictured = next(batches_in_order(run.data.test_images[:NUM_PICTURES], NUM_PICTURES))
    zero = torch.zeros((), device=device)  # logged for the adversary before it starts
    rows_at_clamp = 0

    model.train()
    watch = Stopwatch(seconds)
    progress = tqdm(
        desc=objective, total=total_steps * args.batch_size, initial=step * args.batch_size,
        unit="img", unit_scale=True, mininterval=0.5,
    )  # fmt: skip
    while step < total_steps:
        for x in batches:  # one epoch, or the rest of it after a resume
            adversary_learns = objective == "vqgan" and step >= history.adversarial_start
            adversary_is_used = (
                adversary_learns and step >= history.adversarial_start + args.discriminator_warmup
            )

            # The generator's step: encoder, codebook and decoder; the discriminator only judges.
            with autocast(device, run.dtype):
                output = model(x)
            x_hat = output.reconstruction.float()
            terms = reconstruction_terms(x, x_hat, objective, distance, run.variance)
            perceptual = args.perceptual_weight * terms.get("perceptual", zero)
            reconstruction = terms["reconstruction"] + perceptual  # L_rec of eq. 7
            loss = reconstruction + output.loss  # L_VQ, eq. 4
            losses = terms | {"quantizer": output.loss}
            adversarial, weight = zero, zero
            if adversary_is_used:
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
            step += 1
            if average:
                average.update(model, step)

            # The discriminator's step. x_hat is detached: nothing of it reaches the generator.
            if adversary_learns:
                with autocast(device, run.dtype):
                    real, fake = discriminator(torch.cat([x, x_hat.detach()])).chunk(2)
                discrimination = discriminator_loss(real, fake, args.gan_loss)  # -L_GAN, eq. 5
                discriminator_optimizer.zero_grad(set_to_none=True)
                discrimination.backward()
                discriminator_optimizer.step()

            # What is kept of it. All rows have the same terms: 0 before the adversary takes part.
            if objective == "vqgan":
                losses |= {"adversarial": adversarial, "lambda": weight}
                losses |= {"discriminator": zero, "real": zero, "fake": zero}
                if adversary_learns:
                    losses["discriminator"] = discrimination
                    losses |= {"real": real.float().mean(), "fake": fake.float().mean()}
            losses["codes"] = codes_in_batch(output.indices, model.quantizer.num_embeddings)
            log.record(step, {"loss": loss} | losses)

            # On the way: a row of progress.png, a row of the log, a checkpoint.
            if step in picture_steps:
                epoch = step / len(batches)
                history.pictures.append((epoch, to_uint8(reconstruct(result, pictured, device))))
                draw_progress(folder / "progress.png", pictured, history, objective)
                model.train()
            checkpoint_is_due = step % args.checkpoint_every == 0 or step == total_steps
            adversary_changes = step in (
                history.adversarial_start,
                history.adversarial_start + args.discriminator_warmup,
            )  # a row ends here, so that none averages over steps with and without it
            if step % LOG_EVERY == 0 or checkpoint_is_due or adversary_changes:
                row = log.write_row(epoch=step / len(batches))
                progress.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
                # Eq. 7 divides by the gradient of L_GAN, which vanishes when D stops learning.
                at_clamp = row.get("lambda", 0) > 0.99 * args.max_lambda
                rows_at_clamp = rows_at_clamp + 1 if at_clamp else 0
                if rows_at_clamp == ROWS_AT_CLAMP:
                    progress.write(
                        f"warning: lambda stays at its clamp of {args.max_lambda:g} (step {step}): "
                        "has the discriminator stopped learning? 'real' and 'fake' in log.csv tell;"
                        " try a higher --discriminator-lr, or --discriminator-norm spectral"
                    )
            if checkpoint_is_due:
                seconds = watch.seconds
                save_checkpoint(
                    checkpoint,
                    model=result,
                    arguments=arguments,
                    optimizers=optimizers,
                    batches=batches,
                    step=step,
                    seconds=seconds,
                    companions=companions,
                    about=about_run(args),
                )
            progress.update(args.batch_size)
    progress.close()
    return result, seconds


def reconstruction_terms(
    x: Tensor,
    x_hat: Tensor,
    objective: str,
    distance: PerceptualDistance | None,
    variance: float,
) -> dict[str, Tensor]:
    """How far x_hat is from x, both (B, 3, H, W): each term (), a mean over the batch."""
    if objective == "mse":
        # In units of the variance: 1 is the error of one mean grey.
        return {"reconstruction": F.mse_loss(x_hat, x) / variance}
    terms = {"reconstruction": F.l1_loss(x_hat, x) / math.sqrt(variance)}
    if distance is not None:
        terms["perceptual"] = distance(x, x_hat).mean()
    return terms


def codes_in_batch(indices: Tensor, num_embeddings: int) -> Tensor:
    """How many different codes the batch uses, (), without waiting for the GPU."""
    chosen = torch.zeros(num_embeddings, device=indices.device)
    return chosen.index_fill_(0, indices.flatten(), 1.0).sum()


@torch.no_grad()
def evaluate(
    model: VQGAN,
    distance: PerceptualDistance | None,
    yardstick: Classifier | None,
    inception: nn.Module | None,
    *,
    run: Run,
) -> tuple[dict, Tensor]:
    """Measures over the whole test set, in float32; and how often each code is used, (K,)."""
    model.eval()
    usage = metrics.CodebookUsage(model.quantizer.num_embeddings)
    per_image, features, reconstructed_features = defaultdict(list), [], []
    batch_size = evaluation_batch(run.data.test_images[0].shape[-1])
    for x in batches_in_order(run.data.test_images, batch_size, device=run.device):
        output = model(x)
        usage.update(output.indices)
        x_hat = output.reconstruction
        for name, values in metrics.reconstruction_quality(x, x_hat, run.variance).items():
            per_image[name].append(values)
        if distance is not None:
            per_image["perceptual"].append(distance(x, x_hat).cpu())
        if yardstick is not None:
            features.append(yardstick.features(x).cpu())
            reconstructed_features.append(yardstick.features(x_hat).cpu())
        if inception is not None:
            inception.update(to_unit(x).to(inception.device), real=True)
            inception.update(to_unit(x_hat).to(inception.device), real=False)
    result = {"perceptual": None, "frechet": None, "recognised": None}
    result |= {name: torch.cat(values).mean().item() for name, values in per_image.items()}
    if yardstick is not None:
        features, reconstructed_features = torch.cat(features), torch.cat(reconstructed_features)
        result["frechet"] = metrics.frechet_distance(features, reconstructed_features)
        predicted = yardstick.head(reconstructed_features.to(run.device)).argmax(dim=1).cpu()
        result["recognised"] = (predicted == run.data.test_labels).double().mean().item()
    if inception is not None:
        result["rfid"] = inception.compute().item()
        inception.reset()
    grid = output.indices.shape[1:]
    return result | {
        "perplexity": usage.perplexity,
        "codes_used": usage.codes_used,
        "bits_per_image": metrics.code_bits(*grid, model.quantizer.num_embeddings),
        "entropy_bits_per_image": grid.numel() * usage.entropy,
    }, usage.counts


@torch.no_grad()
def reconstruct(model: VQGAN, x: Tensor, device: torch.device) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> reconstructions, about [-1, 1], on the CPU."""
    return model.eval()(x.to(device)).reconstruction.cpu()


def draw_progress(path: Path, x: Tensor, history: History, objective: str) -> None:
    """Reconstructions on the way, a row for each time, over the originals x."""
    rows = [(f"epoch {epoch:.3g}", to_unit(from_uint8(x))) for epoch, x in history.pictures]
    figures.image_rows(
        path,
        [*rows, ("original", to_unit(x))],
        title=f"{OBJECTIVES[objective]}: the same test images while it learns",
    )


def draw_pictures(
    run: Run,
    models: dict[str, VQGAN],
    results: dict[str, dict],
    counts: dict[str, Tensor],
    logs: dict[str, list[dict]],
    args: argparse.Namespace,
) -> None:
    """Every picture of the run; each dict has an entry for each objective."""
    x = next(batches_in_order(run.data.test_images[:NUM_PICTURES], NUM_PICTURES))
    rows = [("original", to_unit(x))]
    for name, model in models.items():
        rows.append((OBJECTIVES[name], to_unit(reconstruct(model, x, run.device))))
    figures.image_rows(
        run.out / "reconstructions.png",
        rows,
        title=f"Test images, and what {results[name]['bits_per_image']:.0f} bits keep of them",
    )
    # The terms that objectives share; the adversary's have a picture of their own.
    terms = ("step", "epoch", "reconstruction", "perceptual", "quantizer")
    figures.losses(
        run.out / "losses.png",
        {
            OBJECTIVES[name]: [{key: row[key] for key in terms if key in row} for row in log]
            for name, log in logs.items()
        },
        ylabels=dict.fromkeys(OBJECTIVES.values(), "value of the term"),
        title="Training losses",
        share=False,
    )
    if "vqgan" in logs:
        # From the checkpoint: --epochs may have grown since the start was computed from them.
        state = load_checkpoint(run.out / "vqgan" / "checkpoint.pt")
        start = state["companions"]["history"]["adversarial_start"]
        steps_per_epoch = len(run.data.train_images) // args.batch_size
        figures.adversarial(
            run.out / "adversarial.png",
            logs["vqgan"],
            learns_from=start / steps_per_epoch,
            used_from=(start + args.discriminator_warmup) / steps_per_epoch,
            title="The adversarial game",
        )
    usage = {}
    for name, count in counts.items():
        used, perplexity = results[name]["codes_used"], results[name]["perplexity"]
        usage[f"{OBJECTIVES[name]}: {used} used, perplexity {perplexity:.0f}"] = count
    figures.codebook_usage(
        run.out / "codebook_usage.png", usage, title="How often each code is used (test set)"
    )


if __name__ == "__main__":
    run_script(main)
