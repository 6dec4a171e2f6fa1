"""The examples run, in another code base's loop as in ours, and learn."""

import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import amimv.pipelines
from amimv.pipelines import load_store

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"), key=lambda path: path.name)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """What an example defines; what it writes lands in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(amimv.pipelines, "load_store", cache(load_store))
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_they_learn(path: Path, load: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    losses = torch.tensor(load(path.stem)["main"](12))
    assert losses.shape == (12,)
    assert losses.isfinite().all()
    assert losses[-4:].mean() < losses[:4].mean()
    assert f"loss {losses[0]:.3f} to {losses[-1]:.3f} in 12 steps" in capsys.readouterr().out


def test_going_on_gives_what_not_stopping_gives(load: Callable[[str], dict[str, Any]]) -> None:
    train = load("torch_dataloader")["train"]
    whole = train(5, Path("whole.pt"))
    assert train(2, Path("parts.pt")) + train(5, Path("parts.pt")) == whole


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_they_are_short_and_stand_alone(path: Path) -> None:
    text = path.read_text()
    assert text.startswith('"""')
    assert len(text.splitlines()) <= 60
    own = [line.split()[1] for line in text.splitlines() if "amimv" in line and line.split()[0] in ("from", "import")]
    assert set(own) <= {"amimv.pipelines", "amimv.models.losses"}


def test_all_are_here() -> None:
    expected = {"accelerate_loop", "huggingface", "lightning_lightly", "supervised_samplers", "torch_dataloader"}
    assert {path.stem for path in EXAMPLES} == expected
