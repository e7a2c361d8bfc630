import argparse
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from vqgan import training
from vqgan.checkpoint import load_checkpoint, restore, save_checkpoint, save_model, write_atomically
from vqgan.data import Batches
from vqgan.device import choose_device, choose_precision
from vqgan.errors import InputError
from vqgan.training import Log, ModelEMA, read_log

CPU = torch.device("cpu")


# --- device and precision ----------------------------------------------------------------------


def test_auto_device_is_one_that_computes():
    assert torch.ones(2, device=choose_device("auto")).sum().item() == 2
    for bad in ("tpu-v9", "cuda:77"):
        with pytest.raises(InputError, match=bad):
            choose_device(bad)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_precision_on_a_cpu_follows_its_instructions(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_precision("auto", CPU) == dtype
    assert choose_precision("fp32", CPU) == torch.float32
    assert choose_precision("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize("real", [True, False])
def test_auto_precision_on_cuda_asks_for_real_support(monkeypatch, real):
    def is_bf16_supported(including_emulation=True):
        return including_emulation or real

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    expected = torch.bfloat16 if real else torch.float32
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_autocast_computes_in_the_precision_asked_for():
    a = torch.randn(4, 4)
    with training.autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with training.autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32


# --- checkpoints -------------------------------------------------------------------------------


def make_run():
    """A small network with dropout, so that a step draws random numbers, and its surroundings."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images = torch.randint(0, 256, (20, 3, 2, 2), dtype=torch.uint8)
    return model, optimizer, Batches(images, 6, seed=4)


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


def save(path, model, optimizer, batches, step=0):
    save_checkpoint(
        path, model=model, arguments={"width": 8}, optimizers={"adam": optimizer},
        batches=batches, step=step, seconds=1.5,
    )  # fmt: skip


def test_companions_are_saved_and_restored(tmp_path):
    model, optimizer, batches = make_run()
    companion = nn.Linear(2, 2)
    save_checkpoint(
        tmp_path / "c.pt", model=model, arguments={}, optimizers={"adam": optimizer},
        batches=batches, step=0, seconds=0.0, companions={"discriminator": companion},
    )  # fmt: skip
    other = nn.Linear(2, 2)
    state = load_checkpoint(tmp_path / "c.pt")
    parts = {"model": model, "optimizers": {"adam": optimizer}, "batches": batches}
    restore(state, **parts, companions={"discriminator": other})
    assert torch.equal(other.weight, companion.weight)
    with pytest.raises(InputError, match="does not fit"):
        restore(state, **parts, companions={"generator": other})
    with torch.no_grad():
        companion.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="weight is not finite"):
        save_checkpoint(
            tmp_path / "c.pt", model=model, arguments={}, optimizers={"adam": optimizer},
            batches=batches, step=0, seconds=0.0, companions={"discriminator": companion},
        )  # fmt: skip


def test_average_of_weights_by_hand():
    """Buffers too; early steps weigh little; the model is left alone."""
    model = nn.BatchNorm1d(1)
    average = ModelEMA(model, decay=0.9)
    weight, mean = 1.0, 0.0
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.fill_(step)
            model.running_mean.fill_(-step)
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        weight = decay * weight + (1 - decay) * step
        mean = decay * mean - (1 - decay) * step
    # In float32, whose roundings add up to a few times 1e-7 over the steps.
    assert average.model.weight.item() == pytest.approx(weight, rel=1e-5)
    assert average.model.running_mean.item() == pytest.approx(mean, rel=1e-5)
    assert model.weight.item() == 199 and not average.model.training
    assert not average.model.weight.requires_grad and model.weight.requires_grad


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, stop):
    model, optimizer, batches = make_run()
    train_steps(model, optimizer, batches, stop)
    save(tmp_path / "c.pt", model, optimizer, batches, step=stop)
    train_steps(model, optimizer, batches, 5)

    other, other_optimizer, other_batches = make_run()
    torch.manual_seed(77)
    state = load_checkpoint(tmp_path / "c.pt", model="Sequential", arguments={"width": 8})
    restore(state, model=other, optimizers={"adam": other_optimizer}, batches=other_batches)
    train_steps(other, other_optimizer, other_batches, 5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_is_plain_data(tmp_path):
    """Tensors, numbers, strings, lists and dicts: loaded with weights_only=True, by plain torch."""
    model, optimizer, batches = make_run()
    train_steps(model, optimizer, batches, 2)
    save(tmp_path / "c.pt", model, optimizer, batches, step=2)

    def check(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                assert isinstance(key, (str, int))
                check(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                check(inner)
        else:
            assert value is None or isinstance(value, (torch.Tensor, int, float, str, bool))

    state = torch.load(tmp_path / "c.pt", weights_only=True)
    check(state)
    assert state["step"] == 2 and state["model"] == "Sequential" and state["code_version"]


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was-run",))

    for name, write in (
        ("a.pt", torch.save),
        ("b.pt", lambda o, p: p.write_bytes(pickle.dumps(o))),
    ):
        write({"weights": Evil(), "arguments": {}}, tmp_path / name)
        with pytest.raises(InputError, match=f"{name} .* carries code, which was not run"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "was-run").exists()


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path):
    model, optimizer, batches = make_run()
    path = tmp_path / "c.pt"
    save(path, model, optimizer, batches)
    with pytest.raises(InputError, match="VQVAE.*other --out|another --out"):
        load_checkpoint(path, model="VQVAE", arguments={"width": 8})
    with pytest.raises(InputError, match="width=8.*width=9"):
        load_checkpoint(path, model="Sequential", arguments={"width": 9})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="c.pt"):
        load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match="not a checkpoint of this package"):
        load_checkpoint(path)


def test_a_model_is_saved_without_what_only_its_training_needs(tmp_path):
    model, optimizer, batches = make_run()
    train_steps(model, optimizer, batches, 2)
    about = {"data": "shapes", "condition": {"names": ["a", "b"]}}
    save_checkpoint(
        tmp_path / "c.pt", model=model, arguments={"width": 8}, optimizers={"adam": optimizer},
        batches=batches, step=2, seconds=1.5, companions={"d": nn.Linear(2, 2)}, about=about,
    )  # fmt: skip
    save_model(tmp_path / "m.pt", load_checkpoint(tmp_path / "c.pt"))
    state = load_checkpoint(tmp_path / "m.pt")
    kept = {"model", "arguments", "weights", "about", "step", "seconds", "code_version"}
    assert set(state) == kept
    assert state["model"] == "Sequential" and state["arguments"] == {"width": 8}
    assert state["about"] == about
    for name, weight in model.state_dict().items():
        assert torch.equal(state["weights"][name], weight)


def test_a_run_does_not_go_on_from_a_model_alone(tmp_path):
    model, optimizer, batches = make_run()
    save(tmp_path / "c.pt", model, optimizer, batches)
    save_model(tmp_path / "c.pt", load_checkpoint(tmp_path / "c.pt"))
    assert load_checkpoint(tmp_path / "c.pt")["arguments"] == {"width": 8}
    with pytest.raises(InputError, match="c.pt is not a checkpoint of this package"):
        load_checkpoint(tmp_path / "c.pt", model="Sequential", arguments={"width": 8})


def test_half_precision_halves_the_file_and_rounds_the_weights(tmp_path):
    model = nn.BatchNorm1d(20_000)  # with a count of batches, which is no float
    nn.init.normal_(model.weight)
    model.num_batches_tracked += 70_001  # more than half precision could hold
    state = {"model": "BatchNorm1d", "arguments": {}, "weights": model.state_dict()}
    save_model(tmp_path / "whole.pt", state)
    save_model(tmp_path / "half.pt", state, half=True)
    sizes = [(tmp_path / name).stat().st_size for name in ("half.pt", "whole.pt")]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.02)
    model.load_state_dict(load_checkpoint(tmp_path / "half.pt")["weights"])
    whole = load_checkpoint(tmp_path / "whole.pt")["weights"]
    assert model.num_batches_tracked == 70_001
    assert not torch.equal(model.weight, whole["weight"])
    assert torch.allclose(model.weight, whole["weight"], rtol=2**-11, atol=1e-7)


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model, optimizer, batches = make_run()
    save(tmp_path / "c.pt", model, optimizer, batches)
    good = (tmp_path / "c.pt").read_bytes()
    model[1].weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match="1.weight is not finite after step 9"):
        save(tmp_path / "c.pt", model, optimizer, batches, step=9)
    assert (tmp_path / "c.pt").read_bytes() == good


def test_another_thread_count_is_warned_of(tmp_path, capsys):
    model, optimizer, batches = make_run()
    save(tmp_path / "c.pt", model, optimizer, batches)
    state = load_checkpoint(tmp_path / "c.pt")
    state["threads"] += 1
    restore(state, model=model, optimizers={"adam": optimizer}, batches=batches)
    assert "threads" in capsys.readouterr().out


# --- log ---------------------------------------------------------------------------------------


def fill(log, steps):
    for step in steps:
        log.record(step, {"loss": torch.tensor(float(step)), "kl": torch.tensor(2.0)})
        if step % 2 == 0:
            log.write_row(epoch=step / 10)


def test_rows_average_the_steps_between_them(tmp_path):
    fill(Log(tmp_path / "log.csv", resume_at=0), range(1, 5))
    assert read_log(tmp_path / "log.csv") == [
        {"step": 2, "epoch": 0.2, "loss": 1.5, "kl": 2.0},
        {"step": 4, "epoch": 0.4, "loss": 3.5, "kl": 2.0},
    ]


@pytest.mark.parametrize("torn", ["", "10,1.0,9.5,2", "10,1.0"])
def test_rows_past_the_checkpoint_are_cut(tmp_path, torn):
    """A log that was killed, also in the middle of a row, and resumed is the uninterrupted one."""
    fill(Log(tmp_path / "whole.csv", resume_at=0), range(1, 13))
    fill(Log(tmp_path / "killed.csv", resume_at=0), range(1, 9))
    with open(tmp_path / "killed.csv", "a") as file:
        file.write(torn)
    fill(Log(tmp_path / "killed.csv", resume_at=6), range(7, 13))
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path, bad):
    log = Log(tmp_path / "log.csv", resume_at=0)
    fill(log, range(1, 7))
    log.record(7, {"loss": torch.tensor(1.0), "kl": torch.tensor(1.0)})
    log.record(8, {"loss": torch.tensor(bad), "kl": torch.tensor(bad)})  # the sum is bad too
    with pytest.raises(InputError, match="'kl' is (nan|inf) at step 8"):
        log.write_row(epoch=1.0)
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [2, 4, 6]


# --- command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (training.positive_int, "3", ["0", "-1", "1.5", "x"]),
        (training.positive_float, "1e-3", ["0", "-1", "nan", "inf"]),
        (training.seed_int, "0", ["-1", "1.5", "x", str(2**63)]),
        (training.non_negative_float, "0", ["-1", "nan", "inf"]),
    ],
)
def test_numbers_out_of_range_are_refused(kind, good, bad):
    assert kind(good) == float(good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="was expected, not"):
            kind(text)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (InputError("no such data"), "error: no such data"),
        (OSError(28, "No space left on device"), "No space left"),
        (KeyboardInterrupt(), "--resume"),
    ],
)
def test_a_users_mistake_ends_a_script_with_one_line(error, shown):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        training.run_script(main)
    assert shown in stopped.value.code and "\n" not in stopped.value.code


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        training.run_script(lambda: 1 / 0)


# Each module may import those before it, and no other.
ORDER = "errors shapes figures data metrics training classifier perceptual discriminator quantizer "
ORDER += "vae vqvae vqgan conditions transformer compvis loading __main__"


def test_every_import_runs_one_way():
    package, before = Path(training.__file__).parent, {"__init__"}
    for name in ORDER.split():
        source = (package / f"{name}.py").read_text()
        imported = set(re.findall(r"^\s*(?:from|import) vqgan\.(\w+)", source, re.MULTILINE))
        for names in re.findall(r"^\s*from vqgan import (.+)$", source, re.MULTILINE):
            imported |= set(names.split(", "))
        assert imported <= before, name
        before.add(name)
    assert before == {path.stem for path in package.glob("*.py")}


def test_figures_and_metrics_know_no_model():
    models = {"vae", "vqvae", "vqgan", "classifier", "discriminator", "perceptual", "quantizer"}
    models |= {"transformer", "conditions"}
    for name in ("figures", "metrics", "training"):
        source = (Path(training.__file__).parent / f"{name}.py").read_text()
        assert not models & set(re.findall(r"vqgan\.(\w+) import", source)), name


def test_the_transformer_and_its_conditions_know_no_pictures_of_ours():
    for name in ("transformer", "conditions"):
        source = (Path(training.__file__).parent / f"{name}.py").read_text()
        assert re.findall(r"(?:from|import) vqgan\b.*", source) == [
            "from vqgan.errors import InputError"
        ]
