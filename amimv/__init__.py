"""Pair pipelines on the device, and the self-supervised training they feed, for long-tailed medical images."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from amimv.signals import AGAIN, EXIT_INTERRUPTED, interruptible, interruption

__version__ = "0.2.0"

#: Exit statuses of the commands: input that cannot be used, and files that cannot be read or written.
EXIT_BAD_INPUT = 2
EXIT_IO = 74


class InputError(ValueError):
    """What the user gave cannot be used: one line saying what was wrong, what was expected and what to do.

    Commands print it without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for a message of our own; the name of its class if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def told(error: BaseException) -> str:
    """The kind and the first line of somebody else's exception, cut, for a message of our own."""
    return f"{type(error).__name__}: {shown(first_line(error), 160)}"


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raise an `InputError` that lists the near misses unless ``value`` is one of ``choices``."""
    known = tuple(choices)
    if value not in known:
        hint = did_you_mean(value, known, "{} ", cutoff=0.4)
        between = "; " if any("," in one for one in known) else ", "
        listed = between.join(known) if len(known) <= 20 else f"{len(known)}, such as {between.join(known[:3])}"
        raise InputError(f"unknown {what} {shown(value)}: {hint}choose from {listed}")


def shown(value: object, most: int = 60) -> str:
    """What the user gave, for a message: escaped, on one line, and cut where it is long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def did_you_mean(word: str, known: Iterable[str], form: str = "{}", cutoff: float = 0.6) -> str:
    """The question with the up to three nearest of the known words, in this form; empty where none is as near as
    ``cutoff``."""
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=cutoff)
    return form.format(f"did you mean {' or '.join(by_lower[one] for one in near)}?") if near else ""


def user_path(text: str | Path) -> Path:
    """A path that the user gave: ``~`` is the home folder, also where no shell has read it."""
    return Path(os.path.expanduser(text))


def describe_os_error(error: OSError) -> str:
    """Which file, and what is wrong with it, in one line."""
    reason = error.strerror or first_line(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def run_command(command: Callable[[], object], advice: str = AGAIN) -> None:
    """Call a command; an `InputError` becomes its one line on standard error and exit status 2, an `OSError` (a full
    disk, a folder that cannot be written) its own and 74, and so do SIGTERM and SIGINT, with ``advice`` and status 75.
    """
    with interruptible():
        try:
            command()
            return
        except InputError as error:
            status, message = EXIT_BAD_INPUT, f"error: {error}"
        except OSError as error:
            status, message = EXIT_IO, f"error: {describe_os_error(error)}"
        except KeyboardInterrupt as stop:
            status, message = EXIT_INTERRUPTED, interruption(stop, advice)
        print(message, file=sys.stderr, flush=True)
        sys.exit(status)
