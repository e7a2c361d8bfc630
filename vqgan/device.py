"""Where and how a network computes: device, precision, memory layout, compilation."""

import platform
import shutil
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import nn

from vqgan import distributed
from vqgan.errors import InputError

Model = TypeVar("Model", bound=nn.Module)
# What the CPU supports. Older versions of torch cannot tell, and then float32 is used.
CAPABILITIES: dict = getattr(torch.cpu, "get_capabilities", dict)()


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA if there is one, else Apple's MPS, else the CPU.

    With several processes, this waits for all of them, and each gets a GPU of its own.
    """
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        device = torch.device(name)
        if not distributed.is_launched():
            torch.zeros(1, device=device).item()  # fails where the machine has no such device
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # its random state is saved, and its precision queried
        return distributed.start(device)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError(f"device={name}: {reason}; give auto, cpu, cuda or mps") from error


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32 for the matrix multiplications of a network (weights stay float32).

    "auto" is bf16 if the hardware computes in it, namely CUDA since Ampere (older cards emulate it
    slowly, so emulation does not count) and CPUs with AMX or AVX512-BF16 instructions.
    """
    use_bf16 = name == "bf16"
    if name == "auto" and device.type == "cuda":
        use_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto" and device.type == "cpu":
        use_bf16 = bool(CAPABILITIES.get("amx_bf16") or CAPABILITIES.get("avx512_bf16"))
    return torch.bfloat16 if use_bf16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Run matrix multiplications and convolutions in `dtype`; float32 changes nothing."""
    enabled = dtype == torch.bfloat16
    return torch.autocast(device_type=device.type, dtype=torch.bfloat16, enabled=enabled)


def has_fused_optimizers(device: torch.device) -> bool:
    """Whether torch can update all weights in one kernel on this device, which is faster."""
    return device.type in ("cpu", "cuda")


def prepare_model(model: Model, device: torch.device, *, compile: bool) -> Model:
    """Move a model to the device, with channels last, the fastest layout for convolutions."""
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise InputError("compile needs a C++ compiler on a CPU: install one, or leave it out")
    if compile:
        model.compile()  # in place: the names in the state dict stay
    return model


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """The hardware and the precision, for metrics.json."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = CAPABILITIES.get("cpu_name") or platform.processor() or platform.machine()
        name = f"{name}, threads: {torch.get_num_threads()}"
    return f"{device.type} ({name}), {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
