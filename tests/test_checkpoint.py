import hashlib
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from vqgan.checkpoint import (
    all_model_args,
    fingerprint,
    is_float,
    load_checkpoint,
    random_state,
    restore,
    save_checkpoint,
    save_model,
    set_random_state,
)
from vqgan.data import TrainLoader
from vqgan.errors import InputError
from vqgan.transformer import GPT
from vqgan.vae import VAE, SpatialVAE
from vqgan.vqgan import VQGAN
from vqgan.vqvae import VQVAE


class Tiny(nn.Sequential):
    """A small network with dropout, so that a step draws random numbers."""

    def __init__(self, width: int, dropout: float = 0.5):
        super().__init__(
            nn.Flatten(), nn.Linear(12, width), nn.Dropout(dropout), nn.Linear(width, 12)
        )


def make_run():
    """A network and its surroundings."""
    torch.manual_seed(1)
    model = Tiny(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images = torch.randint(0, 256, (20, 3, 2, 2), dtype=torch.uint8)
    return model, optimizer, TrainLoader(images, 6, seed=4)


def train_steps(model, optimizer, batches, steps):
    while steps:
        for x in batches:
            loss = (model(x) - x.flatten(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps -= 1
            if not steps:
                return


def save(path, model, optimizer, batches, step=0, **more):
    save_checkpoint(
        path, model=model, model_args={"width": 8}, optimizers={"adam": optimizer},
        batches=batches, step=step, seconds=1.5, **more,
    )  # fmt: skip


# --- a run goes on -----------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, stop):
    model, optimizer, batches = make_run()
    train_steps(model, optimizer, batches, stop)
    save(tmp_path / "c.pt", model, optimizer, batches, step=stop)
    train_steps(model, optimizer, batches, 5)

    other, other_optimizer, other_batches = make_run()
    torch.manual_seed(77)
    state = load_checkpoint(tmp_path / "c.pt", model_class=Tiny, model_args={"width": 8})
    restore(state, model=other, optimizers={"adam": other_optimizer}, batches=other_batches)
    train_steps(other, other_optimizer, other_batches, 5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_companions_are_saved_and_restored(tmp_path):
    model, optimizer, batches = make_run()
    companion, other = nn.Linear(2, 2), nn.Linear(2, 2)
    extra_state = {"discriminator": companion}
    save(tmp_path / "c.pt", model, optimizer, batches, extra_state=extra_state)
    state = load_checkpoint(tmp_path / "c.pt")
    parts = {"model": model, "optimizers": {"adam": optimizer}, "batches": batches}
    restore(state, **parts, extra_state={"discriminator": other})
    assert torch.equal(other.weight, companion.weight)
    with pytest.raises(InputError, match="does not fit"):
        restore(state, **parts, extra_state={"generator": other})
    with torch.no_grad():
        companion.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="weight is not finite"):
        save(tmp_path / "c.pt", model, optimizer, batches, extra_state=extra_state)


def test_the_random_state_is_put_back():
    state = random_state()
    drawn = torch.rand(3)
    set_random_state(state)
    assert torch.equal(torch.rand(3), drawn)
    if not torch.cuda.is_available():  # what belongs to a device that is not here is left out
        set_random_state(state | {"cuda": torch.zeros(16, dtype=torch.uint8)})
        assert torch.equal(torch.rand(3), drawn)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model, optimizer, batches = make_run()
    save(tmp_path / "c.pt", model, optimizer, batches)
    good = (tmp_path / "c.pt").read_bytes()
    model[1].weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match="1.weight is not finite after step 9.*diverged"):
        save(tmp_path / "c.pt", model, optimizer, batches, step=9)
    assert (tmp_path / "c.pt").read_bytes() == good


def test_another_thread_count_is_warned_of(tmp_path, capsys):
    model, optimizer, batches = make_run()
    save(tmp_path / "c.pt", model, optimizer, batches)
    state = load_checkpoint(tmp_path / "c.pt")
    parts = {"model": model, "optimizers": {"adam": optimizer}, "batches": batches}
    restore(state, **parts)
    assert capsys.readouterr().out == ""
    state["threads"] += 1
    restore(state, **parts)
    assert "threads" in capsys.readouterr().out


# --- what a file holds -------------------------------------------------------------------------


def is_plain(value):
    """Tensors, numbers, strings, lists and dicts of such."""
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(inner) for inner in value)
    return value is None or isinstance(value, torch.Tensor | int | float | str | bool)


def test_a_checkpoint_is_plain_data(tmp_path):
    """Loaded with weights_only=True, by plain torch."""
    model, optimizer, batches = make_run()
    train_steps(model, optimizer, batches, 2)
    save(tmp_path / "c.pt", model, optimizer, batches, step=2)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert is_plain(state)
    assert state["step"] == 2 and state["model"] == "Tiny" and state["code_version"]


SOME_ARGUMENTS = {
    VAE: {"num_hiddens": 8},
    SpatialVAE: {"num_hiddens": 8, "latent_channels": 4},
    VQVAE: {"num_hiddens": 8, "num_embeddings": 16},
    VQGAN: {"channels": 8, "num_embeddings": 16},
    GPT: {
        "num_embeddings": 16,
        "seq_len": 64,
        "condition_vocabulary": 2,
        "condition_length": 1,
        "n_head": 1,
        "n_embd": 8,
    },
}
ANY_MODEL = pytest.mark.parametrize("kind", SOME_ARGUMENTS, ids=lambda kind: kind.__name__)


def save_untrained(path, kind, metadata=None):
    model = kind(**SOME_ARGUMENTS[kind])
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    save_checkpoint(
        path, model=model, model_args=SOME_ARGUMENTS[kind], optimizers={},
        batches=TrainLoader(images, 2), step=0, seconds=0.0, metadata=metadata,
    )  # fmt: skip
    return model


@ANY_MODEL
def test_a_checkpoint_holds_every_argument_with_the_defaults_written_out(tmp_path, kind):
    save_untrained(tmp_path / "c.pt", kind)
    save_model(tmp_path / "m.pt", load_checkpoint(tmp_path / "c.pt"))
    parameters = inspect.signature(kind).parameters
    for name in ("c.pt", "m.pt"):
        written = torch.load(tmp_path / name, weights_only=True)["model_args"]
        assert written.keys() == parameters.keys() and is_plain(written)
        for argument, value in written.items():
            default = parameters[argument].default
            assert value == SOME_ARGUMENTS[kind].get(argument, default)


def test_a_default_that_changes_later_does_not_change_an_old_model(tmp_path, monkeypatch):
    save_untrained(tmp_path / "c.pt", VQVAE)
    assert VQVAE.__init__.__defaults__[:4] == (32, 128, 32, 2)
    later = (32, 128, 32, 3, *VQVAE.__init__.__defaults__[4:])  # residual layers
    monkeypatch.setattr(VQVAE.__init__, "__defaults__", later)
    state = load_checkpoint(tmp_path / "c.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        VQVAE(**SOME_ARGUMENTS[VQVAE]).load_state_dict(state["weights"])
    VQVAE(**state["model_args"]).load_state_dict(state["weights"])


def test_arguments_that_a_constructor_does_not_have_are_a_fault():
    assert all_model_args(Tiny, {"width": 3}) == {"width": 3, "dropout": 0.5}
    with pytest.raises(TypeError, match="depth"):
        all_model_args(Tiny, {"width": 3, "depth": 1})
    with pytest.raises(TypeError, match="width"):
        all_model_args(Tiny, {})


@ANY_MODEL
def test_a_run_goes_on_with_the_arguments_that_it_began_with(tmp_path, kind):
    """However many of them are spelled out."""
    save_untrained(tmp_path / "c.pt", kind)
    given = SOME_ARGUMENTS[kind]
    for model_args in (given, all_model_args(kind, given)):
        load_checkpoint(tmp_path / "c.pt", model_class=kind, model_args=model_args)
    for name, value in all_model_args(kind, given).items():
        if type(value) is int:
            with pytest.raises(InputError, match=f"{name} = {value}.*{name} = {value + 1}"):
                model_args = given | {name: value + 1}
                load_checkpoint(tmp_path / "c.pt", model_class=kind, model_args=model_args)


def test_a_model_is_saved_without_what_only_its_training_needs(tmp_path):
    model, optimizer, batches = make_run()
    train_steps(model, optimizer, batches, 2)
    metadata = {"data": "shapes", "condition": {"names": ["a", "b"]}}
    extra_state = {"d": nn.Linear(2, 2)}
    save(
        tmp_path / "c.pt", model, optimizer, batches, 2, extra_state=extra_state, metadata=metadata
    )
    save_model(tmp_path / "m.pt", load_checkpoint(tmp_path / "c.pt"))
    state = load_checkpoint(tmp_path / "m.pt")
    kept = {"model", "model_args", "weights", "metadata", "step", "seconds", "code_version"}
    assert set(state) == kept
    assert state["model"] == "Tiny" and state["model_args"] == {"width": 8, "dropout": 0.5}
    assert state["metadata"] == metadata
    for name, weight in model.state_dict().items():
        assert torch.equal(state["weights"][name], weight)


def test_half_precision_halves_the_file_and_rounds_the_weights(tmp_path):
    model = nn.BatchNorm1d(20_000)  # with a count of batches, which is no float
    nn.init.normal_(model.weight)
    model.num_batches_tracked += 70_001  # more than half precision could hold
    state = {"model": "BatchNorm1d", "model_args": {}, "weights": model.state_dict()}
    save_model(tmp_path / "whole.pt", state)
    save_model(tmp_path / "half.pt", state, half=True)
    sizes = [(tmp_path / name).stat().st_size for name in ("half.pt", "whole.pt")]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.02)
    model.load_state_dict(load_checkpoint(tmp_path / "half.pt")["weights"])
    whole = load_checkpoint(tmp_path / "whole.pt")["weights"]
    assert model.num_batches_tracked == 70_001
    assert not torch.equal(model.weight, whole["weight"])
    assert torch.allclose(model.weight, whole["weight"], rtol=2**-11, atol=1e-7)


def test_what_is_a_float():
    assert is_float(torch.zeros(1)) and is_float(torch.zeros(1, dtype=torch.bfloat16))
    assert not any(map(is_float, (torch.zeros(1, dtype=torch.int64), {"a": 1}, 1.0)))


# --- files that are refused --------------------------------------------------------------------


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was-run",))

    for name, write in (
        ("a.pt", torch.save),
        ("b.pt", lambda o, p: p.write_bytes(pickle.dumps(o))),
    ):
        write({"weights": Evil(), "model_args": {}}, tmp_path / name)
        with pytest.raises(InputError, match=f"{name} .*code.* not run"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "was-run").exists()


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path):
    model, optimizer, batches = make_run()
    path = tmp_path / "c.pt"
    save(path, model, optimizer, batches)
    with pytest.raises(InputError, match="c.pt is of Tiny.*VQVAE.*another folder"):
        load_checkpoint(path, model_class=VQVAE, model_args={})
    with pytest.raises(InputError, match="width = 8.*width = 9"):
        load_checkpoint(path, model_class=Tiny, model_args={"width": 9})

    whole = path.read_bytes()
    for size in (0, 1000, 5000, len(whole) // 2, len(whole) - 10):  # torch raises other types
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="c.pt .*damaged"):
            load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match="c.pt is not a checkpoint of this package: try another"):
        load_checkpoint(path, remedy="try another")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "gone.pt")


def test_an_argument_newer_than_the_checkpoint_had_its_default(tmp_path):
    model, optimizer, batches = make_run()
    path = tmp_path / "c.pt"
    save(path, model, optimizer, batches)
    content = torch.load(path, weights_only=True)
    del content["model_args"]["dropout"]
    torch.save(content, path)
    load_checkpoint(path, model_class=Tiny, model_args={"width": 8, "dropout": 0.5})
    with pytest.raises(InputError, match="dropout = 0.1"):
        load_checkpoint(path, model_class=Tiny, model_args={"width": 8, "dropout": 0.1})


def test_a_run_does_not_go_on_from_a_model_alone(tmp_path):
    model, optimizer, batches = make_run()
    save(tmp_path / "c.pt", model, optimizer, batches)
    save_model(tmp_path / "c.pt", load_checkpoint(tmp_path / "c.pt"))
    assert load_checkpoint(tmp_path / "c.pt")["model"] == "Tiny"
    with pytest.raises(InputError, match="c.pt is not a checkpoint of this package"):
        load_checkpoint(tmp_path / "c.pt", model_class=Tiny, model_args={"width": 8})


def test_weights_of_another_network_are_refused(tmp_path):
    model, optimizer, batches = make_run()
    save(tmp_path / "c.pt", model, optimizer, batches)
    state = load_checkpoint(tmp_path / "c.pt")
    with pytest.raises(InputError, match="does not fit.*1.weight") as error:
        restore(state, model=Tiny(9), optimizers={"adam": optimizer}, batches=batches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "parts",
    [
        {"optimizers": {"adam": None}}, {"optimizers": {"adam": {"state": 1}}}, {"extra_state": {}},
        {"batches": {}}, {"batches": {"num_images": 20, "position": "x", "epoch_start": 1}},
        {"random": {}}, {"random": {"cpu": torch.zeros(3, dtype=torch.uint8)}},
        {"random": {"cpu": "x"}}, {"weights": {"a": 1}},
        {"batches": {"num_images": 20, "position": -1}},
    ],
)  # fmt: skip
def test_a_run_whose_other_parts_are_odd_is_named(tmp_path, parts):
    model, optimizer, batches = make_run()
    save(tmp_path / "c.pt", model, optimizer, batches)
    whole = load_checkpoint(tmp_path / "c.pt")
    if "position" in parts.get("batches", {}):
        parts = {"batches": whole["batches"] | parts["batches"]}
    state = whole | parts
    extra = {"more": Tiny(8)} if "extra_state" in parts else None
    before = torch.get_rng_state()
    with pytest.raises(InputError, match="does not fit this run") as error:
        restore(
            state, model=model, optimizers={"adam": optimizer}, batches=batches, extra_state=extra
        )
    assert "\n" not in str(error.value) and torch.equal(torch.get_rng_state(), before)


def test_an_optimizer_of_another_model_is_named_and_crashes_nothing(tmp_path):
    model, optimizer, batches = make_run()
    model(torch.rand(2, 12)).sum().backward()
    optimizer.step()
    save(tmp_path / "c.pt", model, optimizer, batches)
    state = load_checkpoint(tmp_path / "c.pt")
    state["optimizers"]["adam"]["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(InputError, match="adam is of another model"):
        restore(state, model=model, optimizers={"adam": optimizer}, batches=batches)


# --- fingerprints ------------------------------------------------------------------------------


def test_the_same_weights_have_one_fingerprint_whichever_file_they_come_from(tmp_path):
    model = save_untrained(tmp_path / "a.pt", VQVAE)
    save_model(tmp_path / "b.pt", load_checkpoint(tmp_path / "a.pt"))
    expected = fingerprint(model)
    assert len(expected) == 64 and int(expected, 16) > 0
    for name in ("a.pt", "b.pt"):
        state = load_checkpoint(tmp_path / name)
        loaded = VQVAE(**state["model_args"])
        loaded.load_state_dict(state["weights"])
        assert fingerprint(loaded) == expected
    assert fingerprint(model.to(memory_format=torch.channels_last)) == expected


def test_a_fingerprint_is_of_the_weights_alone():
    """A pipeline records its tokenizer's, which may not change with what else is saved."""
    model = VQVAE(**SOME_ARGUMENTS[VQVAE])
    digest = hashlib.sha256()
    for name in sorted(model.state_dict().keys() - {"quantizer._extra_state"}):
        digest.update(name.encode() + model.state_dict()[name].numpy().tobytes())
    assert fingerprint(model) == digest.hexdigest()
    model.quantizer.initialized = not model.quantizer.initialized
    assert fingerprint(model) == digest.hexdigest()


@pytest.mark.parametrize("part", ["encoder", "quantizer", "decoder"])
def test_one_changed_weight_changes_the_fingerprint(part):
    model = VQVAE(**SOME_ARGUMENTS[VQVAE])
    before = fingerprint(model)
    tensors = [t for t in getattr(model, part).state_dict().values() if t.is_floating_point()]
    weight = tensors[-1].view(-1)  # of the model itself, no copy
    weight[-1] += 1
    assert fingerprint(model) != before
    weight[-1] -= 1


def test_weights_under_another_name_have_another_fingerprint():
    layer = nn.Linear(2, 2)
    a, b = (nn.ModuleDict({name: layer}) for name in ("encoder", "decoder"))
    assert fingerprint(a) != fingerprint(b)
