"""Transformers with their tokenizers, from files."""

import json
import time
from pathlib import Path

import pytest
import torch

from vqgan import pretrained
from vqgan.checkpoint import fingerprint, save_checkpoint
from vqgan.conditions import class_condition
from vqgan.data import TrainLoader
from vqgan.errors import InputError
from vqgan.images import from_uint8
from vqgan.pretrained import (
    PRETRAINED,
    init_weights,
    load_model,
    load_pipeline,
    load_tokenizer,
    read_checkpoint,
)
from vqgan.transformer import GPT
from vqgan.vae import VAE, SpatialVAE
from vqgan.vqgan import VQGAN
from vqgan.vqvae import VQVAE

CONDITION = class_condition(("cat", "dog"))
ARGUMENTS = {
    VAE: {"image_size": 32, "num_hiddens": 8},
    SpatialVAE: {"num_hiddens": 8, "latent_channels": 4},
    VQVAE: {"num_hiddens": 8, "num_embeddings": 16},
    VQGAN: {"channels": 8, "num_embeddings": 16},
    GPT: {
        "num_embeddings": 16,
        "seq_len": 36,  # of 24 pixels
        "condition_vocabulary": 2,
        "condition_length": 1,
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 8,
    },
}
ABOUT = {"data": "textures", "image_size": 32, "command": "python train_vqvae.py --data textures"}


def save(path, kind, *, metadata=None, seed=0):
    """A checkpoint of a small model, untrained."""
    torch.manual_seed(seed)
    model = kind(**ARGUMENTS[kind])
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    save_checkpoint(
        path, model=model, model_args=ARGUMENTS[kind], optimizers={},
        batches=TrainLoader(images, 2), step=0, seconds=0.0, metadata=metadata,
    )  # fmt: skip
    return model.eval()


def save_pair(folder):
    """A transformer's run: its checkpoint, and its tokenizer beside it."""
    tokenizer = save(folder / "tokenizer.pt", VQVAE, metadata=ABOUT)
    metadata = ABOUT | {
        "image_size": 24,  # not the tokenizer's
        "condition": CONDITION.to_dict(),
        "condition_drop": 0.1,
        "tokenizer": "runs/vqvae/checkpoint.pt",
        "tokenizer_fingerprint": fingerprint(tokenizer),
    }
    return save(folder / "checkpoint.pt", GPT, metadata=metadata), tokenizer


def same_weights(a, b):
    a, b = ([*model.named_parameters(), *model.named_buffers()] for model in (a, b))
    return [name for name, _ in a] == [name for name, _ in b] and all(
        torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True)
    )


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [VAE, SpatialVAE, VQVAE, VQGAN])
def test_a_loaded_model_is_the_saved_one(tmp_path, kind, shape_images):
    model = save(tmp_path / "c.pt", kind)
    loaded = load_model(tmp_path / "c.pt")
    x = shape_images * 2 - 1
    assert torch.equal(loaded(x).reconstruction, model(x).reconstruction)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.image_size == 32


def test_checkpoints_of_something_else_are_named(tmp_path):
    save(tmp_path / "c.pt", VQVAE)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    torch.save(state | {"model": "Diffusion"}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="'Diffusion'.*VQGAN"):
        load_model(tmp_path / "other.pt")
    for model_args, expected in (
        ({"depth": 3}, "depth"),
        (state["model_args"] | {"num_downsamples": 0}, "num_downsamples"),
        (state["model_args"] | {"num_hiddens": 16}, "encoder.0.weight"),
    ):
        torch.save(state | {"model_args": model_args}, tmp_path / "other_args.pt")
        with pytest.raises(InputError, match=f"other_args.pt does not fit VQVAE.*{expected}"):
            load_model(tmp_path / "other_args.pt")


def change(path, edit):
    """Edit the content of a checkpoint."""
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_damaged_size_is_refused_before_the_model_is_built(tmp_path, kind):
    """Each whole number among the arguments, as large as a file may say; in no time or memory."""
    save(tmp_path / "whole.pt", kind)
    arguments = torch.load(tmp_path / "whole.pt", weights_only=True)["model_args"]
    numbers = {n: v for n, v in arguments.items() if isinstance(v, int) and v is not bool(v)}
    numbers |= {n: v for n, v in arguments.items() if isinstance(v, tuple | list)}
    assert len(numbers) >= 3
    for name, value in numbers.items():
        for number in (10**30, 2 * 10**7, 20_000):
            wrong = [number] * 3 if isinstance(value, tuple | list) else number
            if (name, number) in UNBOUNDED:
                continue
            content = torch.load(tmp_path / "whole.pt", weights_only=True)
            torch.save(content | {"model_args": arguments | {name: wrong}}, tmp_path / "c.pt")
            start = time.monotonic()
            with pytest.raises(InputError, match=rf"c.pt does not fit {kind.__name__}"):
                load_model(tmp_path / "c.pt")
            assert time.monotonic() - start < 20, name  # a second, even beside other work


# The networks are convolutional, and this side changes no weight.
UNBOUNDED = {("image_size", 20_000), ("resolution", 20_000)}


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_embeddings": 0}, {"embedding_dim": -1}, {"quantizer": 5}, {"beta": "x"}, {1: 2},
        {"image_size": 33}, {"unknown": 1}, {"num_hiddens": None}, {"num_downsamples": [1] * 999},
    ],
)  # fmt: skip
def test_arguments_that_make_no_model_are_named(tmp_path, arguments):
    save(tmp_path / "c.pt", VQVAE)
    change(tmp_path / "c.pt", lambda content: content["model_args"].update(arguments))
    with pytest.raises(InputError, match="c.pt does not fit VQVAE") as caught:
        load_model(tmp_path / "c.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, kind, bad):
    save(tmp_path / "c.pt", kind)
    name = []

    def damage(content):
        name.append(list(content["weights"])[-1])
        content["weights"][name[0]].flatten()[0] = bad

    change(tmp_path / "c.pt", damage)
    with pytest.raises(InputError, match="is not finite"):
        load_model(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "weights",
    [
        {"a": torch.zeros(1)}, {0: torch.zeros(1)}, {"quantizer.codebook": "x"}, {},
        {"quantizer.codebook": torch.zeros(1).expand(16, 65)},
        {"quantizer.codebook": torch.zeros(1).expand(16, 64)},  # of the right shape, and larger
    ],
)  # fmt: skip
def test_other_weights_are_named(tmp_path, weights):
    save(tmp_path / "c.pt", VQVAE)
    change(tmp_path / "c.pt", lambda content: content["weights"].update(weights or {}))
    if not weights:
        change(tmp_path / "c.pt", lambda content: content["weights"].clear())
    with pytest.raises(InputError, match="c.pt does not fit VQVAE"):
        load_model(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "parts",
    [
        {"model": ["VQVAE"]}, {"model": {}}, {"model": "Evil"}, {"model_args": None},
        {"weights": [1]}, {"metadata": [1]}, {"metadata": "x"}, {"step": "1"}, {"seconds": None},
        {"metadata": {"image_size": 0}}, {"metadata": {"image_size": -32}},
        {"metadata": {"image_size": "32"}}, {"metadata": {"image_size": 10**9}},
        {"metadata": {"image_size": 10**400}}, {"metadata": {"data": 1}},
        {"metadata": {"result": None}}, {"metadata": {"command": ["a"]}},
    ],
)  # fmt: skip
def test_parts_of_another_type_are_named(tmp_path, parts):
    save(tmp_path / "c.pt", VQVAE)
    change(tmp_path / "c.pt", lambda content: content.update(parts))
    with pytest.raises(InputError, match="c.pt") as caught:
        load_model(tmp_path / "c.pt")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_an_error_does_not_print_all_that_it_is_about(tmp_path):
    """Lists in lists, each ten times: a file of some bytes, and a text of gigabytes."""
    nested = ["x"]
    for _ in range(12):
        nested = [nested] * 10
    for parts in ({"step": nested}, {"model_args": {"beta": nested}}, {"metadata": nested}):
        save(tmp_path / "c.pt", VQVAE)
        change(tmp_path / "c.pt", lambda content, parts=parts: content.update(parts))
        with pytest.raises(InputError, match="c.pt") as caught:
            load_model(tmp_path / "c.pt")
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "metadata",
    [
        {"condition": None}, {"condition": {}}, {"condition": "class"},
        {"condition": CONDITION.to_dict() | {"kind": "evil"}},
        {"condition": CONDITION.to_dict() | {"names": [1, 2]}},
        {"condition": CONDITION.to_dict() | {"names": ["cat"]}},
        {"condition": CONDITION.to_dict() | {"names": None}},
        {"condition": CONDITION.to_dict() | {"length": 2}},
        {"condition": CONDITION.to_dict() | {"vocabulary": 3, "names": list("abc")}},
        {"condition": CONDITION.to_dict() | {"kind": "image", "transform": "evil"}},
        {"condition": CONDITION.to_dict() | {"unknown": 1}},
        {"image_size": 32}, {"image_size": 25}, {"condition_drop": "x"}, {"tokenizer": None},
        {"tokenizer_fingerprint": 5},
    ],
)  # fmt: skip
def test_a_transformers_metadata_is_checked(tmp_path, metadata):
    save_pair(tmp_path)
    change(tmp_path / "checkpoint.pt", lambda content: content["metadata"].update(metadata))
    with pytest.raises(InputError, match="checkpoint.pt") as caught:
        load_pipeline(tmp_path / "checkpoint.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "missing", ["condition", "condition_drop", "image_size", "tokenizer", "tokenizer_fingerprint"]
)
def test_a_transformer_without_its_metadata_is_named(tmp_path, missing):
    save_pair(tmp_path)
    change(tmp_path / "checkpoint.pt", lambda content: content["metadata"].pop(missing))
    with pytest.raises(InputError, match="checkpoint.pt"):
        load_pipeline(tmp_path / "checkpoint.pt")


def test_loading_draws_no_random_numbers(tmp_path):
    save(tmp_path / "c.pt", VQGAN)
    before = torch.get_rng_state()
    load_model(tmp_path / "c.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_is_searched_one_level_deep(tmp_path):
    save(tmp_path / "run" / "vqvae" / "checkpoint.pt", VQVAE)
    with pytest.raises(InputError, match="run is a folder.*vqvae.checkpoint.pt"):
        load_model(tmp_path / "run")
    with pytest.raises(InputError, match="name the checkpoint.pt of a run"):
        load_model(tmp_path)


# --- to train on -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_model_starts_from_the_weights_of_another(tmp_path, kind):
    source = save(tmp_path / "c.pt", kind)
    model = kind(**ARGUMENTS[kind])
    assert not same_weights(model, source)
    init_weights(model, tmp_path / "c.pt")
    assert same_weights(model, source) and all(p.requires_grad for p in model.parameters())


def test_a_model_starts_from_no_other_kind_or_size(tmp_path):
    save(tmp_path / "c.pt", VQVAE)
    model = VQVAE(**ARGUMENTS[VQVAE] | {"num_embeddings": 17})
    with pytest.raises(InputError, match="num_embeddings is 16, not 17"):
        init_weights(model, tmp_path / "c.pt")
    with pytest.raises(InputError, match="c.pt is a VQVAE"):
        init_weights(VAE(**ARGUMENTS[VAE]), tmp_path / "c.pt")
    same_shapes = (
        (GPT, {"n_head": 2}),
        (VQGAN, {"norm_groups": 4}),
        (VAE, {"likelihood": "fixed"}),
    )
    for kind, change in same_shapes:
        save(tmp_path / "c.pt", kind)
        with pytest.raises(InputError, match=f"{list(change)[0]} is .*, not "):
            init_weights(kind(**ARGUMENTS[kind] | change), tmp_path / "c.pt")


# --- pairs ---------------------------------------------------------------------------------------


def test_a_pair_is_the_transformer_and_the_tokenizer_beside_it(tmp_path):
    transformer, tokenizer = save_pair(tmp_path)
    pipeline = load_pipeline(tmp_path / "checkpoint.pt")
    assert same_weights(pipeline.transformer, transformer) and same_weights(
        pipeline.tokenizer, tokenizer
    )
    assert pipeline.condition == CONDITION and pipeline.tokenizer.image_size == 24
    for model in (pipeline.transformer, pipeline.tokenizer):
        assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_missing_tokenizer_is_refused_where_it_was_expected_and_where_it_came_from(tmp_path):
    save_pair(tmp_path)
    (tmp_path / "tokenizer.pt").unlink()
    with pytest.raises(InputError) as error:
        load_pipeline(tmp_path / "checkpoint.pt")
    for part in (str(tmp_path / "tokenizer.pt"), "runs/vqvae/checkpoint.pt"):
        assert part in str(error.value)


def test_a_tokenizer_is_taken_from_where_it_is_said_to_be(tmp_path):
    _, tokenizer = save_pair(tmp_path)
    (tmp_path / "tokenizer.pt").rename(tmp_path / "moved.pt")
    pipeline = load_pipeline(tmp_path / "checkpoint.pt", tokenizer=tmp_path / "moved.pt")
    assert same_weights(pipeline.tokenizer, tokenizer)
    save(tmp_path / "tokenizer.pt", VQVAE, seed=1)  # another one beside it is not looked at
    pipeline = load_pipeline(tmp_path / "checkpoint.pt", tokenizer=tmp_path / "moved.pt")
    assert same_weights(pipeline.tokenizer, tokenizer)


def test_another_tokenizer_is_refused(tmp_path):
    save_pair(tmp_path)
    save(tmp_path / "other.pt", VQVAE, seed=1)
    with pytest.raises(InputError, match="other.pt is not the tokenizer.*runs/vqvae/checkpoint.pt"):
        load_pipeline(tmp_path / "checkpoint.pt", tokenizer=tmp_path / "other.pt")
    (tmp_path / "other.pt").replace(tmp_path / "tokenizer.pt")
    with pytest.raises(InputError, match="tokenizer.pt is not the tokenizer"):
        load_pipeline(tmp_path / "checkpoint.pt")


def test_a_tokenizer_is_no_transformer(tmp_path):
    save_pair(tmp_path)
    with pytest.raises(InputError, match="of a VQVAE, not a transformer"):
        load_pipeline(tmp_path / "tokenizer.pt")


@pytest.mark.parametrize("kind", [VAE, SpatialVAE, GPT])
def test_a_model_without_codes_of_pictures_is_no_tokenizer(tmp_path, kind):
    save_pair(tmp_path)
    save(tmp_path / "c.pt", kind)
    with pytest.raises(InputError, match=f"of a {kind.__name__}, not a tokenizer"):
        load_tokenizer(tmp_path / "c.pt")
    with pytest.raises(InputError, match=f"of a {kind.__name__}, not a tokenizer"):
        load_pipeline(tmp_path / "checkpoint.pt", tokenizer=tmp_path / "c.pt")


# --- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [VQVAE, VQGAN])
def test_a_tokenizer_says_what_it_was_trained_on(tmp_path, kind):
    model = save(tmp_path / "c.pt", kind, metadata=ABOUT)
    (tmp_path / "config.json").write_text(json.dumps(ABOUT | {"data": "cifar10"}))  # not asked
    loaded, state = load_tokenizer(tmp_path / "c.pt")
    assert type(loaded) is kind and same_weights(loaded, model)
    assert state["metadata"] == ABOUT


# --- names ---------------------------------------------------------------------------------------


def test_a_name_is_the_model_that_comes_with_the_package_unless_a_file_has_it(
    tmp_path, monkeypatch
):
    packaged, tokenizer = save_pair(tmp_path / "package")
    monkeypatch.setattr(
        pretrained, "PRETRAINED", {"shapes": tmp_path / "package" / "checkpoint.pt"}
    )
    monkeypatch.chdir(tmp_path)
    pipeline = load_pipeline("shapes")
    assert same_weights(pipeline.transformer, packaged) and same_weights(
        pipeline.tokenizer, tokenizer
    )
    (tmp_path / "shapes").mkdir()  # a folder of images, say
    assert same_weights(load_model("shapes"), packaged)
    (tmp_path / "shapes").rmdir()
    own = save(tmp_path / "shapes", VQVAE)
    assert same_weights(load_model("shapes"), own)
    with pytest.raises(InputError, match="no checkpoint circles.*: shapes$"):
        load_model("circles")


# --- the pair that comes with the package --------------------------------------------------------


def test_the_shipped_pair_is_small_and_its_commands_stand_beside_what_they_wrote():
    results = Path(__file__).parents[1] / "docs" / "results"
    files = {"transformer": PRETRAINED["shapes"]}
    files["tokenizer"] = PRETRAINED["shapes"].with_name("tokenizer.pt")
    assert sum(file.stat().st_size for file in files.values()) <= 5e6
    for folder, file in files.items():
        script = " ".join((results / f"shapes-{folder}" / "run.sh").read_text().split())
        for command in read_checkpoint(file)["metadata"]["command"].split(" && "):
            assert command in script.replace("\\ ", "")


def test_the_shipped_pair_is_as_good_as_it_was_before_it_was_rounded(shapes):
    pipeline = load_pipeline("shapes")
    tokens = shapes.test_labels[:500, None]
    indices = pipeline.tokenizer.encode(from_uint8(shapes.test_images[:500])).indices
    loss = pipeline.transformer.loss(tokens, indices.flatten(1)).item()
    measured = read_checkpoint("shapes")["metadata"]["result"]["nats_per_token"]
    assert loss == pytest.approx(measured, abs=0.05)
    assert pipeline.condition.names == shapes.class_names
