"""The tables of a report: finished runs to rows, rows to means over seeds."""

import csv
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from amimv import InputError
from amimv.trainers.comparisons import Interval, paired_bootstrap
from amimv.trainers.evaluation import COLUMNS

#: Columns that results of before had not.
LATER = ("total", "partner", "steps", "val_balanced_accuracy")
#: Flags that do not make another row of a table: they make another table, another seed, or nothing.
NOT_A_VARIANT = (
    *("data", "data-seed", "seed", "rho", "total", "profile", "method", "recipe", "sampler", "partner", "baselines"),
    *("finetune", "label-fractions", "supervised-steps", "supervised-lr", "knn-every", "save-every", "root"),
)
#: What a table is about: images and their imbalance.
SUBSET = ["data", "profile", "rho", "total"]
#: Baselines in the order of a table, and what they are called there.
BASELINES = {
    "majority": "majority class",
    "raw pixels": "raw pixels",
    "random": "random initialisation",
    "supervised": "from scratch, on the labels",
}
#: Probes and their columns; a network trained from scratch stands beside the fine-tuned ones.
PROBES = {"knn": "kNN", "linear": "linear", "fine-tuned": "fine-tuned", "classifier": "fine-tuned", "": "linear"}


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    environment: dict[str, Any]
    config: str
    command: str

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """What the run predicted for the test images; empty if it did not say."""
        path = self.folder / "predictions.npz"
        return dict(np.load(path, allow_pickle=False)) if path.is_file() else {}

    @property
    def seconds(self) -> float:
        return sum((self.environment.get("wall_seconds") or {}).values())


@dataclass
class Study:
    """All that a report is made of: one line per point of the grids, features, probe and label fraction."""

    rows: pd.DataFrame
    runs: dict[str, Run]
    failed: dict[str, str] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def read_study(folders: list[Path]) -> Study:
    """Everything that lies in the folders.

    Raises:
        InputError: a folder that is not there, or no finished run in any of them.
    """
    study = Study(pd.DataFrame(), {})
    frames, plans = [], []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: expected one with run folders, as runs/study")
        plan = _read_plan(folder / "plan.csv")
        plans.append(plan)
        for path in sorted({*folder.iterdir(), folder}):
            if (path / "config.yaml").is_file():
                frames += _read_run(path, plan, study)
            elif path.is_dir() and (path / "results.csv").is_file():
                study.left_out.append(f"{path.name}: results without a config.yaml")
        study.failed |= {path.stem: path.read_text().strip() for path in sorted(folder.glob("failed/*.txt"))}
    if not frames:
        raise InputError(f"no finished run in {', '.join(map(str, folders))}: expected folders with results.csv")
    plan = pd.concat(plans)
    planned = list(dict.fromkeys(plan["run"])) if len(plan) else []
    study.not_run = [name for name in planned if name not in study.runs and name not in study.failed]
    rows = _as_planned(pd.concat(frames, ignore_index=True), plan)
    rows["label"] = _labels(rows, study.runs)
    study.rows = rows
    return study


def _read_plan(path: Path) -> pd.DataFrame:
    columns = ["grid", "run", "profile", "rho", "total", "command"]
    return pd.read_csv(path, keep_default_na=False)[columns] if path.is_file() else pd.DataFrame(columns=columns)


def _read_run(folder: Path, plan: pd.DataFrame, study: Study) -> list[pd.DataFrame]:
    """A run's rows, none if it cannot be used: then the study says why."""
    name = folder.resolve().name
    try:
        if name in study.runs:
            raise ValueError("a run of this name was read already")
        with (folder / "results.csv").open() as file:
            header = next(csv.reader(file), [])
        missing = [column for column in COLUMNS if column not in (*header, *LATER)]
        if missing:
            raise ValueError(f"results.csv has no column {missing[0]}")
        rows = pd.read_csv(folder / "results.csv").reindex(columns=COLUMNS)
        if rows.empty or rows["balanced_accuracy"].isna().any():
            raise ValueError("results.csv is torn")
        environment = json.loads((folder / "environment.json").read_text())
    except FileNotFoundError as error:
        study.left_out.append(f"{name}: not finished, {Path(error.filename).name} is missing")
        return []
    except (ValueError, pd.errors.ParserError) as error:
        study.left_out.append(f"{name}: {str(error).splitlines()[0]}")
        return []
    commands = plan.loc[plan["run"] == name, "command"]
    command = commands.iloc[0] if len(commands) else shlex.join(["python", *environment.get("command", [])])
    study.runs[name] = Run(folder, environment, (folder / "config.yaml").read_text(), command)
    text = ["method", "recipe", "sampler", "partner", "probe"]
    rows[text] = rows[text].fillna("")
    rows["total"] = rows["total"].fillna(0)
    return [rows.assign(run=name, line=range(len(rows)))]


def _as_planned(rows: pd.DataFrame, plan: pd.DataFrame) -> pd.DataFrame:
    """Rows by the grids' words: a run that is two points of a grid stands in both."""
    planned = rows["run"].isin(plan["run"])
    points = plan[["run", "profile", "rho", "total"]].drop_duplicates()
    by_plan = rows[planned].drop(columns=["profile", "rho", "total"]).merge(points, on="run")
    return pd.concat([by_plan, rows[~planned]], ignore_index=True).astype({"rho": float, "total": int})


def _labels(rows: pd.DataFrame, runs: dict[str, Run]) -> list[str]:
    """What a table calls each row: the baseline, or method, recipe, samplers and whatever else the study varies."""
    flags = {name: _flags(run.command) for name, run in runs.items()}
    varied = _varied(rows[rows["features"] == "pretrained"], flags)
    labels = []
    for row in rows.to_dict("records"):
        if row["features"] != "pretrained":
            labels.append(BASELINES.get(row["features"], row["features"]))
            continue
        parts = [f"{row['method']} on {row['recipe']}"]
        parts += [f"{name} {row[name]}" for name in ("sampler", "partner") if row[name] not in ("", "uniform")]
        own = flags[row["run"]]
        parts += [f"{flag} {own[flag]}".strip() for flag in varied if flag in own]
        labels.append(", ".join(parts))
    return labels


def _varied(rows: pd.DataFrame, flags: dict[str, dict[str, str]]) -> list[str]:
    """Flags that differ between runs on the same data set."""
    found: list[str] = []
    for _, names in rows.groupby("data")["run"]:
        own = [flags[name] for name in dict.fromkeys(names)]
        for flag in dict.fromkeys(flag for one in own for flag in one):
            if flag not in (*NOT_A_VARIANT, *found) and len({one.get(flag) for one in own}) > 1:
                found.append(flag)
    return found


def _flags(command: str) -> dict[str, str]:
    words, flags = shlex.split(command), dict[str, str]()
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            flags[name] = ""
        elif name:
            flags[name] = f"{flags[name]} {word}".strip()
    return {name: value for name, value in flags.items() if name not in ("output", "name", "resume")}


def describe_subset(subset: tuple[Any, ...], rows: pd.DataFrame) -> str:
    """A heading: the data set, its imbalance as asked for and as it is."""
    data, profile, rho, total = subset
    whole = rows[rows["label_fraction"] == rows["label_fraction"].max()]
    shown = f"{data} (synthetic)" if data == "phantom" else data
    asked = "natural" if profile == "natural" or (profile == "exp" and rho == 1 and not total) else f"rho {rho:g}"
    images = int(whole["n_train"].max())
    kind = "" if total else ", capped" if asked != "natural" else ""
    return f"{shown}, {asked}{kind}: {images:,} training images, realised ratio {whole['realised_ratio'].max():.1f}"


def subsets(rows: pd.DataFrame) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """The rows of each data set and imbalance."""
    for key, own in rows.groupby(SUBSET, sort=True):
        yield tuple(key), own


def summarise(rows: pd.DataFrame, metric: str = "balanced_accuracy") -> pd.DataFrame:
    """Mean, standard deviation (of two seeds or more) and number of seeds, by label, probe's column and fraction.

    A run counts once, whatever number of points of the grids it is.
    """
    rows = rows.assign(column=rows["probe"].map(PROBES), baseline=rows["features"] != "pretrained")
    rows = rows.drop_duplicates(["run", "line"])
    keys = ["baseline", "label", "label_fraction", "column"]
    return rows.groupby(keys)[metric].agg(["mean", "std", "count"]).reset_index()


def order(labels: list[str]) -> list[str]:
    """Baselines first, then the methods by name."""
    first = [name for name in BASELINES.values() if name in labels]
    return first + sorted(label for label in set(labels) if label not in first)


def compare(rows: pd.DataFrame, study: Study, label: str, reference: str, fraction: float) -> Interval | None:
    """The linear probe of one row of a table against another's, over the same test images; None if predictions are
    missing, or the labels multi-hot."""
    chosen = rows[(rows["probe"] == "linear") & (rows["label_fraction"] == fraction)].drop_duplicates(["run", "line"])
    stacks: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for name in (label, reference):
        own = chosen[chosen["label"] == name]
        arrays = [
            (study.runs[run].arrays, f"row_{line:03d}") for run, line in zip(own["run"], own["line"], strict=True)
        ]
        if not arrays or any(key not in found or found["labels"].ndim > 1 for found, key in arrays):
            return None
        stacks.append(np.stack([found[key] for found, key in arrays]))
        labels += [found["labels"] for found, _ in arrays]
    if any(not np.array_equal(one, labels[0]) for one in labels):
        return None
    return paired_bootstrap(labels[0], stacks[0], stacks[1])


def long_form(study: Study) -> pd.DataFrame:
    """One line per subset, label fraction, row and probe: mean, spread and the runs behind it."""
    frames = []
    for key, own in subsets(study.rows):
        table = summarise(own)
        runs = own.assign(column=own["probe"].map(PROBES)).drop_duplicates(["run", "line"])
        names = runs.groupby(["label", "label_fraction", "column"])["run"].agg(" ".join).reset_index()
        table = table.merge(names, on=["label", "label_fraction", "column"])
        frames.append(table.assign(**dict(zip(SUBSET, key, strict=True))))
    renamed = {"column": "probe", "mean": "balanced_accuracy", "count": "seeds", "run": "runs"}
    columns = [*SUBSET, "label_fraction", "label", "probe", "balanced_accuracy", "std", "seeds", "runs"]
    return pd.concat(frames).rename(columns=renamed)[columns]
