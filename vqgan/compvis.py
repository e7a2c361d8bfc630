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
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from vqgan.errors import InputError
from vqgan.transformer import GPT
from vqgan.vqgan import VQGAN

# The keys of their YAML (model.params.ddconfig, and embed_dim and n_embed beside it) that say what
# the network is. The others must have the only value that the published networks have.
CONFIG_KEYS = ("resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels")
CONFIG_KEYS += ("embed_dim", "n_embed")
ONLY_VALUES = {"double_z": False, "in_channels": 3, "out_ch": 3, "resamp_with_conv": True}
NO_EFFECT = ("dropout", "give_pre_end")  # in eval mode

# The same of the transformer (model.params.transformer_config.params). `n_unmasked` places at the
# start would see each other.
TRANSFORMER_KEYS = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
TRANSFORMER_ONLY_VALUES = {"n_unmasked": 0}
TRANSFORMER_NO_EFFECT = ("embd_pdrop", "resid_pdrop", "attn_pdrop")


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
    names, ours = _their_names(model), model.state_dict()
    theirs, of_the_loss = _set_apart(read_weights(path), ("loss.",))
    _check_weights(path, theirs, {name: ours[our_name].shape for our_name, name in names.items()})
    if of_the_loss:
        modules = sorted({".".join(name.split(".")[:2]) for name in of_the_loss})
        print(f"ignored {len(of_the_loss)} weights of the training loss: {', '.join(modules)}")
    for our_name, their_name in names.items():
        ours[our_name] = theirs[their_name].float()
    model.load_state_dict(ours)
    model.quantizer.waits_for_data = False
    return model.eval()


def load_compvis_transformer(
    path: str | Path,
    config: dict,
    grid_size: tuple[int, int] | None = None,
    condition_length: int | None = None,
) -> GPT:
    """Their checkpoint as a transformer in eval mode: the same logits.

    A condition consists of ids of their one table: a code, the label of a class, a start token.
    Token `nothing` has a row of zeros, since they trained none.

    Args:
        config: their YAML as a dictionary, or of it only the parameters of `transformer_config`,
            flat or nested as there.
        grid_size: (h, w) of the codes; what their block holds beyond them is the condition, of
            block_size - h w + 1 tokens. None: (1, block_size), after a condition of one token.
        condition_length: fewer tokens than that, where a block is larger than it had to be (their
            faces have 512 places for 256 tokens and 256 codes, of which the last is not read).

    Raises:
        InputError: the file cannot be read, or does not have exactly the weights of this network
            (those of the autoencoders beside it are named and ignored), or the grid is too large.
    """
    model = GPT(**_transformer_arguments(config, grid_size, condition_length))
    names, ours = _their_transformer_names(model), model.state_dict()
    theirs, beside = _set_apart(read_weights(path), ("first_stage_model.", "cond_stage_model."))
    theirs = {name: w for name, w in theirs.items() if not name.endswith(".attn.mask")}
    shapes = {}
    for our_name, their_names in names.items():
        rows, *others = ours[our_name].shape
        shapes |= dict.fromkeys(their_names, (rows // len(their_names), *others))
    positions = "transformer.pos_emb"
    model_config = _innermost(config)
    shapes[positions] = (1, model_config["block_size"], model_config["n_embd"])
    _check_weights(path, theirs, shapes)
    if beside:
        modules = sorted({name.split(".")[0] for name in beside})
        print(f"ignored {len(beside)} weights beside the transformer: {', '.join(modules)}")
    # Rows of places that are not read, where the condition is shorter than the block allows, go.
    theirs[positions] = theirs[positions].squeeze(0)[: len(model.position_table)]
    for our_name, their_names in names.items():
        ours[our_name] = torch.cat([theirs[name].float() for name in their_names])
    tokens = ours["code_table.weight"]
    ours["condition_table.weight"] = torch.cat([tokens, torch.zeros_like(tokens[:1])])
    model.load_state_dict(ours)
    return model.eval()


def _set_apart(weights: dict, prefixes: tuple[str, ...]) -> tuple[dict, list[str]]:
    """The weights of the network, and the names of those that belong to something else."""
    apart = sorted(name for name in weights if name.startswith(prefixes))
    return {name: w for name, w in weights.items() if not name.startswith(prefixes)}, apart


def _check_weights(path: str | Path, theirs: dict, shapes: dict) -> None:
    """Raise InputError unless their weights have exactly these names and shapes."""
    advice = "give the config that belongs to this checkpoint"
    missing = sorted(shapes.keys() - theirs.keys())
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of the network's {len(shapes)} weights, {missing[0]} "
            f"among them: {advice}"
        )
    unknown = sorted(theirs.keys() - shapes.keys())
    if unknown:
        raise InputError(
            f"{path} has {len(unknown)} weights that this network has not, {unknown[0]} among "
            f"them: {advice}"
        )
    for name, shape in shapes.items():
        expected, given = tuple(shape), tuple(theirs[name].shape)
        if given != expected:
            raise InputError(
                f"{path}: {name} has the shape {given}, but the config makes it {expected}: "
                f"{advice}"
            )


# --- configs -----------------------------------------------------------------------------------


def _arguments(config: dict) -> dict:
    """Constructor arguments of `VQGAN` from their config."""
    for key in ("model", "params"):  # a whole YAML
        config = config.get(key, config)
    if "ddconfig" in config:  # beside it their YAML has more than the network: the loss, say
        outside = {key: config[key] for key in ("embed_dim", "n_embed") if key in config}
        config = config["ddconfig"] | outside
    where = "the ddconfig of the checkpoint's YAML, with embed_dim and n_embed"
    _check_config(config, where, CONFIG_KEYS, ONLY_VALUES, NO_EFFECT)
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


def _transformer_arguments(
    config: dict, grid_size: tuple[int, int] | None, condition_length: int | None
) -> dict:
    """Constructor arguments of `GPT` from their config."""
    config = _innermost(config)
    where = "the parameters of transformer_config in the checkpoint's YAML"
    only_values, no_effect = TRANSFORMER_ONLY_VALUES, TRANSFORMER_NO_EFFECT
    _check_config(config, where, TRANSFORMER_KEYS, only_values, no_effect)
    block_size, vocabulary = config["block_size"], config["vocab_size"]
    h, w = (1, block_size) if grid_size is None else grid_size
    if h * w > block_size:
        raise InputError(
            f"a grid of {h}x{w} codes was given, but the transformer's block holds {block_size}: "
            "give a smaller one"
        )
    most = block_size - h * w + 1  # the last code is not read
    if condition_length is not None and not 1 <= condition_length <= most:
        raise InputError(
            f"a condition of {condition_length} tokens was given, but beside {h}x{w} codes the "
            f"transformer's block holds 1 to {most}: give as many"
        )
    return {
        "num_embeddings": vocabulary,
        "grid_size": (h, w),
        "condition_vocabulary": vocabulary,
        "condition_length": condition_length or most,
        "n_layer": config["n_layer"],
        "n_head": config["n_head"],
        "n_embd": config["n_embd"],
        "dropout": 0.0,
    }


def _innermost(config: dict) -> dict:
    """The transformer's own parameters, of a whole YAML of theirs or a part of it."""
    for key in ("model", "params", "transformer_config", "params"):
        config = config.get(key, config)
    return config


def _check_config(
    config: dict, where: str, keys: tuple[str, ...], only_values: dict, no_effect: tuple[str, ...]
) -> None:
    """Raise InputError unless the config has these keys, and no others but those without effect."""
    missing = [key for key in keys if key not in config]
    if missing:
        raise InputError(f"the config lacks {', '.join(missing)}: give {where}")
    for key in keys:
        values = config[key] if key in ("ch_mult", "attn_resolutions") else [config[key]]
        if not isinstance(values, list | tuple) or not all(type(v) is int for v in values):
            wanted = "a whole number" if values == [config[key]] else "a list of whole numbers"
            raise InputError(f"the config has {key} = {config[key]!r}, but {wanted} was expected")
    for key, value in config.items():
        if key not in (*keys, *no_effect) and only_values.get(key, key) != value:
            wanted = f"{only_values[key]!r}" if key in only_values else "not given"
            raise InputError(
                f"the config has {key} = {value!r}, which would be another network: "
                f"this one's is {wanted}"
            )


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
            continue  # a copy of the table of codes
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
