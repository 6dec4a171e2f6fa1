"""A run that is killed and resumed is one run in its tracker, with every step once."""

import itertools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amimv.trainers import loop
from amimv.trainers.trackers import PROJECT

FLAGS = ("--batch-size", "16", "--steps", "8", "--save-every", "5", "--log-every", "3", "--knn-every", "0")
RUN = Path("runs/tracked")


def tensorboard_steps(name: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (hparams,) = (RUN / PROJECT).rglob("hparams.yml")  # of the first start alone
    assert "batch_size: 16\n" in hparams.read_text()
    read = EventAccumulator(str(RUN / name))
    read.Reload()
    return [event.step for event in read.Scalars("loss")]


def records(path: Path) -> Iterator[bytes]:
    """Of a LevelDB log, wandb's offline file: blocks of 32 KiB of parts, each with checksum, length and kind."""
    data, at, found = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := -at % 2**15) and left < 7:  # no room for a part's head
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        found += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield found
            found = b""


def wandb_steps(name: str) -> list[int]:
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted((RUN / "wandb").rglob("*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2  # offline, each start has its file
    steps = []
    for record in map(Record.FromString, itertools.chain.from_iterable(map(records, files))):
        items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        steps += [int(items["_step"])] if "loss" in items else []
    return steps


def mlflow_steps(name: str) -> list[int]:
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (name, RUN.name, "FINISHED")
    assert run.data.params["batch_size"] == "16"
    return [metric.step for metric in client.get_metric_history(name, "loss")]


def trackio_steps(name: str) -> list[int]:
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs(PROJECT) == [name]
    assert name.startswith(f"{RUN.name}-")
    return [row["step"] for row in SQLiteStorage.get_logs(PROJECT, name) if "loss" in row]


@pytest.mark.parametrize(
    ("tracker", "steps_of"),
    [
        ("tensorboard", tensorboard_steps),
        ("wandb", wandb_steps),
        pytest.param("mlflow", mlflow_steps, marks=pytest.mark.slow),
        pytest.param("trackio", trackio_steps, marks=pytest.mark.slow),
    ],
)
def test_the_same_run_is_continued(
    tracker: str,
    steps_of: Callable[[str], list[int]],
    pretrain_here: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlflow"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which needs no database
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(tracker)
    step = loop.train_step

    def killed(training: Any, *arguments: Any) -> Any:
        if training.step == 7:  # after a checkpoint at 5 and six steps logged
            raise RuntimeError("killed")
        return step(training, *arguments)

    flags = (*FLAGS, "--no-evaluate", "--tracker", tracker, "--name", RUN.name)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain_here(*flags)
    (name,) = json.loads((RUN / "trackers.json").read_text()).values()
    assert pretrain_here(*flags, "--resume", "auto") == 0
    assert json.loads((RUN / "trackers.json").read_text()) == {tracker: name}
    assert steps_of(name) == list(range(1, 9))


def test_one_that_is_not_installed_or_cannot_begin(
    pretrain_here: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
        assert pretrain_here(*FLAGS, "--no-evaluate", "--tracker", "wandb") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: tracker 'wandb' is not installed: pip install wandb, or leave it out"
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *_: 1 / 0)
    assert pretrain_here(*FLAGS, "--no-evaluate", "--tracker", "tensorboard") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: tracker 'tensorboard' cannot begin a run: set it up, or leave it out. It says: div")
