"""What guides get wrong, measured: each mistake beside the line that has it right.

    python docs/experiments/mistakes.py

Needs no run and no data: the pictures are drawn, and the tokenizer and transformer come with the
package. Two transformers of the smallest size are trained for a few seconds each. Writes, in
docs/results/mistakes/:

    noise.png       what the decoder makes of noise, of random codes, and of generated codes
    metrics.json    the numbers of chapter 9
"""

import argparse
import copy
import json
import math
import time

import torch
import torch.nn.functional as F
from _common import no_flags, results_of, write_metrics
from torch import Tensor, nn

from vqgan import figures, metrics
from vqgan.data import load_dataset, pixel_variance
from vqgan.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    receptive_field,
)
from vqgan.gradient_estimators import straight_through
from vqgan.images import from_uint8, to_unit
from vqgan.pretrained import Pipeline, load_pipeline
from vqgan.quantizer import EMAVectorQuantizer, nearest_indices
from vqgan.script import run_script
from vqgan.training import Stopwatch
from vqgan.transformer import GPT
from vqgan.vqgan import group_norm
from vqgan.vqvae import ResidualBlock, VQAutoencoder, residual_stack

OUT = results_of(__file__)
IMAGES = 500  # test images that most is measured on
TRANSFORMS = 12  # in a row of noise.png
STEPS, BATCH, TRAINED_ON = 300, 32, 2000  # of the smallest transformers


def main(args: argparse.Namespace) -> None:
    watch = Stopwatch()
    torch.manual_seed(0)
    pipeline, data = load_pipeline("shapes"), load_dataset("shapes")
    x = from_uint8(data.test_images)  # (2000, 3, 32, 32)
    condition = data.test_labels[:, None]
    with torch.no_grad():
        z_e = torch.cat([pipeline.tokenizer.encoder(part) for part in x.split(100)])
        codes = torch.cat([pipeline.tokenizer.quantizer(part).indices for part in z_e.split(100)])
    variance = pixel_variance(data.train_images)
    results = {
        "noise": noise(pipeline, codes[:IMAGES], condition[:IMAGES]),
        "straight_through": gradients_of_the_encoder(pipeline.tokenizer, x[:32]),
        "beta": gradients_of_beta(pipeline.tokenizer, z_e[:32]),
        "ema_counts_from_zero": ema_counts(z_e[:64]),
        "restart": restart(pipeline.tokenizer.quantizer, z_e[:64]),
        "bfloat16_search": bfloat16_search(pipeline.tokenizer.quantizer, z_e[:IMAGES]),
        "shared_blocks": shared_blocks(),
        "in_place_relu": in_place_relu(),
        "group_norm": group_norms(pipeline.tokenizer, x[:IMAGES]),
        "detach": detach(pipeline.tokenizer, x[:32]),
        "swapped_arguments": swapped_arguments(),
        "lambda": lambdas(pipeline.tokenizer, x[:32]),
        "patch": patches(),
        "ssim": ssim_ranges(pipeline.tokenizer, x[:IMAGES]),
        "nmse": nmse_ranges(pipeline.tokenizer, x[:IMAGES], variance),
        "perplexity": perplexities(codes, pipeline.tokenizer.num_embeddings),
        "frechet": few_samples(),
        "off_by_one": off_by_one(pipeline, data),
        "resume": resume(condition[:IMAGES], codes[:IMAGES].flatten(1)),
    }
    results["cpu_seconds"] = round(time.process_time(), 1)
    write_metrics(OUT, watch, {"source": "shapes", "test_images": len(x)}, results)
    print(json.dumps(results, indent=2))


# --- the idea ------------------------------------------------------------------------------------


@torch.no_grad()
def noise(pipeline: Pipeline, codes: Tensor, condition: Tensor) -> dict:
    """What the decoder makes of noise; how likely grids of codes are, under the transformer."""
    tokenizer, quantizer = pipeline.tokenizer, pipeline.tokenizer.quantizer
    generator = torch.Generator().manual_seed(0)
    # The easiest noise for the decoder: of the codebook's own mean and deviation.
    deviation, mean = torch.std_mean(quantizer.codebook, dim=0)
    normal = torch.randn(TRANSFORMS, *codes.shape[1:], len(mean), generator=generator)
    z = (mean + deviation * normal).permute(0, 3, 1, 2)  # (12, D, 8, 8)
    anything = torch.randint(quantizer.num_embeddings, codes.shape, generator=generator)
    order = torch.randperm(codes.numel(), generator=generator)
    shuffled = codes.flatten()[order].view(codes.shape)  # as often as in pictures, anywhere
    generated = pipeline.transformer.sample(condition, guidance=3.0, generator=generator)
    generated = generated.view_as(codes)  # grids again
    rows = {
        "noise": tokenizer.decode(z),
        "random codes": tokenizer.decode_indices(anything[:TRANSFORMS]),
        "frequent codes,\nrandom positions": tokenizer.decode_indices(shuffled[:TRANSFORMS]),
        "codes that a\ntransformer generated": tokenizer.decode_indices(generated[:TRANSFORMS]),
        "codes of images": tokenizer.decode_indices(codes[:TRANSFORMS]),
    }
    title = "Decoded: noise, codes in random positions, codes of the transformer, codes of images"
    named = [(name, to_unit(images)) for name, images in rows.items()]
    figures.image_rows(OUT / "noise.png", named, title=title)
    grids = {"random": anything, "shuffled": shuffled, "generated": generated, "images": codes}
    return {
        "nats_per_token": {
            name: pipeline.transformer.loss(condition, grid.flatten(1)).item()
            for name, grid in grids.items()
        },
        # Of a picture's codes, those that its picture is encoded to again.
        "codes_that_survive": {
            name: torch.cat(
                [
                    tokenizer.encode(tokenizer.decode_indices(part)).indices == part
                    for part in grid[:200].split(100)
                ]
            )
            .double()
            .mean()
            .item()
            for name, grid in grids.items()
        },
    }


# --- the codebook --------------------------------------------------------------------------------


def gradients_of_the_encoder(tokenizer: VQAutoencoder, x: Tensor) -> dict:
    """Norm of the gradient that the reconstruction gives the encoder's last layer."""
    tokenizer = copy.deepcopy(tokenizer).requires_grad_(True)
    weight = tokenizer.encoder[-1].weight
    z_e = tokenizer.encoder(x)
    z_q = tokenizer.quantizer.lookup(tokenizer.quantizer(z_e).indices)
    norms = {}
    for name, z in {"with": straight_through(z_e, z_q), "without": z_q}.items():
        loss = F.mse_loss(tokenizer.decode(z), x)
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True, allow_unused=True)
        norms[name] = 0.0 if gradient is None else gradient.norm().item()
    return norms


def gradients_of_beta(tokenizer: VQAutoencoder, z_e: Tensor) -> dict:
    """Norms of the gradients of both terms' sum for vectors and codes: beta here, and there."""
    beta = 0.25
    z_e = z_e.clone().requires_grad_(True)
    codes = tokenizer.quantizer.lookup(tokenizer.quantizer(z_e).indices).detach()
    codes.requires_grad_(True)
    codebook, commitment = F.mse_loss(codes, z_e.detach()), F.mse_loss(z_e, codes.detach())
    result = {}
    losses = {"right": codebook + beta * commitment, "wrong": beta * codebook + commitment}
    for name, loss in losses.items():
        of_vectors, of_codes = torch.autograd.grad(loss, (z_e, codes), retain_graph=True)
        result[name] = {"vectors": of_vectors.norm().item(), "codes": of_codes.norm().item()}
    return result


@torch.no_grad()
def ema_counts(z_e: Tensor) -> dict:
    """The longest code after one step, with counts that start at one and at zero."""
    longest = {}
    for name, start in (("right", 1.0), ("wrong", 0.0)):
        torch.manual_seed(0)
        quantizer = EMAVectorQuantizer(256, z_e.shape[1], data_init=False, restart_dead_codes=False)
        quantizer.ema_counts.fill_(start)
        longest["before"] = quantizer.codebook.norm(dim=1).max().item()
        quantizer(z_e)
        longest[name] = quantizer.codebook.norm(dim=1).max().item()
    return longest


@torch.no_grad()
def restart(trained: EMAVectorQuantizer, z_e: Tensor) -> dict:
    """How far of the way back a restarted code has gone after one step."""
    vector, way_back = z_e[0, :, 0, 0], {}
    for name in ("right", "wrong"):
        quantizer = copy.deepcopy(trained).train()
        quantizer.restart_dead_codes = False
        dead = int(quantizer.ema_counts.argmin())
        old = quantizer.codebook[dead].clone()
        quantizer.codebook[dead] = vector
        if name == "right":  # code, sum and count together
            average = quantizer.ema_counts.mean()
            quantizer.ema_counts[dead], quantizer.ema_sums[dead] = average, average * vector
        quantizer(z_e[1:])
        moved = (quantizer.codebook[dead] - vector).norm() / (old - vector).norm()
        way_back[name] = moved.item()
    return way_back


@torch.no_grad()
def bfloat16_search(quantizer: EMAVectorQuantizer, z_e: Tensor) -> dict:
    vectors = z_e.permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
    right = nearest_indices(vectors, quantizer.codebook)
    low = quantizer.codebook.bfloat16()
    distances = low.square().sum(dim=1) - 2 * vectors.bfloat16() @ low.T  # (N, K)
    return {
        "vectors": len(right),
        "wrong": (distances.argmin(dim=1) != right).double().mean().item(),
    }


# --- networks and losses -------------------------------------------------------------------------


def shared_blocks() -> dict:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    return {
        "right": count(residual_stack(128, 32, 2)),
        "wrong": count(nn.Sequential(*[ResidualBlock(128, 32)] * 2)),
    }


@torch.no_grad()
def in_place_relu() -> dict:
    """How much of the skip path a leading ReLU in place changes, for normal activations."""
    block, h = ResidualBlock(128, 32), torch.randn(16, 128, 8, 8)
    right = block(h)
    wrong = h.relu() + (right - h)  # the ReLU has changed the h that is added, too
    return {
        "values_changed": (wrong != right).double().mean().item(),
        "relative_error": ((wrong - right).norm() / right.norm()).item(),
    }


@torch.no_grad()
def group_norms(tokenizer: VQAutoencoder, x: Tensor) -> dict:
    """What a channel's mean still says of an image: its deviation over images, after a norm."""
    h = tokenizer.encoder[0](x)  # (M, 16, 32, 32)
    channels = h.shape[1]

    def deviation(features: Tensor) -> float:
        return features.mean(dim=(2, 3)).std(dim=0).mean().item()

    return {
        "channels": channels,
        f"{channels // 4} groups": deviation(group_norm(channels, channels // 4)(h)),
        f"{channels} groups": deviation(group_norm(channels, channels)(h)),
    }


def detach(tokenizer: VQAutoencoder, x: Tensor) -> dict:
    """What a discriminator's step leaves in the generator's gradient, and what it costs."""
    tokenizer = copy.deepcopy(tokenizer).train().requires_grad_(True)
    tokenizer.quantizer.eval()  # its codes stay
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(x.shape[-1], 32)
    result = {}
    for name in ("right", "wrong", "right", "wrong"):  # the first round warms up
        tokenizer.zero_grad()
        x_hat = tokenizer(x).reconstruction
        start = time.process_time()
        fake = discriminator(x_hat.detach() if name == "right" else x_hat)
        discriminator_loss(discriminator(x), fake, "hinge").backward()
        seconds = time.process_time() - start
        gradient = tokenizer.last_layer.grad
        result[name] = {
            "gradient": 0.0 if gradient is None else gradient.norm().item(),
            "cpu_seconds": seconds,
        }
    tokenizer.zero_grad()
    F.l1_loss(tokenizer(x).reconstruction, x).backward()
    return result | {"gradient_of_the_reconstruction": tokenizer.last_layer.grad.norm().item()}


def swapped_arguments() -> dict:
    """The non-saturating loss at a few logits, as it is and with its arguments swapped."""
    logits = (-2.0, 0.0, 2.0, 5.0)
    right = [generator_loss(torch.tensor([a]), "non-saturating").item() for a in logits]
    one = torch.ones(1)
    wrong = [
        F.binary_cross_entropy_with_logits(one, torch.tensor([a])).item()  # (input, target)
        for a in logits
    ]
    return {"logits": logits, "right": right, "wrong": wrong}


def lambdas(tokenizer: VQAutoencoder, x: Tensor) -> dict:
    """lambda for a discriminator, and for the same with a thousandth of its last layer."""
    tokenizer = copy.deepcopy(tokenizer).requires_grad_(True)
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(x.shape[-1], 32, norm="none")
    x_hat = tokenizer(x).reconstruction
    reconstruction, result = F.l1_loss(x_hat, x), {}
    for name in ("fresh", "fading"):
        adversarial = generator_loss(discriminator(x_hat), "hinge")
        for maximum in (math.inf, 1e4, 5.0):
            weight = adaptive_weight(
                reconstruction, adversarial, tokenizer.last_layer, maximum=maximum
            )
            result[f"{name}, clamp {maximum:g}"] = weight.item()
        with torch.no_grad():
            discriminator.layers[-1].weight *= 1e-3
    return result


def patches() -> dict:
    """Of the usual discriminator's patch on 32 pixels: how much of it is padding."""
    usual, ours = receptive_field(3), receptive_field(1)
    return {"usual": usual, "ours": ours, "padding": 1 - (32 / usual) ** 2}


# --- what is measured ----------------------------------------------------------------------------


@torch.no_grad()
def ssim_ranges(tokenizer: VQAutoencoder, x: Tensor) -> dict:
    """SSIM of images in [0, 1] if the program takes their range to be 1, 2 or 255.

    Its constants are (0.01 L)^2 and (0.03 L)^2: a range of L is that of images divided by L.
    """
    images = to_unit(x)
    x_hat = torch.cat([tokenizer(part).reconstruction for part in x.split(100)])
    answers = {
        "reconstruction": to_unit(x_hat),
        "its mean color": images.mean(dim=(2, 3), keepdim=True).expand_as(images),
    }
    return {
        name: {
            f"range {L}": metrics.ssim(images / L, answer / L).mean().item() for L in (1, 2, 255)
        }
        | {"whole image": metrics.ssim_global(images, answer).mean().item()}
        for name, answer in answers.items()
    }


@torch.no_grad()
def nmse_ranges(tokenizer: VQAutoencoder, x: Tensor, variance: float) -> dict:
    """Errors in [-1, 1] by a variance in [-1, 1], and by one in [0, 1], a quarter of it."""
    x_hat = torch.cat([tokenizer(part).reconstruction for part in x.split(100)])
    return {
        "right": metrics.normalized_mse(x, x_hat, variance).mean().item(),
        "wrong": metrics.normalized_mse(x, x_hat, variance / 4).mean().item(),
    }


def perplexities(codes: Tensor, num_embeddings: int) -> dict:
    """Mean perplexity of batches of some sizes, and that of all codes."""
    result = {}
    for size in (1, 8, 32, 128, len(codes)):
        values = []
        for part in codes[: 10 * size].split(size):
            usage = metrics.CodebookUsage(num_embeddings)
            usage.update(part)
            values.append(usage.perplexity)
        result[str(size)] = sum(values) / len(values)
    return result


def few_samples() -> dict:
    """Fréchet distance of two sets that come from the very same distribution, by their size."""
    generator = torch.Generator().manual_seed(0)
    result = {}
    for size in (250, 1000, 10000):
        x, y = torch.randn(
            2, size, 96, generator=generator
        )  # the evaluation classifier's features are 96
        result[str(size)] = metrics.frechet_distance(x, y)
    return result


# --- the transformer -----------------------------------------------------------------------------


def off_by_one(pipeline: Pipeline, data) -> dict:
    """The smallest transformer, asked for the next code, and for one that it has just read."""
    K, N = pipeline.transformer.num_embeddings, pipeline.transformer.seq_len
    with torch.no_grad():
        x = from_uint8(data.train_images[:TRAINED_ON])
        tokens = torch.cat([pipeline.tokenizer.tokens(part) for part in x.split(100)])  # (M, N)
    condition = data.train_labels[:TRAINED_ON, None]
    grids = tokens.unflatten(1, pipeline.tokenizer.grids[0])
    result = {"steps": STEPS, "baselines": metrics.grid_baselines(grids, grids, K)}

    def different(sequences: Tensor) -> float:
        return sum(len(sequence.unique()) for sequence in sequences) / len(sequences)

    result["different_codes_a_grid_of_images"] = different(tokens)
    for name in ("right", "wrong"):
        torch.manual_seed(0)
        model = GPT(K, N, 10, 1, n_layer=2, n_head=4, n_embd=64, dropout=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        start, losses = time.process_time(), []
        for _ in range(STEPS):
            chosen = torch.randint(len(tokens), (BATCH,))
            wanted = tokens[chosen]
            # Position i reads code i - 1; one too early, it reads the code i that it is asked for.
            read = wanted if name == "right" else wanted.roll(-1, dims=1)
            logits = model(condition[chosen], read)  # (B, N, K)
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        generated = model.sample(condition[:200], generator=torch.Generator().manual_seed(0))
        result[name] = {
            "last_loss": sum(losses[-20:]) / 20,
            "different_codes_a_grid": different(generated),
            "cpu_seconds": time.process_time() - start,
        }
    return result


def resume(condition: Tensor, tokens: Tensor) -> dict:
    """How far weights are from those of a run without a break, after one in the middle of it."""

    def train(model: GPT, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            part = slice(BATCH * (step % 10), BATCH * (step % 10 + 1))
            loss = model.loss(condition[part], tokens[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def new() -> tuple[GPT, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = GPT(256, 64, 10, 1, n_layer=1, n_head=2, n_embd=32, dropout=0.0)
        return model, torch.optim.Adam(model.parameters(), lr=3e-3)

    def weights(model: GPT) -> Tensor:
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole, optimizer = new()
    start = weights(whole)
    train(whole, optimizer, range(50))
    middle = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, range(50, 60))
    result = {}
    for name in ("right", "wrong"):
        model, optimizer = new()
        model.load_state_dict(middle[0])
        if name == "right":
            optimizer.load_state_dict(middle[1])
        train(model, optimizer, range(50, 60))
        gap = (weights(model) - weights(whole)).norm() / (weights(whole) - start).norm()
        result[name] = gap.item()  # as a share of the way that the weights went in all
    return result


if __name__ == "__main__":
    run_script(no_flags("Measure what mistakes cost.").parse_args, main, resumable=False)
