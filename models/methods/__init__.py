"""The methods by their names on the command line.

A method is a class in a file of its own here, which is imported when it is built, and its settings in ``settings.py``.
To add one, see ``docs/adding-a-method.md``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from amimv.models.methods.settings import SETTINGS, MethodSettings

if TYPE_CHECKING:
    from torch import nn

    from amimv.models.methods.base import Method


@dataclass(frozen=True)
class MethodByName:
    """A method's name, and its frozen settings."""

    name: str
    settings: type[MethodSettings]

    @property
    def build(self) -> "Callable[[nn.Module, Any], Method[Any]]":
        """Its class, built from (backbone, settings)."""
        module = import_module(f"{__name__}.{self.name.replace('-', '_')}")
        kind: type = getattr(module, self.settings.__name__.removesuffix("Settings"))
        return kind


METHODS: dict[str, MethodByName] = {name: MethodByName(name, settings) for name, settings in SETTINGS.items()}
