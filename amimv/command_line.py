"""From a command line to settings, answered before anything is loaded that takes seconds."""

import logging
import sys
from dataclasses import field as dataclass_field
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from amimv import run_command
from amimv.fields import Field
from amimv.signals import AGAIN, guard_imports
from amimv.threads import choose_threads

S = TypeVar("S")


def described(field: Field) -> str:
    """What a setting is for, and what it can be."""
    about = field.metadata
    return str(about["help"]) + (f" ({', '.join(about['choices'])})" if about["choices"] else "")


def shown_as(kind: Any) -> Any:
    """A class of settings as tyro shows it, with what each is for; its instances are the class's own, unchecked."""
    made = [
        (one.name, Annotated[one.type, tyro.conf.arg(help=described(one))], dataclass_field(default=one.default))
        for one in fields(kind)
    ]
    space = {"__doc__": kind.__doc__, "__post_init__": lambda self: None}
    return make_dataclass(kind.__name__, made, bases=(kind,), frozen=True, namespace=space)


def read_command(kind: type[S], description: str | None) -> S:
    """The settings that the command line gives; flags that are not known end in tyro's own message and status 2.

    Raises:
        InputError: from the class, for a value that a setting cannot have.
    """
    flat = (tyro.conf.OmitArgPrefixes,)
    prog = Path(sys.argv[0]).name
    return kind(**vars(tyro.cli(shown_as(kind), prog=prog, description=description, config=flat)))


def begin_command(kind: type[Any], description: str | None, advice: str = AGAIN) -> None:
    """What a command does before it imports torch: ``--help`` and what cannot be is answered, a signal ends the
    process with its line from now on, and it is chosen how torch's threads wait.
    """
    guard_imports(advice)
    run_command(lambda: read_command(kind, description), advice)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    choose_threads()
