"""Fair comparisons: the contestants take turns, and the median of their times counts."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize() -> None:
    """Wait for the GPU, which computes while Python goes on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median time of each, called in turns so that a slow spell of the machine hits all alike."""
    times = {name: [] for name in contestants}
    for number in range(rounds + 2):  # the first two rounds warm up
        for name, call in contestants.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _measure(prepare: Callable, name: str, queue) -> None:
    import torch._dynamo  # noqa: F401  A first call loads its 150 MiB, which no contestant needs.

    call = prepare(name)
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        queue.put(float("nan"))  # only Linux tells, and forgets when asked to
        return

    def peak() -> float:
        line = next(line for line in status.read_text().splitlines() if "VmHWM" in line)
        return int(line.split()[1]) / 2**10

    clear.write_text("5")  # the peak so far is forgotten: it is what is held now
    before = peak()
    call()
    queue.put(peak() - before)


def peak_extra_mebibytes(prepare: Callable[[str], Callable[[], None]], name: str) -> float:
    """What `prepare(name)()` needs beyond what `prepare(name)` has allocated, in MiB.

    In a fresh process on the CPU; not a number where the system does not tell (only Linux does).
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(prepare, name, queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def peak_cuda_mebibytes(call: Callable[[], None]) -> float:
    """What `call` needs on the GPU beyond what is held between two calls, in MiB."""
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def environment() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"
