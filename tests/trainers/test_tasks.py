"""The task of a run: inferred or given, and where a reader finds it."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from amimv import InputError
from amimv.trainers import pretrain
from amimv.trainers.layers import resolve

COUNTS = (24, 12, 8, 4)
MULTI_LABEL = "multi-label, binary-class"


@pytest.fixture
def one_hot(tmp_path: Path) -> Path:
    """A file whose classes are one-hot; its largest class has half of the images."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), COUNTS)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (len(labels), 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.eye(4, dtype=np.uint8)[labels]
    np.savez(tmp_path / "hot.npz", **arrays)
    return tmp_path / "hot.npz"


def start(monkeypatch: pytest.MonkeyPatch, data: Path, *flags: str) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(data.parent)
    always = ("--data", str(data), "--batch-size", "16", "--supervised-steps", "0", "--name", "r")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *always, *flags])
    pretrain.main()
    return data.parent / "runs" / "r"


def majority_accuracy(folder: Path) -> float:
    with (folder / "results.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["features"] == "majority"]
    return float(row["accuracy"])


@pytest.mark.parametrize(
    ("flags", "task", "accuracy"),
    [
        ((), "multi-class", 24 / 48),
        (("--task", "ordinal-regression"), "ordinal-regression", 24 / 48),
        (("--task", MULTI_LABEL), MULTI_LABEL, 1 - (24 + 12 + 8 + 4) / 48 / 4),
    ],
)
def test_the_task_stands_in_the_log_the_environment_and_the_title(
    one_hot: Path,
    flags: tuple[str, ...],
    task: str,
    accuracy: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = start(monkeypatch, one_hot, "--baselines", "only", *flags)
    assert majority_accuracy(folder) == pytest.approx(accuracy, abs=1e-6)
    assert json.loads((folder / "environment.json").read_text())["task"] == task
    assert f"seed 0, {task}, test split, %" in capsys.readouterr().out
    assert f"48 training images, task {task}, per class [24, 12, 8, 4]" in caplog.text
    assert caplog.text.count("they are read as 4 classes") == (task != MULTI_LABEL)


def test_a_pretraining_says_it_too(
    one_hot: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = start(monkeypatch, one_hot, "--steps", "1", "--knn-every", "0", "--no-evaluate")
    assert json.loads((folder / "environment.json").read_text())["task"] == "multi-class"
    assert "48 training images, task multi-class, per class" in caplog.text


def test_a_task_that_is_none() -> None:
    with pytest.raises(InputError, match=r"unknown task 'multiclass': did you mean multi-class"):
        resolve(["--steps", "1", "--task", "multiclass"])
