"""How many threads torch has on the CPU and how they wait for one another: chosen before torch is loaded, which is
when OpenMP reads its environment. Nothing here imports it.

Spinning threads are right on idle cores and ruinous beside other work, sleeping ones the other way round
(docs/throughput.md has the numbers). Only the waiting follows the load: on the number of threads depends how sums are
rounded, and the same command is to give the same losses.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from amimv.signals import rank_of

#: ``accelerate launch`` always sets it.
LAUNCHED = "ACCELERATE_DYNAMO_BACKEND"
#: How many processes a launcher started on this machine; of those that Accelerate knows.
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
#: By which a user says how many threads there are, and how they wait.
NUMBERS, WAITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
#: Names which of these a command chose, so that another one that it starts does not take them for the user's.
CHOSEN = "AMIMV_CHOSE"
#: Seconds for which the load is looked at, and as much of a core as other work may take from spinning threads.
WINDOW, SPARE = 0.15, 0.25

logger = logging.getLogger("amimv.threads")
logger.setLevel(logging.INFO)  # whatever the command says besides


def usable_cores(physical: bool = False, root: Path = Path("/")) -> int:
    """Cores that this process may use, by its affinity and its control groups' quota.

    Args:
        physical: count the threads of one core once.
        root: of ``/proc`` and ``/sys``.
    """
    quota = min(_quotas(root), default=math.inf)
    if not hasattr(os, "sched_getaffinity"):  # macOS and Windows bind no process to some of its cores
        count = (psutil.cpu_count(logical=False) if physical else None) or os.cpu_count() or 1
    else:
        count = len({_siblings(cpu, root) if physical else str(cpu) for cpu in os.sched_getaffinity(0)})
    return max(1, int(min(count, quota)))


def _siblings(cpu: int, root: Path) -> str:
    path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return _text(path) or str(cpu)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each control group above this process grants it; versions 1 and 2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            one = [_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            text = _text(folder / "cpu.max") or " ".join(one)
            quota, _, period = text.partition(" ")
            if quota.isdecimal() and period.isdecimal():
                yield int(quota) / int(period)


def idle_cores() -> float:
    """How many of the cores that this process may use nobody uses, over `WINDOW` in which it sleeps."""
    busy = psutil.cpu_percent(WINDOW, percpu=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    return sum(1 - percent / 100 for cpu, percent in enumerate(busy) if cpu in mine)


def local_processes(environment: Mapping[str, str]) -> int:
    """How many processes of this job a launcher started on this machine; 1 without one."""
    return next((int(environment[name]) for name in LOCAL_SIZES if environment.get(name, "").isdecimal()), 1)


def users_own(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what another command chose in it."""
    chosen = {CHOSEN, *environment.get(CHOSEN, "").split()}
    return {name: value for name, value in environment.items() if name not in chosen}


def decide(
    environment: Mapping[str, str], cores: int, idle: Callable[[], float], processes: int = 1, threads: int = 0
) -> tuple[dict[str, str], str]:
    """What is to be set before torch is loaded.

    Args:
        environment: the user's own; what stands there of `NUMBERS` and `WAITS` stays.
        cores: that all processes together may use.
        idle: measures how many are; asked only where it matters.
        processes: of this kind on the machine.
        threads: asked for by a flag; 0: not.

    Returns:
        The variables, and a line that says what was chosen, why, and how to choose otherwise.
    """
    numbers = [name for name in NUMBERS if environment.get(name)]
    if LAUNCHED in environment and processes == 1 and environment.get(NUMBERS[0]) == "1":
        numbers = []  # what accelerate launch gives to whatever it starts
    chosen, count = {}, threads or max(1, cores // processes)
    if threads or not numbers:
        chosen[NUMBERS[0]] = str(count)
    elif (first := environment[numbers[0]].split(",")[0]).isdecimal():
        count = int(first)
    waits = [name for name in WAITS if environment.get(name)]
    how = f" that wait as {waits[0]} says" if waits else ""
    if not waits and count > 1:
        free = idle() if processes == 1 else 0.0  # several processes wait for one another, too
        how = " that spin while they wait"
        if free < min(count, cores) - SPARE:
            chosen[WAITS[0]], how = "passive", " that sleep while they wait"
        how += f": {free:.1f} cores are idle" if processes == 1 else ""
    words = f"{count} thread{'s'[: count != 1]}{how}" + (
        f", in each of {processes} processes" if processes > 1 else ""
    )
    return chosen, f"{words} ({NUMBERS[0]} and {WAITS[0]} choose otherwise)"


def choose_threads(threads: int = 0) -> None:
    """Decide for this process, change its environment and log it, all before torch is loaded."""
    own = users_own(os.environ)
    chosen, line = decide(own, usable_cores(physical=True), idle_cores, local_processes(own), threads)
    for name in os.environ.keys() - own.keys():
        del os.environ[name]
    os.environ |= chosen | {CHOSEN: " ".join(chosen)}
    if rank_of(own) == 0:
        logger.info(line)
