"""Timing: rates over repeats, and seconds per named stage, with the device waited for inside the timing."""

import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch


class Rates(NamedTuple):
    """Median and quartiles over the repeats, in items per second."""

    median: float
    low: float
    high: float


def waiter(device: torch.device | str) -> Callable[[], None]:
    """What waits until the device has done all its work: nothing on a CPU."""
    if torch.device(device).type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def peak_memory(device: torch.device) -> float:
    """MiB: of a GPU what torch has had allocated at most, else the most that the process has had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def held_memory(device: torch.device) -> float:
    """MiB: of a GPU what torch has allocated now, else what the process has resident now (on Linux; else its peak)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory(device)
    return pages * resource.getpagesize() / 2**20


def summarise(rates: list[float]) -> Rates:
    low, _, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else (rates[0],) * 3
    return Rates(statistics.median(rates), low, high)


def measure(batches: Iterator[int], repeats: int, seconds: float, wait: Callable[[], None]) -> Rates:
    """Items per second of an endless iterator that says how many items each batch had.

    One repeat more is made first, to warm up. The device is waited for at the end of each repeat, inside its time.

    Args:
        batches: gives the number of items of each batch, after making it.
        repeats: how many are timed.
        seconds: length of a repeat, at least; a batch that is under way is finished and counted.
        wait: see `waiter`.
    """
    rates = []
    for _ in range(repeats + 1):
        items, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            items += next(batches)
        wait()
        rates.append(items / (time.perf_counter() - started))
    return summarise(rates[1:])


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads for torch's operators, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stopwatch:
    """Seconds spent inside the functions it wraps, by stage; each stage also shows in torch's profiler by its name.

    The device is waited for before and after each call, so that a stage is charged with its own work only; what a
    stage spends inside another one is charged to that.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            self._inner.append(0.0)
            started = time.perf_counter()
            with torch.profiler.record_function(stage):
                result = function(*args, **kwargs)
                self.wait()
            elapsed = time.perf_counter() - started
            self.seconds[stage] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed
            return result

        return wrapped

    @contextmanager
    def watch(self, stages: dict[str, tuple[Any, str]]) -> Iterator[None]:
        """Time these functions, given by stage as (the object it is an attribute of, its name), while inside."""
        with ExitStack() as stack:
            for stage, (at, name) in stages.items():
                stack.enter_context(patch.object(at, name, self.timed(stage, getattr(at, name))))
            yield
