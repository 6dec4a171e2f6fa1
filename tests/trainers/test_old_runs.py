"""What version 0.1.0 wrote is read by this one, and means what it meant.

``tests/data/run-0.1.zip`` is a finished run of 0.1.0 of ten steps (ReSSL with a queue and a teacher, clusters, groups,
a second augmentation) with its checkpoint of step 6. So that it is small, 94 % of the weights were set to zero and the
others rounded to powers of two, in the checkpoint (before 0.1.0 went on from it) and in the export (before 0.1.0
evaluated it). ``tests/data/config-0.1.yaml`` is of a published study.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from amimv.trainers import evaluate
from amimv.trainers.layers import from_yaml, resolve

CONFIG = Path(__file__).resolve().parents[1] / "data" / "config-0.1.yaml"
#: The command that wrote it, as its ``environment.json`` has it.
COMMAND = (
    "--data retinamnist --backbone small --batch-size 128 --steps 400 --label-fractions 0.01 0.1 1.0 --seed 2 "
    "--supervised-steps 150 --supervised-lr 1e-3 5e-3 --knn-every 0 --preset dermatoscopy --method simclr --rho 1 "
    "--total 334 --finetune --baselines no --output docs/study/small "
    "--name retinamnist-rho1-n334-simclr-two-view-small-seed2-6128ac8c --resume auto"
)


def losses_of(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_checkpoint_is_gone_on_with(old_run: Path, pretrain_here: Callable[..., int]) -> None:
    expected = losses_of(old_run)
    (old_run / "results.csv").unlink()
    flags = ("--config", str(old_run / "config.yaml"), "--no-evaluate", "--resume", "auto")
    assert pretrain_here(*flags) == 0
    # Rounding differs by processor: see test_golden.py, whose learning rate is lower.
    assert losses_of(old_run) == pytest.approx(expected, rel=2e-3)
    assert losses_of(old_run)[:6] == expected[:6]


def test_other_settings_are_still_refused(
    old_run: Path, pretrain_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in old_run.rglob("*") if path.is_file() and path.name != "lock"}
    assert pretrain_here("--config", str(old_run / "config.yaml"), "--resume", "auto", "--queue", "40") == 2
    assert "was run with queue 36, not 40" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())


def test_an_export_is_evaluated(old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = pd.read_csv(old_run / "results.csv")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(old_run), "--supervised-steps", "0"])
    evaluate.main()
    now = pd.read_csv(old_run / "results.csv")
    then = then[then.features != "supervised"].reset_index(drop=True)
    scores = ["val_balanced_accuracy", "accuracy", "balanced_accuracy", "macro_f1", "auc", "head", "medium", "tail"]
    described = [name for name in then.columns if name not in (*scores, "k", "revision")]
    pd.testing.assert_frame_equal(now[described], then[described])
    one_image_of_twelve = 1 / 12 + 1e-6
    assert (now.accuracy - then.accuracy).abs().max() <= one_image_of_twelve


def test_a_config_means_what_its_command_meant() -> None:
    by_command, _ = resolve(COMMAND.split())
    assert from_yaml(CONFIG) == replace(by_command, resume="no", backbone="small-v1")


def test_zero_and_the_empty_text_are_unset(old_run: Path) -> None:
    """In 0.1.0 they stood for "as the data have it", "none" and "by itself"."""
    new, _ = resolve(["--config", str(old_run / "config.yaml")])
    bare, _ = resolve([f"--{flag}" for flag in ("method=ressl", "queue=36")])
    for name in ("size", "channels", "task", "root", "cache", "groups", "total", "indices", "view_size", "tracker"):
        assert getattr(new, name) == getattr(bare, name), name
