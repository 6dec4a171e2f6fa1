"""Labels: one-hot columns are classes, and what cannot be evaluated is refused at load in one line."""

import logging
from pathlib import Path

import numpy as np
import pytest

from amimv import InputError
from amimv.pipelines import load_store
from amimv.pipelines.sources.labels import MULTI_LABEL, missing_classes, settle_labels, shortened

CLASSES = {"train": np.arange(12) % 3, "val": np.arange(6) % 3, "test": np.arange(9) % 3}


def one_hot(classes: dict[str, np.ndarray], columns: int = 3) -> dict[str, np.ndarray]:
    return {split: np.eye(columns, dtype=np.uint8)[labels] for split, labels in classes.items()}


def write(path: Path, every: dict[str, np.ndarray]) -> Path:
    rng = np.random.default_rng(0)
    images = {f"{s}_images": rng.integers(0, 256, (len(v), 8, 8), dtype=np.uint8) for s, v in every.items()}
    np.savez(path, **images, **{f"{s}_labels": labels for s, labels in every.items()})
    return path


@pytest.mark.parametrize("kind", [np.uint8, np.int64, bool])
def test_one_hot_columns_are_read_as_classes_and_the_log_says_so(
    kind: type, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "x.npz", {s: v.astype(kind) for s, v in one_hot(CLASSES).items()})
    caplog.set_level(logging.INFO, "amimv")
    for split, labels in CLASSES.items():
        store = load_store(path, split)
        assert store.labels.tolist() == labels.tolist()
        assert (store.task, store.n_classes, store.multi_label) == ("multi-class", 3, False)
    (line,) = [r.getMessage() for r in caplog.records]
    assert "every row of labels has one 1: they are read as 3 classes (task 'multi-label, binary-class'" in line
    assert load_store(path, task="ordinal-regression").labels.ndim == 1


def test_two_exclusive_columns_are_binary(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", one_hot({s: v % 2 for s, v in CLASSES.items()}, 2))
    assert load_store(path).task == "binary-class"


def test_the_task_keeps_them_multi_hot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = load_store(write(tmp_path / "x.npz", one_hot(CLASSES)), task=MULTI_LABEL)
    assert store.labels.tolist() == one_hot(CLASSES)["train"].tolist()
    assert store.task == MULTI_LABEL
    assert not caplog.records


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("row", [[0, 0, 0], [1, 0, 1]])
def test_a_row_of_any_split_that_does_not_sum_to_one_makes_them_multi_hot(
    split: str, row: list[int], tmp_path: Path
) -> None:
    hot = one_hot(CLASSES)
    hot[split][-1] = row
    store = load_store(write(tmp_path / "x.npz", hot))
    assert (store.task, store.n_classes) == (MULTI_LABEL, 3)
    assert store.labels.tolist() == hot["train"].tolist()


def column(value: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    hot = {s: rng.integers(0, 2, (len(v), 4)) for s, v in CLASSES.items()}
    for labels in hot.values():
        labels[:, 1] = value
    return hot


@pytest.mark.parametrize("task", [None, MULTI_LABEL])
@pytest.mark.parametrize(
    ("every", "message"),
    [
        ({s: np.zeros_like(v) for s, v in one_hot(CLASSES).items()}, "no image of any split carries a label"),
        (column(0), "column 1 of the labels is the same in all images of all splits"),
        (column(1), "column 1 of the labels is the same in all images of all splits"),
        (one_hot(CLASSES, 5), r"column 3, 4 of the labels is the same"),
        ({s: np.ones_like(v) for s, v in one_hot(CLASSES).items()}, r"column 0, 1, 2 of the labels is the same"),
    ],
)
def test_columns_that_cannot_be_evaluated(
    every: dict[str, np.ndarray], message: str, task: str | None, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_store(write(tmp_path / "x.npz", every), "val", task=task)
    assert "\n" not in str(caught.value)


def test_a_single_class_in_all_splits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="all images of all splits are of class 0: expected at least two"):
        load_store(write(tmp_path / "x.npz", {s: v * 0 for s, v in CLASSES.items()}))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_classes_that_one_split_lacks_are_remarked_on_when_it_is_loaded(
    split: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    every = CLASSES | {split: CLASSES[split] * 0 + 1}
    for name in CLASSES:
        load_store(write(tmp_path / "x.npz", every), name)
    assert [r.getMessage() for r in caplog.records] == [f"x, {split}: no image of class 0, 2 (2 of 3)"]
    caplog.clear()
    hot = column(0) | {"train": np.eye(4, dtype=int)[np.arange(12) % 4]}
    load_store(write(tmp_path / "y.npz", hot), "val")
    assert [r.getMessage() for r in caplog.records] == ["y, val: no image of label 1 (1 of 4)"]


def test_lines_stay_short() -> None:
    assert shortened(range(3)) == "0, 1, 2"
    assert shortened(range(5), 2) == "0, 1, ..."
    assert missing_classes([0] * 1000, [str(i) for i in range(1000)]).endswith("9, ... (1000 of 1000)")
    with pytest.raises(InputError) as caught:
        settle_labels({"train": np.zeros((4, 500), int), "val": np.eye(2, 500, dtype=int)}, Path("x.npz"), None)
    assert len(str(caught.value)) < 200
