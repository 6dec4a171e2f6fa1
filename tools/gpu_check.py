"""What this package does on a GPU, in one command: parity of the backends, throughput, training steps, its tests.

Each step is a process with a time limit, and the JSON file is written anew after each, so that a run that is cut keeps
what it has. ``--steps`` chooses; of the steps that it leaves out the file keeps what an earlier call found.

Exit status: 0 all is done, or skipped by name; 1 a step failed or measured nothing; 2 input that cannot be used.
"""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from amimv import InputError, check_choice, run_command, user_path
from amimv.command_line import read_command
from amimv.tools.commands import CheckSettings


class Step(NamedTuple):
    """``python -m`` this, killed after so many seconds; skipped where one of the modules is missing."""

    seconds: float
    command: str
    needs: tuple[str, ...] = ("kornia",)


DALI = ("kornia", "nvidia.dali")
PARITY = "amimv.tools.throughput.parity --device {device} --backend"
PROFILE = "amimv.tools.profile_throughput --device {device} --repeats 5 --seconds 0.3"
VIEWS = f"{PROFILE} --no-rivals --sizes 28 64 224 --batch-sizes 1024 --images 32768 --backends"
TRAIN = f"{PROFILE} --train --batch-sizes 512 --backbone"
#: By name, in the order in which they are worth having, should time end.
STEPS = {
    "parity": Step(120, f"{PARITY} kornia"),
    "parity-dali": Step(120, f"{PARITY} dali", DALI),
    "throughput": Step(90, f"{VIEWS} kornia"),
    "stages": Step(90, f"{VIEWS} kornia --stages"),
    "training": Step(60, f"{TRAIN} small"),
    "training-resnet18": Step(90, f"{TRAIN} resnet18"),
    "training-bf16": Step(90, f"{TRAIN} resnet18 --mixed-precision bf16"),
    "tests": Step(300, "pytest -m gpu -q --continue-on-collection-errors --timeout 120", ("pytest", "pytest_timeout")),
    "throughput-dali": Step(90, f"{VIEWS} dali", DALI),
    "throughput-compiled": Step(240, f"{VIEWS} kornia --compile"),
    "throughput-rivals": Step(240, f"{VIEWS} --rivals"),
    "training-compiled": Step(240, f"{TRAIN} resnet18 --mixed-precision bf16 --compile"),
}
#: What ``--quick`` does, and what it adds to the command of each.
TINY = " --images 3000 --sizes 28 --batch-sizes 32 --repeats 2 --seconds 0.02 --recipes two-view"
QUICK = dict.fromkeys(("throughput", "stages", "training"), TINY) | {"tests": "", "parity": " --operations blur"}
QUICK["parity-dali"] = QUICK["parity"]
#: Beside this file in a checkout; an installed package has none.
TESTS = Path(__file__).resolve().parents[1] / "tests"
#: Lines of a failed step's output that are kept.
LOG_LINES = 30


def is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ImportError:  # of the package that it is in
        return True


def count_tests(report: str) -> dict[str, Any]:
    """Of a JUnit XML: how many passed, why each of the others failed, and how many were skipped for each reason."""
    passed, failures, skips = 0, {}, Counter[str]()
    for case in ElementTree.fromstring(report).iter("testcase"):
        end = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if end is None:
            passed += 1
        elif end.tag == "skipped":
            skips[end.get("message", "")] += 1
        else:
            failures[f"{case.get('classname')}::{case.get('name')}"] = end.get("message", "").partition("\n")[0]
    return {"passed": passed, "failures": failures, "skips": dict(skips)}


def run_process(command: list[str], seconds: float, device: str, log: Path) -> str:
    """Why it failed; empty if it ended well. Whatever it started ends with it."""
    # No script's folder on its path (a second `amimv` may lie in it), and no GPU where none is asked for.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"killed after its {seconds:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit status {status}" if status else ""


def missing_result(found: dict[str, Any]) -> str:
    """What should have been measured and was not, for a process that ended well; empty if all is there."""
    own = [row for row in found.get("throughput", ()) if row["pipeline"].startswith("amimv ")]
    notes = (row["note"] for row in own if row["views_per_second"] is None)
    return "no test passed" if found.get("passed") == 0 else next(notes, "" if found else "nothing was written")


def run_step(name: str, step: Step, device: str) -> dict[str, Any]:
    """Its record: ``status`` (ok, failed, skipped), ``reason`` if not ok, ``seconds``, ``found``, a failure's log."""
    missing = [f"{module} is not installed" for module in step.needs if is_missing(module)]
    missing += ["there are no tests beside the package"] if name == "tests" and not TESTS.is_dir() else []
    if missing:
        return {"status": "skipped", "reason": missing[0]}
    found: dict[str, Any] = {}
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        path, log = Path(folder) / "found", Path(folder) / "log"
        where = [f"--junitxml={path}", str(TESTS)] if name == "tests" else [f"--json={path}"]
        words = [sys.executable, "-m", *step.command.format(device=device).split(), *where]
        reason = run_process(words, step.seconds, device, log)
        with suppress(FileNotFoundError, ValueError, ElementTree.ParseError):  # it ended before or while it wrote
            found = count_tests(path.read_text()) if name == "tests" else json.loads(path.read_text())
        said = log.read_text(errors="replace")
    print(said, flush=True)
    lines = [line for line in said.splitlines() if line.strip()] or ["no output"]
    record = {"seconds": round(time.monotonic() - started, 1), "found": found}
    if device == "cpu" and found.get("skips") and not (found["passed"] or found["failures"]):
        return {"status": "skipped", "reason": "no GPU", **record}
    if reason := f"{reason}: {lines[-1].strip()}" if reason else missing_result(found):
        return {"status": "failed", "reason": reason, **record, "log": lines[-LOG_LINES:]}
    return {"status": "ok", **record}


def check(s: CheckSettings) -> int:
    """Do the steps, keep the file up to date; returns the exit status, 0 or 1.

    Raises:
        InputError: there is no CUDA device, no such step, or the file holds something else.
    """
    all_steps = {
        name: step._replace(command=step.command + QUICK.get(name, "") * s.quick) for name, step in STEPS.items()
    }
    for name in s.steps:
        check_choice("step", name, all_steps)
    import torch

    from amimv.trainers.run_folder import describe_environment, write_json

    if s.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available: run this where there is one (--device cpu only tries it out)")
    path = user_path(s.json)
    try:
        records = json.loads(path.read_text())["steps"] if path.is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no result of this command: give another --json") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    gpu = str(torch.cuda.get_device_properties(0)) if s.device == "cuda" else None
    environment = describe_environment({"device": s.device, "quick": s.quick, "gpu_properties": gpu})
    chosen = s.steps or [name for name in STEPS if name in QUICK or not s.quick]
    for name in chosen:
        print(f"== {name}", flush=True)
        records[name] = {**run_step(name, all_steps[name], s.device), "environment": environment}
        write_json(path, {"steps": records})
    for name in chosen:
        record = records[name]
        print(f"{name}: {record['status']}, {record.get('seconds', 0):.0f} s", record.get("reason", ""))
    return int(any(records[name]["status"] == "failed" for name in chosen))


def main() -> None:
    """The command: settings in, exit status out (see above)."""
    run_command(lambda: sys.exit(check(read_command(CheckSettings, __doc__))))


if __name__ == "__main__":
    main()
