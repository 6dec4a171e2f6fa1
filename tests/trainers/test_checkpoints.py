"""Checkpoints that are whole or not there, and logs that can be cut."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from amimv import InputError
from amimv.trainers import checkpoints, loop
from amimv.trainers.checkpoints import JsonLines, load_newest, save_checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Dangerous:
    """What only an unsafe load would bring back."""


# Checkpoints


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    weights = torch.arange(4.0)
    state = {"step": 3, "w": weights, "nested": {"ids": torch.tensor([1, 2]), "x": [1.5, None]}}
    save_checkpoint(tmp_path / "deep" / "er", 3, state)
    loaded = load_newest(tmp_path / "deep" / "er")
    assert loaded is not None
    assert torch.equal(loaded["w"], weights)
    assert torch.equal(loaded["nested"]["ids"], torch.tensor([1, 2]))
    assert (loaded["step"], loaded["nested"]["x"]) == (3, [1.5, None])


def test_only_the_newest_two_are_kept_and_nothing_partial(tmp_path: Path) -> None:
    (tmp_path / "mine.pt").write_text("not ours")
    for step in (5, 10, 15, 100):
        save_checkpoint(tmp_path, step, {"step": step})
    assert names(tmp_path) == ["mine.pt", "step-00000015.pt", "step-00000100.pt"]
    loaded = load_newest(tmp_path)
    assert loaded == {"step": 100}


def test_a_save_that_fails_leaves_the_earlier_ones_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1})

    def torn_save(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.torch, "save", torn_save)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path, 2, {"step": 2})
    assert "step-00000002.pt" not in names(tmp_path)
    assert load_newest(tmp_path) == {"step": 1}
    save_checkpoint(tmp_path, 2, {"step": 2})
    assert names(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]


def test_processes_that_find_different_checkpoints_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "share", lambda accelerator, step: [step + 4, step])
    with pytest.raises(InputError, match=r"some processes find step 4 in .*, others 0: give an --output"):
        loop.restore(SimpleNamespace(step=0, accelerator=None), None, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("kept_bytes", [0, 10, -7])
def test_a_torn_newest_falls_back_and_says_so(
    tmp_path: Path, kept_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1})
    save_checkpoint(tmp_path, 2, {"step": 2, "w": torch.zeros(100)})
    newest = tmp_path / "step-00000002.pt"
    newest.write_bytes(newest.read_bytes()[:kept_bytes])
    with caplog.at_level(logging.WARNING, logger="amimv"):
        assert load_newest(tmp_path) == {"step": 1}
    assert "step-00000002.pt" in caplog.text


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "nowhere") is None
    (tmp_path / "step-00000001.pt").write_bytes(b"garbage")
    (tmp_path / "step-00000002.partial").write_bytes(b"garbage")
    assert load_newest(tmp_path) is None


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1})
    torch.save({"step": 2, "x": Dangerous()}, tmp_path / "step-00000002.pt")
    assert load_newest(tmp_path) == {"step": 1}


# Logs


def test_rows_are_read_as_they_were_appended(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    rows = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-30, "name": "ä\u2028b"}]
    log.append(rows[:1])
    log.append(rows[1:])
    assert log.read() == rows
    assert [json.loads(line) for line in log.path.read_text().split("\n")[:-1]] == rows


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(tmp_path: Path, bad: float) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    log.append([{"step": 1}])
    with pytest.raises(ValueError, match="JSON"):
        log.append([{"step": 2, "loss": bad}])
    assert log.read() == [{"step": 1}]


def test_cut_drops_what_lies_behind_the_step(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    log.append([{"step": step, "v": [step] * 2} for step in (1, 2, 2, 3, 4)])
    whole = log.path.read_text()
    log.cut(9)
    assert log.path.read_text() == whole
    log.cut(2)
    assert log.path.read_text() == "".join(whole.splitlines(keepends=True)[:3])
    log.append([{"step": 3}])
    assert [row["step"] for row in log.read()] == [1, 2, 2, 3]
    log.cut(0)
    assert log.read() == []
    assert names(tmp_path) == ["m.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "{", '{"step": 3, "loss": 1.'])
def test_a_torn_last_line_is_neither_read_nor_kept(tmp_path: Path, torn: str) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    log.append([{"step": 1}, {"step": 2}])
    good = log.path.read_text()
    log.path.write_text(good + torn)
    assert [row["step"] for row in log.read()] == [1, 2]
    log.cut(5)
    assert log.path.read_text() == good


def test_cutting_a_log_that_is_not_there_makes_none(tmp_path: Path) -> None:
    JsonLines(tmp_path / "m.jsonl").cut(3)
    assert names(tmp_path) == []
