"""A trained model from its file: one of this package, or one that the VQGAN's authors published."""

import json
from pathlib import Path
from typing import NamedTuple

from vqgan.checkpoint import fingerprint, load_checkpoint
from vqgan.compvis import load_compvis_vqgan
from vqgan.conditions import Condition
from vqgan.errors import InputError
from vqgan.transformer import GPT
from vqgan.vae import VAE
from vqgan.vqgan import VQGAN
from vqgan.vqvae import VQVAE, VQAutoencoder

MODELS = {"VAE": VAE, "VQVAE": VQVAE, "VQGAN": VQGAN, "GPT": GPT}
# Pairs that come with the package, by name.
PRETRAINED = {"shapes": Path(__file__).parent / "pretrained" / "shapes" / "checkpoint.pt"}


def load_model(path: str | Path, *, config: dict | None = None) -> VAE | VQVAE | VQGAN | GPT:
    """The model of a checkpoint, on the CPU, in eval mode, its parameters frozen.

    Args:
        path: a file, the folder of a run, or the name of one that comes along (`PRETRAINED`).
        config: for a checkpoint of the VQGAN's authors: see `compvis.load_compvis_vqgan`.

    Raises:
        InputError: the file is no checkpoint, or not of the model it names.
    """
    if config is not None:
        return load_compvis_vqgan(checkpoint_path(path), config).requires_grad_(False)
    return build_model(read_checkpoint(path), path)


def read_checkpoint(path: str | Path) -> dict:
    """What a checkpoint of this package holds, of whichever model; see `load_model`."""
    remedy = "name the checkpoint.pt of a run, or give one of the VQGAN's authors its config=FILE"
    state = load_checkpoint(checkpoint_path(path), remedy=remedy)
    if state["model"] not in MODELS:
        raise InputError(f"{path} is of a {state['model']!r}: give one of {', '.join(MODELS)}")
    return state


def build_model(state: dict, path: str | Path) -> VAE | VQVAE | VQGAN | GPT:
    """The model of a checkpoint that was read; `path` is what errors call it."""
    try:
        model = MODELS[state["model"]](**state["model_args"])
        model.load_state_dict(state["weights"])
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} does not fit {state['model']} ({reason}): damaged?") from error
    return model.eval().requires_grad_(False)


def checkpoint_path(path: str | Path) -> Path:
    """The file that is meant; raises InputError for a folder of several, or nothing there."""
    if str(path) in PRETRAINED and not Path(path).is_file():
        path = PRETRAINED[str(path)]
    path = Path(path)
    if (path / "checkpoint.pt").is_file():
        path = path / "checkpoint.pt"
    if path.is_dir():
        inside = [str(found) for found in sorted(path.rglob("checkpoint.pt"))]
        files = ", or ".join(inside) or "the checkpoint.pt of a run"
        raise InputError(f"{path} is a folder, and a checkpoint was expected: name {files}")
    if not path.exists():
        raise InputError(
            f"there is no checkpoint {path}: name the checkpoint.pt of a run, as in "
            f"runs/vqgan/checkpoint.pt, or one that comes along: {', '.join(PRETRAINED)}"
        )
    return path


# --- both stages -----------------------------------------------------------------------------


class Pipeline(NamedTuple):
    """A transformer, and the tokenizer whose codes it generates."""

    transformer: GPT
    tokenizer: VQAutoencoder
    condition: Condition
    supports_guidance: bool  # trained with conditions dropped: guidance has something to go by


def load_tokenizer(path: str | Path) -> tuple[VQAutoencoder, dict]:
    """A VQ-VAE or VQGAN, and its checkpoint's state, whose "metadata" says what it was trained on.

    Raises:
        InputError: also for a model that has no codes.
    """
    state = read_checkpoint(path)
    model = build_model(state, path)
    if not isinstance(model, VQAutoencoder):
        beside = checkpoint_path(path).with_name("tokenizer.pt")  # a transformer's
        file = beside if beside.exists() else "the checkpoint.pt of a VQVAE or VQGAN"
        raise InputError(f"{path} is of a {state['model']}, not a tokenizer: name {file}")
    state["metadata"] = state.get("metadata") or _metadata_from_config(checkpoint_path(path))
    return model, state


def _metadata_from_config(path: Path) -> dict:
    """What the run folder's config.json says of a checkpoint that does not say it itself."""
    for folder in (path.parent, path.parent.parent):
        try:
            config = json.loads((folder / "config.json").read_text())
            return {key: config[key] for key in ("data", "image_size", "command")}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def load_pipeline(path: str | Path, *, tokenizer: str | Path | None = None) -> Pipeline:
    """A transformer with its tokenizer: the file `tokenizer.pt` beside it, or the one given.

    Raises:
        InputError: not a transformer's checkpoint, no tokenizer there, or not the one that the
            transformer was trained with.
    """
    state = read_checkpoint(path)
    transformer = build_model(state, path)
    if not isinstance(transformer, GPT) or "condition" not in state.get("metadata", {}):
        raise InputError(f"{path} is of a {state['model']}, not a transformer: name one of a run")
    metadata = state["metadata"]
    beside = checkpoint_path(path).with_name("tokenizer.pt")
    if tokenizer is None and not beside.exists():
        raise InputError(f"there is no {beside}: copy {metadata['tokenizer']} there, or name it")
    given = tokenizer or beside
    model, _ = load_tokenizer(given)
    if fingerprint(model) != metadata["tokenizer_fingerprint"]:
        name = metadata["tokenizer"]
        raise InputError(f"{given} is not the tokenizer of {path}: name a copy of {name}")
    model.image_size = metadata["image_size"]  # of the transformer's images
    condition = Condition.from_dict(metadata["condition"])
    return Pipeline(transformer, model, condition, supports_guidance=metadata["condition_drop"] > 0)
