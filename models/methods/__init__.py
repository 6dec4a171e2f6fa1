"""The methods by their names on the command line."""

from typing import Any, NamedTuple

from amimv.models.methods.mimv import Mimv, MimvSettings
from amimv.models.methods.simclr import Simclr, SimclrSettings


class Method(NamedTuple):
    """A method's class, built from (backbone, settings), and its frozen settings."""

    build: Any
    settings: type


METHODS = {
    "mimv": Method(Mimv, MimvSettings),
    "simclr": Method(Simclr, SimclrSettings),
}
