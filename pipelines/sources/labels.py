"""Labels of a data set: which task they pose, and whether they can be evaluated at all."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from amimv import InputError, check_choice

#: The task of ChestMNIST in MedMNIST's words; every other task has one label per image.
MULTI_LABEL = "multi-label, binary-class"
#: MedMNIST's tasks, in the words its evaluator takes.
TASKS = ("multi-class", "binary-class", "ordinal-regression", MULTI_LABEL)


def infer_task(multi_label: bool, n_classes: int) -> str:
    """The task of labels that come without one."""
    return MULTI_LABEL if multi_label else "binary-class" if n_classes == 2 else "multi-class"


def check_task_name(task: str) -> None:
    """Raise an `InputError` for what is none of ``TASKS``; the near misses are listed."""
    check_choice("task", task, TASKS)


def check_task(task: str, multi_label: bool, n_classes: int, title: str) -> None:
    """Raise an `InputError` for a task that is none, or not one of these labels."""
    check_task_name(task)
    if (task == MULTI_LABEL) != multi_label:
        kind = "multi-hot" if multi_label else "one class per image"
        raise InputError(f"task {task!r} does not fit the labels of {title}, which are {kind}")
    if task == "binary-class" and n_classes != 2:
        raise InputError(f"task 'binary-class' needs 2 classes, {title} has {n_classes}")


def settle_labels(every: dict[str, np.ndarray], path: Path, task: str | None) -> tuple[dict[str, np.ndarray], int]:
    """Labels that can be evaluated: those of each split, and the number of classes (or labels).

    Columns of 0 and 1 with exactly one 1 in each row of all splits are classes, and come back as ``(N,)``, unless
    ``task`` says that they are multi-hot.

    Args:
        every: ``(N,)`` classes or ``(N, L)`` columns of 0 and 1, ``int64``, by split.
        path: of the file, for messages.
        task: what the user says that the task is, if anything.

    Raises:
        InputError: values out of range, a single class, or a column that is the same in all images.
    """
    if len({labels.shape[1:] for labels in every.values()}) > 1:
        shapes = ", ".join(f"{s}_labels {labels.shape}" for s, labels in every.items())
        raise InputError(f"{path}: the splits' labels differ in shape ({shapes}), expected the same number of columns")
    stacked = np.concatenate(list(every.values()))
    if stacked.ndim == 1:
        return every, _count_classes(stacked, path)
    for split, labels in every.items():
        check_range(labels, stacked.shape[1], path, split)
    _check_columns(stacked, path)
    if task == MULTI_LABEL or not (stacked.sum(1) == 1).all():
        return every, stacked.shape[1]
    return {split: labels.argmax(1) for split, labels in every.items()}, stacked.shape[1]


def _count_classes(labels: np.ndarray, path: Path) -> int:
    values = np.unique(labels)
    if not np.array_equal(values, np.arange(len(values))):
        raise InputError(
            f"{path}: labels out of range: expected classes 0..C-1 without a gap, found {shortened(values.tolist())}"
        )
    if len(values) == 1:
        raise InputError(f"{path}: all images of all splits are of class 0: expected at least two classes")
    return len(values)


def _check_columns(labels: np.ndarray, path: Path) -> None:
    """A label that all images or none carry would count as always right."""
    if len(labels) and not labels.any():
        raise InputError(f"{path}: no image of any split carries a label: expected at least one 1 in each column")
    same = np.flatnonzero((labels == labels[:1]).all(0)).tolist()
    if same:
        raise InputError(
            f"{path}: column {shortened(same)} of the labels is the same in all images of all splits, "
            "so it cannot be evaluated: leave it out"
        )


def check_range(labels: np.ndarray, n_classes: int, path: Path, split: str) -> None:
    """Single labels lie in 0..n_classes-1; multi-hot ones are ``n_classes`` columns of 0 and 1."""
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    top = n_classes - 1 if labels.ndim == 1 else 1
    if low < 0 or high > top:
        raise InputError(f"{path}: {split}_labels out of range: expected 0..{top}, found {low}..{high}")


def missing_classes(counts: Sequence[int], names: Sequence[str]) -> str:
    """The classes (or labels) without an image, as part of a line; empty where there is none."""
    missing = [name for name, count in zip(names, counts, strict=True) if not count]
    return f"{shortened(missing)} ({len(missing)} of {len(names)})" if missing else ""


def shortened(values: Sequence[object], most: int = 10) -> str:
    """The first of them, so that a message stays a line."""
    return ", ".join(map(str, values[:most])) + (", ..." if len(values) > most else "")
