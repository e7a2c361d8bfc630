"""Perceptual distances: how far apart two images are in the features of a network.

Two textures of grass differ in every pixel and look alike; a network that has learned to recognize
things finds them alike too. Esser et al. 2021 (arXiv 2012.09841, section 3.1) put such a distance
in place of the squared error of eq. 4.

Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", 2018, arXiv 1801.03924, eq. 1: with the features f_l of layer l,
scaled to unit length over the channels at each position, and a weight w_l for every channel,

    d(x, y) = sum over l of the mean over positions of |w_l * (f_l(x) - f_l(y))|^2

`LPIPS` has the features of VGG16 and weights fitted to human judgments. `ClassifierDistance` has
the features of a classifier trained here (`classifier.py`), weighs all channels equally, and needs
no download. Both take images in [-1, 1], never learn, and are always in eval mode and float32.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

from vqgan.classifier import Classifier
from vqgan.errors import InputError, file_input
from vqgan.files import load_tensors

# Indices of relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 in torchvision's VGG16 features.
VGG_STAGES = (3, 8, 15, 22, 29)
VGG_CHANNELS = (64, 128, 256, 512, 512)
# Mean and deviation of ImageNet's pixels in [-1, 1], as in the authors' code.
IMAGENET_MEAN, IMAGENET_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

# The five linear layers of LPIPS 0.1 for VGG16, as the authors published them.
LINS_URL = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
LINS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


class PerceptualDistance(nn.Module):
    """What both distances share. A subclass defines `stages`, and may define `weights`."""

    def stages(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> features of each layer, (B, C_l, h_l, w_l)."""
        raise NotImplementedError

    def weights(self) -> list[Tensor] | None:
        """w_l^2 (C_l,) of each layer, or None if all channels weigh alike."""
        return None

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stay in eval mode, also when a parent is put in train mode."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (B, 3, H, W) in [-1, 1] (this is not checked) -> distances (B,), at least 0."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            stages_x, stages_y = self.stages(x.float()), self.stages(y.float())
        distance = x.new_zeros(len(x), dtype=torch.float32)
        for i, (f_x, f_y) in enumerate(zip(stages_x, stages_y, strict=True)):
            # 1e-10: a position where all channels are zero has no direction, and stays zero.
            difference = F.normalize(f_x, dim=1, eps=1e-10) - F.normalize(f_y, dim=1, eps=1e-10)
            squared = difference.square()  # (B, C_l, h_l, w_l)
            if (weights := self.weights()) is not None:
                squared = squared * weights[i][:, None, None]
            distance = distance + squared.sum(dim=1).mean(dim=(1, 2))
        return distance


class ClassifierDistance(PerceptualDistance):
    """Distance in the three stages of a trained `Classifier`: 0 to 6, at most 2 per stage.

    (Features are at least 0, so two directions are at most a right angle apart.)
    """

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier
        self.eval().requires_grad_(False)

    def stages(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) -> (B, w, H, W), (B, 2w, H/2, W/2), (B, 4w, H/4, W/4), w the width."""
        return self.classifier.stage_features(x)


class LPIPS(PerceptualDistance):
    """The published distance, version 0.1 with VGG16; for images of at least 16 pixels per side.

    Args:
        vgg_weights: state dict of torchvision's `vgg16`.
        lin_weights: state dict of the five linear layers, keys "lin0.model.1.weight" to
            "lin4.model.1.weight", each (1, C_l, 1, 1). They are loaded strictly, since
            layers with other keys would stay random, and the distance would be silently wrong.

    Raises:
        ValueError, RuntimeError: a state dict does not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vgg_weights: dict[str, Tensor], lin_weights: dict[str, Tensor]):
        super().__init__()
        expected = {f"lin{i}.model.1.weight": (1, C, 1, 1) for i, C in enumerate(VGG_CHANNELS)}
        given = {name: tuple(weight.shape) for name, weight in lin_weights.items()}
        if given != expected:
            raise ValueError(f"the linear layers must be {expected}, not {given}: see {LINS_URL}")
        vgg = vgg16(weights=None)
        vgg.load_state_dict(vgg_weights)
        self.features = vgg.features[: VGG_STAGES[-1] + 1]
        for i in range(len(VGG_STAGES)):
            weight = lin_weights[f"lin{i}.model.1.weight"]
            self.register_buffer(f"w{i}", weight.flatten().float())  # (C_l,)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def weights(self) -> list[Tensor]:
        """The published numbers, which are w_l^2 (C_l,), because they multiply squares."""
        return [self.get_buffer(f"w{i}") for i in range(len(VGG_STAGES))]

    def stages(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) -> features before each of the five poolings, (B, C_l, h_l, w_l)."""
        features, h = [], (x - self.mean) / self.std
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in VGG_STAGES:
                features.append(h)
        return features


def load_lpips() -> LPIPS:
    """Load LPIPS with the published weights, each file checked against its SHA-256.

    Those of VGG16 are torchvision's (528 MB). Those of the linear layers are read from the package
    `lpips`, or downloaded (7 KB). Both are saved where torch.hub keeps its files.

    Raises:
        InputError: a download fails, or a file is not the published one.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    url = VGG16_Weights.IMAGENET1K_V1.url
    name = Path(url).name
    sha256 = Path(name).stem.partition("-")[2]  # its first digits are in the file's name
    vgg_weights = _read_published("the weights of VGG16 (528 MB)", url, folder / name, sha256)
    return LPIPS(vgg_weights, load_lpips_lins(folder / "lpips_v0.1_vgg.pth"))


def load_lpips_lins(path: Path) -> dict[str, Tensor]:
    """Load the linear layers from `path` if it exists, else from `lpips`, else download them."""
    package = importlib.util.find_spec("lpips")
    packaged = package and Path(package.origin or "").parent / "weights" / "v0.1" / "vgg.pth"
    if not path.exists() and packaged and packaged.exists():
        path = packaged
    return _read_published("the linear layers of LPIPS (7 KB)", LINS_URL, path, LINS_SHA256)


def _read_published(what: str, url: str, path: Path, sha256: str) -> dict[str, Tensor]:
    """Read a file of weights whose SHA-256 begins with `sha256`; download it if it is missing."""
    if not path.exists():
        print(f"downloading {what} from {url} to {path}")
        advice = f": place {url} at {path}, or give perceptual=classifier (with labels) or none"
        with file_input(f"{what} cannot be downloaded", advice):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(sha256):
        raise InputError(f"{path} is not the published file: delete it, and get it from {url}")
    # `load_plain` takes zip files only, and torch wrote no zip files when these were published.
    return load_tensors(path)
