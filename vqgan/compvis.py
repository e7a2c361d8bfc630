"""Reads the checkpoints that the paper's authors published (CompVis/taming-transformers).

Their VQGAN and `vqgan.py`'s are the same function; only the names of the weights differ. Theirs
say where a layer stands ("encoder.down.1.block.0.conv1"); here the encoder is one sequence of
layers ("encoder.4.conv1"), so the two are matched by walking through both in order.

Their transformer and `transformer.py`'s are the same function too. Theirs reads condition and codes
from one table, here each has its own: both get a copy of theirs, and a condition keeps its ids.

Their files are Lightning checkpoints, some of which carry objects of classes beside the weights.
They are read with `weights_only=True` all the same: every foreign class is replaced by one that
does nothing, so nothing of the file is run, and nothing foreign is imported.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from vqgan.checkpoint import MODEL_KEYS
from vqgan.errors import InputError
from vqgan.transformer import GPT
from vqgan.vqgan import VQGAN

# The keys of their YAML (model.params.ddconfig, and embed_dim and n_embed beside it), and the name
# that each argument has here. The others must have the only value that published networks have.
VQGAN_ARGUMENTS = {
    "resolution": "resolution", "ch": "channels", "ch_mult": "channel_multipliers",
    "num_res_blocks": "num_residual_blocks", "attn_resolutions": "attention_resolutions",
    "z_channels": "latent_channels", "embed_dim": "embedding_dim", "n_embed": "num_embeddings",
}  # fmt: skip
VQGAN_ONLY_VALUES = {"double_z": False, "in_channels": 3, "out_ch": 3, "resamp_with_conv": True}
# The same of the transformer (model.params.transformer_config.params); `n_unmasked` positions at
# the start would see each other.
GPT_ARGUMENTS = {
    "vocab_size": "num_embeddings", "block_size": "block_size",
    "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
}  # fmt: skip
GPT_ONLY_VALUES = {"n_unmasked": 0}
# In eval mode these change nothing.
NO_EFFECT = ("dropout", "give_pre_end", "embd_pdrop", "resid_pdrop", "attn_pdrop")


def load_compvis_vqgan(path: str | Path, config: dict) -> VQGAN:
    """Their checkpoint as a VQGAN in eval mode: the same latents, indices and images.

    Args:
        config: their YAML as a dictionary, or of it only the `ddconfig` with `embed_dim` and
            `n_embed`, flat or nested as there.

    Raises:
        InputError: the file cannot be read, or does not have exactly the weights of this network
            (those of the training loss are named and ignored).
    """
    config = _innermost(config, "model", "params")
    if "ddconfig" in config:  # beside it their YAML has more than the network: the loss, say
        outside = {key: config[key] for key in ("embed_dim", "n_embed") if key in config}
        config = config["ddconfig"] | outside
    arguments = _arguments(config, VQGAN_ARGUMENTS, VQGAN_ONLY_VALUES)
    theirs = read_weights(path)
    _ignore(theirs, "of the training loss", "loss.")
    with _fitting(path):
        levels = range(len(arguments["channel_multipliers"]))
        sides = {arguments["resolution"] // 2**level for level in levels}
        # Sides that never occur have no effect in their code.
        arguments["attention_resolutions"] = sides.intersection(arguments["attention_resolutions"])
        model = VQGAN(**arguments, quantizer="gradient", norm_groups=32)  # the published ones
        _load(model, theirs, {ours: [name] for ours, name in _their_names(model).items()})
    model.quantizer.waits_for_data = False
    return model.eval()


def load_compvis_transformer(
    path: str | Path, config: dict, seq_len: int | None = None, condition_length: int | None = None
) -> GPT:
    """Their checkpoint as a transformer in eval mode: the same logits.

    A condition consists of ids of their one table: a code, the label of a class, a start token.
    Token `nothing` has a row of zeros, since they trained none.

    Args:
        config: their YAML as a dictionary, or of it only the parameters of `transformer_config`,
            flat or nested as there.
        seq_len: tokens of an image; what their block holds beyond them is the condition, of
            block_size - seq_len + 1 tokens. None: block_size, after a condition of one token.
        condition_length: fewer tokens than that, where a block is larger than it had to be (their
            faces have 512 positions for 256 tokens and 256 codes, of which the last is not read).

    Raises:
        InputError: the file cannot be read, or does not have exactly the weights of this network
            (those of the autoencoders beside it are named and ignored), or the block is too small.
    """
    config = _innermost(config, "model", "params", "transformer_config", "params")
    arguments = _arguments(config, GPT_ARGUMENTS, GPT_ONLY_VALUES)
    theirs = {k: w for k, w in read_weights(path).items() if not k.endswith(".attn.mask")}
    _ignore(theirs, "beside the transformer", "first_stage_model.", "cond_stage_model.")
    with _fitting(path):
        block_size = arguments.pop("block_size")
        seq_len = block_size if seq_len is None else seq_len
        length = block_size - seq_len + 1 if condition_length is None else condition_length
        if length + seq_len - 1 > block_size:  # the last token is not read
            raise ValueError(f"{length} + {seq_len} tokens, but their block holds {block_size}")
        arguments |= {"seq_len": seq_len, "condition_length": length, "dropout": 0.0}
        model = GPT(**arguments, condition_vocabulary=arguments["num_embeddings"])
        positions = theirs["transformer.pos_emb"]
        if positions.shape != (1, block_size, arguments["n_embd"]):
            raise ValueError(f"transformer.pos_emb has the shape {tuple(positions.shape)}")
        # Rows of positions that are not read, where the block is larger than it had to be, go.
        theirs["transformer.pos_emb"] = positions[0, : len(model.position_table)]
        codes = theirs["transformer.tok_emb.weight"].float()
        theirs["condition"] = torch.cat([codes, torch.zeros_like(codes[:1])])
        _load(model, theirs, _their_transformer_names(model))
    return model.eval()


def _innermost(config: dict, *keys: str) -> dict:
    """A part of their YAML, given the whole of it or any part that holds it."""
    for key in keys:
        config = config.get(key, config)
    return config


def _arguments(config: dict, names: dict[str, str], only_values: dict) -> dict:
    """Our constructor arguments, of a config that says nothing else which we could not follow."""
    missing = names.keys() - config.keys()
    if missing:
        raise InputError(f"the config lacks {', '.join(sorted(missing))}: give that of the model")
    for key in config.keys() - names.keys() - set(NO_EFFECT):
        if key not in only_values or only_values[key] != config[key]:
            only = only_values.get(key, "not given")
            raise InputError(f"{key} = {config[key]!r} is another network: here it is {only}")
    return {ours: config[theirs] for theirs, ours in names.items()}


def _ignore(weights: dict, what: str, *prefixes: str) -> None:
    """Take out the weights that belong to something else, and say so."""
    beside = [name for name in weights if name.startswith(prefixes)]
    for name in beside:
        del weights[name]
    if beside:
        modules = sorted({name.split(".")[0] for name in beside})
        print(f"ignored {len(beside)} weights {what}: {', '.join(modules)}")


@contextmanager
def _fitting(path: str | Path) -> Iterator[None]:
    """A network that cannot be built, or has other weights than the file, is the config's fault."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} does not fit its config ({reason}): give its own") from error


def _load(model: nn.Module, theirs: dict, names: dict[str, list[str]]) -> None:
    """Load weights strictly: each of ours is laid together from some of theirs; none is left."""
    state = model.state_dict()
    for ours, parts in names.items():
        state[ours] = torch.cat([theirs.pop(name).float() for name in parts])
    if theirs:
        raise KeyError(f"{min(theirs)} is not of this network")
    model.load_state_dict(state)


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
    """Their names of a level's residual blocks, each with its attention if the level has any."""
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
    """The same of our decoder's, from its input; they count levels from the image's end."""
    yield from ("post_quant_conv", "decoder.conv_in")
    yield from (f"decoder.mid.{name}" for name in ("block_1", "attn_1", "block_2"))
    for level in reversed(range(model.num_downsamples + 1)):
        yield from _levels(model, "decoder.up", level, model.num_residual_blocks + 1)
        if level > 0:
            yield f"decoder.up.{level}.upsample"
    yield from ("decoder.norm_out", "swish", "decoder.conv_out")


def _their_transformer_names(model: GPT) -> dict[str, list[str]]:
    """For each of our weights, what they call it, or the parts it is laid together from."""
    renamed = {
        "attention.proj": "attn.proj", "norm1": "ln1", "norm2": "ln2", "norm.": "ln_f.",
        "code_table": "tok_emb", "position_table": "pos_emb",
    }  # fmt: skip
    names = {}
    for our_name in model.state_dict():
        if our_name == "condition_table.weight":
            names[our_name] = ["condition"]  # made of the table of codes
            continue
        name = f"transformer.{our_name}"
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        parts = ("query", "key", "value") if "attention.qkv" in name else ("",)
        names[our_name] = [name.replace("attention.qkv", f"attn.{part}") for part in parts]
    return names


# --- reading -----------------------------------------------------------------------------------


class Placeholder(list):
    """Stands for an object of a foreign class in a checkpoint: takes everything, does nothing.

    A list, since torch appends to nothing else; hashable, since it may be a dictionary's key.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]

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
        raise InputError(f"{path} is no checkpoint, or damaged: download it again") from error
    if isinstance(content, dict) and MODEL_KEYS <= content.keys():
        raise InputError(f"{path} is a checkpoint of this package: leave the config out")
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} has no weights (a state_dict of tensors): name a checkpoint")
    return weights


def _load_with_placeholders(path: str | Path) -> dict:
    """Load with a `Placeholder` in the place of every foreign class that the file names."""
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
