"""Folders as people have them, through the real command: what is read, what is said, what is refused."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from amimv.trainers import pretrain

pytest.importorskip("nvidia.dali.experimental.dynamic")
RNG = np.random.default_rng(0)


def start(monkeypatch: pytest.MonkeyPatch, top: Path, *flags: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(top.parent)
    always = ("--data", f"folder:{top}", "--size", "8", "--batch-size", "8", "--supervised-steps", "0", "--name", "r")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *always, *flags])
    pretrain.main()


def write(place: Path, n: int, ending: str, top: int = 255) -> None:
    place.mkdir(parents=True, exist_ok=True)
    kind = np.uint8 if top < 256 else np.uint16
    for i in range(n):
        Image.fromarray(RNG.integers(0, top + 1, (12, 12), dtype=kind)).save(place / f"{i:02}{ending}")


def test_a_folder_as_people_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    top = tmp_path / "lesions"
    write(top / "Train" / "benign", 20, ".png")
    write(top / "Train" / "malignant", 2, ".png")
    write(top / "Train" / "malignant", 9, ".tif")
    write(tmp_path / "patient", 3, ".bmp")
    (top / "Train" / "malignant" / "linked").symlink_to(tmp_path / "patient")
    (top / "Train" / "malignant" / "loop").symlink_to(top)
    (top / "Train" / "benign" / "notes.xml").touch()
    for split in ("VAL", "Test"):
        write(top / split / "Benign", 4, ".webp")
        write(top / split / "malignant", 4, ".jpg")
    (top / "metadata").mkdir()
    (top / "metadata" / "patients.csv").touch()
    with caplog.at_level(logging.INFO, "amimv"):
        start(monkeypatch, top, "--steps", "1", "--knn-every", "0", "--baselines", "no")
    environment = json.loads((tmp_path / "runs" / "r" / "environment.json").read_text())
    assert (environment["training_counts"], environment["task"]) == ([20, 14], "binary-class")
    said = [record.getMessage() for record in caplog.records]
    assert "lesions: left out beside the splits 1 folder metadata (0 images)" in said
    assert "lesions: read as one class each, though written differently in the splits: benign/Benign" in said
    assert "lesions, train: left out 1 .xml, 1 folder(s) reached twice" in said


@pytest.mark.parametrize(
    ("place", "ending", "highest", "message"),
    [
        ("Train/b", ".png", 4095, "lesions, train: 6 of 12 images looked at have 16 bits, the others 8"),
        ("VAL/A", ".png", 255, "VAL has both A and a: rename one, or put them together"),
        ("training/a", ".png", 255, "has both Train and training, which mean the same split 'train'"),
    ],
)
def test_what_is_refused_is_one_line_and_status_2(
    place: str,
    ending: str,
    highest: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    top = tmp_path / "lesions"
    for split in ("Train", "VAL", "test"):
        write(top / split / "a", 6, ".png")
        write(top / split / "b", 6, ".png")
    write(top / place, 6, ending, highest)
    with pytest.raises(SystemExit) as caught:
        start(monkeypatch, top, "--steps", "1")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_twelve_bits_from_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second run decodes nothing, and has the same losses; validation is rendered with the training range."""
    top = tmp_path / "scans"
    for split, highest in (("train", 4095), ("val", 2000), ("test", 2000)):
        for name in "ab":
            write(top / split / name, 12, ".png", highest)
    losses = []
    for run in ("first", "second"):
        with caplog.at_level(logging.INFO, "amimv"):
            flags = ("--steps", "2", "--baselines", "no", "--knn-every", "1", "--cache", "kept", "--name", run)
            start(monkeypatch, top, *flags)
        losses.append((tmp_path / "runs" / run / "metrics.jsonl").read_text())
        monkeypatch.setattr("amimv.pipelines.sources.folder.decode", None)
    assert losses[0] == losses[1]
    assert len(list((tmp_path / "kept").glob("*.images"))) == 3
