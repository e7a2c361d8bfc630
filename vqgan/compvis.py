"""Reads the VQGAN checkpoints that the paper's authors published (CompVis/taming-transformers).

Their network and `vqgan.py`'s are the same function; only the names of the weights differ. Theirs
say where a layer stands ("encoder.down.1.block.0.conv1"); here the encoder is one sequence of
layers ("encoder.4.conv1"), so the two are matched by walking through both in order.

Their files are Lightning checkpoints, some of which carry objects of classes beside the weights.
They are read with `weights_only=True` all the same: every foreign class is replaced by one that
does nothing, so nothing of the file is run, and nothing foreign is imported.
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from vqgan.errors import InputError
from vqgan.vqgan import VQGAN

# The keys of their YAML (model.params.ddconfig, and embed_dim and n_embed beside it) that say what
# the network is. The others must have the only value that the published networks have.
CONFIG_KEYS = ("resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels")
CONFIG_KEYS += ("embed_dim", "n_embed")
ONLY_VALUES = {"double_z": False, "in_channels": 3, "out_ch": 3, "resamp_with_conv": True}
NO_EFFECT = ("dropout", "give_pre_end")  # in eval mode


def load_compvis_vqgan(path: str | Path, config: dict) -> VQGAN:
    """Their checkpoint as a VQGAN in eval mode: the same latents, indices and images.

    Args:
        config: their YAML as a dictionary, or of it only the `ddconfig` with `embed_dim` and
            `n_embed`, flat or nested as there.

    Raises:
        InputError: the file cannot be read, or does not have exactly the weights of this network
            (those of the training loss are named and ignored).
    """
    model = VQGAN(**_arguments(config))
    theirs = read_weights(path)
    names = _their_names(model)
    missing = sorted(set(names.values()) - theirs.keys())
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of the network's {len(names)} weights, {missing[0]} "
            "among them: give the config that belongs to this checkpoint"
        )
    unknown = sorted(theirs.keys() - names.values())
    of_the_loss = [name for name in unknown if name.startswith("loss.")]
    others = [name for name in unknown if not name.startswith("loss.")]
    if others:
        raise InputError(
            f"{path} has {len(others)} weights that this network has not, {others[0]} among them: "
            "give the config that belongs to this checkpoint"
        )
    if of_the_loss:
        modules = sorted({".".join(name.split(".")[:2]) for name in of_the_loss})
        print(f"ignored {len(of_the_loss)} weights of the training loss: {', '.join(modules)}")
    ours = model.state_dict()
    for our_name, their_name in names.items():
        expected, given = tuple(ours[our_name].shape), tuple(theirs[their_name].shape)
        if given != expected:
            raise InputError(
                f"{path}: {their_name} has the shape {given}, but the config makes it {expected}: "
                "give the config that belongs to this checkpoint"
            )
        ours[our_name] = theirs[their_name].float()
    model.load_state_dict(ours)
    model.quantizer.waits_for_data = False
    return model.eval()


def _arguments(config: dict) -> dict:
    """Constructor arguments of `VQGAN` from their config."""
    for key in ("model", "params"):  # a whole YAML
        config = config.get(key, config)
    if "ddconfig" in config:  # beside it their YAML has more than the network: the loss, say
        outside = {key: config[key] for key in ("embed_dim", "n_embed") if key in config}
        config = config["ddconfig"] | outside
    missing = [key for key in CONFIG_KEYS if key not in config]
    if missing:
        raise InputError(
            f"the config lacks {', '.join(missing)}: give the ddconfig of the checkpoint's YAML, "
            "with embed_dim and n_embed"
        )
    for key in CONFIG_KEYS:
        values = config[key] if key in ("ch_mult", "attn_resolutions") else [config[key]]
        if not isinstance(values, list | tuple) or not all(type(v) is int for v in values):
            wanted = "a whole number" if values == [config[key]] else "a list of whole numbers"
            raise InputError(f"the config has {key} = {config[key]!r}, but {wanted} was expected")
    for key, value in config.items():
        if key not in (*CONFIG_KEYS, *NO_EFFECT) and ONLY_VALUES.get(key, key) != value:
            wanted = f"{ONLY_VALUES[key]!r}" if key in ONLY_VALUES else "not given"
            raise InputError(
                f"the config has {key} = {value!r}, which would be another network: "
                f"a VQGAN's is {wanted}"
            )
    sides = [config["resolution"] // 2**level for level in range(len(config["ch_mult"]))]
    return {
        "resolution": config["resolution"],
        "channels": config["ch"],
        "channel_multipliers": tuple(config["ch_mult"]),
        "num_residual_blocks": config["num_res_blocks"],
        # Sides that never occur have no effect in their code.
        "attention_resolutions": tuple(s for s in config["attn_resolutions"] if s in sides),
        "latent_channels": config["z_channels"],
        "embedding_dim": config["embed_dim"],
        "num_embeddings": config["n_embed"],
        "quantizer": "gradient",  # the published ones
        "norm_groups": 32,
    }


# --- names -------------------------------------------------------------------------------------


def _their_names(model: VQGAN) -> dict[str, str]:
    """For each of our weights, what they call it."""
    layers = {"encoder": list(_encoder_layers(model)), "decoder": list(_decoder_layers(model))}
    names = {"quantizer.codebook": "quantize.embedding.weight"}
    for our_name in model.state_dict():
        part, *rest = our_name.split(".")
        if part in layers:
            index, *inside = rest  # "encoder.4.shortcut.weight": layer 4, ["shortcut", "weight"]
            inside = ["nin_shortcut" if name == "shortcut" else name for name in inside]
            names[our_name] = ".".join([layers[part][int(index)], *inside])
    return names


def _levels(model: VQGAN, part: str, level: int, num_blocks: int) -> Iterator[str]:
    for block in range(num_blocks):
        yield f"{part}.{level}.block.{block}"
        if model.resolution // 2**level in model.attention_resolutions:
            yield f"{part}.{level}.attn.{block}"


def _encoder_layers(model: VQGAN) -> Iterator[str]:
    """Their names of our encoder's layers, in order; the swish has no weights and any name."""
    last = model.num_downsamples
    yield "encoder.conv_in"
    for level in range(last + 1):
        yield from _levels(model, "encoder.down", level, model.num_residual_blocks)
        if level < last:
            yield f"encoder.down.{level}.downsample"
    yield from (f"encoder.mid.{name}" for name in ("block_1", "attn_1", "block_2"))
    yield from ("encoder.norm_out", "swish", "encoder.conv_out", "quant_conv")


def _decoder_layers(model: VQGAN) -> Iterator[str]:
    yield from ("post_quant_conv", "decoder.conv_in")
    yield from (f"decoder.mid.{name}" for name in ("block_1", "attn_1", "block_2"))
    for level in reversed(range(model.num_downsamples + 1)):
        yield from _levels(model, "decoder.up", level, model.num_residual_blocks + 1)
        if level > 0:
            yield f"decoder.up.{level}.upsample"
    yield from ("decoder.norm_out", "swish", "decoder.conv_out")


# --- reading -----------------------------------------------------------------------------------


class Placeholder(list):
    """Stands for an object of a foreign class in a checkpoint: takes everything, does nothing.

    A list, since torch appends to nothing else; hashable, since it may be a dictionary's key.
    """

    __hash__ = object.__hash__

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        pass


class PlaceholderDict:
    """Stands for a foreign kind of dictionary: torch sets items of plain ones only."""

    def __new__(cls, *args):
        return OrderedDict()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a Lightning checkpoint (or a bare one), without running code in it.

    Raises:
        InputError: not a checkpoint, or without tensors.
    """
    try:
        content = _load_with_placeholders(path)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, UnpicklingError) as error:
        raise InputError(
            f"{path} cannot be read as a checkpoint: it is damaged, or another kind of file; "
            "download it again, or name another"
        ) from error
    if isinstance(content, dict) and {"model", "arguments", "weights"} <= content.keys():
        raise InputError(
            f"{path} is a checkpoint of this package, not of the authors': leave the config out"
        )
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} has no weights (a state_dict of tensors): name a checkpoint")
    return weights


def _load_with_placeholders(path: str | Path) -> dict:
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins = {name: type(name, (Placeholder,), {}) for name in foreign}
    while True:
        try:
            with torch.serialization.safe_globals([(cls, name) for name, cls in stand_ins.items()]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            # Which ones are dictionaries shows when torch refuses to set their items.
            refused = [name for name, cls in stand_ins.items() if str(cls) in str(error)]
            if not refused:
                raise
            stand_ins |= dict.fromkeys(refused, PlaceholderDict)
