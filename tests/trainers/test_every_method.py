"""Every method through the real command, in this process: exact resume after a signal."""

import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from amimv.models.methods import METHODS
from amimv.pipelines import PairBatch
from amimv.trainers import loop, run_folder
from amimv.trainers import pretrain as module
from amimv.trainers.build import Training
from amimv.trainers.checkpoints import load_newest
from amimv.trainers.journal import Step

BATCH, N_TRAIN, STEPS, STOPPED_AFTER = 16, 48, 8, 5
#: Of whatever a method's settings have. The queue goes round, and stands somewhere inside after the step that is the
#: last before the stop. Every schedule is still on its way there.
SMALL = {
    "projector_hidden": 32,
    "projector_out": 16,
    "predictor_hidden": 24,
    "prototypes": 10,
    "queue": 36,
    "periods": 1.5,
    "teacher_temperature": 0.07,
    "teacher_temperature_start": 0.02,
    "teacher_temperature_warmup": 1.0,
    "centre_momentum": 0.5,
    "momentum": 0.8,
    "freeze_prototypes": 0.75,
    "queue_start": 0.5,
    "prune_every": 0.5,
}


@pytest.fixture(scope="module")
def tiny_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 16 pixels: three steps an epoch."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", N_TRAIN), ("val", 6), ("test", 6)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 3)[:, None].astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path


def flags_of(method: str, data: Path, folder: Path, *more: str) -> list[str]:
    has = {field.name for field in fields(METHODS[method].settings)}
    small = [(f"--{name.replace('_', '-')}", str(value)) for name, value in SMALL.items() if name in has]
    return [
        *("--method", method, "--data", str(data), "--output", str(folder), "--name", "r"),
        *("--batch-size", str(BATCH), "--steps", str(STEPS), "--save-every", "3", "--knn-every", "0"),
        *("--no-evaluate", "--backbone", "small", "--preset", "none", "--warmup", "0.25"),
        *(word for pair in small for word in pair),
        *more,
    ]


def command(monkeypatch: pytest.MonkeyPatch, *flags: str, cpu: bool = True) -> int:
    """The exit status of the command's own main, from whatever state the random generators are in."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(cpu).lower())
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags])
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: None)  # the slowest part, and no part of the training
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    try:
        module.main()
    except SystemExit as status:
        return int(status.code or 0)
    return 0


def raise_sigterm_in(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGTERM to this process while the step (from 1) is at work."""
    train_step = loop.train_step

    def interrupted(training: Training, batches: Iterator[PairBatch], epoch: int) -> Step:
        if training.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(training, batches, epoch)

    monkeypatch.setattr(loop, "train_step", interrupted)


def state_of(folder: Path) -> dict[str, Any]:
    state = load_newest(folder / "r" / "checkpoints")
    assert state is not None
    return state


def assert_same(found: Any, expected: Any, where: str) -> None:
    """Equal bit for bit, whatever is nested in it."""
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for name in found:
            assert_same(found[name], expected[name], f"{where}.{name}")
    elif isinstance(found, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    elif isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


#: A queue, a teacher with a predictor, prototypes, and two images a pair; the other methods are of these parts.
OFTEN = ("nnclr", "byol", "swav", "mimv")


@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m in OFTEN else pytest.mark.slow) for m in METHODS])
def test_stopped_in_mid_epoch_and_resumed_equals_uninterrupted(
    tiny_npz: Path,
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(monkeypatch, *flags_of(method, tiny_npz, whole)) == 0
    per_epoch = N_TRAIN // BATCH
    assert STOPPED_AFTER % per_epoch, "to be strictly inside an epoch"
    assert SMALL["queue"] < STOPPED_AFTER * BATCH
    assert STOPPED_AFTER * BATCH % SMALL["queue"], "to be strictly inside the queue"
    with monkeypatch.context() as patch:
        raise_sigterm_in(STOPPED_AFTER, patch)
        assert command(patch, *flags_of(method, tiny_npz, broken)) == module.EXIT_INTERRUPTED == 75
    assert "SIGTERM: saved; go on with --resume auto" in capsys.readouterr().err
    log = broken / "r" / "metrics.jsonl"
    assert len(log.read_text().splitlines()) == STOPPED_AFTER == state_of(broken)["step"]
    assert command(monkeypatch, *flags_of(method, tiny_npz, broken, "--resume", "auto")) == 0
    assert log.read_bytes() == (whole / "r" / "metrics.jsonl").read_bytes()
    for row in map(json.loads, log.read_text().splitlines()):
        assert math.isfinite(row["loss"])
        # Rows of length one in D dimensions spread by at most 1 / sqrt(D).
        assert 0 < row["embedding_std"] <= 1 / math.sqrt(SMALL["projector_out"]) * math.sqrt(BATCH / (BATCH - 1))
    found, expected = state_of(broken), state_of(whole)
    assert found["step"] == STEPS
    for part in ("method", "optimizer", "loader", "rng"):
        assert_same(found[part], expected[part], part)


def assert_trains(folder: Path, precision: str, steps: int) -> None:
    rows = [json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == steps
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["embedding_std"]) for row in rows)
    weights = state_of(folder)["method"]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert all(tensor.dtype == torch.float32 for tensor in weights.values() if tensor.is_floating_point()), precision


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(tiny_npz: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = flags_of(method, tiny_npz, tmp_path, "--steps", "2", "--mixed-precision", "bf16")
    assert command(monkeypatch, *flags) == 0
    assert_trains(tmp_path, "bf16", 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("recipe", ["amimv", "multi-crop"])
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(
    tiny_npz: Path, tmp_path: Path, method: str, recipe: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = flags_of(method, tiny_npz, tmp_path, "--recipe", recipe, "--mixed-precision", precision)
    assert command(monkeypatch, *flags, cpu=False) == 0
    assert_trains(tmp_path, precision, STEPS)
