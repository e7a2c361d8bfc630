"""Loads trained models from checkpoints, of this package or published by the VQGAN's authors."""

from pathlib import Path
from typing import NamedTuple, get_args

from torch import nn

from vqgan.checkpoint import build_on_meta, fingerprint, is_float, load_checkpoint, load_weights
from vqgan.compvis import load_compvis_vqgan, read_config
from vqgan.conditions import Condition
from vqgan.errors import InputError, file_input
from vqgan.masked import MaskedTransformer
from vqgan.transformer import GPT, Prior
from vqgan.vae import VAE, SpatialVAE
from vqgan.vqgan import VQGAN
from vqgan.vqvae import VQVAE, VQAutoencoder
from vqgan.vqvae2 import VQVAE2

Model = VAE | SpatialVAE | VQVAE | VQVAE2 | VQGAN | GPT | MaskedTransformer
MODELS = {model.__name__: model for model in get_args(Model)}
# Arguments of a model, or of its quantizer, that no shape of a weight tells.
WITHOUT_SHAPE = ("n_head", "norm_groups", "likelihood", "num_embeddings", "cosine", "num_rounds")
# Transformers that come with the package, each with its tokenizer.
PRETRAINED = {"shapes": Path(__file__).parent / "pretrained" / "shapes" / "checkpoint.pt"}


def load_model(path: str | Path, *, config: dict | None = None) -> Model:
    """The model of a checkpoint, on the CPU, in eval mode, with frozen parameters.

    Args:
        path: a file, the folder of a run, or a name in `PRETRAINED`.
        config: only for a checkpoint of the VQGAN's authors, see `compvis.load_compvis_vqgan`.

    Raises:
        InputError: the file is not a checkpoint, or does not fit the model it names.
    """
    if config is not None:
        return load_compvis_vqgan(checkpoint_path(path), config).requires_grad_(False)
    return build_model(read_checkpoint(path), path)


def read_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint of this package, whatever its model; see `load_model`."""
    remedy = "name the checkpoint.pt of a run; "
    remedy += "one of the VQGAN's authors is opened by `vqgan reconstruct` with config=FILE"
    state = load_checkpoint(checkpoint_path(path), remedy=remedy)
    if state["model"] not in MODELS:
        raise InputError(f"{path} is of a {state['model']!r}: give one of {', '.join(MODELS)}")
    return state


def is_prior(state: dict) -> bool:
    """Whether a checkpoint that was read is of a transformer, and not of an autoencoder."""
    return issubclass(MODELS[state["model"]], Prior)


def build_model(state: dict, path: str | Path) -> Model:
    """The model of a checkpoint that was read; errors name it by its `path`."""
    weights, model_args, model_class = state["weights"], state["model_args"], MODELS[state["model"]]
    with file_input(f"{path} does not fit {state['model']}", ": damaged?"):
        model = build_on_meta(model_class, model_args, weights, checkpoint_path(path))
        # Shipped weights are in half precision.
        load_weights(model, {name: w.float() if is_float(w) else w for name, w in weights.items()})
    return model.eval().requires_grad_(False)


def init_weights(model: nn.Module, path: str | Path, config: str | None = None) -> None:
    """Start a model from the weights, and the codebook, of a trained one of the same sizes.

    Args:
        config: file with the config of a checkpoint of the VQGAN's authors.

    Raises:
        InputError: the file is of another model, or of other sizes.
    """
    source = load_model(path, config=None if config is None else read_config(config))
    with file_input(f"{path} is a {type(source).__name__} of other sizes or kind"):
        if type(model) is not type(source):
            raise ValueError(f"this run trains a {type(model).__name__}")
        for name in WITHOUT_SHAPE:
            parts = (getattr(m, "quantizer", m) for m in (model, source))
            ours, theirs = (
                getattr(m, name, getattr(part, name, None))
                for m, part in zip((model, source), parts, strict=True)
            )
            if ours != theirs:
                raise ValueError(f"{name} is {theirs}, not {ours}")
        weights = source.state_dict()
        for name, w in model.state_dict().items():
            if name in weights and weights[name].shape != w.shape:
                raise ValueError(f"{name} is {tuple(weights[name].shape)}, not {tuple(w.shape)}")
        model.load_state_dict(weights)


def checkpoint_path(path: str | Path) -> Path:
    """The file of a checkpoint, given a file, the folder of a run, or a name in `PRETRAINED`.

    Raises:
        InputError: there is no such file, or the folder holds several.
    """
    path = Path(path) if Path(path).is_file() else PRETRAINED.get(str(path), Path(path))
    if (path / "checkpoint.pt").is_file():
        path = path / "checkpoint.pt"
    if path.is_dir():
        found = [str(file) for file in sorted(path.glob("*/checkpoint.pt"))]
        files = ", or ".join(found) or "the checkpoint.pt of a run"
        raise InputError(f"{path} is a folder, and a checkpoint was expected: name {files}")
    if not path.exists():
        raise InputError(
            f"there is no checkpoint {path}: name the checkpoint.pt of a run, as in "
            f"runs/vqgan/checkpoint.pt, or a model of the package: {', '.join(PRETRAINED)}"
        )
    return path


# --- both stages -----------------------------------------------------------------------------


class Pipeline(NamedTuple):
    """A transformer, and the tokenizer whose tokens it generates."""

    transformer: GPT | MaskedTransformer
    tokenizer: VQAutoencoder
    condition: Condition
    supports_guidance: bool  # trained with some conditions dropped


def load_tokenizer(path: str | Path) -> tuple[VQAutoencoder, dict]:
    """A VQ-VAE or VQGAN, and its checkpoint's state, whose "metadata" says what it was trained on.

    Raises:
        InputError: as `load_model`, and if the model has no codebook.
    """
    state = read_checkpoint(path)
    model = build_model(state, path)
    if not isinstance(model, VQAutoencoder):
        neighbor = checkpoint_path(path).with_name("tokenizer.pt")  # of a transformer
        file = neighbor if neighbor.exists() else "the checkpoint.pt of a VQVAE or VQGAN"
        raise InputError(f"{path} is of a {state['model']}, not a tokenizer: name {file}")
    return model, state


def load_condition(state: dict, path: str | Path) -> Condition:
    """The condition of a transformer's checkpoint that was read; errors name it by its `path`."""
    with file_input(f"{path} has a damaged condition", ": name another file"):
        return Condition.from_dict(state["metadata"]["condition"])


def load_pipeline(path: str | Path, *, tokenizer: str | Path | None = None) -> Pipeline:
    """A transformer with its tokenizer, from the file `tokenizer.pt` next to it or the one given.

    Raises:
        InputError: the checkpoint is not a transformer's, or the tokenizer is missing or not the
            one that the transformer was trained with.
    """
    state = read_checkpoint(path)
    transformer, metadata = build_model(state, path), state["metadata"]
    needed = {"condition", "condition_drop", "image_size", "tokenizer", "tokenizer_fingerprint"}
    if not isinstance(transformer, Prior) or not needed <= metadata.keys():
        raise InputError(f"{path} is of a {state['model']}, not a transformer: name one of a run")
    file = Path(tokenizer or checkpoint_path(path).with_name("tokenizer.pt"))
    source = metadata["tokenizer"]
    if tokenizer is None and not file.exists():
        raise InputError(f"there is no tokenizer {file}: copy {source} there, or name it")
    model, _ = load_tokenizer(file)
    if fingerprint(model) != metadata["tokenizer_fingerprint"]:
        raise InputError(f"{file} is not the tokenizer of {path}: name a copy of {source}")
    size = metadata["image_size"]  # that the transformer was trained on
    condition = load_condition(state, path)
    with file_input(f"{path} has damaged metadata", ": name another file"):
        model.check_resolution(size, size)
        model.image_size = size
        expected = (condition.vocabulary, condition.length, model.seq_len)
        found = (transformer.condition_vocabulary, transformer.condition_length)
        if expected != (*found, transformer.seq_len):
            raise ValueError("the condition or the grid is of another model")
    return Pipeline(transformer, model, condition, supports_guidance=metadata["condition_drop"] > 0)
