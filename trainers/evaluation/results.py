"""The rows of ``results.csv``: what probes say of features, as rows, as a file and as a table for people."""

import csv
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from amimv.files import replacing
from amimv.pipelines import ImageStore, realised_ratio
from amimv.trainers.evaluation.metrics import SCORES, balanced_accuracy, compute_scores
from amimv.trainers.evaluation.probes import knn_probe, linear_probe

logger = logging.getLogger("amimv")

#: What needs the labels, for messages.
EVALUATION = "an evaluation"

#: Scores that need no labels, of the features themselves: the same in every row of theirs; see `judge_without_labels`.
WITHOUT_LABELS = ("rankme", "rankme_embeddings", "cluster_knn")

#: Balanced accuracy on the test images that `Splits.unleaked` gives; empty where that is None.
UNLEAKED = "unleaked_balanced_accuracy"
#: What tables call it.
LEAK_FREE = "leak-free"

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
    "label_seed",
    "seed",
    "steps",
    "val_balanced_accuracy",
    *SCORES,
    UNLEAKED,
    *WITHOUT_LABELS,
    "revision",
]

#: Of the features in a table. Where baselines start from a run's initial weights, their rows say so; those of a frozen
#: model of timm are ``frozen NAME``.
FROZEN = "frozen"
INITIAL, SUPERVISED_INITIAL = "initial weights", "supervised from initial weights"
ORDER = ("majority", "raw pixels", "random", INITIAL, FROZEN, "pretrained", "supervised", SUPERVISED_INITIAL)


def kind_of(features: str) -> str:
    """Which of ``ORDER`` these features are; empty for none."""
    kind = FROZEN if features.startswith(f"{FROZEN} ") else features
    return kind if kind in ORDER and features != FROZEN else ""


@dataclass(frozen=True)
class Judged:
    """What one probe on some features said.

    Attributes:
        features: whose: majority, raw pixels, random, pretrained or supervised, or any other name.
        probe: knn, linear, classifier (from scratch), fine-tuned, or empty for the majority class.
        k: neighbours of kNN, else empty.
        val, test: class scores ``(N, C)`` in [0, 1]; every choice was made on those of val.
        without_labels: of ``WITHOUT_LABELS`` what is known of the features.
    """

    features: str
    probe: str
    k: int | str
    val: Tensor
    test: Tensor
    without_labels: Mapping[str, float] = field(default_factory=dict, kw_only=True)


def judge_features(
    name: str, features: Sequence[Tensor], labelled: ImageStore, val: ImageStore, test: ImageStore
) -> tuple[Judged, Judged]:
    """kNN and linear probe; one search scores val, by which k or penalty is chosen, and test.

    Args:
        name: of whatever made the features.
        features: ``(N, D)`` of each of the three stores.
        labelled, val, test: images of one data set.

    Raises:
        InputError: a store has no labels, or as `knn_probe`.
    """
    train_x, val_x, test_x = features
    args = (
        train_x,
        labelled.known_labels(EVALUATION),
        val_x,
        val.known_labels(EVALUATION),
        torch.cat([val_x, test_x]),
        labelled.n_classes,
    )
    parts = [len(val_x), len(test_x)]
    knn, k = knn_probe(*args)
    linear, _ = linear_probe(*args)
    return Judged(name, "knn", k, *knn.split(parts)), Judged(name, "linear", "", *linear.split(parts))


def majority(labelled: ImageStore, val: ImageStore, test: ImageStore) -> Judged:
    """Always answering by the training frequencies, so that the largest class wins."""
    shares = torch.tensor(labelled.class_counts(), device=test.device) / len(labelled)
    return Judged("majority", "", "", *(shares.expand(len(store), -1) for store in (val, test)))


def result_row(
    judged: Judged,
    labelled: ImageStore,
    val: ImageStore,
    test: ImageStore,
    fraction: float = 1.0,
    thirds_by: Sequence[int] | None = None,
    unleaked: Tensor | None = None,
) -> dict[str, Any]:
    """The columns of a row that say what came out; what trained the features is for whoever knows it to add.

    Args:
        judged: what a probe said of val and test.
        labelled, val, test: images of one data set.
        fraction: which share of the training labels ``labelled`` has.
        thirds_by: training images of each class, which decide about head and tail; None: those of ``labelled``.
        unleaked: ``(M,)`` ``bool``, the test images of no group that was trained on; None where that is unknown or
            all of them.
    """
    counts = labelled.class_counts()
    truth, scores = (values.cpu().numpy() for values in (test.known_labels(EVALUATION), judged.test))
    result = compute_scores(truth, scores, test.task, thirds_by or counts)
    if result.auc is None:
        logger.info("no AUC for %s %s: %s", judged.features, judged.probe, result.auc_note)
    values = {name: getattr(result, name) for name in SCORES}
    values[UNLEAKED] = None
    if unleaked is not None:
        apart = unleaked.to(judged.test.device)
        values[UNLEAKED] = float(balanced_accuracy(judged.test[apart], test.known_labels(EVALUATION)[apart]))
    values |= {name: judged.without_labels.get(name) for name in WITHOUT_LABELS}
    return {
        "data": test.name,
        "realised_ratio": round(realised_ratio(counts), 4),
        "n_train": len(labelled),
        "features": judged.features,
        "probe": judged.probe,
        "k": judged.k,
        "label_fraction": fraction,
        "val_balanced_accuracy": round(float(balanced_accuracy(judged.val, val.known_labels(EVALUATION))), 6),
    } | {name: "" if value is None else round(value, 6) for name, value in values.items()}


def write_results(rows: list[dict[str, Any]], path: Path | str) -> None:
    """``results.csv``, whole or not at all: ``COLUMNS``, empty where a row has none, and whatever else there is."""
    with replacing(Path(path), newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
        writer.writeheader()
        writer.writerows(rows)


def rank_of_embeddings(path: Path, rankme: float) -> float | None:
    """The ``rankme_embeddings`` that a ``results.csv`` has of features of this ``rankme``; None if it has none.

    The number may differ in its last digits: another device adds up in another order.
    """
    with suppress(FileNotFoundError, ValueError, csv.Error), path.open(newline="") as file:
        for row in csv.DictReader(file):
            known, wanted = row.get("rankme"), row.get("rankme_embeddings")
            if known and wanted and isclose(float(known), rankme, rel_tol=1e-3):
                return float(wanted)
    return None


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """The rows for people, in percent; of several draws of the labels means, of the first score ± std. There is a
    column ``leak-free`` where a row has such a score.
    """
    table = Table(title=title, title_justify="left")
    shown = sorted(SCORES, key="balanced_accuracy".__ne__)  # that first, the others as they are
    if apart := any(row.get(UNLEAKED, "") != "" for row in rows):
        shown.insert(1, UNLEAKED)
    for name in ("features", "probe", "labels"):
        table.add_column(name, no_wrap=True)
    for name in shown:
        header = LEAK_FREE if name == UNLEAKED else name.replace("_", "\n")
        table.add_column(header, justify="right", no_wrap=name in shown[: 1 + apart])
    names = {"random": "random initialisation", "majority": "majority class"}
    draws: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        draws.setdefault(tuple(row[name] for name in ("features", "probe", "label_fraction")), []).append(row)
    for own in draws.values():
        row, scores = own[0], [[one[name] for one in own if one[name] != ""] for name in shown]
        values = [f"{100 * mean(found):.1f}" if found else "-" for found in scores]
        values[0] += f" ± {100 * stdev(scores[0]):.1f}" if len(own) > 1 else ""
        label = f"{100 * row['label_fraction']:g} % ({row['n_train']}{f', {len(own)} draws' * (len(own) > 1)})"
        chosen = ", ".join(map(str, dict.fromkeys(one["k"] for one in own)))
        probe = f"kNN, k = {chosen}" if row["probe"] == "knn" else row["probe"]
        style = "bold" if row["features"] == "pretrained" else ""
        table.add_row(names.get(row["features"], row["features"]), probe, label, *values, style=style)
    # Frozen models have long names, and numbers are not to be cut for them.
    longest = max((len(row["features"]) for row in rows), default=0)
    Console(width=120 + 12 * apart + max(0, longest - len(names["random"]))).print(table)
