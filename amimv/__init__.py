"""Pair pipelines on the device, and the self-supervised training they feed, for long-tailed medical images."""

__version__ = "0.1.0"


class InputError(ValueError):
    """What the user gave cannot be used: one line saying what was wrong, what was expected and what to do.

    Commands print it without a traceback and exit with status 2.
    """
