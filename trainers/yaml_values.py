"""Settings files: YAML read by a safe loader, and its values as the types that settings have."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

from amimv import InputError, first_line, shown

#: Words for a setting that is on or off; YAML 1.1 takes all of them for booleans, also where a setting is a word.
SWITCH = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


class _Loader(yaml.SafeLoader):
    """The safe loader, to which ``yes``, ``no``, ``on``, ``off`` and dates are words, as in YAML 1.2.

    It also refuses a mapping that gives a key twice: the second would silently win.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                raise yaml.composer.ComposerError(problem=f"'{key.value}' is given twice, again in line {line}")
            seen.add(str(key.value))
        return node


_BOOL, _DATE = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _DATE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, read by a safe loader."""
    try:
        content = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError as error:
        raise InputError(f"no such config file: {path}") from error
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a readable YAML file: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings: expected lines of 'name: value'")
    return content


def coerce(name: str, value: Any, kind: Any, source: str, words: Sequence[str] = ()) -> Any:
    """A YAML value as the field's type: YAML reads ``5e-3`` as text; a scalar is a tuple of one.

    Args:
        name: of the setting.
        value: as read by `read_yaml`.
        kind: the field's type.
        source: what errors begin with.
        words: the values that a setting of text can have, if they are known.

    Raises:
        InputError: what the value is, and what was expected.
    """
    if isinstance(kind, UnionType):
        if value is None:
            return None
        kind = get_args(kind)[0]
    try:
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
            return tuple(_scalar(item, kind) for item in (value if isinstance(value, list | tuple) else [value]))
        return _scalar(value, kind)
    except (OverflowError, TypeError, ValueError) as error:
        expected = " or ".join(words) or {"bool": "bool: yes or no"}.get(kind.__name__, kind.__name__)
        raise InputError(f"{source}: {name} is {shown(value)}, expected {expected}") from error


def _scalar(value: Any, kind: type) -> Any:
    """The value as this type; a `ValueError` or `TypeError` where it is none."""
    if kind is bool and isinstance(value, str):
        value = SWITCH.get(value.lower(), value)
    if isinstance(value, bool) != (kind is bool) or (kind is str and not isinstance(value, str)):
        raise ValueError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    return kind(value)
