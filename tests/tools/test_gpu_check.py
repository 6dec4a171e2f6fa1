"""The check of a GPU keeps what it has, survives what its steps do, and says what it did not measure."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from amimv import InputError
from amimv.tools import gpu_check
from amimv.tools.gpu_check import QUICK, STEPS, CheckSettings, Step, check, count_tests, missing_result
from amimv.tools.profile_throughput import ProfileSettings
from amimv.tools.throughput import parity
from amimv.tools.throughput.parity import ParitySettings, compare_backends

WRITES = "import sys; open(sys.argv[-1].split('=')[1], 'w').write('{\"a\": 1}')\n"


def named(name: str) -> dict[str, Any]:
    """Steps of the check that each run a module of this name."""
    return {"a": Step(20, "writes"), name: Step(1, name), "gone": Step(9, "x", ("no_such_module",))}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the steps that a module of this code and one that writes a result make: exit status, and their records."""
    (tmp_path / "writes.py").write_text(WRITES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run_step(code: str, **settings: Any) -> tuple[int, dict[str, Any]]:
        (tmp_path / "mine.py").write_text(code)
        monkeypatch.setattr(gpu_check, "STEPS", named("mine"))
        status = check(CheckSettings(json=str(tmp_path / "deep" / "gpu.json"), device="cpu", **settings))
        return status, json.loads((tmp_path / "deep" / "gpu.json").read_text())["steps"]

    return run_step


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('CUDA is upset')", "exit status 1: RuntimeError: CUDA is upset"),
        ("pass", "nothing was written"),
        ("import os; os.abort()", "exit status -6: no output"),
    ],
)
def test_a_step_that_fails_is_one_line_and_the_others_run(code: str, reason: str, run: Any) -> None:
    status, records = run(code)
    assert (status, records["mine"]["status"], records["mine"]["reason"]) == (1, "failed", reason)
    assert (records["a"]["status"], records["a"]["found"]) == ("ok", {"a": 1})
    assert (records["gone"]["status"], records["gone"]["reason"]) == ("skipped", "no_such_module is not installed")
    assert records["a"]["environment"]["device"] == "cpu"


def test_what_hangs_is_killed_with_what_it_started(run: Any, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(1.5); open({str(alive)!r}, 'w')"
    code = f"{WRITES}import subprocess, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
    code += "print('so far', flush=True)\ntime.sleep(99)"
    status, records = run(code)
    assert (status, records["mine"]["reason"]) == (1, "killed after its 1 s: so far")
    assert (records["mine"]["found"], records["mine"]["log"]) == ({"a": 1}, ["so far"])
    time.sleep(1)
    assert not alive.exists()


def test_the_file_keeps_the_steps_that_are_not_asked_for(run: Any) -> None:
    assert run("pass")[0] == 1
    status, records = run(WRITES, steps=("mine",))
    assert status == 0
    assert {name: record["status"] for name, record in records.items()} == {"a": "ok", "mine": "ok", "gone": "skipped"}
    with pytest.raises(InputError, match="unknown step 'minne': did you mean mine"):
        run(WRITES, steps=("minne",))


def test_what_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.json"
    with pytest.raises(InputError, match=r"^no CUDA device is available: .*"):
        check(CheckSettings(json=str(path)))
    assert not path.exists()
    for text in ("{", "[]", '{"settings": 1}'):
        path.write_text(text)
        with pytest.raises(InputError, match="no result of this command"):
            check(CheckSettings(json=str(path), device="cpu"))
        assert path.read_text() == text


@pytest.mark.parametrize("name", [name for name in STEPS if name != "tests"])
def test_the_commands_can_be_read(name: str) -> None:
    """What a step is told is what its command takes, in full and quick."""
    for more in ("", QUICK.get(name, "")):
        module, *flags = (STEPS[name].command + more).format(device="cpu").split()
        kind: Any = ParitySettings if module.endswith("parity") else ProfileSettings
        settings = tyro.cli(kind, args=[*flags, "--json", "x"])
        assert settings.device == "cpu"
        if kind is ProfileSettings:
            assert settings.rivals == (name == "throughput-rivals" or settings.train)


def test_tests_are_counted_with_names_and_reasons() -> None:
    bad = '<testcase classname="t" name="bad"><failure message="1 == 2&#10;more"/></testcase>'
    skipped = '<testcase classname="t" name="s"><properties/><skipped message="needs DALI"/></testcase>'
    found = count_tests(f'<testsuites><testcase classname="t" name="good"/>{bad}{2 * skipped}</testsuites>')
    assert found == {"passed": 1, "failures": {"t::bad": "1 == 2"}, "skips": {"needs DALI": 2}}


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ({}, "nothing was written"),
        ({"passed": 0}, "no test passed"),
        ({"throughput": [{"pipeline": "amimv render", "views_per_second": None, "note": "skipped: x"}]}, "skipped: x"),
        ({"throughput": [{"pipeline": "DALI", "views_per_second": None, "note": "skipped: x"}]}, ""),
        ({"throughput": [{"pipeline": "amimv render", "views_per_second": 2.0, "note": ""}]}, ""),
    ],
)
def test_nothing_measured_is_a_failure(found: dict[str, Any], line: str) -> None:
    assert missing_result(found) == line


def test_parity_fails_beyond_the_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {"blur": {"pixels": 5e-4, "normalised": 2e-3}, "crop": {"pixels": 6e-4, "normalised": 8e-4}}
    monkeypatch.setattr(parity, "worst_differences", lambda *arguments: rows)
    settings = ParitySettings(json=str(tmp_path / "parity.json"))
    assert compare_backends(settings) == 1
    assert json.loads((tmp_path / "parity.json").read_text())["operations"] == rows
    rows["blur"]["normalised"] = 5e-4
    assert compare_backends(settings) == 0
    rows["blur"]["normalised"] = float("nan")
    assert compare_backends(ParitySettings()) == 1


def test_parity_of_an_operation() -> None:
    assert compare_backends(ParitySettings(operations=("normalise",))) == 0
    with pytest.raises(InputError, match="unknown operation 'blurr': did you mean blur"):
        compare_backends(ParitySettings(operations=("blurr",)))
