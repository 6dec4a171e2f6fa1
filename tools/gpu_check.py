"""What this package does on a GPU, in one command: tests, parity of the backends, throughput, training steps.

``python tools/gpu_check.py --json gpu.json`` writes one JSON file, anew after every step. Run again with the same
file, it goes on: what is done is not repeated, what failed or is missing is. Every step runs in a process of its own
within its own time, so that one that crashes or hangs is one line, and the next one still runs.

Exit status: 0 all is done, or skipped by name; 1 a step failed or found no time, or nothing was measured; 2 input that
cannot be used (no CUDA device).
"""

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
import tyro
from rich.console import Console
from rich.table import Table

from amimv import InputError, run_command, user_path
from amimv.trainers.run_folder import describe_environment, write_json

Part = Literal["parity", "throughput", "training", "tests"]
Record = dict[str, Any]
PARTS: tuple[Part, ...] = get_args(Part)
WORKER = "--worker"
#: Seconds that a step has for its last words, between being interrupted and being killed.
GRACE = 10
#: Lines of a failed step's output that are kept.
LOG_LINES = 30
#: Modules that may be missing, and whose steps are skipped then; by the name that is installed.
NAMES = {"nvidia.dali": "nvidia-dali", "kornia": "kornia", "pytest": "pytest"}
#: Beside those that every environment lists.
PACKAGES = ("triton", "pytest", "lightly", "tyro")
#: How the tests' folder stands to this file in a checkout; an installed package has none.
TESTS = Path(__file__).resolve().parents[1] / "tests"
MODELS = [("small", "simclr", "two-view"), ("small", "mimv", "amimv")]
MODELS += [("resnet18", method, recipe) for _, method, recipe in MODELS]


@dataclass(frozen=True)
class CheckSettings:
    json: str = "gpu.json"
    """file for everything measured; an earlier one is gone on with"""
    parts: tuple[Part, ...] = PARTS
    """what is done"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu is for trying this command out"""
    quick: bool = False
    """everything tiny, for trying this command out: its numbers mean nothing"""
    fresh: bool = False
    """start over, whatever the file holds"""
    minutes: float = 7.5
    """in all; what finds no time is left for the next call"""


@dataclass(frozen=True)
class Step:
    """What is done and recorded as one.

    Attributes:
        part, name: where its record stands in the document.
        seconds: it is killed after so long.
        command: what is run, with a path added at its end where it writes its record as JSON: ``status``, ``result``
            (one line) and what it measured; it may do so as often as it likes.
        needs: modules without which it is skipped.
    """

    part: Part
    name: str
    seconds: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def worker_step(part: Part, name: str, seconds: float, needs: tuple[str, ...] = (), **arguments: Any) -> Step:
    """A step that one of `WORKERS` does, in another process that runs this file."""
    job = json.dumps({"part": part, "arguments": arguments})
    return Step(part, name, seconds, (sys.executable, str(Path(__file__).resolve()), WORKER, job), needs)


def throughput_steps(device: str) -> dict[str, Step]:
    """By name. Each backend, and the others, apart: one that crashes takes no row of another with it."""
    common = {"device": device, "rivals": False, "repeats": 5, "seconds": 0.3, "backends": ["kornia"]}
    small, large = ({**common, "sizes": [size], "batch_sizes": [batch]} for size, batch in ((28, 1024), (64, 256)))

    def step(name: str, seconds: float, runs: list[dict[str, Any]], *more: str) -> Step:
        return worker_step("throughput", name, seconds, ("kornia", *more), runs=runs)

    steps = (
        step("kornia, 28 px", 90, [small, {**small, "stages": True}]),
        step("kornia, 64 px", 90, [large, {**large, "stages": True}]),
        step("dali", 90, [{**run, "backends": ["dali"]} for run in (small, large)], "nvidia.dali"),
        step("others, 28 px", 120, [{**small, "backends": [], "rivals": True}]),
        step("kornia compiled, 28 px", 120, [{**small, "compile": True}]),
        step("kornia compiled, 64 px", 120, [{**large, "compile": True}]),
    )
    return {step.name: step for step in steps}


def training_step_of(device: str, precision: str, compiled: bool, quick: bool = False) -> Step:
    """Training steps of all `MODELS` in one precision (Accelerate takes one per process)."""
    return worker_step(
        "training",
        f"{precision}{', compiled' * compiled}",
        150 if compiled else 75,
        ("kornia",),
        device=device,
        flags=["--mixed-precision", precision, "--batch-size", "32" if quick else "512"] + ["--compile"] * compiled,
        measured_seconds=0.05 if quick else 1.0,
        models=MODELS[:1] if quick else MODELS,
    )


def list_steps(device: str) -> list[Step]:
    """Everything, in the order in which it is worth having, should time end."""
    kornia, dali = ("kornia", device), ("dali", device)
    throughput = throughput_steps(device)
    return [
        worker_step("parity", f"kornia, {device} and cpu", 60, ("kornia",), first=kornia, second=("kornia", "cpu")),
        worker_step("parity", f"dali and kornia, {device}", 75, ("nvidia.dali", "kornia"), first=dali, second=kornia),
        throughput["kornia, 28 px"],
        training_step_of(device, "no", compiled=False),
        training_step_of(device, "bf16", compiled=False),
        worker_step("tests", "marked gpu", 180, ("pytest",), device=device, paths=[str(TESTS)]),
        throughput["kornia, 64 px"],
        throughput["kornia compiled, 28 px"],
        throughput["dali"],
        throughput["others, 28 px"],
        training_step_of(device, "bf16", compiled=True),
        throughput["kornia compiled, 64 px"],
        training_step_of(device, "no", compiled=True),
    ]


def list_quick_steps(device: str) -> list[Step]:
    """Each part once, tiny."""
    tiny = {"operations": ["blur", "all"], "sizes": [(28, 28)]}
    run = {"device": device, "rivals": False, "repeats": 2, "seconds": 0.02, "backends": ["kornia"]}
    run |= {"recipes": ["two-view"]}
    kornia = ("kornia", device)
    return [
        worker_step("parity", "kornia", 60, ("kornia",), first=kornia, second=("kornia", "cpu"), **tiny),
        worker_step("parity", "dali", 60, ("nvidia.dali", "kornia"), first=("dali", device), second=kornia, **tiny),
        worker_step("throughput", "kornia", 60, ("kornia",), runs=[run, {**run, "stages": True}]),
        training_step_of(device, "no", compiled=False, quick=True),
        worker_step(
            "tests", "marked gpu", 60, ("pytest",), device=device, paths=[str(TESTS / "pipelines" / "test_rng.py")]
        ),
    ]


# What the workers do. Each gets a function to call with its record so far, which counts if it is killed.


def measure_parity(save: Callable[[Record], None], **arguments: Any) -> Record:
    """Two (backend, device) against each other."""
    from amimv.tools.throughput.parity import TOLERANCE, worst_differences

    table = worst_differences(**arguments)
    worst = max(table, key=lambda operation: table[operation]["pixels"])
    apart = [name for name, row in table.items() if not (row["pixels"] < TOLERANCE and row["normalised"] < TOLERANCE)]
    line = f"at most {table[worst]['pixels']:.1e} in pixels ({worst})"
    if apart:
        line += f"; {', '.join(apart)} over {TOLERANCE:g} in pixels or normalised"
    return {"status": "failed" if apart else "ok", "result": line, "tolerance": TOLERANCE, "operations": table}


def measure_throughput(save: Callable[[Record], None], runs: list[dict[str, Any]]) -> Record:
    """Runs of ``profile_throughput.py``: its rows, or its stages."""
    from amimv.tools.profile_throughput import ProfileSettings, profile

    record: Record = {"status": "failed", "result": "", "rows": [], "stages": []}
    for run in runs:
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in run.items()
        }
        document = profile(ProfileSettings(**settings))
        record["rows"] += document.get("throughput", [])
        record["stages"] += document.get("stages", [])
        measured = [row for row in record["rows"] if row["views_per_second"] is not None]
        skipped = [row["note"] for row in record["rows"] if row["views_per_second"] is None]
        fastest = max(measured, key=lambda row: row["views_per_second"], default=None)
        line = f"{len(measured)} rows" + (f", {len(skipped)} skipped" if skipped else "")
        if fastest:
            line += f"; {fastest['views_per_second']:,.0f} views/s ({fastest['pipeline']}, {fastest['recipe']})"
        record["result"] = line + (f"; {skipped[0]}" if skipped else "")
        save(record)
    ours = any(run["backends"] for run in runs)
    missing = any(row["views_per_second"] is None and row["pipeline"].startswith("amimv ") for row in record["rows"])
    done = own_rows(record) and not missing if ours else measured
    return record | {"status": "ok" if done else "failed"}


def measure_training(
    save: Callable[[Record], None], device: str, flags: list[str], measured_seconds: float, models: list[list[str]]
) -> Record:
    """A row for each (backbone, method, recipe); one that raises keeps no other from being measured."""
    from amimv.tools.throughput.training_step import profile_step

    record: Record = {"status": "failed", "result": "", "flags": flags, "rows": []}
    for backbone, method, recipe in models:
        row: Record = {"backbone": backbone, "method": method, "recipe": recipe}
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            argv = ["--backbone", backbone, "--method", method, "--recipe", recipe, *flags]
            row |= profile_step(argv, measured_seconds, cpu=device == "cpu")
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {first_line(str(error))}"
        record["rows"].append(row)
        record["result"] = describe_training(record["rows"], len(models))
        save(record)
    failed = any("error" in row for row in record["rows"])
    return record | {"status": "failed" if failed else "ok"}


def describe_training(rows: list[Record], asked: int) -> str:
    steps = [f"{row['backbone']} {row['method']} {row['step_ms']:.1f}" for row in rows if "step_ms" in row]
    errors = [f"{row['backbone']} {row['method']}: {row['error']}" for row in rows if "error" in row]
    line = f"{len(steps)} of {asked}" + (f": ms a step: {', '.join(steps)}" if steps else "")
    return "; ".join([line, *errors])


def run_tests(save: Callable[[Record], None], device: str, paths: list[str]) -> Record:
    """The tests marked gpu; interrupted, what they were until then."""
    import pytest

    if not TESTS.is_dir():
        return {"status": "skipped", "result": "skipped: there is no folder of tests beside the package"}
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        flags = ["-m", "gpu", "-q", "--continue-on-collection-errors", f"--rootdir={TESTS.parent}"]
        code = pytest.main([*flags, "-p", "no:cacheprovider", f"--junitxml={report}", *paths])
        record: Record = count_tests(report) if report.is_file() else {"passed": 0, "failed": 0, "skipped": 0}
    counts = f"{record['passed']} passed, {record['failed']} failed, {record['skipped']} skipped"
    if record.get("failures"):
        counts += f"; first {next(iter(record['failures']))}"
    if device == "cpu" and code in (0, 5) and not record["passed"]:
        return record | {"status": "skipped", "result": f"skipped: no GPU ({counts})"}
    # pytest: 0 all passed or were skipped, 1 some failed, 5 there are none
    return record | {"status": "ok" if code == 0 and record["passed"] else "failed", "result": counts}


def count_tests(report: Path) -> Record:
    """Passed, failed and skipped of a JUnit XML; names of the failed with why, and skips by their reason."""
    failures: dict[str, str] = {}
    skips: Counter[str] = Counter()
    passed = 0
    for case in ElementTree.parse(report).iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            passed += 1
        elif outcome.tag == "skipped":
            skips[first_line(outcome.get("message", ""))] += 1
        else:
            failures[name] = first_line(outcome.get("message", ""))
    return {
        "passed": passed,
        "failed": len(failures),
        "skipped": skips.total(),
        "failures": failures,
        "skips": dict(skips),
    }


WORKERS: dict[str, Callable[..., Record]] = {
    "parity": measure_parity,
    "throughput": measure_throughput,
    "training": measure_training,
    "tests": run_tests,
}


def work(job: str, path: Path) -> None:
    """The other process: do the job and leave its record in the file."""
    asked = json.loads(job)

    def save(record: Record) -> None:
        write_atomically(path, record)

    save(WORKERS[asked["part"]](save, **asked["arguments"]))


# The process that starts them.


def first_line(text: str) -> str:
    """At most 200 characters."""
    return next(iter(text.strip().splitlines()), "")[:200]


def write_atomically(path: Path, content: Record) -> None:
    """Whoever reads the file sees all of it, or all of what was there before."""
    part = path.with_name(path.name + ".part")
    write_json(part, content)
    part.replace(path)


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def read_json(path: Path) -> Record:
    """Raises ValueError for what is not strict JSON, or no object."""
    content = json.loads(path.read_text(), parse_constant=refuse)
    if not isinstance(content, dict):
        raise ValueError("no object")
    return content


def last_words(log: str) -> str:
    """The line of an output that says why it ended: a fatal error's, else the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    return first_line((fatal or lines or ["no output"])[-1])


def environment_of(device: str) -> dict[str, str]:
    """For a worker: no script's folder on its path (a second `amimv` may lie in it), and no GPU if it gets none."""
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONFAULTHANDLER": "1", **no_gpu}


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and everything that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ended by itself; after so long it is interrupted, and `GRACE` seconds later killed."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return False
    finally:
        end(process)


def run_step(step: Step, device: str, seconds: float) -> Record:
    """Its record, whatever becomes of its process, which has so many seconds."""
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        path, log = Path(folder) / "record.json", Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*step.command, str(path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment_of(device),
                start_new_session=True,
            )
            in_time = wait_for(process, seconds)
        said = log.read_text(errors="replace")
        try:
            record = read_json(path) if path.is_file() else {}
        except ValueError as error:
            record = {"status": "failed", "result": f"its record is not strict JSON ({first_line(str(error))})"}
    if problem := why_failed(process.returncode, in_time, seconds, said, record):
        record |= {"status": "failed", "result": "; ".join(filter(None, (problem, record.get("result"))))}
    if record["status"] == "failed":
        record["log"] = said.splitlines()[-LOG_LINES:]
    return record | {"seconds": round(time.monotonic() - started, 1)}


def why_failed(code: int, in_time: bool, seconds: float, log: str, record: Record) -> str:
    """In one line; empty if the process ended as it should."""
    if not in_time:
        return f"killed after its {seconds:.0f} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}: {last_words(log)}"
    if code > 0:
        return f"exit status {code}: {last_words(log)}"
    return "" if {"status", "result"} <= record.keys() else "it left no record"


def is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except (ImportError, ValueError):
        return True


def nvidia_driver() -> str | None:
    """The driver's version, as its own tool says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return first_line(found.stdout) or None


def fingerprint() -> str:
    """Of the package's own files: the revision does not tell what was changed since."""
    digest = hashlib.sha256()
    for name in ("amimv", "amimv.pipelines", "amimv.models", "amimv.trainers", "amimv.tools"):
        spec = find_spec(name)
        folder = Path(str(spec.origin)).parent if spec else Path()
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def describe(device: str) -> Record:
    """The environment, and the GPU: name, compute capability, driver, memory in MiB."""
    gpu: Record = {"device": device, "gpu": None}
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        gpu |= {"gpu": found.name, "capability": f"{found.major}.{found.minor}", "driver": nvidia_driver()}
        gpu |= {"memory_mib": found.total_memory // 2**20, "cuda": torch.version.cuda}
    environment = describe_environment({**gpu, "source": fingerprint()})
    for name in PACKAGES:
        try:
            environment["packages"][name] = version(name)
        except PackageNotFoundError:
            environment["packages"][name] = "not installed"
    return environment


def open_document(s: CheckSettings, environment: Record, console: Console) -> Record:
    """What the file holds if it is of this environment; else a new one, and the old one is put aside.

    Raises:
        InputError: the file holds something else, or cannot be written.
    """
    path = user_path(s.json)
    new: Record = {"environment": environment, "quick": s.quick, "parts": {}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and not s.fresh:
            document = read_json(path)
            found = document["environment"]
            apart = {k for k in {*found, *environment} - {"threads"} if found.get(k) != environment.get(k)}
            if not apart and document["quick"] == s.quick and isinstance(document["parts"], dict):
                return document
            path.replace(path.with_name(path.name + ".old"))
            changed = ", ".join(sorted(apart)) or "--quick"
            console.print(f"{path} is from before a change ({changed}): moved to {path.name}.old, starting over")
        write_atomically(path, new)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}): give another --json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no result of this command: give another --json, or --fresh") from error
    return new


def own_rows(record: Record) -> list[Record]:
    """Rows of this package's backends that were measured."""
    rows = record.get("rows", [])
    return [row for row in rows if row.get("views_per_second") and row.get("pipeline", "").startswith("amimv ")]


def do_step(step: Step, device: str, left: float) -> Record:
    """Run or skip it, with so many seconds left in all; half of its own must be."""
    missing = [NAMES.get(module, module) for module in step.needs if is_missing(module)]
    if missing:
        return {"status": "skipped", "result": f"skipped: {missing[0]} is not installed", "seconds": 0.0}
    if left < step.seconds / 2:
        line = f"not started, {max(0, left):.0f} s were left of its {step.seconds:.0f}: run the same command again"
        return {"status": "no time", "result": line, "seconds": 0.0}
    return run_step(step, device, min(step.seconds, left))


def problems(document: Record, steps: list[Step]) -> list[str]:
    """Why the exit status is 1, line by line."""
    records = {step: document["parts"].get(step.part, {}).get(step.name, {}) for step in steps}
    lines = [
        f"{step.part}, {step.name}: {record.get('status', 'missing')}"
        for step, record in records.items()
        if record.get("status") not in ("ok", "skipped")
    ]
    asked = {step.part for step in steps}
    rows = {part: [record for step, record in records.items() if step.part == part] for part in asked}
    if "throughput" in asked and not any(own_rows(record) for record in rows["throughput"]):
        lines.append("no throughput of this package's backends was measured")
    steps_of = [row for record in rows.get("training", []) for row in record.get("rows", []) if "step_ms" in row]
    if "training" in asked and not steps_of:
        lines.append("no training step was measured")
    return lines


def summary(document: Record, steps: list[Step]) -> Table:
    table = Table("part", "step", "status", "seconds", "result", title=f"on {where(document['environment'])}")
    for step in steps:
        record = document["parts"].get(step.part, {}).get(step.name, {})
        cells = (record.get("status", "missing"), f"{record.get('seconds', 0):.0f}", record.get("result", ""))
        table.add_row(step.part, step.name, *(cell.replace("[", r"\[") for cell in cells))
    return table


def where(environment: Record) -> str:
    if environment["device"] == "cpu":
        return "the CPU"
    return f"{environment['gpu']}, driver {environment['driver']}, torch {environment['packages']['torch']}"


def check(settings: CheckSettings, list_all: Callable[[str], list[Step]] | None = None) -> int:
    """Do what is not done yet, keep the file up to date, print a table; returns the exit status, 0 or 1.

    Args:
        settings: see `CheckSettings`.
        list_all: gives the steps for a device; by default everything, or everything tiny.

    Raises:
        InputError: there is no CUDA device, or the file cannot be used.
    """
    s, started = settings, time.monotonic()
    if s.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available: run this where there is one (--device cpu only tries it out)")
    console = Console(width=140)
    list_all = list_all or (list_quick_steps if s.quick else list_steps)
    steps = [step for step in list_all(s.device) if step.part in s.parts]
    document = open_document(s, describe(s.device), console)
    for step in steps:
        records = document["parts"].setdefault(step.part, {})
        if records.get(step.name, {}).get("status") in ("ok", "skipped"):
            continue
        print(f"{step.part}, {step.name} ...", file=sys.stderr, flush=True)
        records[step.name] = do_step(step, s.device, 60 * s.minutes - (time.monotonic() - started))
        write_atomically(user_path(s.json), document)
    console.print(summary(document, steps))
    found = problems(document, steps)
    for line in found:
        console.print(line, markup=False, highlight=False)
    return 1 if found else 0


def main() -> None:
    """The command: settings in, exit status out (see above)."""
    if sys.argv[1:2] == [WORKER]:
        work(sys.argv[2], Path(sys.argv[3]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `finally` that ends the step under way
    run_command(lambda: sys.exit(check(tyro.cli(CheckSettings, prog="gpu_check.py", description=__doc__))))


if __name__ == "__main__":
    main()
