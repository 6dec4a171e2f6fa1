"""Run folders as one table: what is read, what is left out and why, what failed and what is still to run."""

import csv
import io
import json
import math
import shlex
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from amimv import InputError, first_line
from amimv.fields import EVALUATION
from amimv.trainers.evaluation import COLUMNS, ORDER
from amimv.trainers.layers import modernised, second_words
from amimv.trainers.settings import ALONE, METHODS, every_setting, of_role, settings_class, that_touch
from amimv.trainers.study import NOT_IDENTITY, PLAN_COLUMNS

#: Columns that results of earlier versions lack.
OPTIONAL = ("total", "partner", "steps", "val_balanced_accuracy")
SCORES = ("balanced_accuracy", "accuracy", "macro_f1", "auc", "head", "medium", "tail")
NUMBERS = ("rho", "realised_ratio", "total", "n_train", "label_fraction", "seed", "steps", "val_balanced_accuracy")
#: Where files are: a folder, or within an archive.
Folder = Path | zipfile.Path
#: Without these a line says nothing.
NEEDED = ("data", "features", "rho", "n_train", "label_fraction", "seed", "balanced_accuracy")
PROBES = ("knn", "linear", "classifier", "fine-tuned", "")
#: Folders of a study that are no runs.
OWN_FOLDERS = ("failed", "logs", "locks", "jobs")
#: Which images of which set a table is about.
SUBSET = ["grid", "data", "profile", "rho", "total"]
#: What fine-tuning and the supervised reference depend on, and frozen features do not.
OF_LABELS = ("supervised_steps", "supervised_lr")
#: Settings that the name of a data set tells.
OF_DATA_NAME = ("data_seed", "size", "channels")
#: What is told by columns of its own or the name of the data set, or does not touch frozen features.
TOLD = {*COLUMNS, *OF_DATA_NAME, "baselines", *that_touch(EVALUATION), *NOT_IDENTITY} - {"steps"}
#: What the supervised reference depends on, besides what is told.
OF_SUPERVISED = (*(name for name in of_role(ALONE) if name not in TOLD), *OF_LABELS)
NAMES = {
    "majority": "majority class",
    "raw pixels": "raw pixels",
    "random": "random initialisation",
    "supervised": "supervised from scratch",
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: of the run.
        anchor: its id in the page, distinct among all runs.
        config: ``config.yaml`` as a mapping, on the defaults of settings that it lacks.
        config_text: ``config.yaml`` as it is written.
        environment: ``environment.json``, empty if it cannot be read.
        command: what makes it again, empty if unknown.
    """

    folder: Folder
    anchor: str
    config: Mapping[str, Any]
    config_text: str
    environment: Mapping[str, Any]
    command: str


@dataclass(frozen=True)
class Predictions:
    """A run's ``predictions.npz``: ``labels`` ``(N,)`` or ``(N, L)``; ``rows[i]`` of line ``i`` of its results."""

    labels: np.ndarray
    rows: tuple[np.ndarray, ...]
    train_counts: np.ndarray
    class_names: tuple[str, ...]
    projection: np.ndarray | None


@dataclass
class Study:
    """All that a report is about.

    Attributes:
        rows: a line per result and grid: the columns of ``results.csv`` and ``grid``, ``anchor`` (of its run),
            ``line`` (in its results), ``name`` (of its row in a table), ``baseline`` (whether it is one).
        runs: by anchor.
        lines: of each run's results, by anchor.
        left_out: (folder, reason) of what could not be used.
        failed: (name, reason) of a study's cells.
        pending: names of a study's cells without results that did not fail.
        repeats: results with the same settings and seed as another one, which are not used.
    """

    rows: pd.DataFrame
    runs: dict[str, Run] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
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
    study, frames = Study(pd.DataFrame()), []
    for path in map(open_folder, paths):
        try:
            plan = _read_plan(path / "plan.csv")
        except InputError as error:
            plan = []
            study.left_out.append((str(path / "plan.csv"), str(error)))
        folders = [path] if (path / "config.yaml").is_file() else [p for p in _children(path) if p.is_dir()]
        for folder in folders:
            if folder.name not in OWN_FOLDERS and not folder.name.startswith("."):
                frames += _add_run(study, folder, [line for line in plan if line["run"] == folder.name])
        done = {str(run.folder) for run in study.runs.values()}
        study.failed += [(name, reason) for name, reason in _failures(path) if str(path / name) not in done]
        _note_pending(study, path, plan)
    if not frames:
        where = "; ".join(f"{name}: {reason}" for name, reason in study.left_out[:3]) or "no run folder in it"
        raise InputError(f"no finished run in {', '.join(map(str, paths))}: {where}")
    rows = pd.concat(frames, ignore_index=True)
    if pool_grids:
        rows["grid"] = ""
    rows["data"] = _data_labels(rows, study.runs)
    rows["name"] = _row_names(rows, study.runs)
    identity = [*SUBSET, "label_fraction", "name", "probe", "seed"]
    repeated = rows.duplicated(identity)
    # One run named by several pooled grids is no repeat, nor are baselines that every run brings along.
    again = rows[repeated & ~rows["baseline"]].drop_duplicates(["anchor", "line"])
    kept = set(zip(rows["anchor"][~repeated], rows["line"][~repeated], strict=True))
    study.repeats = sum((a, line) not in kept for a, line in zip(again["anchor"], again["line"], strict=True))
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


def _failures(path: Folder) -> Iterable[tuple[str, str]]:
    """(run, reason) of each note in ``failed/``."""
    notes = [path for path in _children(path / "failed") if path.name.endswith(".txt")]
    return [(path.name[:-4], path.read_text(errors="replace").strip()) for path in notes]


def _read_plan(path: Folder) -> list[dict[str, str]]:
    """The lines of a study's plan; none without one."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", errors="replace") as file:
            lines = list(csv.DictReader(file))
    except (csv.Error, OSError) as error:
        raise InputError(f"{path} is no plan: {error}") from error
    for number, line in enumerate(lines, 2):
        if None in line or any(line.get(name) is None for name in PLAN_COLUMNS):
            raise InputError(f"{path}, line {number}: expected {len(PLAN_COLUMNS)} columns: write it again")
        if not all(_is_number(line[name]) for name in ("rho", "total")):
            raise InputError(f"{path}, line {number}: rho or total is no number: write it again")
    return lines


def _add_run(study: Study, folder: Folder, plan: list[dict[str, str]]) -> list[pd.DataFrame]:
    """The results of one run, once for each point of the grids that it stands for; none if it cannot be used."""
    try:
        text = (folder / "config.yaml").read_text()
        config = yaml.safe_load(text)
        if not isinstance(config, dict):
            raise InputError("config.yaml holds no settings")
        results = read_results(folder / "results.csv")
        config = _with_defaults(config)
    except Exception as error:  # of any kind: somebody's folder is not to cost the others their report
        study.left_out.append((str(folder), _reason(folder, error)))
        return []
    environment = read_environment(folder)
    taken = sum(run.folder.name == folder.name for run in study.runs.values())
    anchor = f"run-{folder.name}" + (f"-{taken + 1}" if taken else "")
    command = plan[0]["command"] if plan else command_of(environment)
    study.lines[anchor] = len(results)
    study.runs[anchor] = Run(folder, anchor, config, text, environment, command)
    baseline = results["features"] != "pretrained"
    results = results.assign(anchor=anchor, line=range(len(results)), grid="", baseline=baseline)
    points = {(p["grid"], p["profile"], float(p["rho"]), float(p["total"])) for p in plan}
    return [results.assign(grid=g, profile=p, rho=r, total=t) for g, p, r, t in sorted(points)] or [results]


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, and of those that its version did not know yet the defaults, which are what it did."""
    method = str(config.get("method", ""))
    if method not in METHODS:
        return config
    now = modernised(config, every_setting())
    second = {name: value for name, value in (now.get("second") or {}).items() if value is not None}
    return asdict(settings_class(method)()) | now | {"second": second_words(second)}


def _reason(folder: Folder, error: Exception) -> str:
    if not (folder / "config.yaml").is_file():
        return "not a run folder: it has no config.yaml"
    if not (folder / "results.csv").is_file():
        return "not finished: it has no results.csv"
    if isinstance(error, yaml.YAMLError):
        return "config.yaml is not YAML"
    if isinstance(error, UnicodeDecodeError):
        return "config.yaml or results.csv is no text"
    if isinstance(error, InputError):
        return str(error)
    return f"cannot be read: {type(error).__name__}: {first_line(error)}"


def read_results(path: Folder) -> pd.DataFrame:
    """The lines of a ``results.csv``, numbers as floats (empty ones NaN), texts as they are.

    Raises:
        InputError: an unknown or missing column, a torn line, or a value that cannot be.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader.fieldnames or ())
        unknown = [name for name in found if name not in COLUMNS]
        missing = [name for name in COLUMNS if name not in found and name not in OPTIONAL]
        if unknown:
            raise InputError(f"results.csv has an unknown column '{unknown[0]}': made by another version?")
        if missing:
            raise InputError(f"results.csv lacks the column '{missing[0]}': torn, or no results of a run")
        lines = list(reader)
    if not lines:
        raise InputError("results.csv has no lines")
    for number, line in enumerate(lines, 2):
        problem = _problem(line)
        if problem:
            raise InputError(f"results.csv, line {number}: {problem}")
    frame = pd.DataFrame(lines).reindex(columns=COLUMNS).astype(object).fillna("")
    for name in (*NUMBERS, *SCORES):
        frame[name] = pd.to_numeric(frame[name].replace("", None))
    # Given indices have no ratio, and no ratio is 0.
    frame[["total", "rho"]] = frame[["total", "rho"]].fillna(0.0)
    return frame


def _problem(line: dict[Any, Any]) -> str:
    """Why a line cannot be used; empty if it can."""
    if None in line or any(value is None for value in line.values()):
        return "torn: it has another number of values than the header"
    for name in (*NUMBERS, *SCORES):
        value = line.get(name, "")
        needed = name in NEEDED and (name, line["profile"]) != ("rho", "indices")
        if (value == "" and not needed) or (value == "inf" and name == "realised_ratio"):
            continue
        if not _is_number(value):
            return f"{name} is '{value}', expected a number"
        if name in SCORES and not 0 <= float(value) <= 1:
            return f"{name} is {value}, expected 0 to 1"
    if line["features"] not in ORDER:
        return f"features are '{line['features']}', expected one of {', '.join(ORDER)}"
    return "" if line["probe"] in PROBES else f"unknown probe '{line['probe']}'"


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def read_environment(folder: Folder) -> dict[str, Any]:
    try:
        content = json.loads((folder / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def command_of(environment: Mapping[str, Any]) -> str:
    words = environment.get("command")
    words = words if isinstance(words, list) else []
    return shlex.join(["python", f"trainers/{words[0]}", *map(str, words[1:])]) if words else ""


def _note_pending(study: Study, path: Folder, plan: list[dict[str, str]]) -> None:
    """Cells of the plan without results: they replace what was said about their half-written folders."""
    known = {str(run.folder) for run in study.runs.values()} | {name for name, _ in study.left_out}
    failed = {name for name, _ in study.failed}
    unfinished = {name for name, reason in study.left_out if reason.startswith("not finished")}
    for name in dict.fromkeys(line["run"] for line in plan):
        if name not in failed and (str(path / name) not in known or str(path / name) in unfinished):
            study.pending.append(name)
    planned = {line["run"] for line in plan}
    told = {str(path / name) for name in planned if str(path / name) in unfinished}
    study.left_out = [(name, reason) for name, reason in study.left_out if name not in told]


def _data_labels(rows: pd.DataFrame, runs: Mapping[str, Run]) -> list[str]:
    """Names of the data sets that tell apart whatever has other images."""
    seeds: dict[str, set[str]] = {}
    for data, anchor in zip(rows["data"], rows["anchor"], strict=True):
        seeds.setdefault(data, set()).add(str(runs[anchor].config.get("data_seed", 0)))

    def label(data: str, config: Mapping[str, Any]) -> str:
        words = [f"{data} (synthetic)" if data == "phantom" else data]
        words += [f"{config['size']} px"] if config.get("size") not in (None, 28) else []
        words += [f"{config['channels']} channels"] if config.get("channels") else []
        words += [f"data seed {config.get('data_seed', 0)}"] if len(seeds[data]) > 1 else []
        return ", ".join(words)

    return [label(d, runs[a].config) for d, a in zip(rows["data"], rows["anchor"], strict=True)]


def _row_names(rows: pd.DataFrame, runs: Mapping[str, Run]) -> list[str]:
    """What each result's row is called: settings beside method, recipe and samplers are named where they tell rows of
    one table apart, unless more than half of the runs have that value; no more than four where these do.
    """
    names = pd.Series([_plain_name(row) for row in rows.to_dict("records")], index=rows.index)
    _tell_apart(names, rows, runs, _settings_of)
    # Frozen features of the same runs keep their name.
    fine_tuned = rows[(rows["probe"] == "fine-tuned") & ~rows["baseline"]]
    _tell_apart(names, fine_tuned, runs, lambda features, known: OF_LABELS)
    return names.tolist()


def _tell_apart(
    names: pd.Series,
    rows: pd.DataFrame,
    runs: Mapping[str, Run],
    settings_of: Callable[[str, set[str]], Iterable[str]],
) -> None:
    """Add what differs to the names of these rows, in place.

    Args:
        names: of all rows, by their index.
        rows: which may get a longer name.
        runs: by anchor.
        settings_of: what matters to such features, of all settings that the runs have.
    """
    for _, group in rows.groupby([names.loc[rows.index], "grid", "data"], sort=False):
        configs = {anchor: runs[anchor].config for anchor in group["anchor"].unique()}
        known = {name for config in configs.values() for name in config}
        matter = list(settings_of(group["features"].iloc[0], known))
        differing: dict[str, None] = {}
        for _, table in group.groupby(SUBSET, sort=False):
            own_configs = [configs[anchor] for anchor in table["anchor"].unique()]
            differing |= {s: None for s in matter if len({repr(config.get(s)) for config in own_configs}) > 1}
        usual = {s: _usual([config.get(s) for config in configs.values()]) for s in differing}
        own = {
            anchor: tuple(f"{s} {config.get(s)}" for s in differing if repr(config.get(s)) != usual[s])
            for anchor, config in configs.items()
        }
        short = {words: _shortened(words) for words in own.values()}
        if len(set(short.values())) < len(short):
            short = {words: words for words in short}
        for index, anchor in group["anchor"].items():
            names[index] = ", ".join([names[index], *short[own[anchor]]])


def _shortened(words: tuple[str, ...], most: int = 4) -> tuple[str, ...]:
    return (*words[:most], f"{len(words) - most} more") if len(words) > most else words


def _plain_name(row: Mapping[Any, Any]) -> str:
    if row["baseline"]:
        return NAMES[row["features"]]
    words = [f"{row['method']} on {row['recipe']}"]
    words += [row["sampler"]] if row["sampler"] not in ("", "uniform") else []
    words += [f"partner {row['partner']}"] if row["partner"] not in ("", "uniform") else []
    return ", ".join(words)


def _settings_of(features: str, known: set[str]) -> Iterable[str]:
    """Settings that these features depend on, beside what columns tell."""
    if features == "majority":
        return ()
    if features == "raw pixels":
        return ("view_size",)
    if features == "random":
        return ("backbone", "view_size")
    return OF_SUPERVISED if features == "supervised" else sorted(known - TOLD)


def _usual(values: list[Any]) -> str:
    """The value that more than half have; else nothing."""
    texts = [repr(value) for value in values]
    most = max(set(texts), key=texts.count)
    return most if 2 * texts.count(most) > len(texts) else ""


@cache
def read_predictions(folder: Folder, lines: int) -> Predictions | None:
    """What a run with so many results predicted; None where the file is missing, torn, or of other results."""
    try:
        with np.load(io.BytesIO((folder / "predictions.npz").read_bytes()), allow_pickle=False) as stored:
            labels = stored["labels"].astype(np.int64)
            rows = tuple(stored[f"row_{i:03d}"] for i in range(lines))
            if any(row.shape != labels.shape for row in rows) or f"row_{lines:03d}" in stored:
                return None
            projection = stored.get("projection")
            counts, names = stored["train_counts"], tuple(map(str, stored["class_names"]))
            if counts.shape != (len(names),) or (projection is not None and projection.shape != (len(labels), 2)):
                return None
            return Predictions(labels, rows, counts, names, projection)
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile):
        return None
