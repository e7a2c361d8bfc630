"""The networks that look at images beside the model that is trained.

classifier.pt   a `Classifier` whose features are the perceptual distance of the VQGAN's loss
yardstick.pt    another `Classifier`, which no model is trained with: a Frechet distance is
                taken in its features, and it says what it still recognises
Inception       on request: the Frechet distance in its features is the true FID
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqgan.classifier import Classifier, load_classifier, save_classifier, train_classifier
from vqgan.data import ImageDataset, batches_in_order
from vqgan.device import prepare_model
from vqgan.errors import InputError
from vqgan.perceptual import ClassifierDistance, PerceptualDistance, load_lpips
from vqgan.training import Run

# The yardstick is another network than those that models are trained on, and of a fixed seed, so
# that runs of other seeds are measured by the same.
YARDSTICK_WIDTH, YARDSTICK_SEED = 24, 1
CLASSIFIER_WIDTH, CLASSIFIER_SEED = 16, 0  # of the one whose features are a perceptual distance
CLASSIFIER_BATCH_SIZE = 128


def trained_classifier(
    path: Path, run: Run, *, width: int, epochs: int, seed: int
) -> tuple[Classifier, float]:
    """A classifier of the run's images and its accuracy; a resumed run's from its file.

    Raises:
        InputError: the images have no labels, or fewer than two classes.
    """
    if run.resume and path.exists():
        return load_classifier(path, run.device)
    data = run.data
    if data.train_labels is None or len(data.class_names) < 2:
        raise InputError("perceptual=classifier needs class folders: give them, or lpips or none")
    batch_size = min(CLASSIFIER_BATCH_SIZE, len(data.train_images))
    loader = run.loader(batch_size, seed=seed, labels=data.train_labels)
    sizes: dict[str, Any] = {"num_classes": len(data.class_names), "width": width}
    where: dict[str, Any] = {"device": run.device, "dtype": run.dtype}
    model = train_classifier(loader, **sizes, epochs=epochs, seed=seed, **where, name=path.stem)
    share = accuracy(model, data, run.device)
    print(f"{path.stem}: {share:.1%} of the test images recognised")
    save_classifier(path, model, share)
    return model, share


def perceptual_distance(
    run: Run, network: str, *, epochs: int
) -> tuple[PerceptualDistance | None, float | None]:
    """The distance of a network, and its accuracy if it is a classifier.

    Args:
        network: "classifier" (trained on the run's images for `epochs`), "lpips" or "none".
    """
    if network == "none":
        return None, None
    if network == "lpips":
        return prepare_model(load_lpips(), run.device, compile=False), None
    path = run.out / "classifier.pt"
    width, seed = CLASSIFIER_WIDTH, CLASSIFIER_SEED
    classifier, share = trained_classifier(path, run, width=width, epochs=epochs, seed=seed)
    return ClassifierDistance(classifier), share


def load_yardstick(
    run: Run, *, epochs: int, file: str | Path | None = None, folder: Path | None = None
) -> tuple[Classifier | None, float | None]:
    """A classifier that no model is trained with, and its accuracy; None for unlabelled images.

    Args:
        epochs: of a new one.
        file: that of another run, so that both are measured by the same.
        folder: where to look for yardstick.pt if no file is given, and one level above.

    Raises:
        InputError: the file is no classifier, or knows other classes.
    """
    num_classes = 0 if run.data.train_labels is None else len(run.data.class_names)
    if num_classes < 2 or len(run.data.test_images) < 2:
        print("without two classes and two test images: no yardstick, and no Frechet distance")
        return None, None
    if file is None and folder is not None:
        candidates = (folder / "yardstick.pt", folder.parent / "yardstick.pt")
        file = next((path for path in candidates if path.exists()), None)
    if file is None:
        path, width = run.out / "yardstick.pt", YARDSTICK_WIDTH
        return trained_classifier(path, run, width=width, epochs=epochs, seed=YARDSTICK_SEED)
    yardstick, share = load_classifier(Path(file), run.device)
    if yardstick.head.out_features != num_classes:
        known = yardstick.head.out_features
        raise InputError(f"yardstick={file} knows {known} classes, not {num_classes}: give another")
    return yardstick, share


@torch.no_grad()
def features_of(model: Classifier, batches: Iterable[Tensor]) -> Tensor:
    """Features (N, F) of batches of images (B, 3, H, W) in [-1, 1], on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model.features(x.to(device)).cpu() for x in batches])


@torch.no_grad()
def accuracy(model: Classifier, data: ImageDataset, device: torch.device) -> float:
    """Share of the test images that are recognised, 0 to 1."""
    batches = batches_in_order(data.test_images, device=device)
    predicted = torch.cat([model(x).argmax(dim=1).cpu() for x in batches])
    return predicted.eq(data.test_labels).double().mean().item()


def inception_distance(device: torch.device, feature: int | nn.Module = 2048):
    """True FID, between Inception's features, as torchmetrics computes it.

    Takes images in [0, 1]: `update(images, real=True or False)`, `compute()`, `reset()`.

    Args:
        feature: of Inception's layers the one for FID has 2048; or another network, images ->
            (B, num_features).

    Raises:
        InputError: the extra is not installed, or Inception's weights cannot be downloaded.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=feature, normalize=True).to(
            "cpu" if device.type == "mps" else device  # its sums are float64, which MPS has not
        )
    except ModuleNotFoundError as error:
        raise InputError(f"rFID needs this package's extra 'fid' ({error})") from error
    except OSError as error:  # urllib's
        raise InputError(
            f"the weights of Inception cannot be downloaded ({error}): place "
            "weights-inception-2015-12-05-6726825d.pth of github.com/toshas/torch-fidelity "
            f"(releases) in {torch.hub.get_dir()}/checkpoints, or do without"
        ) from error
