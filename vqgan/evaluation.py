"""A model over a whole test set: reconstructions, and samples beside the images they stand for.

The networks that look at them are those of `eval_networks.py`; the measures are `metrics.py`'s.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vqgan import metrics
from vqgan.classifier import Classifier
from vqgan.data import batches_in_order, evaluation_batch
from vqgan.eval_networks import features_of
from vqgan.images import to_uint8, to_unit
from vqgan.perceptual import PerceptualDistance
from vqgan.shapes import colours_of
from vqgan.tokens import TokenDataset
from vqgan.training import Run, Stopwatch
from vqgan.transformer import GPT
from vqgan.vae import VAE, reparameterise
from vqgan.vqvae import VQAutoencoder

MAX_CACHED = 2**28  # numbers in the keys and values of sampling, 1 GiB


# --- reconstructions -----------------------------------------------------------------------------


@torch.no_grad()
def evaluate_autoencoder(
    model: VAE | VQAutoencoder,
    run: Run,
    *,
    distance: PerceptualDistance | None = None,
    yardstick: Classifier | None = None,
    inception: Any = None,
) -> tuple[dict, Tensor | None]:
    """Measures over the test set, in float32; and how often each code is used, (K,).

    A VAE is measured twice: with z at the mean of q(z|x), the usual reconstruction, and with a
    sampled z ("..._sampled"), since it is a sample that the bits of the KL can transmit. A code is
    not random, so for the others both are the same. What is not measured is None.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)  # its own: evaluation must not disturb training
    usage: Any = None if isinstance(model, VAE) else metrics.CodebookUsage(model.num_embeddings)
    per_image, features, features_hat = defaultdict(list), [], []
    for x in batches_in_order(run.data.test_images, device=run.device):
        output = model(x)
        x_hat = output.reconstruction
        quality = metrics.reconstruction_quality(x, x_hat, run.variance)
        if isinstance(model, VAE):
            quality["kl"] = output.kl
            mean, log_var = model.encode(x)
            noise = torch.randn(mean.shape, generator=generator).to(run.device)
            sampled = model.decode(reparameterise(mean, log_var, noise))
            quality["nmse_sampled"] = metrics.normalised_mse(x.cpu(), sampled.cpu(), run.variance)
            quality["ssim_sampled"] = metrics.ssim(to_unit(x).cpu(), to_unit(sampled).cpu())
        else:
            usage.update(output.indices)
            quality |= {f"{name}_sampled": quality[name] for name in ("nmse", "ssim")}
        if distance is not None:
            quality["perceptual"] = distance(x, x_hat)
        for name, values in quality.items():
            per_image[name].append(values.cpu())
        if yardstick is not None:
            features.append(yardstick.features(x).cpu())
            features_hat.append(yardstick.features(x_hat).cpu())
        if inception is not None:
            inception.update(to_unit(x).to(inception.device), real=True)
            inception.update(to_unit(x_hat).to(inception.device), real=False)

    result: dict[str, Any] = {"perceptual": None, "frechet": None, "recognised": None}
    result |= {name: torch.cat(values).mean().item() for name, values in per_image.items()}
    if yardstick is not None:
        real, reconstructed = torch.cat(features), torch.cat(features_hat)
        result["frechet"] = metrics.frechet_distance(real, reconstructed)
        predicted = yardstick.head(reconstructed.to(run.device)).argmax(dim=1).cpu()
        result["recognised"] = (predicted == run.data.test_labels).double().mean().item()
    if inception is not None:
        result["rfid"] = inception.compute().item()
        inception.reset()
    result |= {"perplexity": None, "codes_used": None, "entropy_bits_per_image": None}
    if isinstance(model, VAE):
        return result | {"bits_per_image": metrics.nats_to_bits(result.pop("kl"))}, None
    seq_len = output.indices[0].numel()
    return result | {
        "perplexity": usage.perplexity,
        "codes_used": usage.codes_used,
        "bits_per_image": metrics.code_bits(seq_len, model.num_embeddings),
        "entropy_bits_per_image": seq_len * usage.entropy,
    }, usage.counts


# --- samples -------------------------------------------------------------------------------------


@torch.no_grad()
def decode_tokens(tokenizer: VQAutoencoder, tokens: Tensor) -> Tensor:
    """Tokens (M, N) -> images (M, 3, H, W), about [-1, 1], on the CPU; decoded in parts."""
    parts = tokens.split(evaluation_batch(tokenizer.image_size))
    return torch.cat([tokenizer.decode_tokens(part).cpu() for part in parts])


@torch.no_grad()
def reference_frechet(
    yardstick: Classifier, tokenizer: VQAutoencoder, run: Run
) -> tuple[Tensor, dict[str, float]]:
    """Features of the test images, and two distances to them that a sample's is read beside.

    Reconstructions of the test images differ from them by what the tokenizer loses, and as many
    training images by what two sets of real images differ by. (Neither is a bound: guided samples
    can lie below.)
    """
    device, test = run.device, run.data.test_images
    features = features_of(yardstick, batches_in_order(test, device=device))
    reconstructions = (tokenizer(x).reconstruction for x in batches_in_order(test, device=device))
    reconstructed = features_of(yardstick, reconstructions)
    train = run.data.train_images[: len(test)]
    real = features_of(yardstick, batches_in_order(train, device=device))
    compared = {"reconstructions": reconstructed, "training images": real}
    return features, {n: metrics.frechet_distance(f, features) for n, f in compared.items()}


@torch.no_grad()
def evaluate_samples(
    prior: GPT,
    tokenizer: VQAutoencoder,
    dataset: TokenDataset,
    settings: list[dict],
    yardstick: Classifier | None,
    *,
    num_samples: int | None,
    run: Run,
) -> tuple[list[dict], dict[str, float]]:
    """Samples at each setting, beside the test images; and `reference_frechet`.

    They are sampled under the conditions of the test images, in their order. Without a yardstick
    there is nothing to measure them by.

    Args:
        settings: keyword arguments of `GPT.sample`, which stand in the results too.
        num_samples: None takes one for each test image.
    """
    if yardstick is None:
        return [], {}
    test_features, references = reference_frechet(yardstick, tokenizer, run)
    chosen = torch.arange(num_samples or len(dataset.test)) % len(dataset.test)  # around again
    conditions = dataset.test_conditions[chosen].to(run.device)
    labels, kind = run.data.test_labels[chosen], dataset.condition.kind
    # Keys and values of every block and position, twice with guidance.
    cached = 2 * 2 * len(prior.blocks) * prior.position_table.numel()
    chunk_size = min(500, max(1, MAX_CACHED // cached))

    def measure(setting: dict) -> dict:
        watch, generator = Stopwatch(), torch.Generator().manual_seed(0)
        features, colours = [], []
        for part in tqdm(conditions.split(chunk_size), desc="sampling", unit="batch"):
            x = decode_tokens(tokenizer, prior.sample(part, generator=generator, **setting))
            features.append(features_of(yardstick, x.split(evaluation_batch(x.shape[-1]))))
            if kind == "caption":
                colours += colours_of(to_uint8(x).numpy())
        sample_features = torch.cat(features)
        right = yardstick.head(sample_features.to(run.device)).argmax(dim=1).cpu() == labels
        result = setting | {
            "num_samples": len(chosen),
            "frechet": metrics.frechet_distance(sample_features, test_features),
            "recognised": None if kind == "none" else right.double().mean().item(),
            "colour_right": None,
            "prompt_right": None,
        }
        if kind == "caption":
            # "small red star on blue": its second and fifth word.
            wanted = (tuple(run.data.test_captions[i].split()[1::3]) for i in chosen.tolist())
            same = torch.tensor([a[0] == b[0] for a, b in zip(wanted, colours, strict=True)])
            result["colour_right"] = same.double().mean().item()
            result["prompt_right"] = (right & same).double().mean().item()
        return result | {"seconds": round(watch.seconds, 1)}

    return [measure(setting) for setting in settings], references
