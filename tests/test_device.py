import shutil

import pytest
import torch
from torch import nn

from vqgan.device import (
    autocast,
    choose_device,
    choose_precision,
    describe_device,
    has_fused_optimizers,
    prepare_model,
)
from vqgan.errors import InputError

CPU = torch.device("cpu")


def test_auto_device_is_one_that_computes():
    assert torch.ones(2, device=choose_device("auto")).sum().item() == 2
    for bad in ("tpu-v9", "cuda:77"):
        with pytest.raises(InputError, match=f"device={bad}.*auto, cpu, cuda or mps"):
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
    monkeypatch.setattr("vqgan.device.CAPABILITIES", capabilities)
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
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32


def test_where_optimizers_are_said_to_be_fused_they_are():
    assert has_fused_optimizers(CPU) and has_fused_optimizers(torch.device("cuda"))
    assert not has_fused_optimizers(torch.device("mps"))
    weight = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    weight.sum().backward()
    optimizer.step()
    assert torch.allclose(weight, torch.tensor(-0.1))


def test_a_prepared_model_is_channels_last_with_the_same_names_and_weights():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert prepare_model(model, CPU, compile=False) is model
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_compile_without_a_compiler_is_refused_on_a_cpu(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="compile.*compiler"):
        prepare_model(nn.Linear(2, 2), CPU, compile=True)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/c++")
    model = prepare_model(nn.Linear(2, 2), CPU, compile=True)
    assert compiled == [model]


def test_the_description_says_device_threads_and_precision():
    text = describe_device(CPU, torch.bfloat16)
    assert text.startswith("cpu (") and f"threads: {torch.get_num_threads()}" in text
    assert text.endswith("bf16") and describe_device(CPU, torch.float32).endswith("fp32")
