"""The networks that measure images, next to the model that is trained.

classifier.pt        a `Classifier` whose features give the perceptual distance of the VQGAN's loss
eval_classifier.pt   another `Classifier`, which no model is trained with; its features give a
                     Fréchet distance, and its accuracy on a model's images is measured
Inception            loaded on request; the Fréchet distance in its features is the true FID
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqgan import distributed
from vqgan.classifier import Classifier, load_classifier, save_classifier, train_classifier
from vqgan.data import ImageDataset, eval_batches
from vqgan.device import prepare_model
from vqgan.errors import InputError
from vqgan.perceptual import ClassifierDistance, PerceptualDistance, load_lpips
from vqgan.training import Run

# The evaluation classifier is not the network that models are trained with, since that one would
# flatter them. Its seed is fixed, so that runs of all seeds are measured by the same network.
EVAL_WIDTH, EVAL_SEED = 24, 1
CLASSIFIER_WIDTH, CLASSIFIER_SEED = 16, 0  # of the network in the perceptual distance
CLASSIFIER_BATCH_SIZE = 128


def trained_classifier(
    path: Path, run: Run, *, width: int, epochs: int, seed: int
) -> tuple[Classifier, float]:
    """Train a classifier on the run's images, or load a resumed run's; return its accuracy too.

    Raises:
        InputError: the images have no labels, or fewer than two classes.
    """
    if run.resume and path.exists():
        return load_classifier(path, run.device)
    data = run.data
    if data.train_labels is None or len(data.class_names) < 2:
        raise InputError("perceptual=classifier needs class folders: give those, lpips or none")
    batch_size = min(CLASSIFIER_BATCH_SIZE, len(data.train_images))
    batch_size -= batch_size % distributed.num_processes()
    loader = run.loader(batch_size, seed=seed, labels=data.train_labels)
    sizes: dict[str, Any] = {"num_classes": len(data.class_names), "width": width}
    where: dict[str, Any] = {"device": run.device, "dtype": run.dtype}
    model = train_classifier(loader, **sizes, epochs=epochs, seed=seed, **where, name=path.stem)
    test_accuracy = accuracy(model, data, run.device)
    print(f"{path.stem}: {test_accuracy:.1%} of the test images classified correctly")
    save_classifier(path, model, test_accuracy)
    return model, test_accuracy


def perceptual_distance(
    run: Run, network: str, *, epochs: int
) -> tuple[PerceptualDistance | None, float | None]:
    """Build the distance in a network's features; return the accuracy of a classifier too.

    Args:
        network: "classifier" (trained on the run's images for `epochs`), "lpips" or "none".
    """
    if network == "none":
        return None, None
    if network == "lpips":
        return prepare_model(load_lpips(), run.device, compile=False), None
    path = run.out / "classifier.pt"
    width, seed = CLASSIFIER_WIDTH, CLASSIFIER_SEED
    classifier, test_accuracy = trained_classifier(path, run, width=width, epochs=epochs, seed=seed)
    return ClassifierDistance(classifier), test_accuracy


def load_eval_classifier(
    run: Run, *, epochs: int, file: str | Path | None = None, folder: Path | None = None
) -> tuple[Classifier | None, float | None]:
    """Return the evaluation classifier and its accuracy; both are None for unlabeled images.

    Args:
        epochs: of a new network.
        file: the network of another run, so that both are measured by the same.
        folder: it and its parent are searched for eval_classifier.pt if no file is given.

    Raises:
        InputError: the file is not a classifier, or has another number of classes.
    """
    num_classes = 0 if run.data.train_labels is None else len(run.data.class_names)
    if num_classes < 2 or len(run.data.test_images) < 2:
        print("no evaluation classifier, which needs two classes and two test images")
        return None, None
    if file is None and folder is not None:
        candidates = (folder / "eval_classifier.pt", folder.parent / "eval_classifier.pt")
        file = next((path for path in candidates if path.exists()), None)
    if file is None:
        path, width = run.out / "eval_classifier.pt", EVAL_WIDTH
        return trained_classifier(path, run, width=width, epochs=epochs, seed=EVAL_SEED)
    eval_classifier, test_accuracy = load_classifier(Path(file), run.device)
    if (found := eval_classifier.head.out_features) != num_classes:
        message = f"eval_classifier={file} has {found} classes, not {num_classes}: give another"
        raise InputError(message)
    return eval_classifier, test_accuracy


@torch.no_grad()
def extract_features(model: Classifier, batches: Iterable[Tensor]) -> Tensor:
    """Extract features (N, F) of batches of images (B, 3, H, W) in [-1, 1], on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model.features(x.to(device)).cpu() for x in batches])


@torch.no_grad()
def accuracy(model: Classifier, data: ImageDataset, device: torch.device) -> float:
    """Fraction of the test images that are classified correctly, 0 to 1."""
    batches = eval_batches(data.test_images, device=device)
    predicted = torch.cat([model(x).argmax(dim=1).cpu() for x in batches])
    return predicted.eq(data.test_labels).double().mean().item()


def inception_distance(device: torch.device, feature: int | nn.Module = 2048):
    """Build the true FID, in Inception's features, as torchmetrics computes it.

    It takes images in [0, 1]: `update(images, real=True or False)`, `compute()`, `reset()`.

    Args:
        feature: width of the layer of Inception, 2048 for FID; or another network, images ->
            (B, num_features).

    Raises:
        InputError: the extra is not installed, or Inception's weights cannot be downloaded.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        where = "cpu" if device.type == "mps" else device  # its sums are float64, which MPS lacks
        return FrechetInceptionDistance(feature=feature, normalize=True).to(where)
    except ModuleNotFoundError as error:
        raise InputError(f"install this package's extra 'fid' for the rFID ({error})") from error
    except OSError as error:  # urllib's
        raise InputError(
            f"the weights of Inception cannot be downloaded ({error}): place "
            "weights-inception-2015-12-05-6726825d.pth of github.com/toshas/torch-fidelity "
            f"(releases) in {torch.hub.get_dir()}/checkpoints, or leave out the rFID"
        ) from error
