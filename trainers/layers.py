"""Where settings come from: layers of defaults, YAML files and flags.

Later layers win: dataclass < ``configs/METHOD.yaml`` < ``--preset`` < ``--config FILE`` < flags, whatever the order on
the command line. Every resolved value remembers its layer.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tyro
import yaml

from amimv import InputError, check_choice, did_you_mean, shown, user_path
from amimv.command_line import shown_as
from amimv.fields import Field, check_setting, may_be_unset
from amimv.pipelines.recipes import ALIASES as RECIPE_ALIASES
from amimv.trainers.checks import check, idle, refuse_contradictions
from amimv.trainers.conditions import read_second, write_second
from amimv.trainers.data_settings import PATH
from amimv.trainers.settings import METHOD_ALIASES, PretrainSettings, groups, of_role, settings_class
from amimv.trainers.yaml_values import coerce, read_yaml

logger = logging.getLogger("amimv")

CONFIGS = Path(__file__).parent / "configs"
#: The settings that say how long a training is, of which one is set.
LENGTHS = ("epochs", "steps", "views", "minutes")
#: The preset that stands for the one of the data's kind of images, and the kind where nothing is known.
AUTO, PHOTOGRAPH = "auto", "photograph"
#: What is in every run's ``config.yaml``, and in no other file.
WHOLE = {"output", "name", "data_seed", "backbone"}
#: Settings of version 0.1.0 that are an override of ``second`` now, and the operation's setting that each overrides.
SECOND_OF_OLD = {f"second_{name}": name for name in ("crop_min", "jitter_p", "grey_p", "blur_p", "solarise_p")}


def modernised(content: Mapping[str, Any], known: Mapping[str, Field]) -> dict[str, Any]:
    """What a file says, in the words of this version: see the table of docs/settings.md.

    Before 0.2.0 a setting was left unset by an empty text, or by a 0 that it cannot be, and side b's view had five
    settings of its own. The backbone `small` of a run's ``config.yaml`` that lacks `resplit` is `small-v1`.
    """
    second = {name: content[old] for old, name in SECOND_OF_OLD.items() if old in content}
    kept = {name: value for name, value in content.items() if name not in SECOND_OF_OLD}
    if second and isinstance(kept.get("second", {}), dict):
        kept["second"] = second | kept.get("second", {})
    if kept.get("backbone") == "small" and content.keys() >= WHOLE and "resplit" not in content:
        kept["backbone"] = "small-v1"
    return {name: None if name in known and _was_unset(value, known[name]) else value for name, value in kept.items()}


def _was_unset(value: Any, field: Field) -> bool:
    nothing = value == "" or (value == 0 and not isinstance(value, bool) and field.metadata["low"] > 0)
    return nothing and may_be_unset(field)


def _layer(content: dict[str, Any], cls: type, source: str) -> dict[str, Any]:
    """A file's settings, each of its type and in its range; every error begins with ``source``."""
    known = {field.name: field for field in fields(cls)}
    layer = {}
    for name, value in modernised(content, known).items():
        if name not in known:
            hint = ": " + near if (near := did_you_mean(str(name), known)) else ", see --help for all settings"
            raise InputError(f"{source}: unknown setting {shown(str(name))}{hint}")
        value = second_words(value) if name == "second" else value
        layer[name] = coerce(name, value, known[name].type, source, known[name].metadata["choices"])
        try:
            check_setting(known[name], layer[name])
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
    return layer


def second_words(value: Any) -> Any:
    """The mapping that ``second`` is in a file as it is on the command line; nothing else is changed."""
    if not isinstance(value, dict):
        return value
    return tuple(f"{key}={','.join(map(str, v if isinstance(v, list) else [v]))}" for key, v in value.items())


@cache
def presets() -> dict[str, tuple[str, ...]]:
    """The presets by name, each with the data sets whose images are such."""
    files = sorted((CONFIGS / "presets").glob("*.yaml"))
    return {path.stem: tuple(read_yaml(path).get("sets", ())) for path in files}


def check_preset(preset: str) -> None:
    """Raise an `InputError` for a preset that there is none of."""
    check_choice("preset", preset, (*presets(), AUTO, "none"))


def preset_of(data: str) -> str | None:
    """The kind of images that a data set is known to have."""
    return next((preset for preset, sets in presets().items() if data in sets), None)


def _preset_layers(preset: str, method: str, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """A preset's settings, and those that it has for one method or for the small backbone, with which it lies on the
    preset `small`.
    """
    for name in dict.fromkeys(("small", preset) if small else (preset,)) if preset != "none" else ():
        content = read_yaml(CONFIGS / "presets" / f"{name}.yaml")
        content.pop("sets", None)
        by_method, if_small = content.pop("methods", {}), content.pop("small", {})
        own = by_method.get(METHOD_ALIASES.get(method, method), {})
        yield f"preset {name}", content | (if_small if small else {}) | own


def _given(argv: list[str]) -> list[str]:
    """The names of the settings that stand on the command line."""
    names = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    for name in names:
        if name in SECOND_OF_OLD:
            new = SECOND_OF_OLD[name]
            raise InputError(f"--{name.replace('_', '-')} is now an override: give --second {new}=VALUE")
    return [name.removeprefix("no_") if name.startswith("no_") else name for name in names]


def _peek(argv: list[str], name: str) -> str | None:
    """The value of a flag that decides about layers, before the command line is parsed."""
    flag = "--" + name
    value = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            value = argv[i + 1]
        elif word.startswith(flag + "="):
            value = word.partition("=")[2]
    return value


def _over(lower: dict[str, Any], layer: dict[str, Any], source: str) -> dict[str, Any]:
    """A layer laid over those below it: its ``second`` over theirs, setting by setting, and a length over any other.

    Raises:
        InputError: the layer has two lengths.
    """
    lengths = [name for name in LENGTHS if layer.get(name)]
    if len(lengths) > 1:
        raise InputError(f"{source} gives both {lengths[0]} and {lengths[1]}: give one of them")
    values = lower | layer
    if lengths:
        values |= {name: None for name in LENGTHS if name not in lengths}
    if "second" in layer:
        values["second"] = write_second(read_second(lower.get("second", ())) | read_second(layer["second"]))
    return values


def _layered(
    first: Callable[[str, str], str], config: dict[str, Any], source: str
) -> tuple[type[PretrainSettings], dict[str, Any], dict[str, str]]:
    """All layers up to a config's: the settings' class, their values and where each came from.

    ``first(name, default)`` tells the method, preset, data and backbone, which decide about layers.
    """
    method = first("method", PretrainSettings.method)
    cls = settings_class(method)
    data, preset = first("data", PretrainSettings.data), first("preset", PretrainSettings.preset)
    small = data == PretrainSettings.data or first("backbone", PretrainSettings.backbone).startswith("small")
    chosen = (preset_of(data) or PHOTOGRAPH) if preset == AUTO else preset
    check_preset(chosen)

    published = CONFIGS / f"{method}.yaml"
    layers = [(f"configs/{method}.yaml", read_yaml(published))] if published.exists() else []
    layers += _preset_layers(chosen, method, small)
    values: dict[str, Any] = {}
    sources = {field.name: "default" for field in fields(cls)}
    for layer_source, content in [*layers, (source, config)]:
        below, values = values, _over(values, _layer(content, cls, layer_source), layer_source)
        changed = {name for name in values if name in modernised(content, {}) or values[name] != below.get(name)}
        sources |= dict.fromkeys(changed, layer_source)
    return cls, values | {"preset": chosen}, sources | ({"preset": AUTO} if preset == AUTO else {})


def _settled(cls: type[PretrainSettings], values: dict[str, Any]) -> PretrainSettings:
    """Checked settings without aliases."""
    method, recipe = (values.get(name, getattr(PretrainSettings, name)) for name in ("method", "recipe"))
    values = values | {"method": METHOD_ALIASES.get(method, method), "recipe": RECIPE_ALIASES.get(recipe, recipe)}
    settings = cls(**_finished(values))
    check(settings)
    refuse_contradictions(settings)
    return settings


def _finished(values: dict[str, Any]) -> dict[str, Any]:
    """With places at home in full, and without overrides that were taken back."""
    values = values | {name: os.path.expanduser(values[name]) for name in of_role(PATH) if values.get(name)}
    second = {name: value for name, value in read_second(values.get("second", ())).items() if value is not None}
    return values | {"second": write_second(second)}


def settings_from(content: dict[str, Any], source: str) -> PretrainSettings:
    """Settings from a mapping, on the layers that a config file would lie on; every error begins with ``source``.

    Raises:
        InputError: an unknown name or a bad value.
    """
    try:
        cls, values, _ = _layered(lambda name, default: str(content.get(name, default)), content, source)
        return _settled(cls, values)
    except InputError as error:
        if str(error).startswith(source):
            raise
        raise InputError(f"{source}: {error}") from error


def _command_line(method: str, values: dict[str, Any]) -> Any:
    """The settings in their groups, as tyro shows them: what it parses, with these values as defaults."""
    made = []
    for name, kind in groups(METHOD_ALIASES.get(method, method)).items():
        as_shown = shown_as(kind)
        own = {field.name: values[field.name] for field in fields(kind) if field.name in values}
        made.append((name, as_shown, as_shown(**own)))
    return make_dataclass("Settings", made, frozen=True)()


def resolve(argv: list[str] | None = None, prog: str | None = None) -> tuple[PretrainSettings, dict[str, str]]:
    """Settings from the command line and all layers below it.

    Returns:
        The settings, aliases resolved, and for each name the layer that it came from.

    Raises:
        InputError: an unknown name or a bad value. Flags that are not known end in tyro's own message.
    """
    argv = sys.argv[1:] if argv is None else argv
    config_path = _peek(argv, "config")
    config = read_yaml(user_path(config_path)) if config_path else {}

    def first(name: str, default: str) -> str:
        value = _peek(argv, name)
        return str(config.get(name, default) if value is None else value)

    given = _given(argv)
    cls, values, sources = _layered(first, config, config_path or "")
    defaults = _command_line(first("method", PretrainSettings.method), _finished(values))
    parsed = tyro.cli(type(defaults), prog=prog, args=argv, default=defaults, config=(tyro.conf.OmitArgPrefixes,))
    found = {name: value for group in asdict(parsed).values() for name, value in group.items()}
    flags = {name: found[name] for name in given if name in sources}
    for field in fields(cls):
        if field.name in flags:
            check_setting(field, flags[field.name])
    own = {"preset": values["preset"], "method": first("method", PretrainSettings.method)}
    over = _over(values, flags, "the command line")
    sources |= dict.fromkeys([name for name in over if name in flags or over[name] != values.get(name)], "flag")
    settings = _settled(cls, over | own)
    for names, reason in idle(settings, flags):
        logger.info("no effect here: %s: %s", ", ".join(names), reason)
    if sources["preset"] == AUTO and preset_of(settings.data) is None:
        others = ", ".join(name for name, sets in presets().items() if sets and name != settings.preset)
        logger.info("preset %s, as nothing says what the images are; others: --preset %s", settings.preset, others)
    return settings, sources


def to_yaml(settings: PretrainSettings, sources: dict[str, str]) -> str:
    """The resolved settings as YAML that ``--config`` reads again; each line ends with where its value came from."""
    lines = []
    for field in fields(settings):
        if field.name in ("config", "resume"):
            continue
        value = getattr(settings, field.name)
        if field.name == "second":
            value = _second_over_files(settings)
        value = list(value) if isinstance(value, tuple) else value
        dumped = yaml.safe_dump([value], default_flow_style=True, width=1000, sort_keys=False).strip()
        text = f"{field.name}: {dumped[1:-1]}"
        lines.append(f"{text:<40} # {sources[field.name]}")
    return "\n".join(lines) + "\n"


def _second_over_files(settings: PretrainSettings) -> dict[str, Any]:
    """The overrides of side b's view, and None for those of the method's file and the preset that are taken back."""
    own = {"method": settings.method, "preset": settings.preset}
    _, below, _ = _layered(lambda name, default: own.get(name, default), {}, "")
    taken_back = dict.fromkeys(read_second(below.get("second", ())))
    pairs = (taken_back | read_second(settings.second)).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}


def from_yaml(path: Path) -> PretrainSettings:
    """The settings of a run folder's ``config.yaml``."""
    content = read_yaml(path)
    cls = settings_class(str(content.get("method", PretrainSettings.method)))
    return cls(**_finished(_layer(content, cls, str(path))))
