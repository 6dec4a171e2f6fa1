"""docs/settings.md is what the settings say of themselves: ``python tests/test_settings_page.py`` prints it."""

import math
import re
import zipfile
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from amimv.fields import NOTHING, SEED, TRAINING, Field, describe_range, may_be_unset
from amimv.models.methods import METHODS
from amimv.trainers.layers import SECOND_OF_OLD, modernised
from amimv.trainers.settings import every_setting, groups

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "settings.md"
#: What 0.1.0 wrote of a run.
with zipfile.ZipFile(ROOT / "tests" / "data" / "run-0.1.zip") as run:
    OLD = yaml.safe_load(run.read("runs/old/config.yaml"))
HEAD = """\
# Settings

<!-- made by: python tests/test_settings_page.py > docs/settings.md -->

Every setting of `pretrain.py`, by the groups of `--help`. A flag is a setting's name with dashes (`--batch-size 512`),
a key of YAML the name itself (`batch_size: 512`), and both are flat. Later layers win: the defaults here, then
`trainers/configs/METHOD.yaml` (what was published), `--preset`, `--config FILE.yaml`, flags. A run's `config.yaml`
holds the value of every setting and where it came from.

- **Unset** is `None` on the command line and `null` in YAML: then the value follows from the data or from other
  settings.
- **Touches** says what depends on a setting: the *training*, the *evaluation* alone, or *nothing* but where things are
  and how often something is said. A run is resumed (`--resume auto`) with the settings that its training depends on;
  the others may change.
- Settings that undo each other are refused, and one that does nothing beside the others is named in the log.
"""
COLUMNS = "| setting | default | can be | touches | what |\n|---|---|---|---|---|"
CHANGED = """\
## Changed since 0.1.0

A `config.yaml`, a study and the runs of a report that say it in the old words are read as they were meant. Flags take
the new words only. Of a `config.yaml` from before there was `resplit`, the backbone `small` is read as `small-v1`.

| before | now |
|---|---|
"""


def table(kind: Any) -> str:
    """One line a setting."""
    return "\n".join([COLUMNS, *map(row, fields(kind))])


def row(field: Field) -> str:
    about = field.metadata
    cells = (f"`{field.name}`", default(field.default), can_be(field), about["touches"], about["help"])
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def default(value: Any) -> str:
    if value is None or value == ():
        return "unset" if value is None else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    words = value if isinstance(value, tuple) else (value,)
    return f"`{' '.join(f'{word:.6g}' if isinstance(word, float) else str(word) for word in words)}`"


def can_be(field: Field) -> str:
    about, kind = field.metadata, str(field.type)
    if about["choices"]:
        return ", ".join(f"`{choice}`" for choice in about["choices"])
    if "str" in kind:
        return "words" if "tuple" in kind else "text"
    if "bool" in kind:
        return "yes or no"
    if (about["low"], about["high"]) == SEED:
        return "a whole number"
    several = "two numbers, each " if "tuple" in kind and "..." not in kind else "numbers, each " * ("..." in kind)
    whole = "a whole number, " * ("int" in kind and about["high"] == math.inf)
    return several + whole + describe_range(about)


def changed() -> str:
    """What 0.1.0 said otherwise, of the settings that it had."""
    rows = [(f"`{name}: {value!r}`", f"`{name}: null`") for name, value in old_unset().items()]
    rows += [(f"`{old}: 0.5`", f"`second: {{{new}: 0.5}}`") for old, new in SECOND_OF_OLD.items()]
    rows += [(f"`--{old.replace('_', '-')} 0.5`", f"`--second {new}=0.5`") for old, new in SECOND_OF_OLD.items()]
    return CHANGED + "\n".join(f"| {old} | {new} |" for old, new in rows) + "\n"


def old_unset() -> dict[str, Any]:
    """What 0.1.0 wrote where a setting was left unset, of those that may be."""
    known = {name: field for name, field in every_setting().items() if name in OLD and may_be_unset(field)}
    texts = {name: "" if "str" in str(field.type) else 0 for name, field in known.items()}
    return {name: value for name, value in texts.items() if "tuple" not in str(known[name].type)}


def doc(kind: Any) -> str:
    return " ".join((kind.__doc__ or "").split())


def page() -> str:
    parts = [HEAD]
    for name, kind in groups("mimv").items():
        if name == "method":
            own = [f"### {method}\n\n{doc(of.settings)}\n\n{table(of.settings)}" for method, of in METHODS.items()]
            method = row(next(field for field in fields(kind) if field.name == "method"))
            parts.append("\n\n".join([f"## {name}\n\nThe method, and its own settings.\n\n{COLUMNS}\n{method}", *own]))
        else:
            parts.append(f"## {name}\n\n{doc(kind)}\n\n{table(kind)}")
    return "\n\n".join(part.rstrip() for part in [*parts, changed()]) + "\n"


def test_the_page_is_made_of_the_settings() -> None:
    assert PAGE.read_text() == page(), "python tests/test_settings_page.py > docs/settings.md"


def test_every_setting_is_on_it_once() -> None:
    common, per_method = every_setting(), [field.name for of in METHODS.values() for field in fields(of.settings)]
    found = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(found) == sorted([*common, *per_method])


def test_what_may_be_unset_was_unset_before() -> None:
    """Nothing that 0.1.0 left unset by 0 or by an empty text means that value now; what has one keeps it."""
    assert {"size", "root", "total", "tracker", "lr_batch", "epochs", "steps"} <= set(old_unset())
    read = modernised(old_unset(), every_setting())
    assert read == dict.fromkeys(old_unset())
    kept = {"knn_every": 0, "supervised_steps": 0, "seed": 0, "total": 5, "root": "here", "lr": 0, "evaluate": False}
    assert modernised(kept, every_setting()) == kept


def names(settings: Iterable[Field], touches: str) -> set[str]:
    return {field.name for field in settings if field.metadata["touches"] == touches}


def test_what_touches_nothing_is_what_may_not_change_a_result() -> None:
    """By hand, so that a new setting is thought about: what is not here is held against a run that is resumed."""
    settings = every_setting().values()
    assert names(settings, NOTHING) == {
        *("resume", "output", "name", "config", "preset", "root", "cache", "tracker"),
        *("log_every", "save_every", "knn_every"),
    }
    assert {"seed", "threads", "batch_size", "recipe"} <= names(settings, TRAINING)


if __name__ == "__main__":
    print(page(), end="")
