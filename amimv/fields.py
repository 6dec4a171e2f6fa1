"""Settings: fields of a frozen dataclass that say what they are for, what they can be and what depends on them."""

import dataclasses
import math
from typing import Any

from amimv import InputError, check_choice, shown

#: The largest whole number that is no seed.
MOST = 2**31 - 1


def setting(
    default: Any,
    text: str,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above: bool = False,
    choices: tuple[str, ...] = (),
    called: str = "",
    roles: tuple[str, ...] = (),
) -> Any:
    """A field of a settings class, with all that is known about it in ``metadata``.

    Args:
        default: the value; None where it may be left unset.
        text: for ``--help`` and the documentation.
        low, high: the range of a number, ends included; ``above``: without the lower end.
        choices: of a setting with a closed list of values.
        called: what a message calls it, if not by its name.
        roles: what depends on it, in words that the class's users agree on.
    """
    metadata = {"help": text, "low": low, "high": high, "above": above, "choices": choices, "called": called}
    return dataclasses.field(default=default, metadata=metadata | {"roles": roles})


def check_number(name: str, value: int | float, low: float, high: float, above: bool = False) -> None:
    """Raise an `InputError` for a number outside a range, or one that is none (NaN, infinite)."""
    if isinstance(value, int):
        most = MOST if high == math.inf else int(high)
        if value < low:
            raise InputError(f"{name} is {shown(value)}, expected at least {int(low)}")
        if value > most:
            raise InputError(f"{name} is {shown(value)}, expected at most {most}")
    elif not ((low < value if above else low <= value) and value <= high):
        least = f"more than {low:g}" if above else f"at least {low:g}"
        ends = "a number" if low == -math.inf else least if high == math.inf else f"{low:g} to {high:g}"
        raise InputError(f"{name} is {value}, expected {ends}")
    elif math.isinf(value):
        raise InputError(f"{name} is {value}, expected a number")


def check_setting(field: "dataclasses.Field[Any]", value: Any) -> None:
    """Raise an `InputError` for a value that is none of the field's choices, or out of its range; None is unset."""
    about = field.metadata
    if value is None:
        return
    if about["choices"]:
        check_choice(about["called"] or field.name, str(value), about["choices"])
    if isinstance(value, int | float) and not isinstance(value, bool):
        check_number(field.name, value, about["low"], about["high"], about["above"])
