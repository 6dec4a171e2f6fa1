"""A study: a grid of runs from one YAML file, each cell one ordinary command of ``pretrain.py``.

The file has three parts, the first two optional::

    settings: {steps: 400, label_fractions: [0.01, 0.1, 1]}    # of every cell: any setting of pretrain.py
    sets:                                                      # short names of data sets, with settings of their own
      ham10000: {data: ham10000_28.npz, preset: dermatoscopy}
    grids:
      robustness:
        data: [retinamnist, ham10000]     # a list is an axis of the grid, anything else a setting
        method: [simclr, byol, mimv, amimv]
        rho: [1, 10, 50, 100]
        total: common                     # the largest number of images that a set can reach at all these ratios
        seed: [0, 1, 2]

A setting of the grid wins over one of the set, that over ``settings``. ``baselines: no`` leaves out the cells that
judge raw pixels, random initialisation and the supervised reference, one for each subset and seed; ``only`` leaves out
all others, as for a grid of supervised rivals.
"""

import csv
import hashlib
import itertools
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from amimv import InputError, check_choice, did_you_mean, shown
from amimv.fields import NOTHING
from amimv.files import replacing
from amimv.pipelines import ImageStore, largest_total
from amimv.pipelines.names import FILES
from amimv.pipelines.sources.npz import NotDownloaded, medmnist_names
from amimv.trainers.conditions import read_second
from amimv.trainers.data import load_split, subset_indices
from amimv.trainers.data_settings import ALONE, SPLIT, SUBSET
from amimv.trainers.evaluation.results import EVALUATION
from amimv.trainers.label_draws import check_draws
from amimv.trainers.layers import SECOND_OF_OLD, modernised, second_words, settings_from
from amimv.trainers.length import with_views_as_steps
from amimv.trainers.run_folder import default_name
from amimv.trainers.settings import (
    METHODS,
    PretrainSettings,
    every_setting,
    of_role,
    settings_class,
    that_touch,
)
from amimv.trainers.yaml_values import coerce, read_yaml

PARTS = ("settings", "sets", "grids")
#: Settings whose value is a list: in a grid they are one value, not an axis.
LISTS = tuple(
    name
    for name, kind in get_type_hints(settings_class(PretrainSettings.method)).items()
    if any(get_origin(one) is tuple for one in (kind, *get_args(kind)))  # or unset
)
#: Settings that the study itself decides about.
OWN = ("output", "name", "config", "resume", "baselines", "indices", "evaluate")
#: What does not tell two cells apart: names of the subset (its images do) and what touches no result.
NOT_IDENTITY = (*of_role(SUBSET), *that_touch(NOTHING))
PLAN_COLUMNS = (
    *("grid", "run", "kind", "data", "profile", "rho", "total", "method", "recipe", "sampler", "partner"),
    *("seed", "command"),
)


@dataclass(frozen=True)
class Cell:
    """One point of a grid.

    Attributes:
        grid: the grid's name.
        kind: "cell", or "baselines" for one without pre-training.
        run: name of the run folder; equal cells (same images, same settings) have the same.
        data: name of the data set, as in the results.
        given: the settings that the study gives, by name, ``total`` and aliases resolved.
        settings: all of them.
        problem: why the data cannot be downloaded; empty if they are here.
    """

    grid: str
    kind: str
    run: str
    data: str
    given: Mapping[str, Any]
    settings: PretrainSettings
    problem: str = ""

    def flags(self) -> list[str]:
        """The flags of ``pretrain.py`` that make this run."""
        return list(itertools.chain.from_iterable(_flag(name, value) for name, value in self.given.items()))

    def command(self) -> str:
        """What a reader types to make this run again."""
        return shlex.join(["python", "trainers/pretrain.py", *self.flags()])


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, *map(str, value)] if isinstance(value, list | tuple) else [flag, str(value)]


def read_study(path: Path) -> list[Cell]:
    """All cells of a study, seed by seed, the baselines first: a part of a study that was cut short is one, too.

    Raises:
        InputError: for an unknown key, method or data set, a bad value, data that cannot be read, or a ratio that a
            set cannot reach.
    """
    content = read_yaml(path)
    _check_keys(content, PARTS, f"{path}")
    common, sets, grids = (content.get(part) or {} for part in PARTS)
    for part, value in zip(PARTS, (common, sets, grids), strict=True):
        if not isinstance(value, dict):
            raise InputError(f"{path}: {part} is {value!r}, expected lines of 'name: value'")
    if not grids:
        raise InputError(f"{path} has no grids: expected at least one, with lists as its axes")
    for name, own in sets.items():
        if own is not None and not isinstance(own, dict):
            raise InputError(f"{path}: set {name} is {own!r}, expected lines of 'setting: value'")
        _refuse_own(f"{path}: set {name}", own or {})
        _check_keys(own or {}, (*_all_settings(), *SECOND_OF_OLD), f"{path}: set {name}")
    _refuse_own(f"{path}: settings", common)
    cells = [cell for name, grid in grids.items() for cell in _cells(path, str(name), grid, common, sets)]
    # Cells that differ in the name of their images only, such as two ratios that a set cannot tell apart, are one run.
    runs: dict[str, str] = {}
    cells = [replace(cell, run=runs.setdefault(digest_of(cell.run), cell.run)) for cell in cells]
    return sorted(cells, key=lambda cell: (cell.settings.seed, cell.kind != "baselines"))


@cache
def _all_settings() -> tuple[str, ...]:
    """Names of the settings of all methods."""
    return tuple({field.name: None for method in METHODS for field in fields(settings_class(method))})


def _check_keys(content: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for key in content:
        if key not in known:
            expected = f", expected {', '.join(known)}" if len(known) < 9 else ""
            hint = did_you_mean(str(key), known, ": {}") or expected
            raise InputError(f"{where}: unknown key {shown(str(key))}{hint}")


def _refuse_own(where: str, given: Iterable[str]) -> None:
    for key in given:
        if key in OWN:
            raise InputError(f"{where}: {key} cannot be given: the study sets it for each cell")
        if key == "minutes":
            raise InputError(f"{where}: minutes cannot be given: cells would differ in length; give steps or epochs")


def _cells(path: Path, name: str, grid: Any, common: dict[str, Any], sets: dict[str, Any]) -> list[Cell]:
    """The cells of one grid: the product of its axes, and their baselines."""
    where = f"{path}: grid {name}"
    if not isinstance(grid, dict):
        raise InputError(f"{where} is {grid!r}, expected lines of 'setting: value' or 'setting: [values]'")
    axes = {key: _axis(key, value) for key, value in grid.items() if key != "baselines"}
    _refuse_own(where, axes)
    baselines = grid.get("baselines", True)
    if baselines != "only":
        baselines = coerce("baselines", baselines, bool, where, ("yes", "no", "only"))
    cells = []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        chosen = _of_set(path, sets, point.pop("data", common.get("data", "phantom")))
        given = modernised({"data": ""} | common | chosen | point, every_setting())
        cells.append(_cell(where, name, "cell", given, axes.get("rho", [given.get("rho", 1)])))
    if not baselines:
        return cells
    bare = [_bare(cell) for cell in cells]
    # Totals are resolved by now, so that no ratios are needed.
    alone = [_cell(where, name, "baselines", given | {"baselines": "only"}, []) for given in _distinct(bare)]
    return alone if baselines == "only" else alone + cells


def _bare(cell: Cell) -> dict[str, Any]:
    """What its baselines depend on."""
    unused = OWN if cell.settings.init_baselines else (*OWN, "init")
    return {key: cell.given[key] for key in of_role(ALONE) if key in cell.given and key not in unused}


def _axis(key: str, value: Any) -> list[Any]:
    values = value if isinstance(value, list) and key not in LISTS else [value]
    if not values:
        raise InputError(f"{key} is an empty list, expected at least one value")
    return values


def _distinct(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [point for i, point in enumerate(points) if point not in points[:i]]


def _of_set(path: Path, sets: dict[str, Any], data: Any) -> dict[str, Any]:
    """A data set's own settings."""
    if not isinstance(data, str):
        raise InputError(f"{path}: data is {data!r}, expected the name of a set")
    own = {"data": data} | (sets.get(data) or {})
    name = str(own["data"])
    if name != "phantom" and not name.endswith(".npz") and not name.startswith(FILES):
        check_choice("data set", name, (*sets, "phantom", *medmnist_names()))
    return own


def _cell(where: str, grid: str, kind: str, given: dict[str, Any], rhos: list[Any]) -> Cell:
    """A cell whose settings are complete and whose images are known.

    Args:
        where: what errors call it.
        grid, kind: as in `Cell`.
        given: the settings that the study gives.
        rhos: all ratios of the grid, which ``total: common`` is for.

    Raises:
        InputError: a setting that cannot be, data that cannot be read, or a ratio that the set cannot reach.
    """
    if kind == "cell":
        given = given | {"baselines": "no"}
    common = given.get("total") == "common"
    settings = settings_from(given | {"total": None} if common else given, where)
    # Of their types: as flags, words of YAML such as yes and no would be others.
    kept = ("method", "recipe", "second", *(("total",) if common else ()))
    given = given | {name: getattr(settings, name) for name in given if name not in kept}
    if "second" in given:
        given = given | {"second": second_words(given["second"])}
    split = _of_split(settings)
    try:
        train = _training_split(split)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if isinstance(train, NotDownloaded):
        return Cell(grid, kind, _run_name(kind, settings, ""), settings.data, given, settings, str(train))
    if common:
        ratios = tuple(settings_from(given | {"total": None, "rho": rho}, where).rho for rho in rhos)
        given = given | {"total": _common_total(split, ratios, settings.profile)}
        settings = settings_from(given, where)
    if kind == "cell":
        # As they are, so that a command makes the same run again when an alias has moved.
        given = given | {"method": settings.method, "recipe": settings.recipe}
    try:
        subset = replace(split, rho=settings.rho, profile=settings.profile, total=settings.total)
        images = _images(subset)
        with_views_as_steps(settings, {})
        if settings.label_seeds:
            check_draws(settings, train.known_labels(EVALUATION)[subset_indices(subset, train)], train.name)
    except InputError as error:
        raise InputError(f"{where}: {settings.data}, rho {settings.rho:g}: {error}") from error
    return Cell(grid, kind, _run_name(kind, settings, images), train.name, given, settings)


def _of_split(settings: PretrainSettings) -> PretrainSettings:
    """Only what decides which training split is read."""
    return PretrainSettings(**{name: getattr(settings, name) for name in of_role(SPLIT)})


@cache
def _training_split(split: PretrainSettings) -> ImageStore | NotDownloaded:
    """A training split, or why it cannot be downloaded: that is tried once.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return load_split(split, "train", "cpu")
    except NotDownloaded as error:
        return error


def image_shape(settings: PretrainSettings) -> tuple[int, int]:
    """Channels and size in pixels of a cell's images, whose data can be had."""
    train = _training_split(_of_split(settings))
    assert isinstance(train, ImageStore)
    return train.channels, train.size


@cache
def _common_total(split: PretrainSettings, rhos: tuple[float, ...], profile: str) -> int:
    train = _training_split(split)
    assert isinstance(train, ImageStore)
    return largest_total(train.known_labels("a long tail"), rhos, profile, train.n_classes)


@cache
def _images(subset: PretrainSettings) -> str:
    """A hash of which images a long tail keeps.

    Raises:
        InputError: with a total, a ratio at which the smallest class would have less than half an image.
    """
    train = _training_split(replace(subset, rho=1.0, profile="exp", total=None))
    assert isinstance(train, ImageStore)
    indices = subset_indices(subset, train)
    if subset.total and subset.profile != "natural":
        largest = max(train.subset(indices).class_counts())
        if subset.rho > 2 * largest:
            raise InputError(
                f"{subset.total} images cannot reach this ratio: beside {largest} in the largest class the smallest "
                f"would have {largest / subset.rho:.2g}; use a ratio of at most {2 * largest}"
            )
    return hashlib.sha256(indices.numpy().tobytes()).hexdigest()


def _run_name(kind: str, settings: PretrainSettings, images: str) -> str:
    """A name one can read, and a hash of everything that the results depend on."""
    alone = {*of_role(ALONE)} - {*OWN}
    own = [field for field in fields(settings) if kind == "cell" or field.name in alone]
    left_out = [name for name in NOT_IDENTITY if images or name not in of_role(SUBSET)]
    # Without defaults, so that a setting that is new in a later version leaves the names of earlier runs as they are.
    changed = [field.name for field in own if getattr(settings, field.name) != field.default]
    identity = [(name, getattr(settings, name)) for name in changed if name not in (*left_out, "second")]
    # By the names that overrides had before 0.2.0, as those of published runs are.
    identity += [(f"second_{name}", value) for name, value in read_second(settings.second).items()]
    digest = hashlib.sha256(repr((kind, sorted(identity), images)).encode()).hexdigest()[:8]
    name = default_name(settings)
    if kind == "baselines":
        name = name.replace(f"-{settings.method}-{settings.recipe}-", "-baselines-")
    return f"{name}-{digest}"


def digest_of(run: str) -> str:
    """The end of a run's name, which equal runs share, whatever else they are called."""
    return run.rpartition("-")[2]


def write_plan(cells: list[Cell], path: Path) -> None:
    """``plan.csv``: every point of the grids, its run folder and the command that makes it; whole or not at all."""
    with replacing(path, newline="") as file:
        writer = csv.DictWriter(file, PLAN_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for cell in cells:
            s = cell.settings
            row = {name: getattr(s, name) for name in PLAN_COLUMNS if hasattr(s, name)} | {"total": s.total or 0}
            own = {"grid": cell.grid, "run": cell.run, "kind": cell.kind, "data": cell.data}
            writer.writerow(row | own | {"command": cell.command()})
