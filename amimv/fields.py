"""Settings: fields of a frozen dataclass that say what they are for, what they can be and what depends on them."""

import dataclasses
import math
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from amimv import InputError, check_choice, shown

Field = dataclasses.Field[Any]
#: The largest whole number that is no seed; the range of a seed is any 64-bit integer, as PyTorch takes it.
MOST, SEED = 2**31 - 1, (-(2**63), 2**63 - 1)
#: What depends on a setting: the training and all after it, the evaluation alone, or no result at all.
TRAINING, EVALUATION, NOTHING = "training", "evaluation", "nothing"


class Idle(NamedTuple):
    """Why a setting does nothing, and when; ``{}`` in the reason is filled from the settings."""

    reason: str
    when: Callable[[Any], bool]


def setting(
    default: Any,
    text: str,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above: bool = False,
    choices: tuple[str, ...] = (),
    called: str = "",
    check: Callable[[Any], object] | None = None,
    touches: str = TRAINING,
    roles: tuple[str, ...] = (),
    idle: Idle | None = None,
) -> Any:
    """A field of a settings class, with all that is known about it in ``metadata``.

    Args:
        default: the value; None where it may be left unset; a pair (smallest, largest), each of which is in the range.
        text: for ``--help`` and the documentation.
        low, high: the range of a number, ends included; ``above``: without the lower end.
        choices: of a setting with a closed list of values.
        called: what a message calls it, if not by its name.
        check: raises an `InputError` for other bad values, in place of the range.
        touches: ``TRAINING``, ``EVALUATION`` or ``NOTHING``: what depends on it.
        roles: what else it is, in words that the class's users agree on.
        idle: when it does nothing beside the other settings.
    """
    metadata = {"help": text, "low": low, "high": high, "above": above, "choices": choices, "called": called}
    metadata |= {"check": check, "touches": touches, "roles": roles, "idle": idle}
    return dataclasses.field(default=default, metadata=metadata)


def may_be_unset(field: Field) -> bool:
    """Whether None is one of its values, and means that it is unset."""
    return "None" in str(field.type)


def check_setting(field: Field, value: Any) -> None:
    """Raise an `InputError` for a value that is none of the field's choices, or out of its range."""
    about = field.metadata
    if value is None and may_be_unset(field):
        return
    for one in (value if isinstance(value, tuple) else (value,)) if about["choices"] else ():
        check_choice(about["called"] or field.name, str(one), about["choices"])
    if about["check"]:
        about["check"](value)
    elif _is_number(value) and not about["choices"]:
        check_numbers(field, value)
    if isinstance(value, str):
        _check_text(field.name, value)


def _is_number(value: Any) -> bool:
    """Or several of them."""
    one = value[0] if isinstance(value, tuple) and value else value
    return isinstance(one, int | float) and not isinstance(one, bool)


def check_settings(settings: Any) -> None:
    """Raise an `InputError` for the first value that its field cannot have."""
    for field in dataclasses.fields(settings):
        check_setting(field, getattr(settings, field.name))


def check_numbers(field: Field, value: Any) -> None:
    """Raise an `InputError` for a number outside the field's range, or one that is none (NaN, infinite), also among
    several; for a field with a pair as its default, unless both are in the range, the smaller one first.
    """

    low, high, above = (field.metadata[name] for name in ("low", "high", "above"))
    many = "..." in str(field.type)
    pair = isinstance(field.default, tuple) and not many
    values = value if isinstance(value, tuple) else (value,)
    whole = isinstance(field.default, int) or ((many or field.default is None) and isinstance(values[0], int))
    high = MOST if whole and high == math.inf else high
    shaped = many or (isinstance(value, tuple) == pair and len(values) == 1 + pair)
    if shaped and all(isinstance(v, int | float) and -math.inf < v < math.inf for v in values):
        inside = all((low < v if above else low <= v) and v <= high for v in values)
        if inside and (many or list(values) == sorted(values)):
            return
        ends = f"at most {high}" if whole and max(values) > high else describe_range(field.metadata)
    else:
        ends = "a number" if math.inf in values or -math.inf in values else describe_range(field.metadata)
    raise InputError(f"{field.name} is {shown(value)}, expected {'(smallest, largest), each ' * pair}{ends}")


def describe_range(about: Mapping[str, Any]) -> str:
    """The range of a number, in words."""
    low, high = (str(end) if isinstance(end, int) else f"{end:g}" for end in (about["low"], about["high"]))
    if about["high"] < math.inf and not about["above"]:
        return f"{low} to {high}"
    if about["low"] == -math.inf:
        return "a number"
    upper = f" and at most {high}" * (about["high"] < math.inf)
    return (f"more than {low}" if about["above"] else f"at least {low}") + upper


def _check_text(name: str, value: str) -> None:
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        raise InputError(f"{name} is {shown(value)}, expected text without line breaks and other controls")
    if not value:
        raise InputError(f"{name} is empty: give one, or leave it out")
