"""The methods by their names on the command line.

A method is a class and its frozen settings in a file of its own here: ``barlow-twins`` is `BarlowTwins` and
`BarlowTwinsSettings` in ``barlow_twins.py``. To add one, see ``docs/adding-a-method.md``.
"""

from importlib import import_module
from typing import Any, NamedTuple

NAMES = (
    "barlow-twins",
    "byol",
    "dino",
    "mimv",
    "moco-v3",
    "nnclr",
    "ressl",
    "sdclr",
    "simclr",
    "simclr-ts",
    "simsiam",
    "swav",
    "vicreg",
)


class Method(NamedTuple):
    """A method's class, built from (backbone, settings), and its frozen settings."""

    build: Any
    settings: type


def _load(name: str) -> Method:
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    title = name.title().replace("-", "")
    return Method(getattr(module, title), getattr(module, title + "Settings"))


METHODS = {name: _load(name) for name in NAMES}
