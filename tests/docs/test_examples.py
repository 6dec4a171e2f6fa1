"""The examples run, in another code base's loop as in ours, and learn."""

import csv
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
#: Those of a training loop; the others evaluate.
LOOPS = [path for path in EXAMPLES if not path.stem.startswith("evaluate")]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """What an example defines; what it writes lands in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(amimv.pipelines, "load_store", cache(load_store))
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
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


@pytest.mark.slow
def test_any_model_is_evaluated_beside_its_baselines(
    load: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {(row["features"], row["probe"]): row for row in load("evaluate_any_model")["main"](8)}
    probes = [("majority", ""), *((name, p) for name in ("raw pixels", "resnet10t") for p in ("knn", "linear"))]
    assert list(rows) == [*probes, ("resnet10t", "fine-tuned")]
    assert rows["majority", ""]["balanced_accuracy"] == pytest.approx(1 / 7, abs=1e-6)
    assert rows["raw pixels", "knn"]["balanced_accuracy"] > 0.2
    assert all(row["n_train"] == 700 for row in rows.values())
    with Path("results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [(row["features"], row["probe"], row["run"]) for row in read] == [(*key, "") for key in rows]
    assert "raw pixels" in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_they_are_short_and_stand_alone(path: Path) -> None:
    text = path.read_text()
    assert text.startswith('"""')
    assert len(text.splitlines()) <= 60
    own = [line.split()[1] for line in text.splitlines() if "amimv" in line and line.split()[0] in ("from", "import")]
    assert set(own) <= {"amimv.pipelines", "amimv.models.losses", "amimv.trainers.evaluation"}


def test_all_are_here() -> None:
    loops = {"accelerate_loop", "huggingface", "lightning_lightly", "supervised_samplers", "torch_dataloader"}
    assert {path.stem for path in LOOPS} == loops
    assert {path.stem for path in EXAMPLES} - loops == {"evaluate_any_model"}
