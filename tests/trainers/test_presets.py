"""Presets: what the images are; the short training of the small backbone lies below."""

import logging
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from medmnist.info import INFO

from amimv.models.methods import METHODS
from amimv.pipelines.sources.npz import medmnist_names
from amimv.trainers.layers import CONFIGS, preset_of, presets, resolve, settings_from
from amimv.trainers.settings import METHOD_ALIASES, settings_class

KINDS = ("photograph", "microscopy", "dermatoscopy", "xray")
PUBLISHED = [path.stem for path in CONFIGS.glob("*.yaml") if path.stem in {*METHODS} - {"mimv"}]


def content(preset: str) -> dict:
    return yaml.safe_load((CONFIGS / "presets" / f"{preset}.yaml").read_text())


def test_every_known_set_has_one_kind_which_its_description_tells() -> None:
    listed = [name for sets in presets().values() for name in sets]
    assert sorted(listed) == sorted(["phantom", *medmnist_names()])
    words = {"xray": r"X-Ray|\(CT\)", "dermatoscopy": "dermatoscopic", "microscopy": "cells|histological"}
    for name in medmnist_names():
        told = [kind for kind, word in words.items() if re.search(word, INFO[name]["description"])]
        assert [preset_of(name)] == (told or ["photograph"])
    assert set(presets()) == {*KINDS, "small"}


@pytest.mark.parametrize(
    ("flags", "preset", "layers"),
    [
        ((), "photograph", {"small"}),
        (("--data", "retinamnist"), "photograph", {"small"}),
        (("--backbone", "resnet18"), "photograph", {"small"}),
        (("--data", "retinamnist", "--backbone", "resnet18"), "photograph", set()),
        (("--data", "chestmnist", "--backbone", "resnet18"), "xray", {"xray"}),
        (("--data", "bloodmnist"), "microscopy", {"small", "microscopy"}),
        (("--data", "own.npz"), "photograph", {"small"}),
        (("--data", "own.npz", "--preset", "small", "--backbone", "resnet18"), "small", {"small"}),
        (("--data=retinamnist", "--backbone=resnet18", "--preset=dermatoscopy"), "dermatoscopy", {"dermatoscopy"}),
        (("--preset", "none"), "none", set()),
    ],
)
def test_auto_goes_by_the_data_and_the_small_backbone_trains_shortly(
    flags: tuple[str, ...], preset: str, layers: set[str]
) -> None:
    settings, sources = resolve(list(flags))
    assert settings.preset == preset
    assert {source.removeprefix("preset ") for source in sources.values() if source.startswith("preset ")} == layers
    assert sources["preset"] == ("flag" if any("--preset" in flag for flag in flags) else "auto")


def test_auto_looks_into_the_config_file_too(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data: chestmnist\nbackbone: resnet18\n")
    assert resolve(["--config", str(config)])[0].steps is None
    settings, _ = resolve(["--config", str(config), "--backbone", "small"])
    assert (settings.preset, settings.steps) == ("xray", content("small")["steps"])


def test_what_is_taken_for_own_data_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "amimv"):
        for flags in ((), ("--data", "bloodmnist"), ("--data", "own.npz", "--preset", "xray")):
            resolve(list(flags))
        assert not caplog.records
        resolve(["--data", "folder:scans"])
    (line,) = (record.getMessage() for record in caplog.records)
    expected = "preset photograph, as nothing says what the images are; others: --preset "
    assert line == expected + "dermatoscopy, microscopy, xray"


@pytest.mark.parametrize("preset", ["small", "dermatoscopy"])
def test_a_presets_part_for_one_method(preset: str) -> None:
    simclr, sources = resolve(["--method", "simclr", "--preset", preset])
    assert (vars(simclr)["projector_hidden"], vars(simclr)["projector_out"]) == (128, 64)
    assert sources["projector_hidden"] == "preset small"
    for method in ("mimv", "amimv"):
        other, sources = resolve(["--method", method, "--preset", preset])
        assert (vars(other)["projector_hidden"], sources["projector_hidden"]) == (None, "default")


def test_the_parts_of_small_name_settings_that_the_methods_have() -> None:
    parts = content("small")["methods"]
    assert set(parts) <= set(METHODS)
    assert set(parts) >= set(PUBLISHED), "widths that fit the small backbone"
    for method, part in parts.items():
        assert set(part) <= {field.name for field in fields(settings_class(method))}, method
        settings, sources = resolve(["--method", method, "--preset", "small"])
        for name, value in part.items():
            kept = type(getattr(settings, name))(value)  # YAML reads 1e-6 as text
            assert (getattr(settings, name), sources[name]) == (kept, "preset small")


@pytest.mark.parametrize("method", [*METHOD_ALIASES, *METHODS])
def test_a_kind_changes_how_images_are_augmented_and_nothing_else(method: str) -> None:
    small = settings_from({"method": method, "preset": "small"}, "")
    for kind in KINDS:
        own = content(kind)
        settings = settings_from({"method": method, "preset": kind}, "")
        differ = {name for name, value in vars(settings).items() if value != getattr(small, name)} - {"preset"}
        assert differ <= {*own, *own.get("small", {})}
        large, plain = (
            settings_from(
                {"method": method, "preset": preset, "data": "x.npz", "backbone": "resnet18", "steps": 9}, ""
            )
            for preset in (kind, "none")
        )
        differ = {name for name, value in vars(large).items() if value != getattr(plain, name)} - {"preset"}
        assert differ <= {*own} - {"sets", "small"}


def test_an_xray_is_neither_mirrored_nor_turned_far_and_colour_stays_where_it_is_a_sign() -> None:
    xray, microscopy, dermatoscopy = (
        resolve(["--preset", kind])[0] for kind in ("xray", "microscopy", "dermatoscopy")
    )
    assert (vars(xray)["hflip"], vars(xray)["vflip"]) == (0, 0)
    assert 0 < vars(xray)["rotation"] <= 15
    assert vars(xray)["gamma_p"] > 0
    for kind in (microscopy, dermatoscopy):
        assert (vars(kind)["rotation"], vars(kind)["grey_p"]) == (180, 0)
        assert vars(kind)["hue"] <= 0.05
