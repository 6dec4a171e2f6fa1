"""Training without labels, and on the images of one patient, through the real command."""

import csv
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from amimv import InputError
from amimv.models import load_backbone
from amimv.trainers import loop, pretrain
from amimv.trainers.layers import resolve

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (48, 12, 12, 3), dtype=np.uint8)
LABELS = np.arange(48) % 3


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, data: str, *flags: str) -> Path:
    """One tiny run; its folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(folder)
    always = ("--data", data, "--batch-size", "16", "--steps", "2", "--supervised-steps", "2", "--name", "r")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *always, *flags])
    pretrain.main()
    return folder / "runs" / "r"


def write_npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def check_backbone(run: Path) -> None:
    network, spec = load_backbone(run / "backbone")
    assert (spec.channels, spec.size) == (3, 12)
    assert not network.training


def test_an_npz_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "amimv")
    run = start(monkeypatch, tmp_path, write_npz(tmp_path / "bare.npz", train_images=IMAGES))
    check_backbone(run)
    assert not (run / "results.csv").exists()
    why = "no table: the training images have no labels, and there are no val and test splits"
    assert said(caplog).count(why) == 1
    assert "bare: 48 training images without labels" in said(caplog)


def test_a_flat_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("nvidia.dali.experimental.dynamic", reason="nvidia.dali is not installed")
    caplog.set_level(logging.INFO, "amimv")
    (tmp_path / "flat").mkdir()
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / "flat" / f"{i:02}.png")
    run = start(monkeypatch, tmp_path, f"folder:{tmp_path / 'flat'}", "--size", "12", "--sampler", "cluster-balanced")
    check_backbone(run)
    assert not (run / "results.csv").exists()
    assert any(line.startswith("no table: ") for line in said(caplog))


def test_labels_of_val_and_test_make_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "amimv")
    held_out = {
        f"{split}_{kind}": values
        for split in ("val", "test")
        for kind, values in (("images", IMAGES), ("labels", LABELS))
    }
    run = start(monkeypatch, tmp_path, write_npz(tmp_path / "half.npz", train_images=IMAGES, **held_out))
    check_backbone(run)
    assert "without labels of training images, the probes learn from half of the val images" in said(caplog)
    with (run / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["features"] for row in rows} == {"majority", "raw pixels", "random", "pretrained", "supervised"}
    assert {row["n_train"] for row in rows} == {"24"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sampler", "class-balanced"), "sampler class-balanced reads labels, and there are none"),
        (("--rho", "10"), "a long tail needs labels, and bare (train) has none"),
        (("--task", "multi-class"), "has no train_labels, so that task 'multi-class' does not fit"),
        (("--recipe", "A(x) | A(y)", "--partner", "same-group"), "partner same-group needs groups"),
        (("--baselines", "only"), "no table: the training images have no labels"),
    ],
)
def test_what_needs_labels_says_so_in_one_line(
    flags: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as status:
        start(monkeypatch, tmp_path, write_npz(tmp_path / "bare.npz", train_images=IMAGES), *flags)
    assert status.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.mark.parametrize("beside", [False, True])
def test_pairs_of_one_patient(beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays: dict[str, Any] = {"train_images": IMAGES, "train_labels": LABELS}
    flags = ["--recipe", "A(x) | A(y)", "--partner", "same-group", "--method", "simclr", "--no-evaluate"]
    if beside:
        rows = "".join(f"train,{i},patient {i // 3}\n" for i in range(48))
        (tmp_path / "scans_index.csv").write_text("split,index,patient\n" + rows)
        flags += ["--groups", "patient"]
    else:
        arrays["train_groups"] = np.array([f"patient {i // 3}" for i in range(48)])
    seen = []
    stepped = loop.train_step

    def noting(*given: Any) -> loop.Step:
        step = stepped(*given)
        seen.append(step.indices)
        return step

    monkeypatch.setattr(loop, "train_step", noting)
    start(monkeypatch, tmp_path, write_npz(tmp_path / "scans.npz", **arrays), "--knn-every", "0", *flags)
    assert len(seen) == 2
    for anchors, partners in seen:
        assert (anchors // 3 == partners // 3).all()
        assert (anchors != partners).all()


def test_groups_without_use_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amimv")
    resolve(["--groups", "patient"])  # the evaluation tells which test images leak
    resolve(["--groups", "patient", "--no-evaluate", "--split", "0.7", "0.1", "0.2"])
    assert said(caplog) == []
    resolve(["--groups", "patient", "--no-evaluate"])
    told = "no effect here: groups: the partner is uniform, not same-group, and nothing is split or evaluated"
    assert said(caplog) == [told]
    with pytest.raises(InputError, match="unknown partner sampler 'same_group': did you mean same-group"):
        resolve(["--partner", "same_group"])
