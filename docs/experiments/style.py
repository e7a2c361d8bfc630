"""Style transfer through a VQGAN: one drawn image gets the texture of another, code by code.

    python docs/experiments/style.py

Gatys, Ecker, Bethge, "Image Style Transfer Using Convolutional Neural Networks", 2016: an image is
optimized until its features are those of one image, and the Gram matrices of its features those of
another. Here the features are those of the perceptual network, a classifier, and the colors are one
more layer. The image is reached in three ways: its pixels are optimized; or the latent of the
frozen VQGAN that comes with the package; or the latent again, replaced by the nearest codes at
every step, with the straight-through gradient. Needs no run and no data: the images are drawn, and
the classifier is trained here. Writes, in docs/results/style/, in minutes of one core:

    style.png       six pairs of images, and what becomes of them in each of the three ways
    metrics.json    content and Gram distances before and after, and how many codes changed
"""

import argparse
import json
from collections.abc import Callable

import torch
from _common import no_flags, results_of, write_metrics
from torch import Tensor

from vqgan import figures, load_pipeline
from vqgan.classifier import train_classifier
from vqgan.data import TrainLoader, load_dataset
from vqgan.images import from_uint8, to_unit
from vqgan.perceptual import ClassifierDistance
from vqgan.script import run_script
from vqgan.training import Stopwatch

OUT = results_of(__file__)
TRAINED_ON, EPOCHS, BATCH = (6000, 2000), 4, 64  # shapes, textures; of the perceptual network
PAIRS, SHOWN = 24, 6  # test images of shapes, each with one of textures
STEPS = 150
STYLE_WEIGHT = 1.0  # the content's is one; both distances are one between the two images
# Adam's steps: in [-1, 1] for pixels, and in deviations of the codebook for latents.
PIXEL_LR, LATENT_LR = 0.03, 0.1


def main(args: argparse.Namespace) -> None:
    watch = Stopwatch()
    torch.manual_seed(0)
    shapes, textures = load_dataset("shapes"), load_dataset("textures")
    network = train_network(shapes, textures)
    tokenizer = load_pipeline("shapes").tokenizer
    content = from_uint8(shapes.test_images[:PAIRS])
    style = from_uint8(textures.test_images[:PAIRS])
    objective = Objective(network, content, style)
    with torch.no_grad():
        z_e = tokenizer.encoder(content)
        before = tokenizer.quantizer(z_e)
        decoded = tokenizer.decode(before.z_q)
    lr = LATENT_LR * tokenizer.quantizer.codebook.std().item()
    ways: dict[str, tuple[Tensor, float, Callable[[Tensor], Tensor]]] = {
        "pixels": (content, PIXEL_LR, lambda x: x),
        "latent": (z_e, lr, tokenizer.decode),
        "codes": (z_e, lr, lambda z: tokenizer.decode(tokenizer.quantizer(z).z_q)),
    }
    rows = [("content", to_unit(content)), ("style", to_unit(style))]
    results = {"before": objective.measure(decoded)}
    for name, (start, rate, render) in ways.items():
        latent = optimize(objective, start, render, rate)
        with torch.no_grad():
            image = render(latent)
            results[name] = objective.measure(image)
            if name != "pixels":
                changed = tokenizer.quantizer(latent).indices != before.indices
                results[name]["codes_changed"] = changed.double().mean().item()
        rows.append((f"{name}\noptimized", to_unit(image)))
    rows = [(name, images[:SHOWN]) for name, images in rows]
    title = "Shapes of the first row in the style of the second, optimized in three ways"
    figures.image_rows(OUT / "style.png", rows, title=title)
    data = {"content": "shapes", "style": "textures", "pairs": PAIRS}
    write_metrics(OUT, watch, data, results)
    print(json.dumps(results, indent=2))


def train_network(shapes, textures) -> ClassifierDistance:
    """A classifier of ten shapes and four textures: the package's perceptual network."""
    parts = (shapes.first(TRAINED_ON[0]), textures.first(TRAINED_ON[1]))
    images = torch.cat([part.train_images for part in parts])
    labels = torch.cat([parts[0].train_labels, parts[1].train_labels + len(shapes.class_names)])
    loader = TrainLoader(images, BATCH, labels=labels)
    num_classes = len(shapes.class_names) + len(textures.class_names)
    sizes = {"num_classes": num_classes, "width": 16, "epochs": EPOCHS, "seed": 0}
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    return ClassifierDistance(train_classifier(loader, **sizes, **where, name="perceptual network"))


def gram(features: Tensor) -> Tensor:
    """Which channels occur together, wherever: (B, C, h, w) -> (B, C, C)."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[-1]


class Objective:
    """Distances to the content of one image and to the style of another, for each of B pairs.

    Both are divided by what they are between the two images. So the first image has content
    distance 0 and Gram distance 1, and the second has content distance 1 and Gram distance 0.
    """

    def __init__(self, network: ClassifierDistance, content: Tensor, style: Tensor):
        self.network = network
        self.content = network.stages(content)[-1]
        self.grams = [gram(features) for features in self.layers(style)]
        self.unit = torch.ones(2, len(content))
        self.unit = torch.stack([self(style)[0], self(content)[1]])

    def layers(self, image: Tensor) -> list[Tensor]:
        """Colors in about [0, 1], which a classifier hardly keeps, and the network's stages."""
        return [(image + 1) / 2, *self.network.stages(image)]

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W) in [-1, 1] -> content distances (B,), Gram distances (B,)."""
        stages = self.layers(image)
        content = (stages[-1] - self.content).square().mean(dim=(1, 2, 3))
        # Each stage counts by the share of its Gram matrix that is wrong: scales differ.
        shares = [
            (gram(features) - target).square().sum(dim=(1, 2)) / target.square().sum(dim=(1, 2))
            for features, target in zip(stages, self.grams, strict=True)
        ]
        return content / self.unit[0], torch.stack(shares).sum(dim=0) / self.unit[1]

    @torch.no_grad()
    def measure(self, image: Tensor) -> dict[str, float]:
        """The means over the pairs."""
        content, style = self(image)
        return {"content_distance": content.mean().item(), "gram_distance": style.mean().item()}


def optimize(
    objective: Objective, start: Tensor, render: Callable[[Tensor], Tensor], lr: float
) -> Tensor:
    """The argument of `render` for which the sum of both distances is small."""
    latent = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=lr)
    for _ in range(STEPS):
        content, style = objective(render(latent))
        loss = (content + STYLE_WEIGHT * style).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return latent.detach()


if __name__ == "__main__":
    run_script(no_flags("Move codes to another texture.").parse_args, main, resumable=False)
