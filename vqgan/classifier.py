"""A small residual network that classifies labeled images.

One network is trained for its features, which give a perceptual distance that needs no download
(`perceptual.py`). Another one, of another seed and width, is the evaluation classifier, which no
model is trained with. Its features give the Fréchet distance between two sets of images
(`metrics.frechet_distance`), and `evaluation.py` measures its accuracy on a model's images.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016, arXiv 1512.03385.

    x (B, 3, H, W) in [-1, 1] -> stages (B, w, H, W), (B, 2w, H/2, W/2), (B, 4w, H/4, W/4)
    -> means over positions (B, 4w) -> logits (B, classes)
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan import distributed
from vqgan.checkpoint import build_on_meta, load_weights
from vqgan.console import progress_bar
from vqgan.device import autocast, has_fused_optimizers, prepare_model
from vqgan.errors import file_input
from vqgan.files import load_plain, save_plain

# The peak of the schedule suits these widths and BatchNorm; the weight decay is the usual one.
MAX_LR, WEIGHT_DECAY = 1e-2, 1e-2
SHIFT = 4  # training images are moved by up to this many pixels, as He et al. do on CIFAR-10


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))); a stride of 2 halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(h)))


class Classifier(nn.Module):
    """Three stages of two residual blocks; for images of at least 8 pixels per side.

    Args:
        num_classes: number of logits.
        width: channels of the first stage; they double from stage to stage.
    """

    def __init__(self, num_classes: int, width: int = 16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, kernel_size=3, padding=1)
        # Channels before and after a stage, and the stride of its first block.
        sizes = ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        self.stages = nn.ModuleList(
            nn.Sequential(ResidualBlock(before, after, stride), ResidualBlock(after, after, 1))
            for before, after, stride in sizes
        )
        self.head = nn.Linear(4 * width, num_classes)

    def stage_features(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> outputs of all stages, (B, C, h, w), first to last."""
        features, h = [], self.stem(x)
        for stage in self.stages:
            h = stage(h)
            features.append(h)
        return features

    def features(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> (B, 4 width), the last stage averaged over positions."""
        return self.stage_features(x)[-1].mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> logits (B, num_classes)."""
        return self.head(self.features(x))


def train_classifier(
    loader: Any,
    *,
    num_classes: int,
    width: int,
    epochs: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    name: str,
) -> Classifier:
    """Train on labeled images, and return the network in eval mode, its parameters frozen.

    The global random state is left as it was.

    Args:
        loader: batches of images (B, 3, H, W) in [-1, 1] and labels (B,); it has a length.
        name: title of the progress bar.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = prepare_model(Classifier(num_classes, width), device, compile=False)
    fused = has_fused_optimizers(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=MAX_LR, weight_decay=WEIGHT_DECAY, fused=fused
    )
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=MAX_LR, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randint(2 * SHIFT + 1, (steps, 2), generator=generator).tolist()
    model.train()
    distributed.average_gradients([optimizer])
    for epoch in range(1, epochs + 1):
        for x, labels in progress_bar(loader, desc=f"{name}, epoch {epoch}", unit="step"):
            top, left = shifts.pop()
            padded = F.pad(x, (SHIFT,) * 4, mode="reflect")
            x = padded[..., top : top + x.shape[2], left : left + x.shape[3]]
            with autocast(device, dtype):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    for buffer in model.buffers():
        if buffer.is_floating_point():  # the statistics of BatchNorm, of each slice
            buffer.copy_(distributed.mean(buffer))
    return model.eval().requires_grad_(False)


def save_classifier(path: Path, model: Classifier, accuracy: float) -> None:
    """Write the file that `load_classifier` reads."""
    sizes = {"num_classes": model.head.out_features, "width": model.stem.out_channels}
    save_plain(path, sizes | {"weights": model.state_dict(), "accuracy": accuracy})


def load_classifier(path: Path, device: torch.device) -> tuple[Classifier, float]:
    """Load the network, in eval mode and frozen, and its accuracy on the test images.

    Raises:
        InputError: the file was not written by `save_classifier`.
    """
    remedy = "give a classifier of this package"
    state = load_plain(path, remedy=remedy)
    with file_input(f"{path} is not a classifier of this package", f": {remedy}"):
        sizes = {name: state[name] for name in ("num_classes", "width")}
        model = build_on_meta(Classifier, sizes, state["weights"], path)
        load_weights(model, state["weights"])
        accuracy = float(state["accuracy"])
    model = prepare_model(model, device, compile=False)
    return model.eval().requires_grad_(False), accuracy
