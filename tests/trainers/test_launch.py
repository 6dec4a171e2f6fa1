"""What Accelerate is told from outside, which process tells why a job ends, signals at any time, other systems."""

import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from amimv import InputError, signals
from amimv.trainers import benchmark, evaluate, launch, pretrain
from amimv.trainers.journal import Journal, first_not_finite
from amimv.trainers.layers import resolve
from amimv.trainers.settings import PretrainSettings

SCRIPT = Path(pretrain.__file__)
TINY = ("--batch-size", "16", "--steps", "2", "--knn-every", "0", "--no-evaluate", "--name", "r", "--threads", "1")


def taken_over(*flags: str, **environment: str) -> tuple[PretrainSettings, dict[str, str]]:
    return launch.take_over(*resolve(list(flags)), environment)


def run_main(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> int:
    """The command in this process; its exit status."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *TINY, *flags])
    try:
        pretrain.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# Accelerate's settings


@pytest.mark.parametrize(
    ("environment", "name", "value"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision", "bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision", "fp16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "accumulation", 4),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "default"}, "compile", True),
    ],
)
def test_what_the_launcher_asks_for_is_taken_over_and_recorded_or_contradicts_a_flag(
    environment: dict[str, str], name: str, value: object, tmp_path: Path
) -> None:
    (variable, *_) = environment
    settings, sources = taken_over(**environment)
    assert getattr(settings, name) == value
    assert sources[name].endswith(f"({variable})")
    flag = "--" + name.replace("_", "-")
    same = [flag] if value is True else [flag, str(value)]
    settings, sources = taken_over(*same, **environment)
    assert (getattr(settings, name), sources[name]) == (value, "flag")
    own = {"mixed_precision": "no", "accumulation": "2", "compile": "false"}[name]
    config = tmp_path / "c.yaml"
    config.write_text(f"{name}: {own}\n")
    other = ["--no-compile"] if value is True else [flag, own]
    for given, said in ((other, flag), (["--config", str(config)], "c.yaml")):
        with pytest.raises(InputError, match=rf"^{variable} asks for {flag} {value}, but .*{said} says") as caught:
            taken_over(*given, **environment)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "changed"),
    [((), {}), (("--mixed_precision", "bf16"), {"mixed_precision": "bf16"}), (("--cpu", "--debug"), {})],
)
def test_the_environment_of_accelerates_own_launcher(words: tuple[str, ...], changed: dict[str, str]) -> None:
    """Its defaults ask for nothing, so that they contradict no flag."""
    args = launch_command_parser().parse_args([*words, "x.py"])
    args.num_processes, args.num_machines, args.use_cpu = 1, 1, args.cpu
    args.mixed_precision, args.dynamo_backend = args.mixed_precision or "no", args.dynamo_backend or "no"
    environment = prepare_simple_launcher_cmd_env(args)[1]
    settings, sources = launch.take_over(*resolve([]), environment)
    assert settings == (replace(resolve([])[0], **changed) if changed else resolve([])[0])
    assert [name for name, source in sources.items() if source.startswith("accelerate launch")] == list(changed)
    assert not changed or taken_over("--mixed-precision", "bf16", **environment)[1]["mixed_precision"] == "flag"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *((name, "true", what.split()[0]) for name, what in launch.REFUSED.items()),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "CUDAGRAPHS", "CUDAGRAPHS"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", "auto"),
    ],
)
def test_what_the_training_has_no_form_of_is_refused_by_name(name: str, value: str, said: str) -> None:
    with pytest.raises(InputError, match=f"^{name} .*{said}") as caught:
        launch.asked({name: value})
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_compiling_in_another_mode_is_refused() -> None:
    for name, value in (("MODE", "max-autotune"), ("USE_FULLGRAPH", "True"), ("USE_DYNAMIC", "True")):
        with pytest.raises(InputError, match="default mode"):
            launch.asked({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", f"ACCELERATE_DYNAMO_{name}": value})
        assert launch.asked({"ACCELERATE_DYNAMO_BACKEND": "no", f"ACCELERATE_DYNAMO_{name}": value}) == {}


def test_what_is_asked_for_in_vain_is_said() -> None:
    assert launch.without_effect({"ACCELERATE_USE_CPU": "1", "ACCELERATE_DYNAMO_BACKEND": "no", "HOME": "/"}) == []
    assert launch.without_effect({"ACCELERATE_DEBUG_MODE": "1", "ACCELERATE_FP8_BACKEND": "TE"}) == [
        "set, but of no effect here: ACCELERATE_DEBUG_MODE, ACCELERATE_FP8_BACKEND"
    ]
    several = {"ACCELERATE_DYNAMO_BACKEND": "no", "MASTER_PORT": "29500"}
    assert "one process" in launch.without_effect(several)[0]
    assert launch.without_effect(several | {"WORLD_SIZE": "2"}) == []


def test_a_run_obeys_records_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Accumulation by the environment is the same as by its flag, to the bit of the losses."""
    caplog.set_level(logging.INFO, logger="amimv")
    assert run_main(monkeypatch, tmp_path, "--name", "flag", "--accumulation", "4") == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert run_main(monkeypatch, tmp_path, "--save-every", "1") == 0
    runs = tmp_path / "runs"
    assert (runs / "r" / "metrics.jsonl").read_bytes() == (runs / "flag" / "metrics.jsonl").read_bytes()
    config = (runs / "r" / "config.yaml").read_text()
    assert "environment (ACCELERATE_GRADIENT_ACCUMULATION_STEPS)" in config
    assert "accumulation 4, precision no, 1 process(es) on cpu" in caplog.text
    assert run_main(monkeypatch, tmp_path, "--resume", "auto") == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run_main(monkeypatch, tmp_path, "--resume", "auto") == 2


def test_a_study_takes_no_settings_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    (tmp_path / "study.yaml").touch()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", str(tmp_path / "study.yaml")])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2
    assert "ACCELERATE_MIXED_PRECISION is set" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_device_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device)
    assert run_main(monkeypatch, tmp_path) == 2
    assert f"Accelerate chose the device {device}" in capsys.readouterr().err


# Which process says why


def test_a_step_that_is_not_finite_on_one_rank() -> None:
    nan, inf = float("nan"), float("inf")
    assert first_not_finite([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]) is None
    assert first_not_finite([[1.0, 2.0, nan], [1.0, inf, 3.0]]) == (1, [1])
    assert first_not_finite([[nan, 2.0], [inf, 2.0]]) == (0, [0, 1])


def torchrun(folder: Path, *words: str) -> tuple[int, list[str]]:
    """Two processes: the exit status, and the lines of ours that reached the terminal."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launcher, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert 'pretrain.py", line' not in done.stderr, done.stderr
    marks = ("error:", "rank 1:", "SIGTERM", "SIGINT")
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith(marks)]


@pytest.mark.slow
def test_what_rank_0_looks_at_before_the_others_stops_all(tmp_path: Path) -> None:
    """The others, who wait for it, neither hang nor tell of anything but that; and all have its status."""
    images = np.random.default_rng(0).integers(0, 256, (16, 28, 28), dtype=np.uint8)
    splits = ("train", "val")
    arrays = {f"{split}_images": images for split in splits} | {
        f"{split}_labels": np.arange(16) % 2 for split in splits
    }
    np.savez(tmp_path / "own.npz", **arrays)
    flags = ("--data", "own.npz", "--batch-size", "8", "--steps", "2", "--name", "r")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, pretrain.__file__, *flags], cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    own = [line for line in done.stderr.splitlines() if line.startswith(("error:", "rank 1:", "SIG"))]
    assert len(own) == 1
    assert "has no array 'test_" in own[0]
    assert re.findall(r"exitcode +: (-?\d+) \(pid", done.stderr) == ["2", "2"]
    assert [path.name for path in (tmp_path / "runs" / "r").iterdir()] == ["lock"]


@pytest.mark.slow
def test_an_error_of_rank_1_alone_is_named_once(tmp_path: Path) -> None:
    worker = str(Path(__file__).parent / "failing_rank_worker.py")
    status, lines = torchrun(tmp_path, worker, "input", *TINY, "--steps", "9")
    assert status != 0
    assert lines == ["rank 1: error: cannot decode x.png"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_rank_1_stops_both(tmp_path: Path) -> None:
    worker = str(Path(__file__).parent / "failing_rank_worker.py")
    status, lines = torchrun(tmp_path, worker, "nan", *TINY, "--steps", "9", "--log-every", "2", "--save-every", "1")
    assert status != 0
    assert len(lines) == 1
    assert lines[0].startswith("error: loss is nan at step 3 on rank 1 (")
    report = json.loads((tmp_path / "runs" / "r" / "not_finite.json").read_text())
    assert (report["step"], report["ranks"], np.array(report["pairs"]).shape) == (3, [1], (8, 2))
    rows = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


class Board(dict[str, bytes]):
    """A store in this process."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def wait(self, keys: list[str], patience: object) -> None:
        if not self.check(keys):
            raise RuntimeError("timeout")


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], board: Board, rank: int, end: object
) -> tuple[int, str]:
    """The status of a process that ends so (an exception, or a status and its line), and what it prints."""

    def command() -> tuple[int, str]:
        if isinstance(end, BaseException):
            raise end
        return end  # type: ignore[return-value]

    monkeypatch.setattr(launch, "_board", lambda environment: board)
    with signals.interruptible():
        status = launch.run_ranked(command, "ADVICE", {"RANK": str(rank)})
    return status, capsys.readouterr().err


BROKEN = RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("ends", "printed"),
    [
        ([(0, (2, "error: a")), (1, (2, "error: a"))], "error: a\n"),
        ([(0, (2, "error: a")), (1, (2, "error: b"))], "error: a\nrank 1: error: b\n"),
        ([(1, (2, "error: a")), (0, BROKEN)], "rank 1: error: a\n"),
        ([(1, (2, "error: a")), (0, KeyboardInterrupt("SIGTERM"))], "rank 1: error: a\n"),
        ([(1, (2, "error: a")), (0, (75, "SIGTERM: saved"))], "rank 1: error: a\n"),
        ([(0, (2, "error: a")), (1, BROKEN), (2, KeyboardInterrupt("SIGTERM"))], "error: a\n"),
        ([(1, (75, "SIGTERM: saved")), (0, (75, "SIGTERM: saved"))], "SIGTERM: saved\n"),
        ([(1, KeyboardInterrupt("SIGTERM")), (0, BROKEN)], "SIGTERM: ADVICE\n"),
        ([(0, KeyboardInterrupt("SIGINT")), (1, KeyboardInterrupt("SIGINT"))], "SIGINT: ADVICE\n"),
    ],
)
def test_each_reason_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ends: list[tuple[int, object]], printed: str
) -> None:
    board = Board()
    assert "".join(said(monkeypatch, capsys, board, rank, end)[1] for rank, end in ends) == printed


@pytest.mark.parametrize("own", [BROKEN, KeyboardInterrupt("SIGTERM"), (75, "SIGTERM: saved")])
@pytest.mark.parametrize(("status", "first"), [(2, (2, "error: a")), (74, (74, "error: b")), (1, (1, "error: c"))])
def test_who_ends_because_another_one_failed_has_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int, first: object, own: object
) -> None:
    board = Board()
    assert [said(monkeypatch, capsys, board, rank, end)[0] for rank, end in ((1, first), (0, own))] == [status] * 2


def test_who_is_cut_off_by_an_interrupted_one_is_interrupted_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Board()
    ends = ((0, KeyboardInterrupt("SIGTERM")), (1, BROKEN))
    assert [said(monkeypatch, capsys, board, rank, end)[0] for rank, end in ends] == [75, 75]


def test_an_unexpected_exception_names_its_rank_and_silences_what_it_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Board()
    with pytest.raises(KeyError) as caught:
        said(monkeypatch, capsys, board, 1, KeyError("lost"))
    assert caught.value.__notes__ == ["(on rank 1)"]
    assert said(monkeypatch, capsys, board, 0, BROKEN) == (1, "")


# Signals at any time


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["launch.take_over", "build.load_training_subset", "pretrain.finish"])
def test_a_signal_outside_the_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    number: signal.Signals,
) -> None:
    handler = signal.getsignal(number)
    monkeypatch.setattr(f"amimv.trainers.{where}", lambda *_: os.kill(os.getpid(), number))
    assert run_main(monkeypatch, tmp_path) == 75
    assert capsys.readouterr().err.splitlines()[-1] == f"{number.name}: go on with --resume auto"
    assert signal.getsignal(number) is handler
    monkeypatch.undo()
    assert where == "launch.take_over" or run_main(monkeypatch, tmp_path, "--resume", "auto") == 0


@pytest.mark.parametrize(
    ("module", "work", "advice"),
    [(evaluate, "evaluate", signals.AGAIN), (benchmark, "benchmark", signals.GO_ON)],
)
def test_a_signal_in_the_other_commands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: SimpleNamespace,
    work: str,
    advice: str,
) -> None:
    (tmp_path / "config.yaml").touch()
    place = tmp_path if module is evaluate else tmp_path / "config.yaml"
    monkeypatch.setattr(sys, "argv", ["command.py", str(place)])
    monkeypatch.setattr(module, work, lambda settings: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        module.main()
    assert (end.value.code, capsys.readouterr().err) == (75, f"SIGTERM: {advice}\n")


@pytest.mark.parametrize(("module", "given"), [(pretrain, []), (evaluate, ["."]), (benchmark, ["config.yaml"])])
def test_a_signal_while_torch_is_imported(module: SimpleNamespace, given: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    # A torch that takes its time.
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, module.__file__, *given], env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75
    *_, line = stderr.splitlines()
    assert line.startswith("SIGTERM: ")


def test_a_study_passes_a_signal_on_to_its_cells() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    benchmark.stop_cells()
    assert child.wait(timeout=30) == -signal.SIGTERM


# Other systems, other terminals


@pytest.mark.slow
def test_a_run_where_linux_is_missing(tmp_path: Path) -> None:
    """Every module is imported and a run made without what macOS and Windows lack."""
    code = f"""
import os, sys
del os.sched_getaffinity
sys.modules |= {{"nvidia": None, "fcntl": None}}
os.environ |= {{"ACCELERATE_DYNAMO_BACKEND": "no", "OMP_NUM_THREADS": "1"}}
import importlib, pkgutil, amimv
for name in ("pipelines", "models", "trainers", "tools"):
    package = importlib.import_module("amimv." + name)
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from amimv.pipelines.sources.encoded import _share_of_cores
assert _share_of_cores() >= 1
from amimv.trainers import pretrain
sys.argv = ["pretrain.py", *{TINY!r}]
pretrain.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("there are no locks here") == 1
    assert (tmp_path / "runs" / "r" / "backbone").is_dir()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_few_lines_elsewhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    terminal: bool,
) -> None:
    caplog.set_level(logging.INFO, logger="amimv")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    clock = itertools.count(time.perf_counter(), 12)  # seconds, at each look
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert run_main(monkeypatch, tmp_path, "--steps", "24", "--log-every", "2") == 0
    lines = [message for message in caplog.messages if message.startswith("step ")]
    assert ("step/s]" in capsys.readouterr().err or "s/step" in capsys.readouterr().err) == terminal
    if terminal:
        assert not lines
        return
    assert lines
    assert all(line.split()[1] in map(str, range(2, 25, 2)) for line in lines)
    assert "loss" in lines[0]
    assert "views/s" in lines[0]


def test_lines_are_half_a_minute_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="amimv")
    journal = Journal(tmp_path, Accelerator(cpu=True), total_steps=100, views_per_step=1, said_at=0.0)
    for seconds in range(0, 100, 7):
        monkeypatch.setattr(time, "perf_counter", lambda now=seconds: float(now))
        journal.say(seconds, "loss 1")
    assert caplog.messages == [f"step {step} of 100: loss 1" for step in (35, 70)]
