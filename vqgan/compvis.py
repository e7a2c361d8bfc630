"""Reads the checkpoints that the paper's authors published (CompVis/taming-transformers).

Their VQGAN and that of `vqgan.py` are the same function; only the names of the weights differ.
Theirs say where a layer is ("encoder.down.1.block.0.conv1"); here the encoder is one sequence of
layers ("encoder.4.conv1"), so the two are matched by walking through both in order.

Their transformer and that of `transformer.py` are the same function too. Theirs embeds condition
and image tokens with one table, here there are two: both are copies of theirs, with the same ids.

Their files are Lightning checkpoints, some of which hold objects of foreign classes as well. They
are nevertheless read with `weights_only=True`: every foreign class is replaced by one that does
nothing, so no code in the file is run and nothing foreign is imported.
"""

import importlib
import json
import reprlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from vqgan.checkpoint import MODEL_KEYS, build_on_meta, load_weights
from vqgan.errors import InputError, file_input
from vqgan.files import load_plain, load_tensors
from vqgan.transformer import GPT
from vqgan.vqgan import VQGAN

# The keys of their YAML (model.params.ddconfig, and embed_dim and n_embed next to it), and the
# names of the arguments here. Other keys must have the only value that published networks have.
VQGAN_ARGUMENTS = {
    "resolution": "resolution", "ch": "channels", "ch_mult": "channel_multipliers",
    "num_res_blocks": "num_residual_blocks", "attn_resolutions": "attention_resolutions",
    "z_channels": "latent_channels", "embed_dim": "embedding_dim", "n_embed": "num_embeddings",
}  # fmt: skip
VQGAN_ONLY_VALUES = {"double_z": False, "in_channels": 3, "out_ch": 3, "resamp_with_conv": True}
# The same for the transformer (model.params.transformer_config.params). In their code, the first
# `n_unmasked` positions see each other.
GPT_ARGUMENTS = {
    "vocab_size": "num_embeddings", "block_size": "block_size",
    "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
}  # fmt: skip
GPT_ONLY_VALUES = {"n_unmasked": 0}
# These keys have no effect in eval mode.
NO_EFFECT = ("dropout", "give_pre_end", "embd_pdrop", "resid_pdrop", "attn_pdrop")


def load_compvis_vqgan(path: str | Path, config: dict) -> VQGAN:
    """Their checkpoint as a VQGAN in eval mode, with the same latents, indices and images.

    Args:
        config: their YAML as a dictionary, or only its `ddconfig` with `embed_dim` and `n_embed`,
            flat or nested as in the YAML.

    Raises:
        InputError: the file cannot be read, or does not have exactly the weights of this network
            (weights of the training loss are ignored, with a message).
    """
    theirs = read_weights(path)
    _ignore(theirs, "of the training loss", "loss.")
    with file_input(f"{path} does not fit its config", ": give its own"):
        config = _innermost(config, "model", "params")
        if "ddconfig" in config:  # next to it their YAML describes more than the network
            outer = {key: config[key] for key in ("embed_dim", "n_embed") if key in config}
            config = config["ddconfig"] | outer
        model_args = _arguments(config, VQGAN_ARGUMENTS, VQGAN_ONLY_VALUES)
        levels = range(len(model_args["channel_multipliers"]))
        resolutions = {model_args["resolution"] // 2**level for level in levels}
        # Resolutions that never occur have no effect in their code.
        model_args["attention_resolutions"] = resolutions & {*model_args["attention_resolutions"]}
        model_args |= {"quantizer": "gradient", "norm_groups": 32}  # as published
        model = build_on_meta(VQGAN, model_args, theirs, path)
        _load(model, theirs, {ours: [name] for ours, name in _their_names(model).items()})
    return model.eval()


def load_compvis_transformer(
    path: str | Path, config: dict, seq_len: int | None = None, condition_length: int | None = None
) -> GPT:
    """Their checkpoint as a transformer in eval mode, with the same logits.

    A condition consists of ids of their one table: codes, the label of a class, or a start token.
    The row of `null_token` is zero, because they trained none.

    Args:
        config: their YAML as a dictionary, or only the parameters of its `transformer_config`,
            flat or nested as in the YAML.
        seq_len: tokens per image; the rest of their block is the condition, of
            block_size - seq_len + 1 tokens. None is block_size, after a condition of one token.
        condition_length: a shorter condition, if their block is larger than necessary (their faces
            have 512 positions for 256 + 256 tokens, of which the last is not read).

    Raises:
        InputError: the file cannot be read, does not have exactly the weights of this network
            (weights of the autoencoders are ignored, with a message), or its block is too small.
    """
    theirs = {k: w for k, w in read_weights(path).items() if not k.endswith(".attn.mask")}
    _ignore(theirs, "outside the transformer", "first_stage_model.", "cond_stage_model.")
    with file_input(f"{path} does not fit its config", ": give its own"):
        config = _innermost(config, "model", "params", "transformer_config", "params")
        model_args = _arguments(config, GPT_ARGUMENTS, GPT_ONLY_VALUES)
        block_size = model_args.pop("block_size")
        seq_len = block_size if seq_len is None else seq_len
        length = block_size - seq_len + 1 if condition_length is None else condition_length
        if length + seq_len - 1 > block_size:  # the last token is not read
            raise ValueError(f"{length} + {seq_len} tokens exceed their block of {block_size}")
        model_args |= {"seq_len": seq_len, "condition_length": length, "dropout": 0.0}
        model_args["condition_vocabulary"] = model_args["num_embeddings"]
        model = build_on_meta(GPT, model_args, theirs, path)
        positions = theirs["transformer.pos_emb"]
        if positions.shape != (1, block_size, model_args["n_embd"]):
            raise ValueError(f"transformer.pos_emb has the shape {tuple(positions.shape)}")
        # The last positions of a block that is larger than necessary are not read, and dropped.
        theirs["transformer.pos_emb"] = positions[0, : len(model.pos_emb)]
        embeddings = theirs["transformer.tok_emb.weight"].float()
        theirs["condition"] = torch.cat([embeddings, torch.zeros_like(embeddings[:1])])
        _load(model, theirs, _their_transformer_names(model))
    return model.eval()


def read_config(path: str | Path) -> dict:
    """Read a file with their config. Raises InputError unless it is YAML or JSON of an object."""
    is_yaml = Path(path).suffix in (".yaml", ".yml")
    advice = ": YAML needs the extra 'yaml'" if is_yaml else ""
    with file_input(f"{path} cannot be read as a config in JSON or YAML", advice):
        parse = importlib.import_module("yaml").safe_load if is_yaml else json.loads
        config = parse(Path(path).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"an object {{...}} was expected, not {reprlib.repr(config):.60}")
    return config


def _innermost(config: dict, *keys: str) -> dict:
    """The part of their YAML at the end of `keys`, given the whole or any part that holds it."""
    for key in keys:
        config = config[key] if isinstance(config.get(key), dict) else config
    return config


def _arguments(config: dict, names: dict[str, str], only_values: dict) -> dict:
    """Our constructor arguments from their config, which must not ask for anything else."""
    missing = names.keys() - config.keys()
    if missing:
        raise InputError(f"the config lacks {', '.join(sorted(missing))}: give the model's own")
    for key in config.keys() - names.keys() - set(NO_EFFECT):
        if key not in only_values or only_values[key] != config[key]:
            only = only_values.get(key, "not given")
            raise InputError(f"{key} = {config[key]!r} is not supported: here it is {only}")
    return {ours: config[theirs] for theirs, ours in names.items()}


def _ignore(weights: dict, what: str, *prefixes: str) -> None:
    """Remove the weights that belong to something else, and print their modules."""
    ignored = [name for name in weights if name.startswith(prefixes)]
    for name in ignored:
        del weights[name]
    if ignored:
        modules = sorted({name.split(".")[0] for name in ignored})
        print(f"ignored {len(ignored)} weights {what}: {', '.join(modules)}")


def _load(model: nn.Module, theirs: dict, names: dict[str, list[str]]) -> None:
    """Load weights strictly: ours are concatenations of theirs, and none of theirs is left."""
    state = {our: torch.cat([theirs.pop(n).float() for n in parts]) for our, parts in names.items()}
    if theirs:
        raise KeyError(f"{min(theirs)} is not a weight of this network")
    load_weights(model, state)


# --- names -------------------------------------------------------------------------------------


def _their_names(model: VQGAN) -> dict[str, str]:
    """Their name for each of our weights."""
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
    """Their names for a level's residual blocks, each with its attention if the level has any."""
    for block in range(num_blocks):
        yield f"{part}.{level}.block.{block}"
        if model.resolution // 2**level in model.attention_resolutions:
            yield f"{part}.{level}.attn.{block}"


def _encoder_layers(model: VQGAN) -> Iterator[str]:
    """Their names for our encoder's layers, in order; any name will do for the swish."""
    last = model.num_downsamples
    yield "encoder.conv_in"
    for level in range(last + 1):
        yield from _levels(model, "encoder.down", level, model.num_residual_blocks)
        if level < last:
            yield f"encoder.down.{level}.downsample"
    yield from (f"encoder.mid.{name}" for name in ("block_1", "attn_1", "block_2"))
    yield from ("encoder.norm_out", "swish", "encoder.conv_out", "quant_conv")


def _decoder_layers(model: VQGAN) -> Iterator[str]:
    """Their names for our decoder's layers, in order; they count levels from the image inwards."""
    yield from ("post_quant_conv", "decoder.conv_in")
    yield from (f"decoder.mid.{name}" for name in ("block_1", "attn_1", "block_2"))
    for level in reversed(range(model.num_downsamples + 1)):
        yield from _levels(model, "decoder.up", level, model.num_residual_blocks + 1)
        if level > 0:
            yield f"decoder.up.{level}.upsample"
    yield from ("decoder.norm_out", "swish", "decoder.conv_out")


def _their_transformer_names(model: GPT) -> dict[str, list[str]]:
    """Their name for each of our weights, or their names for the parts to concatenate."""
    renamed = {"attention.proj": "attn.proj", "norm1": "ln1", "norm2": "ln2", "norm.": "ln_f."}
    names = {}
    for our_name in model.state_dict():
        if our_name == "cond_emb.weight":
            names[our_name] = ["condition"]  # built from their token embeddings
            continue
        name = f"transformer.{our_name}"
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        parts = ("query", "key", "value") if "attention.qkv" in name else ("",)
        names[our_name] = [name.replace("attention.qkv", f"attn.{part}") for part in parts]
    return names


# --- reading -----------------------------------------------------------------------------------


class Placeholder(list):
    """Stands in for an object of a foreign class: accepts everything and does nothing.

    It is a list, because torch appends to nothing else, and hashable, to be a dictionary's key.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        pass


class PlaceholderDict:
    """Stands in for a foreign kind of dictionary, because torch sets items of plain ones only."""

    def __new__(cls, *args):
        return OrderedDict()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a Lightning checkpoint (or a bare one), read without running its code.

    Raises:
        InputError: the file is not a checkpoint, or holds no tensors.
    """
    content = load_plain(path, remedy="download it again", load=_load_with_placeholders)
    if isinstance(content, dict) and MODEL_KEYS <= content.keys():
        raise InputError(f"{path} is a checkpoint of this package: leave the config out")
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    weights = weights if isinstance(weights, dict) else {}
    named = (isinstance(n, str) and isinstance(w, Tensor) for n, w in weights.items())
    if not weights or not all(named):
        raise InputError(f"{path} has no weights (a state_dict of tensors): name a checkpoint")
    return weights


def _load_with_placeholders(path: str | Path) -> dict:
    """Load with a `Placeholder` in place of every foreign class that the file names."""
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins = {name: type(name, (Placeholder,), {}) for name in foreign}
    for _ in range(len(foreign) + 1):  # a round for each class that turns out to be a dictionary
        try:
            with torch.serialization.safe_globals([(cls, name) for name, cls in stand_ins.items()]):
                return load_tensors(path)
        except UnpicklingError as error:
            # Which classes are dictionaries shows when torch refuses to set their items.
            refused = [name for name, cls in stand_ins.items() if str(cls) in str(error)]
            stand_ins |= dict.fromkeys(refused, PlaceholderDict)
    raise ValueError("its classes cannot be replaced")
