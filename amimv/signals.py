"""What SIGTERM and SIGINT do to a command: one line and status 75, whenever they come.

Commands import this before torch, so it imports nothing that is slow.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: What the line says after the signal's name.
RESUME, GO_ON, AGAIN = "go on with --resume auto", "the same command goes on", "the same command starts again"
#: Of the launchers that Accelerate knows: torchrun (and its own), Intel MPI, Open MPI, MVAPICH.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def rank_of(environment: Mapping[str, str]) -> int:
    """This process's place among those that a launcher started; 0 without one."""
    return next((int(environment[name]) for name in RANKS if environment.get(name)), 0)


@contextmanager
def interruptible() -> Iterator[None]:
    """In here SIGTERM and SIGINT are a `KeyboardInterrupt` with the signal's name, even where a shell ignores them."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # which cannot set handlers
        yield
        return
    previous = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def interruption(stop: KeyboardInterrupt, advice: str) -> str:
    """The line for an interruption."""
    return f"{str(stop) or 'SIGINT'}: {advice}"


def is_command(module: str) -> bool:
    """Whether the module of this ``__name__`` is what was started, rather than imported by something else."""
    return module == "__main__" or Path(sys.argv[0]).name == f"amimv-{module.rpartition('.')[2].replace('_', '-')}"


def guard_imports(advice: str) -> None:
    """From now on a signal ends the process at once, with its line: for the seconds in which torch is imported."""

    def end(number: int, frame: FrameType | None) -> None:
        if rank_of(os.environ) == 0:
            print(interruption(KeyboardInterrupt(signal.Signals(number).name), advice), file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)

    for number in SIGNALS:
        signal.signal(number, end)


def ignore_signals() -> None:
    """From now on no signal changes the exit status: all is said, and the interpreter is taken down."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
