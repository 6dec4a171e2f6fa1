"""The score on test images that share no group with training, against a plain computation on scikit-learn."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from amimv.pipelines import ImageStore
from amimv.trainers.data import HeldOut, Splits
from amimv.trainers.evaluation import COLUMNS, Judged, majority, print_table, result_row
from amimv.trainers.evaluation.metrics import SCORES

NAME = "unleaked_balanced_accuracy"
SIZES = {"train": 60, "val": 30, "test": 90}
SHORT = (
    *("--batch-size", "8", "--threads", "1", "--preset", "none", "--backbone", "small", "--method", "simclr"),
    *("--knn-every", "0", "--supervised-steps", "2", "--projector-hidden", "16", "--steps", "1"),
)
Command = Callable[..., int]


def arrays(multi_label: bool = False, groups: bool = True) -> dict[str, np.ndarray]:
    """Of every test image the lesion is one of forty, of which training images are of the first thirty."""
    rng, found = np.random.default_rng(0), dict[str, np.ndarray]()
    for (split, n), lesions in zip(SIZES.items(), (30, 40, 40), strict=True):
        labels = np.arange(n) % 3
        found[f"{split}_images"] = rng.integers(0, 150, (n, 28, 28, 3), dtype=np.uint8)
        found[f"{split}_images"] += (50 * labels[:, None, None, None]).astype(np.uint8)
        found[f"{split}_labels"] = np.stack([labels == 1, labels > 0], 1).astype(int) if multi_label else labels
        if groups:
            found[f"{split}_groups"] = rng.permutation(np.arange(n) % lesions)
    return found


def run(place: Path, pretrain_here: Command, *flags: str, **kind: bool) -> list[dict[str, str]]:
    np.savez(place / "own.npz", **arrays(**kind))  # type: ignore[arg-type]
    name = ("--output", str(place), "--name", "run")
    assert pretrain_here("--data", str(place / "own.npz"), *SHORT, *flags, *name) == 0
    with (place / "run" / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def plain(truth: np.ndarray, predicted: np.ndarray) -> float:
    if truth.ndim == 1:
        return float(balanced_accuracy_score(truth, predicted))
    return float(np.mean([balanced_accuracy_score(t, p) for t, p in zip(truth.T, predicted.T, strict=True)]))


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_score_is_that_of_images_whose_group_no_training_image_has(
    tmp_path: Path, pretrain_here: Command, capsys: pytest.CaptureFixture[str], multi_label: bool
) -> None:
    """Of the training images that are used: the lesions of the others leak nothing."""
    np.save(tmp_path / "some.npy", np.arange(25))
    flags = ("--indices", str(tmp_path / "some.npy"), "--label-fractions", "0.5", "1")
    rows = run(tmp_path, pretrain_here, *flags[: 2 if multi_label else None], multi_label=multi_label)
    data = arrays(multi_label)
    known = set(data["train_groups"][:25].tolist())
    apart = np.array([group not in known for group in data["test_groups"].tolist()])
    assert 0 < apart.sum() < len(apart)
    with np.load(tmp_path / "run" / "predictions.npz") as stored:
        for i, row in enumerate(rows):
            predicted = stored[f"row_{i:03d}"]
            assert float(row[NAME]) == pytest.approx(plain(data["test_labels"][apart], predicted[apart]), abs=1e-6)
            assert float(row["balanced_accuracy"]) == pytest.approx(plain(data["test_labels"], predicted), abs=1e-6)
    assert any(row[NAME] != row["balanced_accuracy"] for row in rows)
    assert "leak-free" in capsys.readouterr().out


def test_it_is_empty_and_untold_where_groups_are_unknown(
    tmp_path: Path, pretrain_here: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, pretrain_here, groups=False)
    assert {row[NAME] for row in rows} == {""}
    assert "leak-free" not in capsys.readouterr().out


def store(n: int, groups: list[int] | None, labelled: bool = True, **settings: Any) -> ImageStore:
    images = torch.randint(0, 256, (n, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    return ImageStore.from_arrays(images, [i % 2 for i in range(n)] if labelled else None, groups, **settings)


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([1, 2, 2, 3], [3, 4, 5, 1], [False, True, True, False]),
        ([1, 2, 2, 3], [4, 5, 6, 7], None),  # nothing leaks
        ([1, 2, 2, 3], [1, 1, 2, 3], None),  # everything does
        (None, [1, 1, 2, 3], None),
        ([1, 2, 2, 3], None, None),
    ],
)
def test_which_images_are_apart(train: list[int] | None, test: list[int] | None, expected: list[bool] | None) -> None:
    found = Splits(store(4, train), store(4, [8, 8, 9, 9]), store(4, test)).unleaked()
    assert (None if found is None else found.tolist()) == expected


def test_training_without_labels_leaks_what_it_and_the_probes_have_seen() -> None:
    train, test = store(4, [1, 1, 2, 2], labelled=False), store(4, [1, 8, 9, 3], split="test")
    splits = Splits.of(train, HeldOut(store(8, [8] * 8, split="val"), test))
    found = splits.unleaked()
    assert found is not None
    assert found.tolist() == [False, False, True, True]
    without = Splits.of(train, HeldOut(store(8, None, split="val"), test))
    assert without.unleaked() is None


def test_a_row_by_hand_and_its_column() -> None:
    labelled, test = store(4, None), store(4, None, split="test")
    scores = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])  # of labels 0, 1, 0, 1
    one = Judged("any", "knn", 1, scores, scores)
    row = result_row(one, labelled, test, test, unleaked=torch.tensor([True, False, True, True]))
    assert (row["balanced_accuracy"], row[NAME]) == (0.75, 1.0)
    assert result_row(one, labelled, test, test)[NAME] == ""
    assert COLUMNS.index(NAME) == COLUMNS.index(SCORES[-1]) + 1


def test_a_table_leaves_it_empty_where_one_row_has_it_only(capsys: pytest.CaptureFixture[str]) -> None:
    labelled, test = store(4, None), store(4, None, split="test")
    row = result_row(majority(labelled, test, test), labelled, test, test)
    print_table([row, row | {"features": "other", NAME: 0.625}], "title")
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert ["62.5" in line for line in lines] == [False, True]
    row.pop(NAME)  # of an earlier version
    print_table([row], "title")
    assert "leak-free" not in capsys.readouterr().out
