"""Runs on a user's own files by the real command: cut into splits, damaged files left out, for so many minutes."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from amimv import InputError
from amimv.trainers import length
from amimv.trainers.evaluate import EvaluateSettings, evaluate
from amimv.trainers.layers import resolve

PATIENTS, CLASSES = 30, ("nv", "mel", "bkl")
SHORT = [
    *("--size", "16", "--batch-size", "16", "--preset", "none", "--backbone", "small", "--method", "simclr"),
    *("--knn-every", "0", "--supervised-steps", "0", "--baselines", "no", "--projector-hidden", "16"),
]
Command = Callable[..., int]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images of each patient, and one file that is no image; the working folder is theirs."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(2 * PATIENTS):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(f"{i}.png")
        rows.append((f"{i}.png", CLASSES[i // 2 % 3], f"patient {i // 2}"))
    Path("damaged.png").write_bytes(b"no image")
    write([*rows, ("damaged.png", "nv", "another")])
    return tmp_path / "scans.csv"


def write(rows: list[tuple]) -> None:
    with open("scans.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "patient"), *rows])


def read_rows() -> list[tuple]:
    with open("scans.csv", newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def results_of(run: str) -> list[dict[str, str]]:
    with open(f"runs/{run}/results.csv", newline="") as file:
        return list(csv.DictReader(file))


def settings_of(run: str) -> dict:
    return yaml.safe_load(Path(f"runs/{run}/config.yaml").read_text())


def test_a_table_is_cut_trained_on_and_evaluated_again(
    table: Path, pretrain_here: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", "csv:scans.csv", "--steps", "2", "--split", "0.6", "0.2", "0.2", *SHORT]
    assert pretrain_here(*flags, "--name", "a") == 2
    assert "damaged.png cannot be decoded as an image" in capsys.readouterr().err
    assert pretrain_here(*flags, "--name", "a", "--skip-damaged") == 0
    kept = settings_of("a")
    assert (kept["split"], kept["split_seed"], kept["skip_damaged"]) == ([0.6, 0.2, 0.2], 0, True)
    record = json.loads(Path("runs/a/data.json").read_text())
    left_out = [name for split in record.values() for name in split.get("left_out", ())]
    assert left_out == ["damaged.png"]
    assert [sum(split["per_class"]) for split in record.values()] == [split["images"] for split in record.values()]
    assert sum(split["images"] for split in record.values()) == 2 * PATIENTS
    results = results_of("a")
    evaluate(EvaluateSettings("runs/a"))
    assert results_of("a") == results
    assert json.loads(Path("runs/a/data.json").read_text()) == record

    assert pretrain_here(*flags, "--name", "a", "--skip-damaged", "--split-seed", "1", "--resume", "auto") == 2
    assert "was run with split_seed 0, not 1" in capsys.readouterr().err
    rows = read_rows()
    write([rows[-2], *rows[:-2], rows[-1]])  # the same images in another order are split otherwise
    with pytest.raises(InputError, match=r"runs/a: .*the run.s beginning: bring the data back"):
        evaluate(EvaluateSettings("runs/a"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "csv:scans.csv"), "has no split 'val', only train: add rows of it, or cut it off (--split"),
        (("--data", "csv:scans.csv", "--columns", "label=dx"), "has no column 'dx': expected one of file, label"),
        (
            ("--data", "csv:scans.csv", "--split", "0.5", "0.5", "0.5"),
            "expected shares of train, val and test whose sum",
        ),
        (
            ("--data", "phantom", "--size", "28", "--split", "0.7", "0.1", "0.2"),
            "phantom has splits of its own (train, val, test)",
        ),
        (("--data", "csv:scans.csv", "--split", "0.7", "0.1", "0.2"), "class rare has 1 group(s) of images, but each"),
        (("--data", "scans.csv", "--size", "28"), "did you mean csv:scans.csv?"),
        (("--minutes", "0"), "minutes is 0.0, expected more than 0"),
    ],
)
def test_bad_input_is_one_line(
    table: Path, pretrain_here: Command, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    rows = read_rows()
    write([*rows[:-2], (rows[-2][0], "rare", "another")])
    assert pretrain_here(*SHORT, *(() if "--minutes" in flags else ("--steps", "2")), *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_split_of_ones_own_that_leaks_is_told(
    table: Path, pretrain_here: Command, caplog: pytest.LogCaptureFixture
) -> None:
    """Every third image is held out, so that the other one of its patient is trained on, or held out elsewhere."""
    splits = ["train", "val", "train", "train", "test", "train"] * (PATIENTS // 3)
    rows = [(*row, split) for row, split in zip(read_rows(), splits, strict=False)]
    with open("own.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "patient", "split"), *rows])
    patients = {split: {row[2] for row in rows if row[3] == split} for split in ("train", "val", "test")}
    assert pretrain_here("--data", "csv:own.csv", "--steps", "1", *SHORT, "--knn-every", "1") == 0
    for split in ("val", "test"):
        n = sum(row[3] == split and row[2] in patients["train"] for row in rows)
        assert n == 10
        assert f"own, {split}: {n} of {n} images share a group (patient, lesion, slide) with training" in caplog.text


def test_views_become_steps_that_the_run_repeats_from(table: Path, pretrain_here: Command) -> None:
    flags = ["--data", "csv:scans.csv", "--split", "0.6", "0.2", "0.2", "--skip-damaged", "--no-evaluate", *SHORT]
    settings, _ = resolve([*flags, "--views", "1"])
    of_step = settings.batch_size * 5
    views = ["--recipe", "amimv-views", "--views", str(4 * of_step - 1)]
    assert pretrain_here(*flags, *views, "--name", "counted") == 0
    (line,) = (line for line in Path("runs/counted/config.yaml").read_text().splitlines() if line.startswith("steps:"))
    assert [part.strip() for part in line.split("#")] == ["steps: 3", f"views {4 * of_step - 1} at {of_step} a step"]
    assert settings_of("counted")["views"] is None
    assert Path("runs/counted/metrics.jsonl").read_bytes().count(b"\n") == 3
    assert pretrain_here(*flags, *views, "--name", "counted", "--resume", "auto") == 0
    assert pretrain_here(*flags, *views[:-1], str(of_step), "--name", "counted", "--resume", "auto") == 2


@pytest.fixture
def ten_steps_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured says so, whatever the machine is busy with."""
    measure = length.measure_rate
    monkeypatch.setattr(length, "measure_rate", lambda training: 10.0 if measure(training) else 0.0)
    monkeypatch.setattr(length, "SECONDS", 0.0)


def test_minutes_become_steps_that_the_run_repeats_from(
    table: Path,
    pretrain_here: Command,
    ten_steps_a_second: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flags = ["--data", "csv:scans.csv", "--split", "0.6", "0.2", "0.2", "--skip-damaged", "--no-evaluate", *SHORT]
    assert pretrain_here(*flags, "--minutes", "0.01", "--name", "timed") == 0
    (line,) = (line for line in Path("runs/timed/config.yaml").read_text().splitlines() if line.startswith("steps:"))
    assert [part.strip() for part in line.split("#")] == ["steps: 6", "minutes 0.01 at 10 steps/s"]
    assert settings_of("timed")["minutes"] is None
    assert pretrain_here("--config", "runs/timed/config.yaml", "--name", "again") == 0
    assert pretrain_here(*flags, "--steps", "6", "--name", "steps") == 0
    first, *others = (Path(f"runs/{name}/metrics.jsonl").read_bytes() for name in ("timed", "again", "steps"))
    assert first.count(b"\n") == 6
    assert others == [first, first]
    with caplog.at_level("INFO", "amimv"):
        assert pretrain_here(*flags, "--minutes", "0.02", "--name", "timed", "--resume", "auto") == 0
    assert "runs/timed began with 6 steps: it keeps that length" in caplog.text
    assert Path("runs/timed/metrics.jsonl").read_bytes() == first
