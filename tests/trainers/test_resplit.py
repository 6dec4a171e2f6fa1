"""Data with splits of their own that are joined and cut anew: a run, its evaluation again, other data, a study."""

import csv
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from amimv import InputError
from amimv.command_line import shown_as
from amimv.pipelines import load_store
from amimv.pipelines.sources.listing import SPLITS
from amimv.tools.commands import EmbedSettings
from amimv.tools.embed import embed
from amimv.trainers.commands import EvaluateSettings
from amimv.trainers.data_settings import DataSettings
from amimv.trainers.evaluate import evaluate
from amimv.trainers.run_folder import default_name, name_evaluation
from amimv.trainers.settings import PretrainSettings
from amimv.trainers.study import read_study

SIZES = {"train": 60, "val": 20, "test": 40}
ANEW = ("--split", "0.6", "0.2", "0.2", "--resplit")
SHORT = (
    *("--batch-size", "8", "--threads", "1", "--preset", "none", "--backbone", "small", "--method", "simclr"),
    *("--knn-every", "0", "--supervised-steps", "0", "--projector-hidden", "16", "--steps", "1"),
)
Command = Callable[..., int]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three images of each of forty lesions, one in each third of the whole; the working folder is theirs."""
    monkeypatch.chdir(tmp_path)
    rng, start, arrays = np.random.default_rng(0), 0, dict[str, np.ndarray]()
    for split, n in SIZES.items():
        lesions = np.arange(start, start := start + n) % 40
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28, 3), dtype=np.uint8)
        arrays |= {f"{split}_labels": lesions % 2, f"{split}_groups": lesions}
    np.savez("own.npz", **arrays)  # type: ignore[arg-type]
    return "own.npz"


def anew(data: str) -> DataSettings:
    return DataSettings(data, split=(0.6, 0.2, 0.2), resplit=True)


def rows_of(folder: str) -> list[dict[str, str]]:
    with open(f"{folder}/results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_is_cut_anew_recorded_and_evaluated_again(
    data: str, pretrain_here: Command, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "amimv")
    assert pretrain_here("--data", data, *ANEW, *SHORT, "--name", "run") == 0
    (line,) = [line for line in caplog.messages if "split by seed" in line]
    assert line.startswith("own: its own splits (60 train, 20 val, 40 test images) joined and split by seed 0 into 72")
    assert "share a group" not in caplog.text
    kept = yaml.safe_load(Path("runs/run/config.yaml").read_text())
    assert (kept["split"], kept["resplit"]) == ([0.6, 0.2, 0.2], True)
    record = json.loads(Path("runs/run/data.json").read_text())
    assert {split: one["images"] for split, one in record.items()} == {"train": 72, "val": 24, "test": 24}
    results = rows_of("runs/run")
    evaluate(EvaluateSettings("runs/run"))
    assert rows_of("runs/run") == results
    capsys.readouterr()
    assert pretrain_here("--data", data, *ANEW[:-1], "--no-resplit", *SHORT, "--name", "run", "--resume", "auto") == 2
    assert "was run with resplit True, not False" in capsys.readouterr().err

    evaluate(EvaluateSettings("runs/run", other=replace(shown_as(DataSettings)(data=""), **vars(anew(data)))))
    assert {row["n_train"] for row in rows_of("runs/run/evaluations/own-resplit-split-0.6-0.2-0.2-seed0")} == {"72"}
    embed(EmbedSettings("runs/run", "features.npz", images=anew(data), predict="knn"))
    with np.load("features.npz") as columns:
        for split in SPLITS:
            store = load_store(data, split, shares=(0.6, 0.2, 0.2), resplit=True)
            assert store.groups is not None
            assert columns["group"][columns["split"] == split].tolist() == store.groups.tolist()
    with pytest.raises(InputError, match=r"^resplit joins splits that shares"):
        embed(EmbedSettings("runs/run", "features.npz", images=DataSettings(data, resplit=True)))


def test_data_that_are_to_be_cut_otherwise_are_refused_in_one_line(
    data: str, pretrain_here: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        (("--resplit",), "resplit joins the splits of the data, but nothing cuts them anew: give --split 0.7 0.1 0.2"),
        (ANEW[:-1], "own has splits of its own (train, val, test): leave --split out, or give --resplit to join them"),
    ):
        assert pretrain_here("--data", data, *flags, *SHORT) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


def test_a_study_tells_the_splits_apart(data: str, tmp_path: Path) -> None:
    text = f"""
    settings: {{steps: 1, method: simclr, batch_size: 8}}
    sets:
      official: {{data: {data}}}
      lesions: {{data: {data}, split: [0.6, 0.2, 0.2], resplit: yes}}
      others: {{data: {data}, split: [0.6, 0.2, 0.2], split_seed: 1, resplit: yes}}
    grids: {{all: {{data: [official, lesions, others]}}}}
    """
    Path("study.yaml").write_text(text)
    cells = read_study(Path("study.yaml"))
    assert len(cells) == len({cell.run for cell in cells}) == 6  # the baselines, too
    assert {cell.settings.resplit for cell in cells if "-resplit-" in cell.run} == {True}
    assert sum("--resplit" in cell.flags() for cell in cells) == 4
    Path("study.yaml").write_text(text.replace("split: [0.6, 0.2, 0.2], resplit: yes", "resplit: yes"))
    with pytest.raises(InputError, match=r"grid all: resplit joins the splits of the data, but nothing cuts them"):
        read_study(Path("study.yaml"))


def test_evaluations_on_other_images_have_folders_of_their_own(data: str) -> None:
    cut: dict[str, Any] = {"split": (0.6, 0.2, 0.2)}
    others: list[dict[str, Any]] = [{}, {"data_seed": 1}, cut, cut | {"split_seed": 1}, cut | {"resplit": True}]
    others += [{"split": (0.5, 0.25, 0.25)}, {"rho": 9.0}, cut | {"rho": 9.0, "data_seed": 1}]
    names = [name_evaluation(PretrainSettings(data=data, steps=1, **one)) for one in others]
    assert len(set(names)) == len(names)
    assert names[0] == "own"
    assert names[-1] == "own-rho9-dataseed1-split-0.6-0.2-0.2-seed0"


def test_names_of_other_runs_stay(data: str) -> None:
    settings: dict[str, Any] = {"data": data, "steps": 1, "split": (0.6, 0.2, 0.2)}
    name = default_name(PretrainSettings(**settings))
    assert name.startswith("own-amimv")
    assert default_name(PretrainSettings(**settings, resplit=True)) == name.replace("own-", "own-resplit-", 1)
