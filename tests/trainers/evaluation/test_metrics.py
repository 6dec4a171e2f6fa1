"""Metrics against medmnist and scikit-learn, for every task and every layout of labels."""

import dataclasses
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from medmnist.evaluator import getACC, getAUC
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score

from amimv import InputError
from amimv.trainers.evaluation.metrics import MULTI_LABEL, TASKS, class_thirds, compute_scores

DATA = Path(os.environ.get("AMIMV_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "medmnist")


def draw_scores(labels: np.ndarray, n_classes: int, seed: int = 0) -> np.ndarray:
    """Probabilities that are better than chance and far from perfect."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(labels), n_classes)) + 1.2 * np.eye(n_classes)[labels]
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@pytest.mark.parametrize(("task", "n_classes"), [("multi-class", 5), ("ordinal-regression", 4), ("binary-class", 2)])
@pytest.mark.parametrize("layout", [(-1,), (-1, 1)])
@pytest.mark.filterwarnings("error")
def test_single_label_scores_equal_medmnist_and_sklearn(task: str, n_classes: int, layout: tuple[int, ...]) -> None:
    labels = np.random.default_rng(1).integers(0, n_classes, 300).astype(np.uint8)
    scores = draw_scores(labels, n_classes)
    predicted = scores.argmax(1)
    got = compute_scores(labels.reshape(layout), scores, task, range(n_classes, 0, -1))
    assert got.accuracy == pytest.approx(getACC(labels, scores, task))
    assert got.auc == pytest.approx(getAUC(labels, scores, task))
    assert got.auc_note == ""
    assert got.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert got.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    recall = recall_score(labels, predicted, average=None)
    assert got.per_class_recall == pytest.approx(tuple(recall))
    third = round(n_classes / 3)
    assert got.head == pytest.approx(recall[:third].mean())
    assert got.tail == pytest.approx(recall[-third:].mean())
    if n_classes == 2:
        assert got.medium is None
    else:
        assert got.medium == pytest.approx(recall[third:-third].mean())


@pytest.mark.filterwarnings("error")
def test_multi_label_scores_equal_medmnist_and_sklearn() -> None:
    rng = np.random.default_rng(2)
    labels = (rng.random((400, 6)) < [0.5, 0.3, 0.2, 0.2, 0.1, 0.05]).astype(np.uint8)
    scores = np.clip(0.35 * rng.random((400, 6)) + 0.4 * labels + 0.1, 0, 1)
    predicted = (scores > 0.5).astype(int)
    assert 0 < predicted[:, 0].sum() < 400
    got = compute_scores(labels, scores, MULTI_LABEL, [10, 60, 20, 30, 40, 50])
    assert got.accuracy == pytest.approx(getACC(labels, scores, MULTI_LABEL))
    assert got.auc == pytest.approx(getAUC(labels, scores, MULTI_LABEL))
    per_label = [balanced_accuracy_score(labels[:, i], predicted[:, i]) for i in range(6)]
    assert got.balanced_accuracy == pytest.approx(np.mean(per_label))
    assert got.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    recall = recall_score(labels, predicted, average=None)
    assert got.per_class_recall == pytest.approx(tuple(recall))
    assert (got.head, got.medium, got.tail) == pytest.approx(
        (recall[[1, 5]].mean(), recall[[3, 4]].mean(), recall[[0, 2]].mean())
    )


@pytest.mark.parametrize("name", ["retinamnist", "breastmnist", "ham10000_28"])
def test_real_label_layouts(name: str) -> None:
    path = DATA / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set AMIMV_DATA to a folder that has it")
    with np.load(path, allow_pickle=False) as data:
        labels, train = data["test_labels"], data["train_labels"]
    counts = np.bincount(train.ravel())
    scores = draw_scores(labels.ravel(), len(counts))
    task = "binary-class" if len(counts) == 2 else "multi-class"
    got = compute_scores(labels, scores, task, counts.tolist())
    assert got.accuracy == pytest.approx(np.mean(scores.argmax(1) == labels.ravel()))
    assert got.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels.ravel(), scores.argmax(1)))
    assert got.auc == pytest.approx(getAUC(labels, scores, task))
    json.dumps(dataclasses.asdict(got), allow_nan=False)


@pytest.mark.parametrize(
    ("counts", "thirds"),
    [
        ([3, 9], ([1], [], [0])),
        ([5, 5, 5], ([0], [1], [2])),
        ([1, 2, 3, 4, 5], ([4, 3], [2], [1, 0])),
        ([7, 1, 7, 3, 9, 3, 2], ([4, 0], [2, 3, 5], [6, 1])),
    ],
)
def test_thirds(counts: list[int], thirds: tuple[list[int], list[int], list[int]]) -> None:
    assert class_thirds(counts) == thirds


@pytest.mark.parametrize("n_classes", range(2, 30))
def test_thirds_are_a_partition_with_equal_ends(n_classes: int) -> None:
    head, medium, tail = class_thirds(range(n_classes))
    assert sorted(head + medium + tail) == list(range(n_classes))
    assert len(head) == len(tail) >= 1
    assert abs(len(head) - len(medium)) <= 1


@pytest.mark.filterwarnings("error")
def test_an_absent_class_leaves_the_auc_undefined_and_the_rest_on_the_others() -> None:
    labels = np.array([0, 0, 1, 1, 3, 3, 3, 3])
    predicted = np.array([0, 1, 1, 1, 3, 3, 2, 0])
    got = compute_scores(labels, np.eye(5)[predicted], "multi-class", [5, 4, 3, 2, 1])
    assert got.auc is None
    assert got.auc_note == "not among the labels: class 2, 4"
    assert got.per_class_recall == (0.5, 1.0, None, 0.5, None)
    assert got.balanced_accuracy == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert got.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert (got.head, got.medium, got.tail) == (0.75, None, 0.5)


@pytest.mark.filterwarnings("error")
def test_undefined_auc_of_a_binary_task_and_of_labels() -> None:
    got = compute_scores(np.ones(4, int), np.array([[0.4, 0.6]] * 4), "binary-class", [1, 1])
    assert (got.auc, got.auc_note) == (None, "not among the labels: class 0")
    assert (got.accuracy, got.balanced_accuracy, got.macro_f1) == (1, 1, 1)
    labels = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1]])
    got = compute_scores(labels, labels * 0.8, MULTI_LABEL, [0, 3, 2])
    assert (got.auc, got.auc_note) == (None, "on none or all of the images: label 0, 1")
    assert got.per_class_recall == (None, 1.0, 1.0)
    assert (got.balanced_accuracy, got.macro_f1) == (1, 1)
    nothing = compute_scores(np.zeros((3, 2), int), np.zeros((3, 2)), MULTI_LABEL, [0, 0])
    assert (nothing.balanced_accuracy, nothing.macro_f1, nothing.tail) == (1, 0, None)


def test_binary_accuracy_takes_the_last_column_as_a_probability() -> None:
    """Where the columns do not sum to one, medmnist's accuracy is not that of the argmax."""
    labels, scores = np.array([1, 0]), np.array([[0.1, 0.3], [0.3, 0.1]])
    got = compute_scores(labels, scores, "binary-class", [1, 1])
    assert got.accuracy == 0.5
    assert got.balanced_accuracy == 1.0


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for task in TASKS:
            labels = np.zeros((5, 2), int) if task == MULTI_LABEL else np.zeros(5, int)
            compute_scores(labels, np.full((5, 2), 0.5), task, [1, 1])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("labels", "scores", "task", "counts", "message"),
    [
        ([0, 1], np.eye(2), "multiclass", [1, 1], "unknown task 'multiclass'"),
        ([0, 1], np.eye(2)[0], "multi-class", [1, 1], "scores have shape"),
        ([0], np.eye(2)[:1], "multi-class", [1, 1], "two or more images"),
        ([0, 1], np.eye(3)[:2], "binary-class", [1, 1, 1], "3 columns, expected 2"),
        ([0, 1], np.eye(2), "multi-class", [1, 1, 1], "3 training counts for 2 columns"),
        ([0, 1], np.eye(2) * np.nan, "multi-class", [1, 1], "NaN or infinity"),
        ([0, 1, 1], np.eye(2), "multi-class", [1, 1], r"labels have shape \(3,\), expected \(2,\)"),
        ([[0], [1]], np.eye(2), MULTI_LABEL, [1, 1], r"labels have shape \(2, 1\), expected \(2, 2\)"),
        ([0, 2], np.eye(2), "multi-class", [1, 1], r"labels lie in \[0, 2\], expected \[0, 1\]"),
    ],
)
def test_bad_input(labels: list, scores: np.ndarray, task: str, counts: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        compute_scores(np.array(labels), scores, task, counts)
    assert "\n" not in str(error.value)
