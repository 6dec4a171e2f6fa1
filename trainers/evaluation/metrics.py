"""What a table reports for one set of predictions: accuracies, macro-F1, AUC, recall by class.

Accuracy and AUC are medmnist's own, so that they can stand beside published MedMNIST numbers; the rest is
scikit-learn's, from the predicted class. All are fractions in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from medmnist.evaluator import getACC, getAUC
from sklearn.metrics import f1_score, recall_score
from torch import Tensor
from torch.nn.functional import one_hot

from amimv import InputError
from amimv.pipelines.sources.labels import MULTI_LABEL, TASKS


@dataclass(frozen=True)
class Scores:
    """Results on one split, fractions in [0, 1]; ``None`` where a value is undefined.

    Attributes:
        accuracy: medmnist's. Multi-class and ordinal: the argmax. Binary: class 1 where the *last* column is
            above 0.5, which is the argmax only where the two columns sum to one. Multi-label: the mean over
            labels of the accuracy of each (threshold 0.5), not the share of images with every label right.
        balanced_accuracy: mean recall over the classes that occur in the labels. Multi-label: the mean over
            labels of the mean recall of images with and without it (of one kind where the other is missing).
        macro_f1: mean F1 over the classes that occur in the labels or the predictions; 0 if none does.
        auc: medmnist's: one class against the rest, mean over the classes; binary: of the last column.
        auc_note: why ``auc`` is ``None``, else empty.
        head, medium, tail: mean recall over the classes of that third (`class_thirds`) that occur in the
            labels; ``None`` where none does.
        per_class_recall: ``C`` values (multi-label: recall of the images that have the label); ``None`` for a
            class that does not occur in the labels.
    """

    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    auc: float | None
    auc_note: str
    head: float | None
    medium: float | None
    tail: float | None
    per_class_recall: tuple[float | None, ...]


#: The single numbers among them: columns of the results and of the table.
SCORES = tuple(field.name for field in fields(Scores) if field.type in (float, float | None))


def compute_scores(labels: np.ndarray, scores: np.ndarray, task: str, train_counts: Sequence[int]) -> Scores:
    """Score predictions.

    Args:
        labels: integers, ``(N,)`` or ``(N, 1)`` class ids; multi-label ``(N, L)`` zeros and ones.
        scores: ``(N, C)`` float probabilities; binary ``(N, 2)``; multi-label ``(N, L)``.
        task: one of ``TASKS``, as in medmnist's INFO.
        train_counts: ``C`` numbers of training images per class (multi-label: with the label).

    Raises:
        InputError: unknown task, shapes or classes that do not fit, fewer than two images, scores not finite.
    """
    labels = _check(labels, scores, task, len(train_counts))
    n_classes = scores.shape[1]
    if task == MULTI_LABEL:
        predicted: np.ndarray = (scores > 0.5).astype(np.int64)
        recalls = np.array([_recalls(t, p, 2) for t, p in zip(labels.T, predicted.T, strict=True)])
        balanced = np.nanmean(recalls, axis=1).mean()
        recall = recalls[:, 1]
    else:
        predicted = scores.argmax(axis=1)
        recall = _recalls(labels, predicted, n_classes)
        balanced = np.nanmean(recall)
    macro_f1 = f1_score(labels, predicted, labels=range(n_classes), average="macro", zero_division=np.nan)
    auc_note = _why_no_auc(labels, n_classes, task)
    head, medium, tail = (_mean_present(recall[ids]) for ids in class_thirds(train_counts))
    return Scores(
        accuracy=float(getACC(labels, scores, task)),
        balanced_accuracy=float(balanced),
        macro_f1=float(np.nan_to_num(macro_f1)),
        auc=None if auc_note else float(getAUC(labels, scores, task)),
        auc_note=auc_note,
        head=head,
        medium=medium,
        tail=tail,
        per_class_recall=tuple(None if np.isnan(r) else float(r) for r in recall),
    )


def balanced_accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean recall over the classes that occur in the labels, a 0-d ``float64`` tensor in [0, 1].

    Args:
        scores: ``(N, C)``; the predicted class is the argmax, a predicted label one that scores above 0.5.
        labels: ``(N,)`` ids, or ``(N, C)`` zeros and ones: then the mean over labels of the mean recall of
            rows with and without it.
    """
    if labels.ndim == 2:
        truth = torch.stack([labels == 0, labels == 1])
        right = truth & ((scores > 0.5) == (labels == 1))
        return _mean_recall(right.sum(1), truth.sum(1)).mean()
    truth = one_hot(labels.long(), scores.shape[1]).bool()
    right = truth & (scores.argmax(1) == labels)[:, None]
    return _mean_recall(right.sum(0), truth.sum(0))


def _mean_recall(right: Tensor, counts: Tensor) -> Tensor:
    recall = right.double() / counts.clamp(min=1)
    return recall.sum(0) / (counts > 0).sum(0).clamp(min=1)


def class_thirds(train_counts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Class ids of head, medium and tail: thirds of the classes by training count.

    Head and tail have ``round(C / 3)`` classes each, so that they can be compared, and medium has the rest:
    none of two classes, three of seven. Ordered by falling count; among equals the lower id comes first.
    """
    order = sorted(range(len(train_counts)), key=lambda c: (-train_counts[c], c))
    third = round(len(order) / 3)
    middle_end = len(order) - third
    return order[:third], order[third:middle_end], order[middle_end:]


def _check(labels: np.ndarray, scores: np.ndarray, task: str, n_counts: int) -> np.ndarray:
    """The labels as medmnist's functions take them, ``(N,)`` or ``(N, L)`` ``int64``."""
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}, expected one of: {'; '.join(TASKS)}")
    if scores.ndim != 2 or scores.shape[0] < 2 or scores.shape[1] < 2:
        raise InputError(f"scores have shape {scores.shape}, expected (N, C), two or more images and classes")
    if task == "binary-class" and scores.shape[1] != 2:
        raise InputError(f"scores have {scores.shape[1]} columns, expected 2 for the task 'binary-class'")
    if n_counts != scores.shape[1]:
        raise InputError(f"{n_counts} training counts for {scores.shape[1]} columns of scores, expected as many")
    if not np.isfinite(scores).all():
        raise InputError("scores contain NaN or infinity, expected probabilities: the model has diverged")
    if task != MULTI_LABEL and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    expected = scores.shape if task == MULTI_LABEL else scores.shape[:1]
    if labels.shape != expected:
        raise InputError(f"labels have shape {labels.shape}, expected {expected} for the task {task!r}")
    largest = 1 if task == MULTI_LABEL else scores.shape[1] - 1
    if labels.min() < 0 or labels.max() > largest:
        raise InputError(f"labels lie in [{labels.min()}, {labels.max()}], expected [0, {largest}]")
    # Stored labels are uint8; scikit-learn and medmnist compare and index with them.
    return labels.astype(np.int64)


def _recalls(truth: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """``(n_classes,)`` recall of each class, NaN where the truth has none of it."""
    return recall_score(truth, predicted, labels=range(n_classes), average=None, zero_division=np.nan)


def _mean_present(recall: np.ndarray) -> float | None:
    present = recall[~np.isnan(recall)]
    return float(present.mean()) if present.size else None


def _why_no_auc(labels: np.ndarray, n_classes: int, task: str) -> str:
    """Empty where the AUC is defined: every class has images in it and images out of it."""
    if task == MULTI_LABEL:
        counts = labels.sum(axis=0)
        one_sided = [c for c in range(n_classes) if counts[c] in (0, len(labels))]
        return f"on none or all of the images: label {_listed(one_sided)}" if one_sided else ""
    absent = [c for c, count in enumerate(np.bincount(labels, minlength=n_classes)) if count == 0]
    return f"not among the labels: class {_listed(absent)}" if absent else ""


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids))
