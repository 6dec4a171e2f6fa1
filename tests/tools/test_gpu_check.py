"""The check of a GPU goes on where it ended, survives what its steps do, and says what it did not measure."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from amimv import InputError
from amimv.tools import gpu_check
from amimv.tools.gpu_check import CheckSettings, Part, Step, check, count_tests, list_quick_steps, list_steps

WRITES = """
import json, pathlib, sys
record, counter, path = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
counter.write_text(counter.read_text() + "x" if counter.exists() else "x")
path.write_text(json.dumps(record))
"""
ROW = {"pipeline": "amimv PairLoader, kornia", "views_per_second": 5.0}
FINE = {"status": "ok", "result": "fine"}
MEASURED: dict[Part, dict[str, Any]] = {
    "parity": FINE,
    "throughput": {**FINE, "rows": [ROW]},
    "training": {**FINE, "rows": [{"step_ms": 1.0}]},
    "tests": FINE,
}


def writes(part: Part, record: dict[str, Any], counter: Path) -> Step:
    """A step that leaves this record, and an x in a file each time it is run."""
    return Step(part, "s", 60, (sys.executable, "-c", WRITES, json.dumps(record), str(counter)))


def runs(part: Part, code: str, seconds: float = 60) -> Step:
    return Step(part, "s", seconds, (sys.executable, "-c", code))


def on_cpu(folder: Path, *steps: Step, **settings: Any) -> tuple[int, dict[str, Any]]:
    """Exit status and document of these steps."""
    path = folder / "gpu.json"
    status = check(CheckSettings(json=str(path), device="cpu", **settings), lambda device: list(steps))
    return status, strict(path)


def strict(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_what_is_done_is_not_repeated(tmp_path: Path) -> None:
    counters = {part: tmp_path / part for part in MEASURED}
    steps = [writes(part, record, counters[part]) for part, record in MEASURED.items()]
    steps[0] = writes("parity", {"status": "skipped", "result": "skipped: x"}, counters["parity"])
    steps[3] = writes("tests", {"status": "failed", "result": "bad"}, counters["tests"])
    assert on_cpu(tmp_path, *steps)[0] == 1
    assert on_cpu(tmp_path, *steps)[0] == 1
    assert {part: counter.read_text() for part, counter in counters.items()} == {
        "parity": "x",
        "throughput": "x",
        "training": "x",
        "tests": "xx",
    }
    steps[3] = writes("tests", FINE, counters["tests"])
    status, document = on_cpu(tmp_path, *steps)
    assert status == 0
    assert document["parts"]["throughput"]["s"]["rows"] == [ROW]
    assert on_cpu(tmp_path, *steps, fresh=True)[0] == 0
    assert counters["parity"].read_text() == "xx"


@pytest.mark.parametrize("key", ["revision", "source", "gpu", "packages", "driver"])
def test_another_environment_starts_over(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, counter = writes("parity", FINE, tmp_path / "counter"), tmp_path / "counter"
    assert on_cpu(tmp_path, step)[0] == 0
    real = gpu_check.describe
    monkeypatch.setattr(gpu_check, "describe", lambda device: real(device) | {key: "another"})
    document = on_cpu(tmp_path, step)[1]
    assert counter.read_text() == "xx"
    assert document["environment"][key] == "another"
    assert strict(tmp_path / "gpu.json.old")["environment"].get(key) != "another"
    assert on_cpu(tmp_path, step)[0] == 0
    assert counter.read_text() == "xx"


def test_only_the_parts_asked_for(tmp_path: Path) -> None:
    steps = [writes(part, record, tmp_path / part) for part, record in MEASURED.items()]
    status, document = on_cpu(tmp_path, *steps, parts=("tests", "parity"))
    assert status == 0
    assert set(document["parts"]) == {"tests", "parity"}


PARTIAL = (
    "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'status': 'ok', 'result': '3 of 8', 'rows': [1]}))"
)


@pytest.mark.parametrize(
    ("code", "expected"),
    {
        "abort": ("import os; os.abort()", "ended by SIGABRT: Fatal Python error: Aborted"),
        "raise": ("raise RuntimeError('CUDA is upset')", "exit status 1: RuntimeError: CUDA is upset"),
        "nothing": ("pass", "it left no record"),
        "nan": ("import sys; open(sys.argv[1], 'w').write('{\"a\": NaN}')", "not strict JSON (NaN is not JSON)"),
        "list": ("import sys; open(sys.argv[1], 'w').write('[]')", "not strict JSON"),
        "partial": (f"{PARTIAL}; sys.exit(3)", "exit status 3: no output; 3 of 8"),
    }.values(),
)
def test_a_step_that_fails_is_one_line(
    tmp_path: Path, code: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, document = on_cpu(tmp_path, runs("parity", code), writes("tests", FINE, tmp_path / "counter"))
    record = document["parts"]["parity"]["s"]
    assert status == 1
    assert record["status"] == "failed"
    assert expected in record["result"]
    assert "\n" not in record["result"]
    assert document["parts"]["tests"]["s"]["status"] == "ok"
    assert "parity, s: failed" in capsys.readouterr().out


@pytest.mark.parametrize("ignores", ["", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "])
def test_a_step_that_hangs_is_killed(tmp_path: Path, ignores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 0.3)
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(alive)!r}, 'w')"
    code = f"{ignores}{PARTIAL}; import subprocess, time; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    started = time.monotonic()
    status, document = on_cpu(
        tmp_path, runs("parity", code + "time.sleep(99)", 1), writes("tests", FINE, tmp_path / "c")
    )
    record = document["parts"]["parity"]["s"]
    assert (status, record["status"]) == (1, "failed")
    assert record["result"] == "killed after its 1 s; 3 of 8"
    assert record["rows"] == [1]
    assert document["parts"]["tests"]["s"]["status"] == "ok"
    time.sleep(max(0.0, 3 - (time.monotonic() - started)))
    assert not alive.exists()


@pytest.mark.parametrize(
    ("part", "record"),
    [
        ("throughput", FINE),
        ("throughput", {**FINE, "rows": [{**ROW, "views_per_second": None}]}),
        ("throughput", {**FINE, "rows": [{**ROW, "pipeline": "DALI pipeline"}]}),
        ("training", FINE),
        ("training", {**FINE, "rows": [{"error": "ValueError"}]}),
    ],
)
def test_nothing_measured_is_a_failure(
    tmp_path: Path, part: Part, record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert on_cpu(tmp_path, writes(part, record, tmp_path / "counter"))[0] == 1
    assert "was measured" in capsys.readouterr().out
    assert on_cpu(tmp_path, writes(part, MEASURED[part], tmp_path / "counter"), fresh=True)[0] == 0


def test_no_time_is_left_for_the_next_call(tmp_path: Path) -> None:
    step = writes("tests", FINE, tmp_path / "counter")
    status, document = on_cpu(tmp_path, step, minutes=0.001)
    assert (status, document["parts"]["tests"]["s"]["status"]) == (1, "no time")
    assert not (tmp_path / "counter").exists()
    assert on_cpu(tmp_path, step)[0] == 0


def test_no_gpu_is_one_line(tmp_path: Path) -> None:
    code = "import sys, torch; torch.cuda.is_available = lambda: False; from amimv.tools.gpu_check import main; main()"
    command = [sys.executable, "-c", code, "--json", str(tmp_path / "gpu.json")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("error: no CUDA device is available")
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"environment": NaN}', '{"environment": 1, "parts": {}}'])
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, text: str) -> None:
    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(InputError, match="no result of this command"):
        on_cpu(tmp_path, writes("tests", FINE, tmp_path / "counter"))
    assert (tmp_path / "gpu.json").read_text() == text


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        check(CheckSettings(json=str(tmp_path / "file" / "gpu.json"), device="cpu"), lambda device: [])


def test_the_file_is_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the command while it writes, the file is what it was before, and NaN is never written."""
    step = writes("tests", FINE, tmp_path / "counter")
    on_cpu(tmp_path, step)
    before = (tmp_path / "gpu.json").read_bytes()

    def torn(path: Path, content: dict[str, Any]) -> None:
        path.write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "write_json", torn)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.write_atomically(tmp_path / "gpu.json", {})
    assert (tmp_path / "gpu.json").read_bytes() == before
    monkeypatch.undo()
    with pytest.raises(ValueError, match="JSON"):
        gpu_check.write_atomically(tmp_path / "gpu.json", {"a": float("nan")})
    assert (tmp_path / "gpu.json").read_bytes() == before
    with (tmp_path / "gpu.json").open("rb") as reader:  # who is reading it meanwhile reads what was there
        gpu_check.write_atomically(tmp_path / "gpu.json", {"a": 1})
        assert reader.read() == before
    assert strict(tmp_path / "gpu.json") == {"a": 1}


def test_a_quick_run_without_dali(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    settings = CheckSettings(json=str(tmp_path / "gpu.json"), device="cpu", quick=True, parts=("parity",))
    assert check(settings) == 0
    document = strict(tmp_path / "gpu.json")
    parity = document["parts"]["parity"]
    assert parity["dali"]["result"] == "skipped: nvidia-dali is not installed"
    assert set(parity["kornia"]["operations"]) == {"blur", "all"}
    assert document["environment"]["device"] == "cpu"
    assert document["environment"]["gpu"] is None


def test_parity_fails_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"blur": {"pixels": 5e-4, "normalised": 2e-3}, "crop": {"pixels": 6e-4, "normalised": 8e-4}}
    monkeypatch.setattr("amimv.tools.throughput.parity.worst_differences", lambda **arguments: rows)
    record = gpu_check.measure_parity(lambda record: None)
    assert record["status"] == "failed"
    assert record["result"].startswith("at most 6.0e-04 in pixels (crop); blur over 0.001")
    rows["blur"]["normalised"] = 5e-4
    assert gpu_check.measure_parity(lambda record: None)["status"] == "ok"
    rows["blur"]["normalised"] = float("nan")
    assert gpu_check.measure_parity(lambda record: None)["status"] == "failed"


def test_throughput_of_our_own_is_counted() -> None:
    saved: list[dict[str, Any]] = []
    run = {"device": "cpu", "rivals": False, "repeats": 1, "seconds": 0.01, "backends": ["kornia"]}
    record = gpu_check.measure_throughput(saved.append, [run | {"recipes": ["two-view"]}])
    assert record["status"] == "ok"
    assert len(gpu_check.own_rows(record)) == len(record["rows"]) == 2
    assert len(saved) == 1


def test_an_error_of_one_model_keeps_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(argv: list[str], seconds: float, cpu: bool) -> dict[str, float]:
        assert cpu
        if "resnet18" in argv:
            raise RuntimeError("out of memory\nmore")
        return {"step_ms": 2.0}

    monkeypatch.setattr("amimv.tools.throughput.training_step.profile_step", step)
    models = [["small", "simclr", "two-view"], ["resnet18", "mimv", "amimv"], ["small", "mimv", "amimv"]]
    record = gpu_check.measure_training(lambda record: None, "cpu", ["--compile"], 0.1, models)
    assert record["status"] == "failed"
    assert ["step_ms" in row for row in record["rows"]] == [True, False, True]
    assert record["rows"][1]["error"] == "RuntimeError: out of memory"
    assert "resnet18 mimv: RuntimeError: out of memory" in record["result"]


TESTS = """
import pytest

@pytest.mark.gpu
def test_good(): pass

@pytest.mark.gpu
def test_bad(): assert 1 == 2, "unequal"

@pytest.mark.gpu
@pytest.mark.parametrize("i", [0, 1])
def test_skipped(i): pytest.skip("needs DALI")

def test_not_asked_for(): pass
"""


def test_tests_are_counted_with_names_and_reasons(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, check=False)
    record = count_tests(report)
    assert (record["passed"], record["failed"], record["skipped"]) == (1, 1, 2)
    assert record["skips"] == {"needs DALI": 2}
    ((name, why),) = record["failures"].items()
    assert name.endswith("test_it::test_bad")
    assert "unequal" in why


def test_without_tests_they_are_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "TESTS", tmp_path / "none")
    record = gpu_check.run_tests(lambda record: None, "cpu", [])
    assert record == {"status": "skipped", "result": "skipped: there is no folder of tests beside the package"}


@pytest.mark.parametrize("steps", [list_steps("cuda"), list_quick_steps("cpu")])
def test_the_steps(steps: list[Step]) -> None:
    """Every part is there, no name twice, and what a worker is told can be told."""
    assert {step.part for step in steps} == set(gpu_check.PARTS)
    assert len({(step.part, step.name) for step in steps}) == len(steps)
    for step in steps:
        assert json.loads(step.command[3])["part"] == step.part
