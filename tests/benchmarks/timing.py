"""Fair comparisons: the contestants take turns, and the median of their times counts."""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch


def median_seconds(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median time of each, called in turns so that a slow spell of the machine hits all alike."""
    times = {name: [] for name in contestants}
    for number in range(rounds + 2):  # the first two rounds warm up
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _peak_rss() -> float:
    """The most memory that this process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _measure(prepare: Callable, name: str, queue) -> None:
    call = prepare(name)
    before = _peak_rss()
    call()
    queue.put(_peak_rss() - before)


def peak_extra_mebibytes(prepare: Callable[[str], Callable[[], None]], name: str) -> float:
    """What `prepare(name)()` needs beyond what `prepare(name)` has allocated, in MiB.

    In a fresh process on the CPU, whose peak it raises. `prepare` is a function of a module.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(prepare, name, queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def environment() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"
