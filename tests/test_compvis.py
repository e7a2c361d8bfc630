import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch

from vqgan.compvis import (
    Placeholder,
    _their_names,
    load_compvis_transformer,
    load_compvis_vqgan,
    read_config,
    read_weights,
)
from vqgan.errors import InputError
from vqgan.vqgan import VQGAN

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "compvis_vqgan_tiny.ckpt"


@pytest.fixture(scope="module")
def reference():
    """Configuration, input and what the authors' code put out; see tests/data/README.md."""
    return torch.load(DATA / "compvis_vqgan_tiny_io.pt", weights_only=True)


def test_same_latents_indices_and_images_as_the_authors_code(reference):
    model = load_compvis_vqgan(CHECKPOINT, reference["config"])
    with torch.no_grad():
        z_e = model.encoder(reference["x"])
        reconstruction, indices, _ = model(reference["x"])
    assert not model.training
    assert torch.allclose(z_e, reference["z"], atol=1e-4)
    assert torch.equal(indices, reference["indices"])
    assert torch.allclose(reconstruction, reference["reconstruction"], atol=1e-4)


def test_the_config_may_be_nested_as_in_their_yaml(reference):
    flat = reference["config"]
    outer = {"embed_dim": flat["embed_dim"], "n_embed": flat["n_embed"]}
    inner = {k: v for k, v in flat.items() if k not in outer}
    outer["lossconfig"] = {"target": "a class of theirs"}
    params = {"ddconfig": inner} | outer
    for config in (params, {"model": {"base_learning_rate": 4.5e-6, "params": params}}):
        model = load_compvis_vqgan(CHECKPOINT, config)
    assert model.quantizer.num_embeddings == 32


DEEPER = {
    "double_z": False, "z_channels": 8, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 2, 2], "num_res_blocks": 2, "attn_resolutions": [32, 8, 7], "dropout": 0.0,
    "embed_dim": 4, "n_embed": 16,
}  # fmt: skip


def authors_state(**changes):
    """A network of another depth with two attention resolutions, under their names."""
    model = VQGAN(
        resolution=64, channels=32, channel_multipliers=(1, 1, 2, 2), num_residual_blocks=2,
        attention_resolutions=(32, 8), latent_channels=8, embedding_dim=4, num_embeddings=16,
        quantizer="gradient", norm_groups=32,
    )  # fmt: skip
    ours = model.state_dict()
    theirs = OrderedDict((name, ours[our_name]) for our_name, name in _their_names(model).items())
    return model.eval(), OrderedDict(theirs | changes)


def test_their_names_of_another_depth():
    """Spelled out where they are easily got wrong."""
    _, theirs = authors_state()
    for name in (
        "encoder.down.1.attn.1.q.weight",  # side 32 is level 1, after each of two blocks
        "encoder.down.3.attn.0.norm.bias",
        "encoder.down.2.block.0.nin_shortcut.weight",
        "encoder.down.2.downsample.conv.weight",
        "decoder.up.3.block.2.conv2.weight",  # one more block a level than the encoder
        "decoder.up.1.attn.2.proj_out.bias",
        "decoder.up.1.upsample.conv.bias",
        "decoder.up.1.block.0.nin_shortcut.weight",  # from level 2's 64 channels to 32
        "quantize.embedding.weight",
        "post_quant_conv.weight",
    ):
        assert name in theirs, name
    for name in ("encoder.down.3.downsample.conv.weight", "decoder.up.0.upsample.conv.weight"):
        assert name not in theirs
    assert not any(".down.0.attn" in name or ".up.2.attn" in name for name in theirs)


def test_another_depth_loads_and_gives_the_same_images(tmp_path):
    model, theirs = authors_state()
    torch.save({"state_dict": theirs, "epoch": 3}, tmp_path / "deep.ckpt")
    loaded = load_compvis_vqgan(tmp_path / "deep.ckpt", DEEPER)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x).reconstruction, model(x).reconstruction)
    torch.save(theirs, tmp_path / "bare.ckpt")  # a state dict without the wrapper
    assert torch.equal(
        load_compvis_vqgan(tmp_path / "bare.ckpt", DEEPER)(x).reconstruction,
        model(x).reconstruction,
    )


def test_weights_of_the_loss_are_named_and_ignored(tmp_path, capsys):
    _, theirs = authors_state(**{"loss.discriminator.main.0.weight": torch.zeros(2)})
    torch.save({"state_dict": theirs}, tmp_path / "c.ckpt")
    load_compvis_vqgan(tmp_path / "c.ckpt", DEEPER)
    assert "ignored 1 weights of the training loss: loss" in capsys.readouterr().out


class Callback:
    """What a Lightning checkpoint carries beside its weights; loading it must not touch it."""

    def __init__(self):
        self.best = torch.zeros(2)

    def __setstate__(self, state):
        raise AssertionError("code of the checkpoint was run")

    def __reduce__(self):
        return Callback.rebuild, (), {"best": self.best}

    @staticmethod
    def rebuild():
        raise AssertionError("code of the checkpoint was run")


class Names(list):
    """A list of a foreign class."""


class Settings(dict):
    """A dictionary of a foreign class, as Lightning keeps hyperparameters in."""


def test_objects_of_foreign_classes_are_not_run_nor_imported(tmp_path, monkeypatch):
    """Their module is gone, as it is on a machine without Lightning."""
    model, theirs = authors_state()
    foreign = type(sys)("foreign_lightning")
    for kind in (Callback, Names, Settings):
        monkeypatch.setattr(kind, "__module__", "foreign_lightning")
        setattr(foreign, kind.__name__, kind)
    rebuild = Callback.rebuild
    monkeypatch.setattr(rebuild, "__module__", "foreign_lightning")
    monkeypatch.setattr(rebuild, "__qualname__", "rebuild")
    foreign.rebuild = rebuild
    monkeypatch.setitem(sys.modules, "foreign_lightning", foreign)
    wrapper = {
        "state_dict": theirs,
        "callbacks": {Callback: {"best_model": Callback()}, "names": Names(["a", "b"])},
        "hyper_parameters": Settings(lr=1.0, nested=Settings(width=3)),
        "counts": defaultdict(list, a=[1]),
        "optimizer_states": [{"state": {}}],
        "pytorch-lightning_version": "1.0.8",
    }
    torch.save(wrapper, tmp_path / "c.ckpt")
    allowed = torch.serialization.get_safe_globals()
    monkeypatch.delitem(sys.modules, "foreign_lightning")
    with pytest.raises(Exception, match="foreign_lightning"):
        torch.load(tmp_path / "c.ckpt", weights_only=True)
    loaded = load_compvis_vqgan(tmp_path / "c.ckpt", DEEPER)
    assert torch.equal(loaded.encoder[0].weight, model.encoder[0].weight)
    assert "foreign_lightning" not in sys.modules
    assert torch.serialization.get_safe_globals() == allowed  # nothing is left behind


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("encoder.mid.attn_1.q.weight"), "encoder.mid.attn_1.q"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra"),
        (
            lambda state: state.update({"quant_conv.bias": torch.zeros(5)}),
            r"encoder.\d+.bias.*\[5\].*\[4\]",
        ),
    ],
)
def test_weights_match_strictly(tmp_path, change, expected):
    _, theirs = authors_state()
    change(theirs)
    torch.save({"state_dict": theirs}, tmp_path / "c.ckpt")
    with pytest.raises(InputError, match=f"c.ckpt does not fit its config.*{expected}"):
        load_compvis_vqgan(tmp_path / "c.ckpt", DEEPER)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"double_z": True}, "double_z = True"),
        ({"in_channels": 1}, "in_channels = 1"),
        ({"use_linear_attn": True}, "use_linear_attn"),
        ({"ch": 36}, "36 channels"),
        ({"embed_dim": None}, "lacks embed_dim"),
        ({"resolution": "64"}, "does not fit its config"),
        ({"ch_mult": 2}, "does not fit its config"),
        ({"ch_mult": []}, "does not fit its config"),
        ({"ch": -8}, "does not fit its config"),
        ({"ch": 10**30}, "does not fit its config"),
        ({"embed_dim": 0}, "does not fit its config"),
        ({"n_embed": 2 * 10**7}, "does not fit its config"),
        ({"num_res_blocks": 10**9}, "does not fit its config"),
    ],
)
def test_a_config_of_another_network_is_named(change, expected):
    config = {k: v for k, v in (DEEPER | change).items() if v is not None}
    with pytest.raises(InputError, match=expected):
        load_compvis_vqgan(CHECKPOINT, config)


@pytest.mark.parametrize("config", [{"model": "x"}, {"ddconfig": [1]}, {"model": {"params": 1}}])
def test_a_config_of_odd_types_is_named(config):
    with pytest.raises(InputError, match="config"):
        load_compvis_vqgan(CHECKPOINT, config)


@pytest.mark.parametrize("text", ["{", "[1]", 100_000 * "[", b"\xff\xfe"])
def test_a_config_file_that_cannot_be_read_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match="config.json cannot be read as a config"):
        read_config(path)


def test_a_file_that_answers_torchs_errors_ends(tmp_path):
    """Its global of a blocked module bears the names by which a refused class is recognized."""
    torch.save({}, tmp_path / "a.ckpt")
    names = "<class 'vqgan.compvis.evil.Cls'><class 'vqgan.compvis.PlaceholderDict'>"
    evil = b"\x80\x02cevil\nCls\n0cos\n" + names.encode() + b"\n."
    with zipfile.ZipFile(tmp_path / "a.ckpt") as old:
        with zipfile.ZipFile(tmp_path / "evil.ckpt", "w") as new:
            for member in old.infolist():
                is_pickle = member.filename.endswith("data.pkl")
                new.writestr(member.filename, evil if is_pickle else old.read(member))
    with pytest.raises(InputError, match="evil.ckpt"):
        read_weights(tmp_path / "evil.ckpt")


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(InputError, match="text.ckpt is no checkpoint"):
        read_weights(tmp_path / "text.ckpt")
    torch.save({"state_dict": {"a": Placeholder}}, tmp_path / "class.ckpt")
    with pytest.raises(InputError, match="no weights"):
        read_weights(tmp_path / "class.ckpt")
    for odd in ({"state_dict": "x"}, {"state_dict": {1: torch.zeros(1)}}, {"state_dict": []}):
        torch.save(odd, tmp_path / "odd.ckpt")
        with pytest.raises(InputError, match="no weights"):
            read_weights(tmp_path / "odd.ckpt")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "gone.ckpt")


# --- the transformer ---------------------------------------------------------------------------

TRANSFORMER = DATA / "compvis_transformer_tiny.ckpt"


@pytest.fixture(scope="module")
def written():
    """Configuration, tokens (2, 20) and the logits (2, 20, 32) of the authors' code."""
    return torch.load(DATA / "compvis_transformer_tiny_io.pt", weights_only=True)


@pytest.mark.parametrize(("seq_len", "C"), [(None, 1), (20, 1), (12, 9)])
def test_same_logits_as_the_authors_transformer(written, seq_len, C):
    """The first C of their tokens are the condition, and the codes start behind them."""
    model = load_compvis_transformer(TRANSFORMER, written["config"], seq_len)
    tokens = written["tokens"]
    codes = torch.cat([tokens[:, C:], torch.zeros_like(tokens[:, :1])], dim=1)  # one is not read
    with torch.no_grad():
        logits = model(tokens[:, :C], codes)
    assert not model.training
    assert model.seq_len == (seq_len or 20) and model.condition_length == C
    assert torch.allclose(logits, written["logits"][:, C - 1 :], atol=1e-4)


def test_their_conditions_are_ids_of_their_codes_and_nothing_is_zero(written):
    model = load_compvis_transformer(TRANSFORMER, written["config"])
    assert torch.equal(model.cond_emb.weight[:32], model.tok_emb.weight)
    assert (model.cond_emb.weight[model.null_token] == 0).all()


def test_the_transformers_config_may_be_nested_as_in_their_yaml(written):
    flat = written["config"] | {"embd_pdrop": 0.1, "n_unmasked": 0}
    params = {"transformer_config": {"target": "a class of theirs", "params": flat}}
    params["first_stage_config"] = {"params": {"n_embed": 1024}}
    expected = load_compvis_transformer(TRANSFORMER, flat).state_dict()
    for config in (params, {"model": {"base_learning_rate": 4.5e-6, "params": params}}):
        loaded = load_compvis_transformer(TRANSFORMER, config).state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_condition_may_be_shorter_than_the_block_allows(written):
    model = load_compvis_transformer(TRANSFORMER, written["config"], 12, condition_length=5)
    condition, indices = written["tokens"][:, :5], written["tokens"][:, 5:17]
    with torch.no_grad():
        logits = model(condition, indices)
    assert torch.allclose(logits, written["logits"][:, 4:16], atol=1e-4)
    for length in (0, 10):
        with pytest.raises(InputError, match=f"does not fit.*{length}"):
            load_compvis_transformer(TRANSFORMER, written["config"], 12, length)


@pytest.mark.parametrize(
    ("change", "seq_len", "expected"),
    [
        ({"block_size": None, "n_head": None}, None, "lacks block_size, n_head"),
        ({"n_embd": 32.0}, None, "does not fit"),
        ({"n_layer": True}, None, "does not fit.*transformer.blocks.1"),
        ({"n_unmasked": 9}, None, "n_unmasked = 9.* is 0"),
        ({"rotary": True}, None, "rotary = True.* not given"),
        ({"n_head": 5}, None, "does not fit.*n_head=5.*n_embd=32"),
        ({}, 21, "does not fit.*condition_length"),
        ({"n_layer": 3}, None, "does not fit.*transformer.blocks.2"),
        ({"n_layer": 1}, None, "does not fit.*transformer.blocks.1"),
        ({"vocab_size": 31}, None, r"does not fit.*\[33, 32\].*\[32, 32\]"),
        ({"block_size": 21}, None, r"does not fit.*pos_emb.*\(1, 20, 32\)"),
    ],
)
def test_a_config_of_another_transformer_is_named(written, change, seq_len, expected):
    config = {k: v for k, v in (written["config"] | change).items() if v is not None}
    with pytest.raises(InputError, match=expected):
        load_compvis_transformer(TRANSFORMER, config, seq_len)


def test_weights_beside_the_transformer_are_named_and_ignored(written, tmp_path, capsys):
    weights = read_weights(TRANSFORMER)
    expected = load_compvis_transformer(TRANSFORMER, written["config"]).state_dict()
    assert "ignored" not in capsys.readouterr().out
    for name in ("first_stage_model.encoder.a", "first_stage_model.b", "cond_stage_model.a"):
        weights[name] = torch.zeros(2)
    torch.save({"state_dict": weights}, tmp_path / "c.ckpt")
    loaded = load_compvis_transformer(tmp_path / "c.ckpt", written["config"]).state_dict()
    line = "ignored 3 weights outside the transformer: cond_stage_model, first_stage_model\n"
    assert capsys.readouterr().out == line
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    weights["permuter.forward_shuffle_idx"] = torch.arange(20)  # their codes in another order
    torch.save({"state_dict": weights}, tmp_path / "c.ckpt")
    with pytest.raises(InputError, match="does not fit.*permuter.forward_shuffle_idx"):
        load_compvis_transformer(tmp_path / "c.ckpt", written["config"])


@pytest.mark.parametrize(
    "name", ["transformer.blocks.1.attn.value.weight", "transformer.blocks.0.mlp.0.bias"]
)
def test_the_transformers_weights_match_strictly(written, tmp_path, name):
    weights = read_weights(TRANSFORMER)
    del weights[name]
    torch.save({"state_dict": weights}, tmp_path / "c.ckpt")
    with pytest.raises(InputError, match=f"c.ckpt does not fit.*{name}"):
        load_compvis_transformer(tmp_path / "c.ckpt", written["config"])
    weights[name] = torch.zeros(3)
    torch.save({"state_dict": weights}, tmp_path / "c.ckpt")
    with pytest.raises(InputError, match="c.ckpt does not fit") as caught:
        load_compvis_transformer(tmp_path / "c.ckpt", written["config"])
    assert "\n" not in str(caught.value)
