"""Pair pipelines on the device, and the self-supervised training they feed, for long-tailed medical images."""

import difflib
import sys
from collections.abc import Callable, Iterable

__version__ = "0.1.0"


class InputError(ValueError):
    """What the user gave cannot be used: one line saying what was wrong, what was expected and what to do.

    Commands print it without a traceback and exit with status 2.
    """


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raise an `InputError` that lists the near misses unless ``value`` is one of ``choices``."""
    known = tuple(choices)
    if value not in known:
        near = difflib.get_close_matches(value, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(f"unknown {what} '{value}': {hint}choose from {', '.join(known)}")


def run_command(command: Callable[[], object]) -> None:
    """Call a command; an `InputError` becomes its one line on standard error and exit status 2."""
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
