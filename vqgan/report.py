"""What each script prints and plots while it trains and at the end of a run."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgan import figures, metrics
from vqgan.conditions import TRANSFORMS
from vqgan.data import eval_batches
from vqgan.evaluation import decode_tokens
from vqgan.images import from_uint8, to_unit
from vqgan.sampling import describe_sampling
from vqgan.tokens import TokenDataset
from vqgan.training import Run, Session
from vqgan.transformer import Prior
from vqgan.vae import GaussianAutoencoder
from vqgan.vqvae import VQAutoencoder

NUM_SHOWN = 12  # test images per row
SAMPLES_PER_ROW = 8  # of one class or caption
STUDY_TITLES = {"vae": "VAE", "vae-spatial": "spatial VAE", "vqvae": "VQ-VAE", "vqvae2": "VQ-VAE-2"}
OBJECTIVES = {"mse": "MSE", "perceptual": "L1 + perceptual", "vqgan": "VQGAN"}
BASELINES = {  # titles of `metrics.token_baselines`
    "uniform": "uniform (ln K)",
    "unigram": "unigram (frequencies of tokens)",
    "bigram": "bigram (given the token to the left)",
}
STUDY_TERMS = ("loss", "negative log-likelihood", "KL", "reconstruction", "quantizer")  # losses.png
VQGAN_TERMS = ("reconstruction", "perceptual", "quantizer")  # adversarial.png has the others
# Printed tables: key of metrics.json -> heading and format; then the columns of each table.
FORMATS = {
    "nmse": ("norm. MSE", ".4f"), "psnr": ("PSNR/dB", ".2f"), "ssim": ("SSIM", ".4f"),
    "ssim_global": ("SSIM whole", ".4f"), "perceptual": ("perceptual", ".3f"),
    "frechet": ("Fréchet", ".3f"), "rfid": ("rFID", ".2f"), "class_accuracy": ("class acc.", ".1%"),
    "prompt_accuracy": ("prompt acc.", ".1%"), "perplexity": ("perplexity", ".1f"),
    "codes_used": ("codes used", "d"), "bits_per_image": ("bits/image", ".0f"),
    "guidance": ("guidance", ".3g"), "temperature": ("temperature", ".3g"),
    "top_k": ("top-k", "d"), "top_p": ("top-p", ".3g"), "steps": ("steps", "d"),
    "seconds": ("seconds", ".0f"),
}  # fmt: skip
STUDY_COLUMNS = ["nmse", "psnr", "ssim", "ssim_global", "perplexity", "codes_used"]
STUDY_COLUMNS += ["bits_per_image", "seconds"]
VQGAN_COLUMNS = ["nmse", "psnr", "ssim", "perceptual", "frechet", "class_accuracy", "codes_used"]
VQGAN_COLUMNS += ["perplexity", "seconds"]
SAMPLES_COLUMNS = ["guidance", "temperature", "top_k", "top_p", "frechet", "class_accuracy"]
SAMPLES_COLUMNS += ["prompt_accuracy", "seconds"]


def print_table(results: Mapping[str, dict], columns: Sequence[str]) -> None:
    """Print a line per result; columns are keys of `FORMATS`."""
    width = max(len(name) for name in results)
    print(" " * width, *(f"{FORMATS[key][0]:>10}" for key in columns))
    for name, result in results.items():
        cells = zip((result[key] for key in columns), columns, strict=True)
        values = ("-" if v is None else f"{v:{FORMATS[key][1]}}" for v, key in cells)
        print(f"{name:{width}}", *(f"{value:>10}" for value in values))


def shown_images(run: Run, device: torch.device | str = "cpu") -> Tensor:
    """The test images that figures show, (12 or fewer, 3, H, W) in [-1, 1]."""
    return next(eval_batches(run.data.test_images[:NUM_SHOWN], NUM_SHOWN, device=device))


@torch.no_grad()
def reconstruct(model: GaussianAutoencoder | VQAutoencoder, x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> reconstructions, about [-1, 1], on the CPU, in eval mode."""
    device = next(model.parameters()).device
    return model.eval()(x.to(device)).reconstruction.cpu()


def _save_usage(out: Path, titles: Mapping[str, str], results: Mapping, counts: Mapping) -> None:
    """Save codebook_usage.png for the models that have a codebook."""
    usage = {}
    for name in titles:
        if (count := counts.get(name)) is not None:
            used, perplexity = results[name]["codes_used"], results[name]["perplexity"]
            usage[f"{titles[name]}: {used:,} used, perplexity {perplexity:,.0f}"] = count
    if usage:
        title = "How often each code is used (test set)"
        figures.codebook_usage(out / "codebook_usage.png", usage, title=title)


# --- train_vqvae.py ------------------------------------------------------------------------------


def study_title(name: str) -> str:
    """ "vqvae-batch16" -> "VQ-VAE, batch 16"."""
    model, _, batch_size = name.partition("-batch")
    return STUDY_TITLES[model] + (f", batch {batch_size}" if batch_size else "")


def in_order(names: Iterable[str]) -> list[str]:
    """Names of the study, batch sizes by number: "vae-batch64" before "vae-batch256"."""
    return sorted(names, key=lambda name: (name.partition("-batch")[0], len(name), name))


def save_study_figures(
    run: Run,
    sessions: Mapping[str, Session],
    results: Mapping[str, dict],
    counts: Mapping[str, Any],
) -> None:
    """Save every figure of the study; each mapping has an entry per trained model."""
    titles = {name: study_title(name) for name in in_order(sessions)}
    # Every model reconstructs the same images; its label states the bits per image.
    x = shown_images(run, run.device)
    rows, title = [("original", to_unit(x))], "Test images and their reconstructions"
    for name in titles:
        model, result = sessions[name].eval_model, results[name]
        label = f"{titles[name]}\n{result['bits_per_image']:,.0f} bits"
        if isinstance(model, GaussianAutoencoder):
            title = "Test images and their reconstructions (a VAE decodes the mean)"
            _save_prior(run.out, name, titles[name], model, x)
        else:
            label += f", {result['codes_used']:,} codes"
        rows.append((label, to_unit(reconstruct(model, x))))
    figures.image_rows(run.out / "reconstructions.png", rows, title=title)
    logs = {title: sessions[name].rows for name, title in titles.items()}
    figures.losses(run.out / "losses.png", logs, STUDY_TERMS, title="Training losses")
    _save_usage(run.out, titles, results, counts)
    _save_sweep(run.out, results)


def _save_sweep(out: Path, results: Mapping[str, dict]) -> None:
    """Save SSIM by batch size, one line per model, if several sizes were trained."""
    if len({result["batch_size"] for result in results.values()}) == 1:
        return
    by_model: dict[str, dict[int, float]] = defaultdict(dict)
    for name, result in results.items():
        by_model[STUDY_TITLES[name.partition("-batch")[0]]][result["batch_size"]] = result["ssim"]
    title = f"SSIM by batch size, {result['epochs']} epochs each\n"
    title += "(at equal epochs, small batches take more steps)"
    ylabel = "SSIM on the test set (Wang et al. 2004)"
    path = out / "ssim_by_batch_size.png"
    figures.metric_by_batch_size(path, by_model, ylabel=ylabel, title=title)


def _save_prior(out: Path, name: str, title: str, model: GaussianAutoencoder, x: Tensor) -> None:
    """Save what a VAE gives without a second model: samples of its prior, and interpolations."""
    samples = to_unit(model.sample(48, generator=torch.Generator().manual_seed(0)))
    path = out / f"{name}_samples.png"
    figures.image_grid(path, samples, title=f"Samples from the prior of the {title}")
    pairs = len(x) // 2  # the first half of the images on the left, the second on the right
    if pairs:
        x0, x1 = x[:pairs], x[pairs : 2 * pairs]
        between = model.interpolate(x0, x1, steps=8)  # (6, 8, 3, H, W)
        strips = torch.cat([x0[:, None], between, x1[:, None]], dim=1)
        rows = [("", to_unit(strip)) for strip in strips]
        path = out / f"{name}_interpolations.png"
        title = f"Interpolations in the latent space of the {title}\n"
        title += "(first and last column: test images)"
        figures.image_rows(path, rows, title=title)


# --- train_vqgan.py ------------------------------------------------------------------------------


def save_progress_figure(
    path: Path, progress: list[tuple[float, Tensor]], title: str, original: Tensor | None = None
) -> None:
    """Save a row of images per time, (epoch, uint8 (N, 3, H, W)), and last the originals."""
    rows = [(f"epoch {epoch:.3g}", to_unit(from_uint8(x))) for epoch, x in progress]
    if original is not None:
        rows.append(("original", to_unit(original)))
    figures.image_rows(path, rows, title=title)


def print_eval_classifier(accuracy: float | None, num_classes: int) -> None:
    """Print the accuracy of the evaluation classifier, and warn if it is near chance."""
    if accuracy is None:
        return
    print(f"(accuracy of the evaluation classifier on the test images: {accuracy:.1%})")
    if accuracy < 2 / num_classes:
        print("warning: that is near chance, so its Fréchet distance says little; train it on")
        print("more images, or for more epochs")


def save_vqgan_figures(
    run: Run,
    sessions: Mapping[str, Session],
    results: Mapping[str, dict],
    counts: Mapping[str, Any],
) -> None:
    """Save every figure of a VQGAN's run; each mapping has an entry per objective."""
    x = shown_images(run)
    rows = [("original", to_unit(x))]
    for name, session in sessions.items():
        rows.append((OBJECTIVES[name], to_unit(reconstruct(session.eval_model, x))))
    bits = next(iter(results.values()))["bits_per_image"]
    title = f"Test images and their reconstructions from {bits:,.0f} bits"
    figures.image_rows(run.out / "reconstructions.png", rows, title=title)
    logs = {OBJECTIVES[name]: session.rows for name, session in sessions.items()}
    figures.losses(run.out / "losses.png", logs, VQGAN_TERMS, title="Training losses")
    if "vqgan" in sessions:
        session = sessions["vqgan"]
        keys = ("disc_start", "gan_start")
        starts = (session.state[key] / session.steps_per_epoch for key in keys)
        path, title = run.out / "adversarial.png", "The adversarial game"
        figures.adversarial(path, session.rows, *starts, title=title)
    _save_usage(run.out, OBJECTIVES, results, counts)


# --- train_transformer.py ------------------------------------------------------------------------


def print_baselines(baselines: Mapping[str, float]) -> None:
    """Print the losses of simple models (`metrics.token_baselines`)."""
    for name, nats in baselines.items():
        print(f"{nats:.3f} nats per token: {BASELINES[name]}")


def price(
    nats_per_token: float, standard_error: float, prior: Prior, image_size: int
) -> dict[str, float | bool]:
    """Convert a transformer's loss to the size of a file, for metrics.json."""
    bits, K = metrics.nats_to_bits(nats_per_token * prior.seq_len), prior.num_embeddings
    return {
        "nats_per_token": nats_per_token,
        "nats_per_token_standard_error": standard_error,  # of the mean over the test images
        "nats_per_token_is_bound": not prior.causal,  # the true number is at most this
        "bits_per_image": bits,  # of an ideal arithmetic coder
        "fixed_length_bits_per_image": metrics.fixed_length_bits(prior.seq_len, K),
        "compression": 3 * 8 * image_size**2 / bits,  # from three channels of 8 bits
    }


def print_transformer(result: dict, samples: list[dict], references: Mapping[str, float]) -> None:
    """Print the transformer's loss, and a table of its samples."""
    bound = "at most " if result["nats_per_token_is_bound"] else ""
    nats, error = result["nats_per_token"], result["nats_per_token_standard_error"]
    print(
        f"{bound}{nats:.3f} +- {error:.3f} nats per token on the test images (after epoch "
        f"{result['best_epoch']}): an arithmetic coder would spend {result['bits_per_image']:.0f} "
        f"bits per image, and fixed-length tokens take {result['fixed_length_bits_per_image']:.0f}"
    )
    if samples:
        columns = (["steps"] if "steps" in samples[0] else []) + SAMPLES_COLUMNS
        print_table({f"samples {i}": row for i, row in enumerate(samples, 1)}, columns)
    for name, distance in references.items():
        print(f"Fréchet distance of {name} to the test images: {distance:.3f}")


def token_losses_title(
    condition: str, condition_drop: float, command: str, *, is_masked: bool = False
) -> str:
    """The title of a transformer's losses, with the reasons of what might look like mistakes."""
    notes = ["Losses of the transformer, and of simple models"]
    if condition_drop and condition != "none":
        notes.append(f"(training drops {condition_drop:.0%} of the conditions, validation none)")
    if is_masked:
        notes.append(
            "(validation estimates the bound, and training may mask more tokens than that)"
        )
    if resumed := re.findall(r"\W\Wepochs (\d+)", command)[:-1]:
        notes.append(f"(the learning rate rises again after epoch {', '.join(resumed)})")
    return "\n".join(notes)


def save_transformer_figures(
    run: Run,
    session: Session,
    tokenizer: VQAutoencoder,
    dataset: TokenDataset,
    setting: dict,
    baselines: Mapping[str, float],
) -> None:
    """Save every figure of a transformer's run.

    Args:
        setting: keyword arguments of the prior's `sample`, for all samples.
        baselines: those of `metrics.token_baselines`.
    """
    condition, metadata = dataset.condition, session.metadata["metadata"]
    is_masked = not session.model.causal
    about = (condition.kind, metadata["condition_drop"], metadata["command"])
    title = token_losses_title(*about, is_masked=is_masked)
    titled = {BASELINES[name]: value for name, value in baselines.items()}
    losses = (session.rows, session.state["validation"], titled)
    figures.token_losses(run.out / "losses.png", *losses, title=title)
    generator, how = torch.Generator().manual_seed(1), describe_sampling(setting)

    def sample(conditions: Tensor, given: Tensor | None = None) -> Tensor:
        conditions = conditions.to(run.device)
        tokens = session.eval_model.sample(conditions, given=given, generator=generator, **setting)
        return to_unit(decode_tokens(tokenizer, tokens))

    # samples.png: the condition on the left or above, and several samples of it.
    path = run.out / "samples.png"
    x = shown_images(run)
    conditions = dataset.test_conditions[: len(x)]
    if condition.kind == "none":
        images = sample(condition.start_tokens(4 * NUM_SHOWN))
        figures.image_grid(path, images, title=f"Samples ({how})")
    elif condition.kind == "image":
        transformed = TRANSFORMS[condition.transform](x)
        rows = [("original", to_unit(x)), (condition.transform, to_unit(transformed))]
        rows += [(f"sample {i}", sample(conditions)) for i in (1, 2, 3)]
        figures.image_rows(path, rows, title=f"Samples given {condition.transform} ({how})")
    else:
        is_class = condition.kind == "class"
        names = condition.names if is_class else run.data.test_captions or ()
        encode = condition.encode_classes if is_class else condition.encode_captions
        rows = [(name, sample(encode([name] * SAMPLES_PER_ROW))) for name in names[:10]]
        figures.image_rows(path, rows, title=f"Samples by {condition.kind} ({how})")

    # completions.png: the tokens of the upper half are given, those to be generated are -1.
    given = dataset.test_tokens[: len(x)].clone()
    for level in tokenizer.split_tokens(given):
        level[:, level.shape[1] // 2 :] = -1
    masked = to_unit(x)
    h = tokenizer.grids[-1][0]
    masked[:, :, h // 2 * (masked.shape[2] // h) :] = 0.5  # gray where tokens are generated
    rows = [("original", to_unit(x)), ("given", masked)]
    rows += [(f"completion {i}", sample(conditions, given)) for i in (1, 2, 3)]
    title = f"Lower halves generated below given upper halves ({how})"
    figures.image_rows(run.out / "completions.png", rows, title=title)
