"""SSIM of the same reconstructions, by five definitions that all go by the name.

    python docs/experiments/ssim_windows.py --data data/cifar10-images

reads the run folder that `RUN` names, below runs/, and needs scikit-image. Writes
docs/results/ssim_windows/:

    metrics.json   the mean of each over all test images, and the images' own variances
"""

import argparse

import numpy as np
import torch
from _common import flags_of_runs, model_folder, read_metrics, results_of, write_metrics

from vqgan import metrics
from vqgan.data import eval_batches, load_dataset
from vqgan.errors import InputError
from vqgan.images import to_unit
from vqgan.pretrained import load_model
from vqgan.script import run_script
from vqgan.training import Stopwatch

OUT = results_of(__file__)
RUN, MODEL = "fair/vqvae-8x8-k512-seed0", "vqvae"
GRAY = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # weights of red, green and blue


def variances(images: torch.Tensor) -> dict[str, float]:
    """Mean variance of uint8 images, in [0, 1], in SSIM's windows, whole images, and the set."""
    x = images.double() / 255
    in_windows = metrics.gaussian_mean(x * x) - metrics.gaussian_mean(x).square()
    return {
        "in_window": in_windows.mean().item(),
        "in_image": x.flatten(2).var(dim=2, unbiased=False).mean().item(),
        "in_set": x.var(unbiased=False).item(),
    }


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise InputError("scikit-image is not installed: pip install scikit-image") from error

    def skimage(x: torch.Tensor, y: torch.Tensor, **settings) -> np.ndarray:
        """One value per image, with scikit-image's own window: 7x7 pixels, all weighted alike."""
        pairs = zip(x.double().numpy(), y.double().numpy(), strict=True)
        settings = {"data_range": 1.0, "channel_axis": 0} | settings
        return np.array([structural_similarity(*pair, **settings) for pair in pairs])

    watch, folder = Stopwatch(), args.runs / RUN
    model = load_model(model_folder(folder, MODEL))
    values = {name: [] for name in ("standard", "skimage", "skimage_range_2", "gray", "global")}
    test_images = load_dataset(args.data).test_images
    for x in eval_batches(test_images, 500):
        x, y = to_unit(x), to_unit(model(x).reconstruction)
        values["standard"].append(metrics.ssim(x, y).numpy())
        values["skimage"].append(skimage(x, y))
        values["skimage_range_2"].append(skimage(x, y, data_range=2.0))
        gray = ((GRAY * x).sum(dim=1, keepdim=True), (GRAY * y).sum(dim=1, keepdim=True))
        values["gray"].append(metrics.ssim(*gray).numpy())
        values["global"].append(metrics.ssim_global(x, y).numpy())
    means = {name: float(np.concatenate(parts).mean()) for name, parts in values.items()}
    of_the_run = read_metrics(folder)
    results = {
        "run": of_the_run["command"],
        "epochs": of_the_run["models"][MODEL]["epochs"],
        "nmse": of_the_run["models"][MODEL]["nmse"],
        "ssim": means,
        "variance": variances(test_images),
    }
    data = {"source": args.data, "test_images": len(test_images)}
    write_metrics(OUT, watch, data, results)
    print(means)


if __name__ == "__main__":
    run_script(flags_of_runs(__doc__.splitlines()[0]).parse_args, main, resumable=False)
