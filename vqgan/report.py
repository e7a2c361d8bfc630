"""What each script prints and draws at the end of a run, and while it trains."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgan import figures, metrics
from vqgan.conditions import PICTURES
from vqgan.data import batches_in_order
from vqgan.evaluation import decode_tokens
from vqgan.images import from_uint8, to_unit
from vqgan.sampling import describe_sampling
from vqgan.tokens import TokenDataset
from vqgan.training import Run, Session
from vqgan.transformer import GPT
from vqgan.vae import VAE
from vqgan.vqvae import VQAutoencoder

NUM_PICTURES = 12  # test images in a row
SAMPLES_PER_ROW = 8  # of one class or caption
STUDY_TITLES = {"vae": "VAE", "vqvae": "VQ-VAE"}
OBJECTIVES = {"mse": "MSE", "perceptual": "L1 + perceptual", "vqgan": "VQGAN"}
BASELINES = {  # titles of `metrics.code_baselines`
    "uniform": "every code alike (ln K)",
    "single": "frequencies of codes",
    "left": "given the code to the left",
}
# Of the printed tables: key of metrics.json -> heading, format; and which columns each has.
FORMATS = {
    "nmse": ("norm. MSE", ".4f"), "psnr": ("PSNR/dB", ".2f"), "ssim": ("SSIM", ".4f"),
    "ssim_whole_image": ("SSIM whole", ".4f"), "perceptual": ("perceptual", ".3f"),
    "frechet": ("Frechet", ".3f"), "rfid": ("rFID", ".2f"), "recognised": ("recognised", ".1%"),
    "prompt_right": ("prompt", ".1%"), "perplexity": ("perplexity", ".1f"),
    "codes_used": ("codes used", "d"), "bits_per_image": ("bits/image", ".0f"),
    "guidance": ("guidance", ".3g"), "temperature": ("temperature", ".3g"),
    "top_k": ("top-k", "d"), "top_p": ("top-p", ".3g"), "seconds": ("seconds", ".0f"),
}  # fmt: skip
STUDY_COLUMNS = ["nmse", "psnr", "ssim", "ssim_whole_image", "perplexity", "codes_used"]
STUDY_COLUMNS += ["bits_per_image", "seconds"]
VQGAN_COLUMNS = ["nmse", "psnr", "ssim", "perceptual", "frechet", "recognised", "codes_used"]
VQGAN_COLUMNS += ["perplexity", "seconds"]
SAMPLES_COLUMNS = ["guidance", "temperature", "top_k", "top_p", "frechet", "recognised"]
SAMPLES_COLUMNS += ["prompt_right", "seconds"]


def print_table(results: Mapping[str, dict], columns: Sequence[str]) -> None:
    """A line for each result; columns are keys of `FORMATS`."""
    width = max(len(name) for name in results)
    print(" " * width, *(f"{FORMATS[key][0]:>10}" for key in columns))
    for name, result in results.items():
        cells = zip((result[key] for key in columns), columns, strict=True)
        values = ("-" if v is None else f"{v:{FORMATS[key][1]}}" for v, key in cells)
        print(f"{name:{width}}", *(f"{value:>10}" for value in values))


def shown_images(run: Run, device: torch.device | str = "cpu") -> Tensor:
    """The test images that figures show, (12 or fewer, 3, H, W) in [-1, 1]."""
    return next(batches_in_order(run.data.test_images[:NUM_PICTURES], NUM_PICTURES, device=device))


@torch.no_grad()
def reconstruct(model: VAE | VQAutoencoder, x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> reconstructions, about [-1, 1], on the CPU. In eval mode."""
    device = next(model.parameters()).device
    return model.eval()(x.to(device)).reconstruction.cpu()


def _usage(out: Path, titles: Mapping[str, str], results: Mapping, counts: Mapping) -> None:
    """codebook_usage.png, for the models that have a codebook."""
    usage = {}
    for name, count in counts.items():
        if count is not None:
            used, perplexity = results[name]["codes_used"], results[name]["perplexity"]
            usage[f"{titles[name]}: {used} used, perplexity {perplexity:.0f}"] = count
    if usage:
        title = "How often each code is used (test set)"
        figures.codebook_usage(out / "codebook_usage.png", usage, title=title)


# --- train_vqvae.py ------------------------------------------------------------------------------


def study_title(name: str) -> str:
    """ "vqvae-batch16" -> "VQ-VAE, batch 16"."""
    model, _, batch_size = name.partition("-batch")
    return STUDY_TITLES[model] + (f", batch {batch_size}" if batch_size else "")


def draw_study(
    run: Run,
    sessions: Mapping[str, Session],
    results: Mapping[str, dict],
    counts: Mapping[str, Any],
) -> None:
    """Every figure of the study; each mapping has an entry for each model that was trained."""
    titles = {name: study_title(name) for name in sessions}
    # The same images through every model, each with what it spends on one.
    x = shown_images(run, run.device)
    rows, logs, ylabels = [("original", to_unit(x))], {}, {}
    for name, session in sessions.items():
        label = f"{titles[name]}\n{results[name]['bits_per_image']:.0f} bits"
        rows.append((label, to_unit(reconstruct(session.kept, x))))
        is_vae = isinstance(session.kept, VAE)
        logs[titles[name]] = session.rows
        ylabels[titles[name]] = "nats per image" if is_vae else "mean over all elements"
        if is_vae:
            _draw_prior(run.out, name, session.kept, x)
    title = "Test images and what each model keeps of them (a VAE: decoded from the mean)"
    figures.image_rows(run.out / "reconstructions.png", rows, title=title)
    figures.losses(run.out / "losses.png", logs, ylabels=ylabels, title="Training losses")
    _usage(run.out, titles, results, counts)
    _draw_sweep(run.out, results)


def _draw_sweep(out: Path, results: Mapping[str, dict]) -> None:
    """SSIM by batch size, one line per model, where several sizes were trained."""
    if len({result["batch_size"] for result in results.values()}) == 1:
        return
    by_model: dict[str, dict[int, float]] = defaultdict(dict)
    for name, result in results.items():
        by_model[STUDY_TITLES[name.partition("-")[0]]][result["batch_size"]] = result["ssim"]
    title = f"SSIM by batch size, {result['epochs']} epochs each\n"
    title += "(equal epochs are not equal steps: small batches take more)"
    ylabel = "SSIM on the test set (Wang et al. 2004)"
    path = out / "ssim_by_batch_size.png"
    figures.metric_by_batch_size(path, by_model, ylabel=ylabel, title=title)


def _draw_prior(out: Path, name: str, model: VAE, x: Tensor) -> None:
    """What a VAE can do without a second model: samples of its prior, and mixed latents."""
    samples = to_unit(model.sample(48, generator=torch.Generator().manual_seed(0)))
    figures.image_grid(out / f"{name}_samples.png", samples, title="Samples from the VAE's prior")
    pairs = len(x) // 2  # the first half of the images on the left, the second on the right
    if pairs:
        x0, x1 = x[:pairs], x[pairs : 2 * pairs]
        between = model.interpolate(x0, x1, steps=8)  # (6, 8, 3, H, W)
        strips = torch.cat([x0[:, None], between, x1[:, None]], dim=1)
        rows = [("", to_unit(strip)) for strip in strips]
        title = "First and last column: test images. Between them: the VAE's latent space"
        figures.image_rows(out / f"{name}_interpolations.png", rows, title=title)


# --- train_vqgan.py ------------------------------------------------------------------------------


def draw_progress(
    path: Path, progress: list[tuple[float, Tensor]], title: str, original: Tensor | None = None
) -> None:
    """A row of images for each time, (epoch, uint8 (N, 3, H, W)); the originals at the bottom."""
    rows = [(f"epoch {epoch:.3g}", to_unit(from_uint8(x))) for epoch, x in progress]
    if original is not None:
        rows.append(("original", to_unit(original)))
    figures.image_rows(path, rows, title=title)


def print_yardstick(accuracy: float | None, num_classes: int) -> None:
    """How far the network that measures can be trusted."""
    if accuracy is None:
        return
    print(f"(the yardstick recognises {accuracy:.1%} of the test images)")
    if accuracy < 2 / num_classes:
        print("warning: that is near chance, so its Frechet distance says little; train it on")
        print("more images, or for more epochs")


def draw_vqgan(
    run: Run,
    sessions: Mapping[str, Session],
    results: Mapping[str, dict],
    counts: Mapping[str, Any],
) -> None:
    """Every figure of a VQGAN's run; each mapping has an entry for each objective."""
    x = shown_images(run)
    rows = [("original", to_unit(x))]
    for name, session in sessions.items():
        rows.append((OBJECTIVES[name], to_unit(reconstruct(session.kept, x))))
    bits = next(iter(results.values()))["bits_per_image"]
    title = f"Test images, and what {bits:.0f} bits keep of them"
    figures.image_rows(run.out / "reconstructions.png", rows, title=title)
    # The terms that objectives share; those of the game have a figure of their own.
    terms = ("step", "epoch", "reconstruction", "perceptual", "quantizer")
    logs = {}
    for name, session in sessions.items():
        shared = ({key: row[key] for key in terms if key in row} for row in session.rows)
        logs[OBJECTIVES[name]] = list(shared)
    ylabels = dict.fromkeys(logs, "value of the term")
    title = "Training losses"
    figures.losses(run.out / "losses.png", logs, ylabels=ylabels, title=title, share=False)
    if "vqgan" in sessions:
        session = sessions["vqgan"]
        starts = (session.state[key] / len(session.loader) for key in ("disc_start", "gan_start"))
        path, title = run.out / "adversarial.png", "The adversarial game"
        figures.adversarial(path, session.rows, *starts, title=title)
    _usage(run.out, OBJECTIVES, results, counts)


# --- train_transformer.py ------------------------------------------------------------------------


def print_baselines(baselines: Mapping[str, float]) -> None:
    """What a token costs without a transformer (`metrics.code_baselines`)."""
    for name, nats in baselines.items():
        print(f"{nats:.3f} nats per token: {BASELINES[name]}")


def price(nats_per_code: float, prior: GPT, image_size: int) -> dict:
    """What a transformer's loss means for the size of a file, for metrics.json."""
    bits = metrics.nats_to_bits(nats_per_code * prior.seq_len)
    return {
        "nats_per_code": nats_per_code,
        "bits_per_image": bits,  # of an ideal arithmetic coder
        "plain_bits_per_image": metrics.code_bits(prior.seq_len, prior.num_embeddings),
        "compression": 3 * 8 * image_size**2 / bits,  # of three channels of 8 bits
    }


def print_transformer(result: dict, samples: list[dict], floors: Mapping[str, float]) -> None:
    """What a token costs, and a table of the samples."""
    print(
        f"{result['nats_per_code']:.3f} nats per token on the test images (after epoch "
        f"{result['best_epoch']}): an arithmetic coder would spend {result['bits_per_image']:.0f} "
        f"bits per image, and plain codes are {result['plain_bits_per_image']:.0f}"
    )
    if samples:
        print_table({f"samples {i}": row for i, row in enumerate(samples, 1)}, SAMPLES_COLUMNS)
    for name, distance in floors.items():
        print(f"Frechet distance of {name} to the test images: {distance:.3f}")


def draw_transformer(
    run: Run,
    session: Session,
    tokenizer: VQAutoencoder,
    dataset: TokenDataset,
    setting: dict,
    baselines: Mapping[str, float],
) -> None:
    """Every figure of a transformer's run.

    Args:
        setting: keyword arguments of `GPT.sample`, for all samples.
        baselines: of `metrics.code_baselines`.
    """
    titled = {BASELINES[name]: value for name, value in baselines.items()}
    title = "What a token costs, and what it would cost without a transformer"
    path = run.out / "losses.png"
    figures.code_losses(path, session.rows, session.state["validation"], titled, title=title)
    generator, how = torch.Generator().manual_seed(1), describe_sampling(setting)

    def sample(conditions: Tensor, given: Tensor | None = None) -> Tensor:
        conditions = conditions.to(run.device)
        tokens = session.kept.sample(conditions, given=given, generator=generator, **setting)
        return to_unit(decode_tokens(tokenizer, tokens))

    # samples.png: what is asked for on the left or above, and several samples of it.
    condition, path = dataset.condition, run.out / "samples.png"
    x = shown_images(run)
    conditions = dataset.test_conditions[: len(x)]
    if condition.kind == "none":
        images = sample(condition.of_nothing(4 * NUM_PICTURES))
        figures.image_grid(path, images, title=f"Samples ({how})")
    elif condition.kind == "image":
        picture = PICTURES[condition.picture](x)
        rows = [("original", to_unit(x)), (condition.picture, to_unit(picture))]
        rows += [(f"sample {i}", sample(conditions)) for i in (1, 2, 3)]
        figures.image_rows(path, rows, title=f"Samples given {condition.picture} ({how})")
    else:
        names = condition.names if condition.kind == "class" else run.data.test_captions or ()
        ask = condition.of_classes if condition.kind == "class" else condition.of_captions
        rows = [(name, sample(ask([name] * SAMPLES_PER_ROW))) for name in names[:10]]
        figures.image_rows(path, rows, title=f"Samples by {condition.kind} ({how})")

    # completions.png: the tokens of the upper half are given, -1 stands for those to be generated.
    (h, w) = tokenizer.grids[0]
    given = dataset.test_tokens[: len(x)].clone()
    given[:, h // 2 * w :] = -1
    shown = to_unit(x)
    shown[:, :, h // 2 * (shown.shape[2] // h) :] = 0.5  # grey: what is to be generated
    rows = [("original", to_unit(x)), ("given", shown)]
    rows += [(f"completion {i}", sample(conditions, given)) for i in (1, 2, 3)]
    title = f"Lower halves written below the codes of upper halves ({how})"
    figures.image_rows(run.out / "completions.png", rows, title=title)
