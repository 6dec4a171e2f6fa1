"""A whole study by one command: ``python trainers/benchmark.py trainers/configs/study.yaml``.

Every cell of the study's grids (see `amimv.trainers.study` for the file) is one ordinary run of ``pretrain.py`` in a
folder of its own, in a process of its own. The same command again goes on where it stopped: what is done is skipped,
what was interrupted resumes, what failed is tried again. Cells run one after the other, ``--workers`` at a time, on
one ``--shard`` of several machines, or as jobs of a cluster through submitit (``--cluster slurm``).

Exit status: 0 done, 1 some cells failed (``failed/NAME.txt`` says why, the rest ran), 2 input that cannot be used, 75
interrupted: the same command goes on.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from amimv.command_line import begin_command, read_command
from amimv.signals import EXIT_INTERRUPTED, GO_ON, is_command
from amimv.trainers.commands import BenchmarkSettings

if is_command(__name__):
    begin_command(BenchmarkSettings, __doc__, GO_ON)

import psutil
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from amimv import InputError, run_command, user_path
from amimv.files import locked
from amimv.threads import decide, idle_cores, usable_cores, users_own
from amimv.trainers.build import build_training
from amimv.trainers.label_draws import draw_seeds
from amimv.trainers.launch import asked, make_accelerator
from amimv.trainers.length import endless_batches, time_steps, with_views_as_steps
from amimv.trainers.settings import PretrainSettings
from amimv.trainers.study import Cell, digest_of, image_shape, read_study, write_plan

logger = logging.getLogger("amimv")

#: Steps that a dry run measures, after as many for warming up.
MEASURED = 5


def is_done(folder: Path) -> bool:
    """Whether a run is finished: its results are the last thing that it writes."""
    results = folder / "results.csv"
    return results.is_file() and results.stat().st_size > 0


def run_cell(flags: list[str], output: Path, run: str, workers: int = 1, keep_checkpoints: bool = False) -> str:
    """Run one cell in a process of its own, unless it is done, and wait for one that runs already.

    Args:
        flags: of ``pretrain.py``, without output, name and resume.
        output: the study's folder; ``logs/`` and ``failed/`` of it are written, too.
        run: name of the run folder.
        workers: how many such processes share the cores.
        keep_checkpoints: of a run that is done.

    Returns:
        "done", "interrupted", or why it failed.
    """
    failure, log = output / "failed" / f"{run}.txt", output / "logs" / f"{run}.log"
    with locked(output / "locks" / run) as lock:
        if is_done(output / run):
            return "done"
        log.parent.mkdir(parents=True, exist_ok=True)
        failure.unlink(missing_ok=True)
        where = ["--output", str(output), "--name", run, "--resume", "auto"]
        command = [sys.executable, "-m", "amimv.trainers.pretrain", *flags, *where]
        with log.open("a") as file:
            file.write("\n")  # a progress bar that was killed ends without
            file.flush()
            begun = file.tell()
            # The lock is the run's, too: it may outlive this process.
            process = subprocess.run(
                command, stdout=file, stderr=file, env=_environment(workers), pass_fds=(lock,), check=False
            )
            status = process.returncode
        if is_done(output / run):
            if not keep_checkpoints:
                shutil.rmtree(output / run / "checkpoints", ignore_errors=True)
            return "done"
        if status in (EXIT_INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
            return "interrupted"
        reason = _last_line(log, begun) or f"no output, exit status {status}"
        write_failure(failure, reason if status >= 0 else f"killed by signal {-status}; last line: {reason}")
        return failure.read_text().strip()


def _environment(workers: int) -> dict[str, str]:
    """Of a cell's process, which chooses for itself how its threads wait, unless it has others beside it."""
    own = users_own(os.environ)
    return own if workers == 1 else own | decide(own, usable_cores(physical=True), idle_cores, workers)[0]


def _last_line(log: Path, begun: int) -> str:
    """The last line after so many bytes that is no progress bar."""
    text = log.read_bytes()[begun:].decode(errors="replace")
    lines = [line.split("\r")[-1].strip() for line in text.split("\n")]
    return next((line.removeprefix("error: ") for line in reversed(lines) if line and "%|" not in line), "")


def write_failure(path: Path, reason: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reason + "\n")


def with_names_of(plan: list[Cell], output: Path) -> list[Cell]:
    """The cells by the names that their runs have already: equal runs may be called otherwise, by another ratio that
    gives the same images, but the end of their names is the same.

    Raises:
        InputError: the folder holds another study.
    """
    there = {path.parent.name for path in output.glob("*/config.yaml")}
    names = {digest_of(name): name for name in there}
    plan = [replace(cell, run=names.get(digest_of(cell.run), cell.run)) for cell in plan]
    if there and (output / "plan.csv").is_file() and there.isdisjoint(cell.run for cell in plan):
        raise InputError(f"{output} holds runs, and not one of this study: give another --output, or move them away")
    return plan


def own_shard(cells: list[Cell], shard: str) -> list[Cell]:
    """The cells of one part, every n-th; equal cells are one."""
    try:
        part, parts = map(int, shard.split("/"))
        if not 1 <= part <= parts:
            raise ValueError
    except ValueError as error:
        raise InputError(f"shard is '{shard}', expected PART/PARTS, such as 2/4") from error
    unique = list({cell.run: cell for cell in reversed(cells)}.values())[::-1]
    return unique[part - 1 :: parts]


def run_all(settings: BenchmarkSettings, cells: list[Cell], output: Path) -> list[str]:
    """Run the cells, several at a time; what came of each, as it comes in."""
    shared = settings.workers > 1 and not settings.cluster and not torch.cuda.is_available()
    workers = settings.workers if shared else 1
    work = [(cell.flags(), output, cell.run, workers, settings.keep_checkpoints) for cell in cells]
    jobs: dict[Any, Cell] = {}
    if settings.cluster:
        executor = _cluster(settings, output)
        submitted = executor.map_array(run_cell, *zip(*work, strict=True))
        jobs = dict(zip(submitted, cells, strict=True))
        return [report(cell, _outcome(job.result, output, cell)) for job, cell in jobs.items()]
    with ThreadPoolExecutor(settings.workers) as pool:
        jobs = {pool.submit(run_cell, *one): cell for one, cell in zip(work, cells, strict=True)}
        try:
            finished = tqdm(as_completed(jobs), total=len(jobs), unit="cell")
            return [report(jobs[job], _outcome(job.result, output, jobs[job])) for job in finished]
        except BaseException:  # an interruption: what has not begun will not, what runs saves
            pool.shutdown(wait=False, cancel_futures=True)
            stop_cells()
            raise


def stop_cells() -> None:
    """Tell the cells that run to save and end, as a terminal's SIGINT does, and a SIGTERM to this process does not."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            child.terminate()


def _cluster(settings: BenchmarkSettings, output: Path) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise InputError("--cluster needs submitit: pip install submitit") from error
    try:
        executor = submitit.AutoExecutor(folder=output / "jobs", cluster=settings.cluster)
    except RuntimeError as error:  # no such cluster here
        raise InputError(f"--cluster {settings.cluster} cannot be used here: {error}") from error
    executor.update_parameters(timeout_min=round(60 * settings.hours), name="amimv")
    if settings.cluster == "slurm":
        executor.update_parameters(
            gpus_per_node=settings.gpus,
            cpus_per_task=settings.cpus,
            slurm_array_parallelism=settings.workers,
            **({"slurm_partition": settings.partition} if settings.partition else {}),
        )
    return executor


def _outcome(result: Callable[[], str], output: Path, cell: Cell) -> str:
    """What a job returned; a job that died with its process is a cell that failed."""
    try:
        return result()
    except Exception as error:  # of any kind: the other cells go on
        reason = f"the job died: {str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__}"
        write_failure(output / "failed" / f"{cell.run}.txt", reason)
        return reason


def report(cell: Cell, outcome: str) -> str:
    tqdm.write(f"{cell.run}: {outcome}")
    return outcome


class Measured(NamedTuple):
    """Views per second in training, distinct views of a pair, and steps of the whole training."""

    rate: float
    views: int
    steps: int


def estimate(cells: list[Cell]) -> list[float | str]:
    """Seconds for each cell: its views, in training and supervised evaluation, over a rate measured in a few steps; or
    why it cannot be trained.
    """
    rates: dict[Any, Measured | str] = {}
    costs: list[float | str] = []
    for cell in cells:
        s, _ = with_views_as_steps(cell.settings, {})
        kind: tuple[Any, ...] = (
            *(s.method, s.recipe, s.partners, s.backbone, s.view_size, s.batch_size, s.mixed_precision),
            image_shape(s),
        )
        if not s.steps:  # epochs are as many steps as there are images for
            kind = (*kind, s.epochs, s.data, s.data_seed, s.rho, s.profile, s.total)
        if kind not in rates:
            rates[kind] = measure_rate(s)
        measured = rates[kind]
        if isinstance(measured, str):
            costs.append(measured)
            continue
        rate, views, steps = measured
        supervised = s.supervised_steps and s.supervised_steps + sum(s.supervised_more_steps)
        supervised *= sum(len(draw_seeds(s, fraction)) for fraction in s.label_fractions)
        supervised *= len(s.supervised_lr) * len(s.supervised_mixup) * len(s.supervised_smoothing)
        supervised *= (s.baselines != "no") + (s.finetune and s.baselines != "only")
        trained = 0 if s.baselines == "only" else views * (s.steps or steps)
        costs.append((trained + supervised) * s.batch_size / rate)
    return costs


def measure_rate(settings: PretrainSettings) -> Measured | str:
    """A few training steps; or why there can be none."""
    settings = replace(settings, knn_every=0, tracker=None, baselines="no")
    AcceleratorState._reset_state()  # each cell has a process of its own; here they take turns with their precision
    with tempfile.TemporaryDirectory() as folder:
        try:
            training = build_training(settings, make_accelerator(settings, Path(folder)))
        except InputError as error:
            return str(error)
        batches, views = endless_batches(training), len(training.loader.recipe.views)
        time_steps(training, batches, MEASURED)
        rate = time_steps(training, batches, MEASURED) * settings.batch_size * views
        return Measured(rate, views, training.total_steps)


def print_plan(cells: list[Cell], costs: list[float | str], output: Path) -> None:
    """The cells that are still to run, with their cost."""
    table = Table(title=f"{len(cells)} cells in {output}", title_justify="left")
    for name in ("cell", "images", "steps", "estimated"):
        table.add_column(name, justify="left" if name == "cell" else "right", no_wrap=True)
    left = 0.0
    for cell, cost in zip(cells, costs, strict=True):
        done = is_done(output / cell.run)
        s, _ = with_views_as_steps(cell.settings, {})
        steps = str(s.steps or f"{s.epochs} epochs")
        state = "done" if done else "fails" if isinstance(cost, str) else f"{cost:,.0f} s"
        table.add_row(cell.run, str(cell.settings.total or "all"), "" if cell.kind == "baselines" else steps, state)
        left += 0.0 if done or isinstance(cost, str) else cost
    console = Console(width=max(120, max((len(cell.run) for cell in cells), default=0) + 40))
    console.print(table)
    console.print(f"about {left / 3600:.1f} hours left, one cell at a time (probes and start-up come on top)")


def _by_problem(cells: list[Cell]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for cell in cells:
        if cell.problem:
            found.setdefault(cell.problem, []).append(cell.run)
    return found


def benchmark(settings: BenchmarkSettings) -> int:
    """Plan, run, report.

    Returns:
        The exit status.
    """
    if wanted := asked(os.environ):
        variable, _ = next(iter(wanted.values()))
        raise InputError(f"{variable} is set, but a study's cells say all of their settings: put it into the study")
    path = user_path(settings.study)
    output = user_path(settings.output or f"runs/{path.stem}")
    plan = with_names_of(read_study(path), output)
    cells = own_shard(plan, settings.shard)
    logger.info("%d points of the grids, %d different cells in shard %s", len(plan), len(cells), settings.shard)
    able = [cell for cell in cells if not cell.problem]
    if settings.dry_run:
        costs = estimate(able)
        print_plan(able, costs, output)
        unable = {cell.run: cost for cell, cost in zip(able, costs, strict=True) if isinstance(cost, str)}
        cells = [replace(cell, problem=unable.get(cell.run, cell.problem)) for cell in cells]
        for problem, (first, *others) in _by_problem(cells).items():
            logger.info("cannot run %s and %d more: %s", first, len(others), problem)
        return 0
    begin(plan, output)
    outcomes = []
    for cell in cells:
        if cell.problem:
            write_failure(output / "failed" / f"{cell.run}.txt", cell.problem)
            outcomes.append(report(cell, cell.problem))
    todo = [cell for cell in able if not is_done(output / cell.run)]
    logger.info("%d cells are done already, %d to run", len(able) - len(todo), len(todo))
    outcomes += run_all(settings, todo, output) if todo else []
    failed = sum(outcome not in ("done", "interrupted") for outcome in outcomes)
    logger.info(
        "%d done, %d failed, %d interrupted: python tools/report.py %s -o %s",
        len(able) - len(todo) + outcomes.count("done"),
        failed,
        outcomes.count("interrupted"),
        output,
        output / "report.html",
    )
    return 1 if failed else EXIT_INTERRUPTED if "interrupted" in outcomes else 0


def begin(plan: list[Cell], output: Path) -> None:
    """Make the folder with the plan in it; what failed before is forgotten."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with locked(output / "locks" / "plan"):  # several shards may write it at once
            write_plan(plan, output / "plan.csv")
    except OSError as error:
        raise InputError(f"cannot write into {output}: {error.strerror}: give another --output") from error
    forget_failures(plan, output)


def forget_failures(plan: list[Cell], output: Path) -> None:
    """Remove what is said of cells that are done by now, or that are none of this study's any more."""
    open_cells = {cell.run for cell in plan if not is_done(output / cell.run)}
    for path in (output / "failed").glob("*.txt"):
        if path.stem not in open_cells:
            path.unlink(missing_ok=True)


def main() -> None:
    """The command: settings in, exit status out."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)

    def command() -> None:
        sys.exit(benchmark(read_command(BenchmarkSettings, __doc__)))

    run_command(command, GO_ON)


if __name__ == "__main__":
    main()
