"""Running a study: what is done stays done, what fails is written down, the rest goes on."""

import csv
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from amimv import InputError
from amimv.trainers import benchmark as module
from amimv.trainers.benchmark import BenchmarkSettings, benchmark, own_shard, run_cell
from amimv.trainers.study import read_study

STUDY = """
settings: {steps: 4, batch_size: 16, total: 70, label_fractions: [1.0], supervised_steps: 0, knn_every: 0}
grids:
  one: {method: [simclr]}
"""
BAD = "  bad: {method: simclr, lr: 1e30, baselines: false}\n"


def write(folder: Path, text: str = STUDY) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchmarkSettings, Path]:
    """A study of two cells that was run, beside one that failed and was written down."""
    folder = tmp_path_factory.mktemp("study")
    settings = BenchmarkSettings(str(write(folder, STUDY + BAD)), output=str(folder / "out"), workers=2)
    assert benchmark(settings) == 1
    (failed,) = (folder / "out" / "failed").iterdir()
    assert "loss is nan" in failed.read_text()
    assert failed.read_text().count("\n") == 1
    write(folder)
    return settings, folder / "out"


@pytest.mark.slow
def test_every_cell_is_an_ordinary_run_that_is_done(finished: tuple[BenchmarkSettings, Path]) -> None:
    settings, out = finished
    cells = read_study(Path(settings.study))
    assert len({c.run for c in cells}) == 2
    for cell in cells:
        rows = list(csv.DictReader((out / cell.run / "results.csv").open()))
        wanted = {"majority", "raw pixels", "random"} if cell.kind == "baselines" else {"pretrained"}
        assert {row["features"] for row in rows} == wanted
        assert (out / cell.run / "predictions.npz").is_file()
        assert not (out / cell.run / "checkpoints").exists()
    assert {cell.run for cell in cells} <= {row["run"] for row in csv.DictReader((out / "plan.csv").open())}


@pytest.mark.slow
def test_the_same_command_again_runs_nothing(
    finished: tuple[BenchmarkSettings, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **kwargs: pytest.fail("a cell was run twice"))
    assert benchmark(finished[0]) == 0
    cell = read_study(Path(finished[0].study))[0]
    assert run_cell(cell.flags(), finished[1], cell.run) == "done"


def test_a_dry_run_lists_the_cells_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = BenchmarkSettings(str(write(tmp_path)), output=str(tmp_path / "out"), dry_run=True)
    assert benchmark(settings) == 0
    shown, noise = capsys.readouterr()
    assert "step/s" not in noise  # no progress bars of the steps that are measured
    assert all(cell.run in shown for cell in read_study(Path(settings.study)))
    assert "hours left" in shown
    assert not (tmp_path / "out").exists()


class Exits:
    """Stands for a cell's process: writes a line, maybe results, and exits."""

    def __init__(self, out: Path, line: str, status: int, results: bool = False) -> None:
        self.out, self.line, self.status, self.results = out, line, status, results

    def __call__(self, command: list[str], stdout: object, **others: object) -> object:
        stdout.write(self.line + "\n")  # type: ignore[attr-defined]
        if self.results:
            run = command[command.index("--name") + 1]
            (self.out / run).mkdir(exist_ok=True)
            (self.out / run / "results.csv").write_text("run\n")
        return subprocess.CompletedProcess(command, self.status)


def test_a_failure_is_forgotten_once_the_cell_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.subprocess, "run", Exits(tmp_path, "50 %\rerror: no such thing", 2))
    assert run_cell([], tmp_path, "a") == "no such thing"
    assert (tmp_path / "failed" / "a.txt").read_text() == "no such thing\n"
    monkeypatch.setattr(module.subprocess, "run", Exits(tmp_path, "finished", 0, results=True))
    assert run_cell([], tmp_path, "a") == "done"
    assert not (tmp_path / "failed" / "a.txt").exists()


def test_an_interrupted_cell_has_not_failed_and_a_killed_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for status in (75, -signal.SIGINT, -signal.SIGTERM):
        module.write_failure(tmp_path / "failed" / "a.txt", "an earlier reason")
        monkeypatch.setattr(module.subprocess, "run", Exits(tmp_path, "SIGTERM: saved", status))
        assert run_cell([], tmp_path, "a") == "interrupted"
        assert not (tmp_path / "failed" / "a.txt").exists()
    monkeypatch.setattr(module.subprocess, "run", Exits(tmp_path, "step 3", -9))
    assert run_cell([], tmp_path, "a") == "killed by signal 9; last line: step 3"


def test_interruption_has_a_status_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = BenchmarkSettings(str(write(tmp_path)), output=str(tmp_path / "out"))
    monkeypatch.setattr(module.subprocess, "run", Exits(tmp_path, "SIGTERM: saved", 75))
    assert benchmark(settings) == 75

    def interrupted(settings: BenchmarkSettings) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "benchmark", interrupted)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", settings.study])
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 75


def test_a_reason_is_no_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "ValueError: odd\n  0%|          | 0/3 [00:00<?, ?step/s]"
    monkeypatch.setattr(module.subprocess, "run", Exits(tmp_path, line, 1))
    assert run_cell([], tmp_path, "a") == "ValueError: odd"


def test_a_reason_is_of_the_last_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_text("phantom: 70 images\n  3%|3   | 1/3 [00:00<?, 2step/s, loss 3.1]")
    monkeypatch.setattr(module.subprocess, "run", Exits(tmp_path, "error: was run with lr 1, not 2", 2))
    assert run_cell([], tmp_path, "a") == "was run with lr 1, not 2"
    monkeypatch.setattr(module.subprocess, "run", Exits(tmp_path, "", 1))
    assert run_cell([], tmp_path, "a") == "no output, exit status 1"


@pytest.mark.slow
def test_a_cell_keeps_the_name_that_its_run_has(
    finished: tuple[BenchmarkSettings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images by another ratio, which comes first and would lend its name."""
    out = tmp_path / "out"
    text = STUDY.replace("total: 70, ", "").replace("[simclr]", "simclr, baselines: false, profile: natural")
    (natural,) = read_study(write(tmp_path, text))
    (out / natural.run).mkdir(parents=True)
    for name in ("results.csv", "config.yaml"):
        (out / natural.run / name).write_text("some")
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **kwargs: pytest.fail("a cell was run twice"))
    capped = "  capped: {method: simclr, baselines: false, rho: 1}\n  one:"
    path = write(tmp_path, text.replace("  one:", capped))
    assert {cell.run for cell in read_study(path)} != {natural.run}
    assert benchmark(BenchmarkSettings(str(path), output=str(out))) == 0
    assert {line["run"] for line in csv.DictReader((out / "plan.csv").open())} == {natural.run}


@pytest.mark.slow
def test_two_studies_do_not_share_a_folder(finished: tuple[BenchmarkSettings, Path], tmp_path: Path) -> None:
    other = write(
        tmp_path, STUDY.replace("steps: 4", "steps: 5").replace("supervised_steps: 0", "supervised_steps: 1")
    )
    before = (finished[1] / "plan.csv").read_bytes()
    with pytest.raises(InputError, match="holds runs, and not one of this study: give another --output"):
        benchmark(BenchmarkSettings(str(other), output=str(finished[1])))
    assert (finished[1] / "plan.csv").read_bytes() == before


def test_a_dry_run_goes_on_past_a_cell_that_cannot_be_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """And past one of another precision."""
    text = STUDY.replace("[simclr]", "simclr, baselines: false, mixed_precision: ['no', bf16]")
    text += "  two: {method: simclr, baselines: false, backbone: resnet99}\n"
    with caplog.at_level("INFO", logger="amimv"):
        assert (
            benchmark(BenchmarkSettings(str(write(tmp_path, text)), output=str(tmp_path / "out"), dry_run=True)) == 0
        )
    shown = capsys.readouterr().out
    assert len(re.findall(r"│ +[\d,]+ s │", shown)) == 2
    assert shown.count(" fails │") == 1
    assert "resnet99" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("views: 511, batch_size: 256, recipe: two-view", "rho 1: views is 511, but one step renders 512"),
        ("steps: 1, rho: 100, label_fractions: [0.9999], label_seeds: [0, 1]", "only 1 can differ: give fewer seeds"),
        ("steps: 1, split: [0.6, 0.2, 0.2], resplit: yes", "own: class 1 has 2 group(s) of images, but each of the 3"),
    ],
)
def test_what_no_cell_could_be_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: str,
    message: str,
) -> None:
    """A class of four images that are of two lesions, in two of the splits that the data come with."""
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28, 3), dtype=np.uint8)
    arrays: dict[str, np.ndarray] = {}
    for split, rare in (("train", (7, 7)), ("val", ()), ("test", (7, 8))):
        arrays[f"{split}_labels"] = np.arange(12) // (12 - len(rare))
        arrays |= {f"{split}_images": images, f"{split}_groups": np.array([*range(20, 32 - len(rare)), *rare])}
    np.savez(tmp_path / "own.npz", **arrays)  # type: ignore[arg-type]
    data = tmp_path / "own.npz" if "resplit" in settings else "phantom"
    path = write(tmp_path, f"grids: {{a: {{method: simclr, data: {data}, {settings}}}}}")
    for flags in (["--dry-run"], []):
        monkeypatch.setattr("sys.argv", ["benchmark.py", str(path), "--output", str(tmp_path / "out"), *flags])
        with pytest.raises(SystemExit) as status:
            module.main()
        assert status.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{path}: grid a: " in line
        assert message in line
    assert not (tmp_path / "out").exists()


def test_sizes_have_costs_of_their_own(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(real_data / name) for name in ("breastmnist.npz", "breastmnist_64.npz")]
    text = STUDY.replace("total: 70, ", "").replace("[simclr]", f"simclr, data: {files}, baselines: false")
    measured = iter([module.Measured(100.0, 2, 4), module.Measured(20.0, 2, 4)])
    monkeypatch.setattr(module, "measure_rate", lambda settings: next(measured))
    small, large = module.estimate(read_study(write(tmp_path, text)))
    assert large == 5 * small  # type: ignore[operator]


@pytest.mark.skipif(shutil.which("srun") is not None, reason="there is a SLURM here")
def test_a_cluster_that_is_not_here_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match=r"--cluster slurm cannot be used here: .*srun"):
        benchmark(BenchmarkSettings(str(write(tmp_path)), output=str(tmp_path / "out"), cluster="slurm"))


def test_failures_of_done_and_of_unknown_cells_are_forgotten(tmp_path: Path) -> None:
    (cell, *others) = read_study(write(tmp_path))
    for run in (cell.run, others[0].run, "of-another-study"):
        module.write_failure(tmp_path / "failed" / f"{run}.txt", "reason")
    (tmp_path / cell.run).mkdir()
    (tmp_path / cell.run / "results.csv").write_text("run\n")
    (tmp_path / others[0].run).mkdir()
    (tmp_path / others[0].run / "results.csv").touch()  # empty: not done
    module.forget_failures([cell, *others], tmp_path)
    assert [path.stem for path in (tmp_path / "failed").iterdir()] == [others[0].run]


def test_epochs_cost_as_many_steps_as_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_rate", lambda settings: module.Measured(100.0, 2, 800))
    text = STUDY.replace("steps: 4, ", "").replace("[simclr]", "simclr, epochs: 200, baselines: false")
    cells = read_study(write(tmp_path, text))
    assert module.estimate(cells) == [2 * 800 * 16 / 100]


def test_a_job_of_a_cluster_has_all_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Job:
        def result(self) -> str:
            return "done"

    class Executor:
        def map_array(self, function: object, *arguments: object) -> list[object]:
            seen.extend(arguments[3])  # type: ignore[call-overload]
            return [Job() for _ in arguments[0]]  # type: ignore[attr-defined]

    monkeypatch.setattr(module, "_cluster", lambda settings, output: Executor())
    cells = read_study(write(tmp_path))
    done = module.run_all(BenchmarkSettings(str(write(tmp_path)), cluster="slurm", workers=64), cells, tmp_path)
    assert done == ["done"] * len(cells)
    assert seen == [1] * len(cells)


@pytest.mark.slow
def test_a_foreign_folder_is_left_as_it_is(tmp_path: Path) -> None:
    text = STUDY.replace("[simclr]", "simclr, baselines: false")
    (cell,) = read_study(write(tmp_path, text))
    folder = tmp_path / "out" / cell.run
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("method: simclr\nsteps: 99\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert benchmark(BenchmarkSettings(str(tmp_path / "study.yaml"), output=str(tmp_path / "out"))) == 1
    assert "was run with" in (tmp_path / "out" / "failed" / f"{cell.run}.txt").read_text()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_shards_share_the_cells_out(tmp_path: Path) -> None:
    cells = read_study(write(tmp_path))
    parts = [[c.run for c in own_shard(cells + cells, f"{i}/2")] for i in (1, 2)]
    assert sorted(parts[0] + parts[1]) == sorted(c.run for c in cells)
    for shard in ("3/2", "0/2", "2", "a/b"):
        with pytest.raises(InputError, match=f"shard is '{shard}', expected PART/PARTS"):
            own_shard(cells, shard)


def test_a_cell_that_runs_elsewhere_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **kwargs: pytest.fail("a cell was run twice"))
    (tmp_path / "locks").mkdir()
    code = (
        "import fcntl, sys, time; from pathlib import Path; out = Path(sys.argv[1])\n"
        "file = (out / 'locks' / 'a').open('w'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True)\n"
        "time.sleep(1); (out / 'a').mkdir(); (out / 'a' / 'results.csv').write_text('run')"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    assert run_cell([], tmp_path, "a") == "done"
    other.wait()


def test_cells_choose_their_threads_or_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the study's own process chose is not passed on; what the user chose is."""
    monkeypatch.setattr(module, "usable_cores", lambda physical: 8)
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")

    def seen(workers: int, **environment: str) -> list[str | None]:
        monkeypatch.setattr(os, "environ", environment)
        return [module._environment(workers).get(name) for name in names]

    own = {"OMP_NUM_THREADS": "8", "OMP_WAIT_POLICY": "passive", "AMIMV_CHOSE": "OMP_NUM_THREADS OMP_WAIT_POLICY"}
    assert seen(1, **own) == [None, None]
    assert seen(3, **own) == ["2", "passive"]
    assert seen(3, **own | {"AMIMV_CHOSE": "OMP_WAIT_POLICY"}) == ["8", "passive"]
    assert seen(2, OMP_WAIT_POLICY="active") == ["4", "active"]


@pytest.mark.slow
@pytest.mark.parametrize("orphan", [False, True])
def test_killed_in_mid_cell_the_same_command_goes_on(
    tmp_path: Path, finished: tuple[BenchmarkSettings, Path], orphan: bool
) -> None:
    """kill -9 of the command, and of the run below it or not; then every run is as if nothing had happened."""
    out = tmp_path / "out"
    # As many workers, so that each run has as many threads: sums in another order are not equal to the bit.
    command = [sys.executable, "-m", "amimv.trainers.benchmark", finished[0].study, "--output", str(out)]
    command += ["--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (begun := [*out.glob("*simclr*/config.yaml")]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert begun
    (os.kill if orphan else os.killpg)(process.pid, signal.SIGKILL)
    process.wait()
    assert not (begun[0].parent / "results.csv").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    for cell in read_study(Path(finished[0].study)):
        same = [folder / cell.run / "metrics.jsonl" for folder in (out, finished[1])]
        if cell.kind == "cell":
            assert same[0].read_bytes() == same[1].read_bytes()
            assert (out / "logs" / f"{cell.run}.log").read_text().count("finished in") == 1


def test_a_lock_is_let_go_of_with_its_process(tmp_path: Path) -> None:
    with module.locked(tmp_path / "lock"), (tmp_path / "lock").open("w") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_submitit_runs_cells_as_jobs(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    text = STUDY.replace("[simclr]", "simclr, baselines: false")
    settings = BenchmarkSettings(str(write(tmp_path, text)), output=str(tmp_path / "out"), cluster="local", hours=0.1)
    assert benchmark(settings) == 0
    (cell,) = read_study(tmp_path / "study.yaml")
    assert (tmp_path / "out" / cell.run / "results.csv").is_file()


def test_bad_settings_are_one_line(tmp_path: Path) -> None:
    study = str(write(tmp_path))
    with pytest.raises(InputError, match="workers is 0"):
        benchmark(BenchmarkSettings(study, workers=0))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write into .*file: File exists: give another --output"):
        benchmark(BenchmarkSettings(study, output=str(tmp_path / "file")))
    with pytest.raises(InputError, match="unknown cluster 'slrum': did you mean slurm"):
        benchmark(BenchmarkSettings(study, cluster="slrum"))
    with pytest.raises(InputError, match="no such config file"):
        benchmark(BenchmarkSettings(str(tmp_path / "none.yaml")))
