"""Where and in which precision a network computes: the device, bfloat16, channels last."""

import platform
import shutil
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import nn

from vqgan.errors import InputError

Model = TypeVar("Model", bound=nn.Module)
# What the processor can do; versions of torch that cannot be asked compute in float32.
CAPABILITIES: dict = getattr(torch.cpu, "get_capabilities", dict)()


def choose_device(name: str) -> torch.device:
    """ "auto" takes CUDA, then Apple's MPS, then the CPU; any other name is taken as it is."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)  # fails where the machine has no such device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # whose random state is saved, and precision asked for
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError(f"device={name}: {reason}; give auto, cpu, cuda or mps") from error
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32 for the matrix multiplications of a network (weights stay float32).

    "auto" takes bf16 where the hardware computes in it: CUDA since Ampere (older cards emulate it,
    slowly, so emulation does not count), and CPUs with AMX or AVX512-BF16 instructions.
    """
    if name == "bf16":
        return torch.bfloat16
    if name == "auto" and device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
    if name == "auto" and device.type == "cpu":
        if CAPABILITIES.get("amx_bf16") or CAPABILITIES.get("avx512_bf16"):
            return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Matrix multiplications and convolutions in `dtype`; nothing changes for float32."""
    enabled = dtype == torch.bfloat16
    return torch.autocast(device_type=device.type, dtype=torch.bfloat16, enabled=enabled)


def has_fused_optimizers(device: torch.device) -> bool:
    """Whether torch updates all weights in one kernel there, which is faster."""
    return device.type in ("cpu", "cuda")


def prepare_model(model: Model, device: torch.device, *, compile: bool) -> Model:
    """Move to the device, channels last (the layout that convolutions are fastest in)."""
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise InputError("compile needs a C++ compiler on a CPU: install one, or leave it out")
    if compile:
        model.compile()  # in place: the names in the state dict stay
    return model


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """For metrics.json: what computed this."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = CAPABILITIES.get("cpu_name") or platform.processor() or platform.machine()
        name = f"{name}, threads: {torch.get_num_threads()}"
    return f"{device.type} ({name}), {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
