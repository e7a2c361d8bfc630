"""A model over a whole test set: its reconstructions, its likelihood, or its samples.

The networks that measure them are in `eval_networks.py`, the formulas in `metrics.py`.
"""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from vqgan import metrics
from vqgan.classifier import Classifier
from vqgan.console import progress_bar
from vqgan.data import eval_batch_size, eval_batches
from vqgan.device import autocast
from vqgan.eval_networks import extract_features
from vqgan.images import to_uint8, to_unit
from vqgan.masked import MaskedTransformer
from vqgan.perceptual import PerceptualDistance
from vqgan.sampling import eval_mode
from vqgan.shapes import detect_colors
from vqgan.tokens import TokenDataset
from vqgan.training import Run, Stopwatch
from vqgan.transformer import GPT
from vqgan.vae import GaussianAutoencoder, reparameterize
from vqgan.vqvae import VQAutoencoder

# Keys of the result that not every model, or not every run, has.
OPTIONAL = ["perceptual", "frechet", "class_accuracy"]
OPTIONAL += ["perplexity", "codes_used", "entropy_bits_per_image"]
MAX_LOGITS = 2**26  # logits per chunk of the likelihood, 256 MiB in float32
MAX_CACHED = 2**28  # numbers in the keys and values of sampling, 1 GiB in float32


# --- reconstructions -----------------------------------------------------------------------------


@torch.no_grad()
def evaluate_autoencoder(
    model: GaussianAutoencoder | VQAutoencoder,
    run: Run,
    *,
    distance: PerceptualDistance | None = None,
    eval_classifier: Classifier | None = None,
    inception: Any = None,
) -> tuple[dict, Tensor | None]:
    """Measure a model over the test set, in float32, and count the uses of each code, (K,).

    A VAE is measured twice, with z at the mean of q(z|x), the usual reconstruction, and with a
    sampled z ("..._sampled"), since it is a sample that the bits of the KL can transmit. Codes are
    not random, so for other models both are the same. What is not measured is None.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)  # the global one belongs to training
    usages = []  # of each grid; a VAE has no codebook
    if isinstance(model, VQAutoencoder):
        usages = [metrics.CodebookUsage(model.num_embeddings) for _ in model.grids]
    per_image, features, features_hat = defaultdict(list), [], []
    for x in eval_batches(run.data.test_images, device=run.device):
        output = model(x)
        x_hat = output.reconstruction
        quality = metrics.reconstruction_quality(x, x_hat, run.variance)
        if isinstance(model, GaussianAutoencoder):
            quality["kl"] = output.kl
            mean, log_var = model.encode(x)
            noise = torch.randn(mean.shape, generator=generator).to(run.device)
            sampled = model.decode(reparameterize(mean, log_var, noise))
            quality["nmse_sampled"] = metrics.normalized_mse(x.cpu(), sampled.cpu(), run.variance)
            quality["ssim_sampled"] = metrics.ssim(to_unit(x).cpu(), to_unit(sampled).cpu())
        else:
            split = model.split_tokens(output.indices.flatten(1))
            for usage, indices in zip(usages, split, strict=True):
                usage.update(indices)
            quality |= {f"{name}_sampled": quality[name] for name in ("nmse", "ssim")}
        if distance is not None:
            quality["perceptual"] = distance(x, x_hat)
        for name, values in quality.items():
            per_image[name].append(values.cpu())
        if eval_classifier is not None:
            features.append(eval_classifier.features(x).cpu())
            features_hat.append(eval_classifier.features(x_hat).cpu())
        if inception is not None:
            inception.update(to_unit(x).to(inception.device), real=True)
            inception.update(to_unit(x_hat).to(inception.device), real=False)

    result: dict[str, Any] = dict.fromkeys(OPTIONAL)
    result |= {name: torch.cat(values).mean().item() for name, values in per_image.items()}
    if eval_classifier is not None:
        real, reconstructed = torch.cat(features), torch.cat(features_hat)
        result["frechet"] = metrics.frechet_distance(real, reconstructed)
        predicted = eval_classifier.head(reconstructed.to(run.device)).argmax(dim=1).cpu()
        result["class_accuracy"] = (predicted == run.data.test_labels).double().mean().item()
    if inception is not None:
        result["rfid"] = inception.compute().item()
        inception.reset()
    if isinstance(model, GaussianAutoencoder):
        return result | {"bits_per_image": metrics.nats_to_bits(result.pop("kl"))}, None
    counts = torch.stack([usage.counts for usage in usages]).sum(dim=0)
    return result | _codebook_result(model, usages), counts


def _codebook_result(model: VQAutoencoder, usages: list[metrics.CodebookUsage]) -> dict:
    """What the tokens cost, and how many codes are used; `usages` are those of each grid."""
    entropy_bits = sum(h * w * u.entropy for (h, w), u in zip(model.grids, usages, strict=True))
    used = torch.stack([usage.counts for usage in usages]) > 0  # (grids, K)
    is_shared = model.quantizer.num_rounds > 1  # one codebook for all grids
    return {
        "perplexity": 2 ** (entropy_bits / model.seq_len),
        # Of several codebooks, the one that is used least.
        "codes_used": int(used.any(dim=0).sum() if is_shared else used.sum(dim=1).min()),
        "bits_per_image": metrics.fixed_length_bits(model.seq_len, model.num_embeddings),
        "entropy_bits_per_image": entropy_bits,
    }


# --- likelihood ---------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_likelihood(
    model: GPT | MaskedTransformer,
    dataset: TokenDataset,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """The mean nats per token over the test images, and its standard error. Keeps the mode.

    (Of a masked transformer, the bound, estimated with the same masks every time.)
    """
    chunk_size = min(250, max(1, MAX_LOGITS // (model.seq_len * model.num_embeddings)))
    conditions = dataset.test_conditions.split(chunk_size)
    generator, losses = torch.Generator().manual_seed(0), []
    with eval_mode(model):
        for condition, tokens in zip(
            conditions, dataset.test_tokens.split(chunk_size), strict=True
        ):
            with autocast(device, dtype):
                condition, tokens = condition.to(device), tokens.to(device)
                losses.append(model.nats_per_token(condition, tokens, generator))
    nats = torch.cat(losses).cpu().double()  # (test images,)
    return nats.mean().item(), nats.std(correction=0).item() / math.sqrt(len(nats))


# --- samples -------------------------------------------------------------------------------------


@torch.no_grad()
def decode_tokens(tokenizer: VQAutoencoder, tokens: Tensor) -> Tensor:
    """Tokens (M, N) -> images (M, 3, H, W), about [-1, 1], on the CPU; decoded in chunks."""
    chunks = tokens.split(eval_batch_size(tokenizer.image_size))
    return torch.cat([tokenizer.decode_tokens(chunk).cpu() for chunk in chunks])


@torch.no_grad()
def reference_frechet(
    eval_classifier: Classifier, tokenizer: VQAutoencoder, run: Run
) -> tuple[Tensor, dict[str, float]]:
    """Extract features of the test images, and measure two reference distances to them.

    That of their reconstructions shows what the tokenizer loses; that of as many training images
    shows how far apart two real sets are. (Neither is a bound, and guided samples can lie below.)
    """
    device, test = run.device, run.data.test_images
    features = extract_features(eval_classifier, eval_batches(test, device=device))
    reconstructions = (tokenizer(x).reconstruction for x in eval_batches(test, device=device))
    reconstructed = extract_features(eval_classifier, reconstructions)
    train = run.data.train_images[: len(test)]
    real = extract_features(eval_classifier, eval_batches(train, device=device))
    compared = {"reconstructions": reconstructed, "training images": real}
    return features, {n: metrics.frechet_distance(f, features) for n, f in compared.items()}


@torch.no_grad()
def evaluate_samples(
    prior: GPT | MaskedTransformer,
    tokenizer: VQAutoencoder,
    dataset: TokenDataset,
    settings: list[dict],
    eval_classifier: Classifier | None,
    *,
    num_samples: int | None,
    run: Run,
) -> tuple[list[dict], dict[str, float]]:
    """Measure samples of each setting against the test images; return `reference_frechet` too.

    The samples have the conditions of the test images, in their order, and do not depend on the
    size of the chunks. Without an evaluation classifier there is nothing to measure them with.

    Args:
        settings: keyword arguments of the prior's `sample`, which the results repeat.
        num_samples: None means one per test image.
    """
    if eval_classifier is None:
        return [], {}
    test_features, references = reference_frechet(eval_classifier, tokenizer, run)
    indices = torch.arange(num_samples or len(dataset.test)) % len(dataset.test)  # wraps around
    conditions = dataset.test_conditions[indices].to(run.device)
    labels, kind = run.data.test_labels[indices], dataset.condition.kind
    # Keys and values of every block and position, twice with guidance.
    cached = 2 * 2 * len(prior.blocks) * prior.pos_emb.numel()
    chunk_size = min(500, max(1, MAX_CACHED // cached))
    if not prior.causal:  # has the logits of all positions at once, and no cache
        logits = 2 * prior.seq_len * prior.num_embeddings
        chunk_size = min(500, max(1, MAX_LOGITS // logits))

    def measure(setting: dict) -> dict:
        watch, generator = Stopwatch(), torch.Generator().manual_seed(0)
        features, colors = [], []
        for chunk in progress_bar(conditions.split(chunk_size), desc="sampling", unit="batch"):
            x = decode_tokens(tokenizer, prior.sample(chunk, generator=generator, **setting))
            batches = x.split(eval_batch_size(x.shape[-1]))
            features.append(extract_features(eval_classifier, batches))
            if kind == "caption":
                colors += [shape for shape, _ in detect_colors(to_uint8(x).numpy())]
        sample_features = torch.cat(features)
        correct = eval_classifier.head(sample_features.to(run.device)).argmax(dim=1).cpu() == labels
        result = setting | {
            "num_samples": len(indices),
            "frechet": metrics.frechet_distance(sample_features, test_features),
            "class_accuracy": None if kind == "none" else correct.double().mean().item(),
            "color_accuracy": None,
            "prompt_accuracy": None,
        }
        if kind == "caption":
            # The color of the shape is the second word, as in "small red star on blue".
            requested = [run.data.test_captions[i].split()[1] for i in indices.tolist()]
            color_correct = torch.tensor([a == b for a, b in zip(requested, colors, strict=True)])
            result["color_accuracy"] = color_correct.double().mean().item()
            result["prompt_accuracy"] = (correct & color_correct).double().mean().item()
        return result | {"seconds": round(watch.seconds, 1)}

    return [measure(setting) for setting in settings], references
