"""A trained model from its file: one of this package, or one that the VQGAN's authors published."""

from pathlib import Path

from torch import nn

from vqgan.compvis import load_compvis_vqgan
from vqgan.errors import InputError
from vqgan.training import load_checkpoint
from vqgan.vae import VAE
from vqgan.vqgan import VQGAN
from vqgan.vqvae import VQVAE

MODELS = {"VAE": VAE, "VQVAE": VQVAE, "VQGAN": VQGAN}


def load_model(path: str | Path, *, config: dict | None = None) -> VAE | VQVAE | VQGAN:
    """The model of a checkpoint, on the CPU, in eval mode, its parameters frozen.

    Args:
        config: for a checkpoint of the VQGAN's authors: see `compvis.load_compvis_vqgan`.

    Raises:
        InputError: the file is no checkpoint, or not of the model it names.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(str(found) for found in path.rglob("checkpoint.pt"))
        raise InputError(
            f"{path} is a folder, and a checkpoint was expected: name "
            f"{', or '.join(inside) or 'the checkpoint.pt of a run'}"
        )
    if not path.exists():
        raise InputError(
            f"there is no checkpoint {path}: name the checkpoint.pt of a run, as in "
            "runs/vqgan/vqgan/checkpoint.pt"
        )
    if config is not None:
        model = load_compvis_vqgan(path, config)
    else:
        remedy = "name the checkpoint.pt of a run, or give one of the VQGAN's authors its config"
        state = load_checkpoint(path, remedy=f"{remedy} (--config)")
        if state["model"] not in MODELS:
            raise InputError(
                f"{path} is of a {state['model']!r}, but one of {', '.join(MODELS)} was expected: "
                "name another checkpoint"
            )
        try:
            model = MODELS[state["model"]](**state["arguments"])
            model.load_state_dict(state["weights"])
        except (TypeError, RuntimeError) as error:
            raise InputError(
                f"{path} does not fit {state['model']} ({' '.join(str(error).split())[:200]}): "
                "it is of another version, or damaged; name another checkpoint"
            ) from error
    return model.eval().requires_grad_(False)


def image_size_of(model: nn.Module) -> int:
    """Side in pixels of the images that the model was made for."""
    if isinstance(model, VAE):
        return model.image_size
    # A VQ-VAE takes any side, and does not know which it was trained on.
    return model.resolution if isinstance(model, VQGAN) else 32
