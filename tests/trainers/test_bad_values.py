"""Every setting with every kind of bad value: one line, or a value that the run can be built from."""

import math
from dataclasses import fields, replace
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from timm.optim import list_optimizers
from torch import nn

from amimv import InputError
from amimv.models.methods import METHODS
from amimv.trainers.build import make_optimizer, make_recipe
from amimv.trainers.layers import from_yaml, settings_from, to_yaml
from amimv.trainers.run_folder import default_name
from amimv.trainers.settings import PretrainSettings, settings_class

#: Each setting once, with a method that has it.
METHOD_OF = {field.name: method for method in reversed(METHODS) for field in fields(settings_class(method))}
HUGE, LONG = 10**30, "x" * 5000
BAD: dict[type, tuple[Any, ...]] = {
    float: (math.nan, math.inf, -math.inf, -1.0, -1e-9, 0.0, 1.5, 1e308, HUGE, "", "nan", "-inf", LONG, None, [], {}),
    int: (-1, 2**31, HUGE, -HUGE, math.nan, math.inf, 0.5, "", "many", LONG, None, [], {}, True),
    str: ("", LONG, "a\nb", "a\0b", "a\x1b[1m", "\udc80", "..", "/", "no such", "é", 3, 0.5, True, None, [], {}),
    bool: ("", "perhaps", LONG, 1, 0.5, None, [], {}),
}


def kind_of(name: str) -> type:
    kind = get_type_hints(settings_class(METHOD_OF[name]))[name]
    while get_args(kind):  # of a tuple's items, and of what may be None
        kind = next(one for one in get_args(kind) if one is not type(None))
    return kind  # type: ignore[no-any-return]


def values_for(name: str) -> list[Any]:
    values = list(BAD[kind_of(name)])
    if get_origin(get_type_hints(PretrainSettings).get(name)) is tuple:
        return values + [[value] for value in values]
    return values + [[0.5, value] for value in values] if name.endswith(("_range", "_sigma", "_ratio")) else values


class Network(nn.Module):
    head = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def build(settings: PretrainSettings) -> None:
    """What a run makes of its settings before it looks at data."""
    make_recipe(settings)
    make_optimizer(settings, Network())  # type: ignore[arg-type]
    default_name(settings)


def tried(name: str, value: Any) -> tuple[PretrainSettings | None, str]:
    try:
        settings = settings_from({"method": METHOD_OF[name], name: value}, "own.yaml")
        build(settings)
    except InputError as error:
        return None, str(error)
    return settings, ""


@pytest.mark.parametrize("name", METHOD_OF)
def test_a_bad_value_is_one_line_or_none(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    for value in values_for(name):
        settings, message = tried(name, value)
        assert "\n" not in message, f"{name}: {value!r:.40}"
        assert len(message) < 300, f"{name}: {value!r:.40}: {message:.300}"
        if settings is None:
            continue
        kept = getattr(settings, name)
        numbers = kept if isinstance(kept, tuple) else (kept,)
        assert all(math.isfinite(number) for number in numbers if isinstance(number, float)), f"{name}: {value!r:.40}"
        assert kept != "", f"{name}: {value!r:.40}"
        (tmp_path / "config.yaml").write_text(to_yaml(settings, dict.fromkeys(vars(settings), "file")))
        again = from_yaml(tmp_path / "config.yaml")
        assert replace(again, config=settings.config, resume=settings.resume) == settings, f"{name}: {value!r:.40}"


def test_every_kind_of_setting_has_its_bad_values() -> None:
    assert {kind_of(name) for name in METHOD_OF} == set(BAD)
    assert get_origin(get_type_hints(PretrainSettings)["label_fractions"]) is tuple


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in list_optimizers() if "kron" not in name])
def test_every_listed_optimizer_steps_or_says_why_not(name: str) -> None:
    """Some need a GPU or a package, one second derivatives; Kron compiles for half a minute and is left out."""
    settings, message = tried("optimizer", name)
    assert "\n" not in message
    if settings is None:
        assert name in message
        return
    network = Network()
    optimizer = make_optimizer(settings, network)  # type: ignore[arg-type]
    network.layer(torch.ones(3, 2)).square().mean().backward()
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())
