"""Run folders as one table: what is read, what is left out and why, what failed and what is still to run."""

import io
import json
import shlex
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from amimv import InputError, first_line
from amimv.fields import EVALUATION
from amimv.trainers.data_settings import ALONE
from amimv.trainers.evaluation import COLUMNS
from amimv.trainers.evaluation.metrics import SCORES
from amimv.trainers.evaluation.results import (
    FROZEN,
    INITIAL,
    SUPERVISED_INITIAL,
    UNLEAKED,
    WITHOUT_LABELS,
    kind_of,
)
from amimv.trainers.layers import modernised, second_words
from amimv.trainers.settings import METHODS, every_setting, of_role, settings_class, that_touch
from amimv.trainers.study import NOT_IDENTITY, PLAN_COLUMNS

#: Where files are: a folder, or within an archive.
Folder = Path | zipfile.Path
NUMBERS = (
    *("rho", "realised_ratio", "total", "n_train", "label_fraction", "seed", "steps", "val_balanced_accuracy"),
    *(*SCORES, UNLEAKED, *WITHOUT_LABELS),
)
#: Without these a line says nothing; `revision` is the last, which a torn line lacks.
NEEDED = ["data", "features", "rho", "n_train", "label_fraction", "seed", "balanced_accuracy", "revision"]
#: Folders of a study that are no runs.
OWN_FOLDERS = ("failed", "logs", "locks", "jobs")
UNFINISHED = "not finished"
#: Which images of which set a table is about.
SUBSET = ["grid", "data", "profile", "rho", "total"]
#: What a plan decides of them.
POINT = ["grid", "profile", "rho", "total"]
#: What fine-tuning and the supervised reference depend on, and frozen features do not.
OF_LABELS = tuple(name for name in that_touch(EVALUATION) if name.startswith("supervised_"))
#: Settings that the name of a data set tells.
OF_DATA_NAME = ("data_seed", "size", "channels", "split", "split_seed", "resplit")
#: What is told by columns of its own or the name of the data set, or does not touch frozen features.
TOLD = {*COLUMNS, *OF_DATA_NAME, "baselines", *that_touch(EVALUATION), *NOT_IDENTITY} - {"steps"}
#: What the supervised reference depends on, besides what is told.
OF_SUPERVISED = (*(name for name in of_role(ALONE) if name not in TOLD), *OF_LABELS)
#: Baselines by their kind of features, in the order of a table: what they are called (frozen models have names
#: of their own), and the settings that they depend on.
BASELINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "majority": ("majority class", ()),
    "raw pixels": ("raw pixels", ("view_size",)),
    "random": ("random initialisation", ("backbone", "view_size")),
    INITIAL: (INITIAL, ("backbone", "init", "view_size")),
    FROZEN: (FROZEN, ()),
    "supervised": ("supervised from scratch", tuple(name for name in OF_SUPERVISED if name != "init")),
    SUPERVISED_INITIAL: (SUPERVISED_INITIAL, OF_SUPERVISED),
}
# libyaml's, where it is there, is ten times as fast.
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: of the run.
        anchor: its id in the page, distinct among all runs.
        lines: how many results it has.
        config: ``config.yaml`` as a mapping, on the defaults of settings that it lacks.
        config_text: ``config.yaml`` as it is written.
        command: what makes it again, empty if unknown.
        told: what ``environment.json`` says for people, by title; `versions` and `revision` of it by themselves.
    """

    folder: Folder
    anchor: str
    lines: int
    config: Mapping[str, Any]
    config_text: str
    command: str
    told: Mapping[str, str]
    versions: str
    revision: str


@dataclass(frozen=True)
class Predictions:
    """A run's ``predictions.npz``: ``labels`` ``(N,)`` or ``(N, L)``; ``rows[i]`` of line ``i`` of its results;
    ``projection`` ``(N, 2)`` or empty.
    """

    labels: np.ndarray
    rows: tuple[np.ndarray, ...]
    train_counts: np.ndarray
    class_names: tuple[str, ...]
    projection: np.ndarray


@dataclass
class Study:
    """All that a report is about.

    Attributes:
        rows: a line per result and grid: the columns of ``results.csv`` and ``grid``, ``anchor`` (of its run),
            ``line`` (in its results), ``name`` (of its row in a table), ``baseline`` (whether it is one).
        runs: by anchor.
        left_out: (folder, reason) of what could not be used.
        failed: (name, reason) of a study's cells.
        pending: names of a study's cells without results that did not fail.
        repeats: results with the same settings and seed as another one, which are not used.
    """

    rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    runs: dict[str, Run] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    repeats: int = 0


def read_study(paths: Iterable[Path], pool_grids: bool = False) -> Study:
    """Everything in these folders of runs, or runs.

    Args:
        paths: folders of run folders, archives of such, or run folders.
        pool_grids: put what several grids say about the same images into one table.

    Raises:
        InputError: a folder that does not exist, or not one finished run in all of them.
    """
    study = Study()
    frames = [frame for path in paths for frame in _read_folder(study, open_folder(path))]
    if not frames:
        where = "; ".join(f"{name}: {reason}" for name, reason in study.left_out[:3]) or "no run folder in it"
        raise InputError(f"no finished run in {', '.join(map(str, paths))}: {where}")
    rows = pd.concat(frames, ignore_index=True)
    if pool_grids:
        rows = rows.assign(grid="").drop_duplicates([*SUBSET, "anchor", "line"], ignore_index=True)
    rows["data"] = _data_labels(rows, study.runs)
    rows["name"] = _row_names(rows, study.runs)
    repeated = rows.duplicated([*SUBSET, "label_fraction", "label_seed", "name", "probe", "seed"])
    # Baselines that every run brings along are no repeat, nor is one result in several grids two.
    study.repeats = len(rows[repeated & ~rows["baseline"]].drop_duplicates(["anchor", "line"]))
    study.rows = rows[~repeated].reset_index(drop=True)
    return study


def open_folder(path: Path) -> Folder:
    """A folder, or an archive as one.

    Raises:
        InputError: neither.
    """
    if zipfile.is_zipfile(path):
        return zipfile.Path(path)
    if not path.is_dir():
        raise InputError(f"there is no folder or archive {path}: give folders of runs, such as runs/")
    return path


def _children(path: Folder) -> list[Folder]:
    children: list[Folder] = list(path.iterdir()) if path.is_dir() else []
    return sorted(children, key=lambda one: one.name)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever goes wrong in here is one line that names the file: it is not to cost other folders their report."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} cannot be read: {type(error).__name__}: {first_line(error)}") from error


def _read_folder(study: Study, path: Folder) -> Iterator[pd.DataFrame]:
    """The results of each run of a folder; what else is in it is added to the study."""
    try:
        plan = _read_plan(path / "plan.csv")
    except InputError as error:
        study.left_out.append((str(path / "plan.csv"), str(error)))
        plan = pd.DataFrame(columns=PLAN_COLUMNS)
    done, broken = set(), set()
    for folder in [path] if (path / "config.yaml").is_file() else _children(path):
        if not folder.is_dir() or folder.name in OWN_FOLDERS or folder.name.startswith("."):
            continue
        try:
            yield _read_run(study, folder, plan[plan["run"] == folder.name])
            done.add(folder.name)
        except InputError as error:
            if folder.name not in set(plan["run"]) or not str(error).startswith(UNFINISHED):
                study.left_out.append((str(folder), str(error)))
                broken.add(folder.name)
    notes = {note.name[:-4]: note for note in _children(path / "failed") if note.name.endswith(".txt")}
    failed = {name: note.read_text(errors="replace").strip() for name, note in notes.items() if name not in done}
    study.failed += failed.items()
    study.pending += [name for name in plan["run"].unique() if name not in done | broken | set(failed)]


def _read_plan(path: Folder) -> pd.DataFrame:
    """The lines of a study's plan; none without one."""
    if not path.is_file():
        return pd.DataFrame(columns=PLAN_COLUMNS)
    with _naming("plan.csv"):
        plan = _read_csv(path, ("rho", "total"))[list(PLAN_COLUMNS)]
        if plan.drop(columns=["rho", "total"]).isna().any(axis=None):
            raise InputError("plan.csv is torn: write it again")
        return plan.fillna({"rho": 0.0, "total": 0.0})


def _read_csv(path: Folder, numbers: Iterable[str]) -> pd.DataFrame:
    """A table in which these columns are floats (empty ones NaN) and all others texts as they are."""
    with path.open(encoding="utf-8", newline="") as file:
        kinds: dict[str, type] = defaultdict(lambda: str, dict.fromkeys(numbers, float))
        return pd.read_csv(file, dtype=kinds, keep_default_na=False, na_values={name: [""] for name in numbers})


def _read_run(study: Study, folder: Folder, plan: pd.DataFrame) -> pd.DataFrame:
    """The results of a run, once for each point of the grids that it stands for.

    Raises:
        InputError: a file that is missing or damaged.
    """
    for name, what in (("config.yaml", "not a run folder"), ("results.csv", UNFINISHED)):
        if not (folder / name).is_file():
            raise InputError(f"{what}: it has no {name}")
    with _naming("config.yaml"):
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        config = _with_defaults(yaml.load(text, Loader=SafeLoader))
    with _naming("results.csv"):
        results = read_results(folder / "results.csv")
    with _naming("environment.json"):
        environment = read_environment(folder)
        told, versions = _describe(environment)
    taken = sum(run.folder.name == folder.name for run in study.runs.values())
    anchor = f"run-{folder.name}" + (f"-{taken + 1}" if taken else "")
    command = plan["command"].iloc[0] if len(plan) else command_of(environment)
    revision = environment.get("revision", "")
    study.runs[anchor] = Run(folder, anchor, len(results), config, text, command, told, versions, revision)
    drawn = (results["label_fraction"] < 1) & (results["label_seed"] == "")  # by an earlier version
    results["label_seed"] = results["label_seed"].mask(drawn, str(config.get("data_seed", 0)))
    results = results.assign(anchor=anchor, line=range(len(results)), grid="")
    points = plan[POINT].drop_duplicates().sort_values(POINT)
    return results.drop(columns=list(points)).merge(points, how="cross") if len(points) else results


def read_results(path: Folder) -> pd.DataFrame:
    """The lines of a ``results.csv``, with columns that an earlier version lacked, and ``baseline``.

    Raises:
        InputError: a torn line, or a table of something else.
    """
    frame = _read_csv(path, NUMBERS).reindex(columns=COLUMNS)
    # Given indices have no ratio, and no ratio is 0.
    frame["rho"] = frame["rho"].mask(frame["rho"].isna() & (frame["profile"] == "indices"), 0.0)
    missing = frame[NEEDED].replace("", np.nan).isna()
    if missing.any(axis=None) or frame.empty:
        line, column = missing.stack().idxmax() if len(frame) else (0, "data")
        raise InputError(f"results.csv has no {column} in line {line + 2}: torn, or not of a run")
    texts = frame.columns.difference(NUMBERS)
    frame[texts] = frame[texts].astype(object).fillna("")
    return frame.fillna({"total": 0.0}).assign(baseline=frame["features"] != "pretrained")


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, and of those that its version did not know yet the defaults, which are what it did."""
    method = str(config.get("method", ""))
    if method not in METHODS:
        return config
    now = modernised(config, every_setting())
    second = {name: value for name, value in (now.get("second") or {}).items() if value is not None}
    return asdict(settings_class(method)()) | now | {"second": second_words(second)}


def read_environment(folder: Folder) -> dict[str, Any]:
    """A run's ``environment.json``; empty without one."""
    path = folder / "environment.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def command_of(environment: Mapping[str, Any]) -> str:
    """What makes the run again; empty if it is unknown."""
    script, *flags = environment.get("command") or [""]
    return shlex.join(["python", f"trainers/{script}", *flags]) if script else ""


def _describe(environment: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """What is told by title, and versions of packages, of an ``environment.json``."""
    packages = {"Python": environment.get("python", "")} | environment.get("packages", {})
    machine = f"{environment.get('gpu') or environment.get('device', '')}, {environment.get('threads')} threads"
    wall = ", ".join(f"{part} {seconds:,.0f} s" for part, seconds in environment.get("wall_seconds", {}).items())
    told = {
        "Revision at training": environment.get("revision", ""),
        "Wall time": f"{wall} ({machine})" if wall else "",
        "Training images by class": ", ".join(map(str, environment.get("training_counts") or ())),
    }
    return told, ", ".join(f"{name} {version}" for name, version in packages.items() if version)


def _data_labels(rows: pd.DataFrame, runs: Mapping[str, Run]) -> list[str]:
    """Names of the data sets that tell apart whatever has other images."""
    configs = [runs[anchor].config for anchor in rows["anchor"]]
    seeds = pd.Series([f"data seed {config.get('data_seed', 0)}" for config in configs], rows.index)
    cuts = pd.Series(list(map(_cut, configs)), rows.index)
    told = (one.where(one.groupby(rows["data"]).transform("nunique") > 1, "") for one in (seeds, cuts))

    def label(data: str, config: Mapping[str, Any], *told: str) -> str:
        size, channels = config.get("size"), config.get("channels")
        words = [f"{data} (synthetic)" if data == "phantom" else data]
        words += [f"{size} px"] if size and size != 28 else []
        words += [f"{channels} channels"] if channels else []
        return ", ".join([*words, *filter(None, told)])

    return list(map(label, rows["data"], configs, *told))


def _cut(config: Mapping[str, Any]) -> str:
    """How the data were split."""
    if not (shares := config.get("split")):
        return "own splits"
    anew = "anew " if config.get("resplit") else ""
    return f"split {anew}{' '.join(f'{share:g}' for share in shares)}, seed {config.get('split_seed', 0)}"


def _row_names(rows: pd.DataFrame, runs: Mapping[str, Run]) -> pd.Series:
    """What each result's row is called: settings beside method, recipe and samplers are named where they tell rows of
    one table apart, unless more than half of the runs have that value; no more than four where these do.
    """
    names = rows["method"] + " on " + rows["recipe"]
    for column, word in (("sampler", ""), ("partner", "partner ")):
        names += (", " + word + rows[column]).where(~rows[column].isin(["", "uniform"]), "")
    names = names.where(~rows["baseline"], rows["features"].map(lambda one: BASELINES.get(one, (one,))[0]))
    for _, own in rows.groupby([names, "grid", "data"], sort=False):
        known = {setting for anchor in own["anchor"].unique() for setting in runs[anchor].config}
        kind = kind_of(own["features"].iloc[0])
        matter = BASELINES[kind][1] if kind in BASELINES else sorted(known - TOLD)
        names[own.index] += _what_differs(own, runs, matter)
    # Frozen features of the same runs keep their name.
    fine_tuned = rows[(rows["probe"] == "fine-tuned") & ~rows["baseline"]]
    for _, own in fine_tuned.groupby([names, "grid", "data"], sort=False):
        names[own.index] += _what_differs(own, runs, OF_LABELS)
    return names


def _what_differs(rows: pd.DataFrame, runs: Mapping[str, Run], matter: Iterable[str]) -> pd.Series:
    """Of each of these results, which have one name, what it is to be told by."""
    told = pd.DataFrame(
        {anchor: {s: _told(s, runs[anchor].config.get(s)) for s in matter} for anchor in rows["anchor"].unique()}
    ).T
    tables = [told.loc[own["anchor"].unique()].nunique() > 1 for _, own in rows.groupby(SUBSET)]
    differing = told.columns[pd.concat(tables, axis=1).any(axis=1)]
    usual = {s: counts.index[0] for s in differing if 2 * (counts := told[s].value_counts()).iloc[0] > len(told)}
    words = {anchor: [w for s, w in own.items() if w != usual.get(s)] for anchor, own in told[differing].T.items()}
    long = {anchor: "".join(f", {word}" for word in own) for anchor, own in words.items()}
    short = {
        anchor: "".join(f", {word}" for word in own[:4]) + (f", {len(own) - 4} more" if len(own) > 4 else "")
        for anchor, own in words.items()
    }
    return rows["anchor"].map(short if len(set(short.values())) == len(set(long.values())) else long)


def _told(setting: str, value: Any) -> str:
    """A setting in words, the same where it means the same: unset is 0 or empty in older runs, None in newer ones."""
    if isinstance(value, list | tuple):
        return f"{setting} {', '.join(map(str, value))}"
    whole = isinstance(value, float) and value.is_integer()
    return f"{setting} {int(value) if whole else value}" if value else f"no {setting}"


@cache
def read_predictions(run: Folder, lines: int) -> Predictions | None:
    """What a run with so many results predicted; None where the file is missing, torn, or of other results."""
    try:
        with np.load(io.BytesIO((run / "predictions.npz").read_bytes()), allow_pickle=False) as stored:
            labels = stored["labels"].astype(np.int64)
            rows = tuple(stored[f"row_{i:03d}"] for i in range(lines))
            counts, names = stored["train_counts"], tuple(map(str, stored["class_names"]))
            places = stored.get("projection", np.empty((0, 2)))
            fits = {row.shape for row in rows} == {labels.shape} and counts.shape == (len(names),)
            fits &= places.shape in ((0, 2), (len(labels), 2))
            return Predictions(labels, rows, counts, names, places) if fits else None
    except Exception:  # of any kind: pictures and intervals are left out, the numbers stand
        return None
