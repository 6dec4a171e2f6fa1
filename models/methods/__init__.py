"""The methods by their names on the command line.

A method is a class in a file of its own here, which is imported when it is built, and its settings in ``settings.py``.
To add one, see ``docs/adding-a-method.md``.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from amimv.models.methods.settings import SETTINGS, MethodSettings


@dataclass(frozen=True)
class Method:
    """A method by name, and its frozen settings."""

    name: str
    settings: type[MethodSettings]

    @property
    def build(self) -> Any:
        """Its class, built from (backbone, settings)."""
        module = import_module(f"{__name__}.{self.name.replace('-', '_')}")
        return getattr(module, self.settings.__name__.removesuffix("Settings"))


METHODS = {name: Method(name, settings) for name, settings in SETTINGS.items()}
