"""What other work on the machine costs the training, by how its threads wait.

``python tools/throughput/shared_machine.py`` runs some steps of the README's first command alone and beside a process
that keeps a core busy, in turns; to be run where nothing else does.
"""

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro
from rich.console import Console
from rich.table import Table

from amimv.threads import NUMBERS, WAITS, idle_cores, usable_cores, users_own

#: What a user says, by name of the row; as often as in the second, libgomp's threads look for work if nothing is said.
WAYS: dict[str, dict[str, str]] = {
    "as chosen": {},
    "spinning": {"GOMP_SPINCOUNT": "300000"},
    "sleeping": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


@contextmanager
def busy_core() -> Iterator[None]:
    """In here another process keeps a core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def train(steps: int, way: dict[str, str], beside: bool) -> tuple[float, str]:
    """Milliseconds a step, and what the log says of the threads."""
    environment = {name: value for name, value in users_own(os.environ).items() if name not in (*NUMBERS, *WAITS)}
    words = ["--steps", str(steps), "--knn-every", "0", "--no-evaluate", "--name", "r"]
    with TemporaryDirectory() as folder, busy_core() if beside else nullcontext():
        done = subprocess.run(
            [sys.executable, "-m", "amimv.trainers.pretrain", *words],
            cwd=folder, env=environment | way, capture_output=True, text=True, check=True,
        )  # fmt: skip
        rows = map(json.loads, (Path(folder) / "runs" / "r" / "timings.jsonl").read_text().splitlines())
        return 1000 * sum(row["seconds"] for row in rows) / steps, done.stderr.partition("\n")[0]


def measure(rounds: int = 3, steps: int = 40) -> None:
    """Print the table: median and extremes over the rounds, and how many times as slow as alone."""
    print(f"phantom (synthetic), {usable_cores()} cores, {idle_cores():.1f} of them idle at the start")
    found: dict[tuple[str, bool], list[float]] = defaultdict(list)
    said: dict[bool, list[str]] = defaultdict(list)
    for _ in range(rounds):
        for name, way in WAYS.items():
            for beside in (False, True):
                time, line = train(steps, way, beside)
                found[name, beside].append(time)
                said[beside] += [line] if not way else []
    table = Table("threads", "alone, ms/step", "beside one busy core", "times as slow")
    for name in WAYS:
        both = [found[name, beside] for beside in (False, True)]
        alone, beside_it = map(statistics.median, both)
        cells = [f"{statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f})" for times in both]
        table.add_row(name, *cells, f"{beside_it / alone:.2f}")
    Console(width=120).print(table)
    for where, lines in zip(("alone", "beside a busy core"), said.values(), strict=True):
        print(f"chosen {where}:", *dict.fromkeys(lines), sep="\n  ")


if __name__ == "__main__":
    tyro.cli(measure, description=__doc__)
