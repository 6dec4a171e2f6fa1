"""The rows of ``results.csv``: what a probe said, as a file and as a table for people."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from amimv.files import replacing
from amimv.trainers.evaluation.metrics import SCORES

COLUMNS = [
    "run",
    "data",
    "profile",
    "rho",
    "realised_ratio",
    "total",
    "n_train",
    "method",
    "recipe",
    "sampler",
    "partner",
    "features",
    "probe",
    "k",
    "label_fraction",
    "seed",
    "steps",
    "val_balanced_accuracy",
    *SCORES,
    "revision",
]

#: Of the features in a table.
ORDER = ("majority", "raw pixels", "random", "pretrained", "supervised")


@dataclass(frozen=True)
class Judged:
    """What one probe on some features said.

    Attributes:
        features: majority, raw pixels, random, pretrained or supervised.
        probe: knn, linear, classifier (from scratch), fine-tuned, or empty for the majority class.
        k: neighbours of kNN, else empty.
        val, test: class scores ``(N, C)`` in [0, 1]; every choice was made on those of val.
    """

    features: str
    probe: str
    k: int | str
    val: Tensor
    test: Tensor


def write_results(rows: list[dict[str, Any]], path: Path) -> None:
    """``results.csv``, whole or not at all."""
    with replacing(path, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """The rows for people, in percent."""
    table = Table(title=title, title_justify="left")
    shown = sorted(SCORES, key="balanced_accuracy".__ne__)  # that first, the others as they are
    for name in ("features", "probe", "labels"):
        table.add_column(name, no_wrap=True)
    for name in shown:
        table.add_column(name.replace("_", " "), justify="right")
    names = {"random": "random initialisation", "majority": "majority class"}
    for row in rows:
        values = [f"{100 * row[name]:.1f}" if row[name] != "" else "-" for name in shown]
        label = f"{100 * row['label_fraction']:g} % ({row['n_train']})"
        probe = f"kNN, k = {row['k']}" if row["probe"] == "knn" else row["probe"]
        style = "bold" if row["features"] == "pretrained" else ""
        table.add_row(names.get(row["features"], row["features"]), probe, label, *values, style=style)
    Console(width=120).print(table)
