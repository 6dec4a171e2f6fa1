"""The rate that makes minutes a number of steps is measured without a trace."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from amimv.models.methods import METHODS
from amimv.trainers import length
from amimv.trainers.build import Training, build_training
from amimv.trainers.layers import resolve
from amimv.trainers.loop import train_step

SMALL = {
    "projector_hidden": 32,
    "projector_out": 16,
    "predictor_hidden": 24,
    "prototypes": 10,
    "queue": 36,
    "momentum": 0.8,
    "freeze_prototypes": 0.75,
    "queue_start": 0.0,
    "prune_every": 0.25,
}


@pytest.fixture(scope="module")
def tiny_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, train_images=rng.integers(0, 256, (48, 16, 16, 3), dtype=np.uint8))
    return path


def build(method: str, data: Path) -> Training:
    AcceleratorState._reset_state(reset_partial_state=True)
    has = {field.name for field in fields(METHODS[method].settings)}
    small = [
        word for name, value in SMALL.items() if name in has for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    flags = ["--method", method, "--data", str(data), "--batch-size", "16", "--steps", "8", "--preset", "none"]
    settings, _ = resolve(
        [*flags, "--backbone", "small", "--warmup", "0.25", "--knn-every", "0", "--no-evaluate", *small]
    )
    return build_training(settings, Accelerator(cpu=True))


def losses(training: Training) -> list[list[float]]:
    batches = training.loader.epoch(0)
    found = [train_step(training, batches, 0).values.tolist() for _ in range(3)]
    return [*found, [float(p.detach().double().sum()) for p in training.method.state_dict().values()]]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_measured_leaves_no_trace(method: str, tiny_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length, "FEWEST", 4)
    monkeypatch.setattr(length, "SECONDS", 0.0)
    expected = losses(build(method, tiny_npz))
    training = build(method, tiny_npz)
    torch.rand(())  # whatever is drawn from torch's generator goes on where it stood
    state = torch.get_rng_state()
    assert length.measure_rate(training) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert (training.step, training.total_steps) == (0, 8)
    assert losses(training) == expected


def test_the_rate_is_that_of_the_measured_steps(tiny_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each step moves by a tenth of a second, and the first five by one."""
    now, taken = [0.0], []

    def step(training: Training, batches: object, epoch: int) -> None:
        taken.append(epoch)
        now[0] += 1.0 if len(taken) <= length.WARM_UP else 0.1

    monkeypatch.setattr(length, "train_step", step)
    monkeypatch.setattr(length.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(length, "SECONDS", 30.0)
    assert length.measure_rate(build("simclr", tiny_npz)) == pytest.approx(10)
    assert len(taken) == length.WARM_UP + 30
