"""Several processes that train one model together, each on its part of every batch.

    torchrun --standalone --nproc-per-node 4 train_vqgan.py ...

Each of the W processes has the whole model and takes a slice of the same shuffled batch. The loss
is a mean over the batch, so its gradient is the mean of the gradients of the slices:

    L = 1/W sum_r L_r        dL/dw = 1/W sum_r dL_r/dw

Whatever else is computed from a whole batch is summed or averaged over the processes, too:

    counts and sums of the EMA codebook, or W codebooks would drift apart (`quantizer.py`, eq. 6, 7)
    vectors that codes are initialized from and restarted on
    the error that the VAE's optimal scale follows, LFQ's p(c), and both gradients of lambda

Random numbers are drawn for the whole batch in every process, from the same state, and each takes
its slice. So all processes have the same weights, bit for bit, and to rounding those of one process
alone. Two things differ. Dropout drops the same places of every slice, and the classifiers that
measure images normalize each slice by itself. Everything but training is done by each process for
itself, and only the first one writes and prints.

Without torchrun there is one process, and every function here returns what it was given.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_launched() -> bool:
    """Whether torchrun started this process, and its environment says which one it is."""
    return dist.is_available() and dist.is_torchelastic_launched()


def is_main() -> bool:
    """Whether this process writes and prints."""
    return not is_launched() or os.environ["RANK"] == "0"


def num_processes() -> int:
    """W, after `start`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def start(device: torch.device) -> torch.device:
    """Wait for the other processes that torchrun started. Returns this one's device.

    Raises:
        ValueError: the device cannot be shared, or there are fewer GPUs than processes.
    """
    if not is_launched() or dist.is_initialized():
        return device
    if device.type == "mps" or device.index is not None:
        raise ValueError(f"several processes cannot share {device}, give cuda or cpu")
    if device.type == "cuda":  # one for each process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"there are {torch.cuda.device_count()} GPUs, start as many processes")
        torch.cuda.set_device(device)
    has_nccl = device.type == "cuda" and dist.is_nccl_available()
    dist.init_process_group("nccl" if has_nccl else "gloo")
    dist.barrier()
    return device


def stop() -> None:
    """Leave the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def first_alone() -> Iterator[None]:
    """What is inside is done by the first process, and then by the others (a download)."""
    if num_processes() > 1 and not is_main():
        dist.barrier()
    try:
        yield
    finally:
        if num_processes() > 1 and is_main():
            dist.barrier()


def part(whole: Tensor, dim: int = 0) -> Tensor:
    """This process's slice of what belongs to a whole batch."""
    return whole if num_processes() == 1 else whole.chunk(num_processes(), dim)[dist.get_rank()]


def whole(part: Tensor) -> Tensor:
    """A tensor of the whole batch's size, whose random numbers `part` then divides."""
    return part if num_processes() == 1 else torch.cat([part] * num_processes())


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; no gradient."""
    if num_processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, through which gradients flow back to each of them."""
    return tensor if num_processes() == 1 else _Mean.apply(tensor)


class _Mean(torch.autograd.Function):
    """y = 1/W sum_r x_r. Each loss L_r depends on x through y, so x gets 1/W sum_r dL_r/dy."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return total(tensor.clone()) / num_processes()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient.clone()) / num_processes()


def rows(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Rows (M, D) of the tensors (N, D) of all processes, one after the other; chosen (M,)."""
    if num_processes() == 1:
        return tensor[chosen]
    own = chosen - dist.get_rank() * len(tensor)  # 0 to N - 1 if the row is in this process
    is_own = (own >= 0) & (own < len(tensor))
    found = torch.where(is_own[:, None], tensor[own.clamp(0, len(tensor) - 1)], 0.0)
    return total(found)  # all others have zeros there


def average_gradients(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Average each gradient over all processes as soon as `backward` has computed it."""
    if num_processes() == 1:
        return

    def average(parameter: Tensor) -> None:
        parameter.grad = total(parameter.grad) / num_processes()  # type: ignore[arg-type]

    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(average)
