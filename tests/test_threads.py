"""Threads and their waiting: the choice on made-up machines, and that it is made before torch is loaded."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from amimv import threads
from amimv.threads import CHOSEN, decide, local_processes, usable_cores, users_own
from amimv.trainers import benchmark, evaluate, pretrain

NUMBER, WAIT = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"


@pytest.mark.parametrize(
    ("environment", "idle", "machine", "chosen", "said"),
    [
        # Idle cores, other work on some of them, more threads than cores.
        ({}, 2.0, {}, {NUMBER: "2"}, "2 threads that spin while they wait: 2.0 cores are idle"),
        ({}, 1.8, {}, {NUMBER: "2"}, "spin"),
        ({}, 1.7, {}, {NUMBER: "2", WAIT: "passive"}, "2 threads that sleep while they wait: 1.7 cores are idle"),
        ({}, 15.0, {"cores": 8}, {NUMBER: "8"}, "spin"),
        ({}, 15.0, {"cores": 16}, {NUMBER: "16", WAIT: "passive"}, "sleep"),
        ({}, 2.0, {"threads": 4}, {NUMBER: "4"}, "4 threads that spin"),
        # One thread waits for nobody.
        ({}, None, {"cores": 1}, {NUMBER: "1"}, "1 thread ("),
        ({}, None, {"threads": 1}, {NUMBER: "1"}, "1 thread ("),
        # Several processes of one job.
        ({}, None, {"processes": 2}, {NUMBER: "1"}, "1 thread, in each of 2 processes"),
        ({}, None, {"processes": 2, "cores": 9}, {NUMBER: "4", WAIT: "passive"}, "4 threads that sleep"),
        ({}, None, {"processes": 4}, {NUMBER: "1"}, "1 thread, in each of 4 processes"),
        # The user's own.
        ({NUMBER: "1"}, None, {}, {}, "1 thread ("),
        ({NUMBER: "2,1"}, 1.0, {}, {WAIT: "passive"}, "2 threads that sleep"),
        ({"MKL_NUM_THREADS": "2"}, 2.0, {"cores": 8}, {}, "2 threads that spin"),
        ({NUMBER: "2"}, 1.0, {"threads": 3}, {NUMBER: "3", WAIT: "passive"}, "3 threads"),
        ({WAIT: "active"}, None, {}, {NUMBER: "2"}, "2 threads that wait as OMP_WAIT_POLICY says"),
        ({"GOMP_SPINCOUNT": "9"}, None, {"processes": 2, "cores": 8}, {NUMBER: "4"}, "as GOMP_SPINCOUNT says"),
        ({NUMBER: "2", WAIT: "passive"}, None, {}, {}, "2 threads that wait as OMP_WAIT_POLICY says"),
        # accelerate launch gives one thread to whatever it starts.
        ({NUMBER: "1", threads.LAUNCHED: "no"}, 2.0, {}, {NUMBER: "2"}, "2 threads that spin"),
        ({NUMBER: "4", threads.LAUNCHED: "no"}, 4.0, {"cores": 8}, {}, "4 threads that spin"),
        ({NUMBER: "1", threads.LAUNCHED: "no"}, None, {"processes": 2, "cores": 8}, {}, "1 thread, in each"),
    ],
)
def test_the_choice(
    environment: dict[str, str], idle: float | None, machine: dict[str, int], chosen: dict[str, str], said: str
) -> None:
    """Where ``idle`` is None the load does not matter, and is not looked at."""

    def look() -> float:
        assert idle is not None
        return idle

    given = {"cores": 2} | machine
    cores = given.pop("cores")
    found, line = decide(environment, cores, look, **given)
    assert found == chosen
    assert said in line
    assert line.endswith("(OMP_NUM_THREADS and OMP_WAIT_POLICY choose otherwise)")


def test_what_a_command_chose_is_not_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/", WAIT: "passive"})
    monkeypatch.setattr(threads, "usable_cores", lambda physical: 2)
    threads.choose_threads()
    assert os.environ == {"HOME": "/", WAIT: "passive", NUMBER: "2", CHOSEN: NUMBER}
    assert users_own(os.environ) == {"HOME": "/", WAIT: "passive"}
    del os.environ[WAIT]
    for idle, wait in ((0.0, {WAIT: "passive"}), (2.0, {})):  # the second one does not keep the first one's choice
        monkeypatch.setattr(threads, "idle_cores", lambda idle=idle: idle)
        threads.choose_threads()
        assert users_own(os.environ) == {"HOME": "/"}
        assert {WAIT: os.environ[WAIT]} == wait if wait else WAIT not in os.environ


def test_processes_of_each_launcher() -> None:
    assert local_processes({}) == local_processes({"LOCAL_WORLD_SIZE": ""}) == 1
    assert local_processes({"LOCAL_WORLD_SIZE": "3"}) == local_processes({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}) == 3


def test_cores_by_affinity_siblings_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    def cores() -> tuple[int, int]:
        return usable_cores(root=tmp_path), usable_cores(physical=True, root=tmp_path)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5}, raising=False)
    assert cores() == (6, 6)
    for cpu in range(6):
        write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 3},{cpu % 3 + 3}\n")
    assert cores() == (6, 3)
    write("proc/self/cgroup", "0::/slurm/job\n")
    write("sys/fs/cgroup/slurm/job/cpu.max", "max 100000\n")
    assert cores() == (6, 3)
    write("sys/fs/cgroup/slurm/cpu.max", "250000 100000\n")  # of the group above
    assert cores() == (2, 2)
    write("sys/fs/cgroup/slurm/job/cpu.max", "50000 100000\n")
    assert cores() == (1, 1)
    write("proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/host/path\n")  # version 1, in a container
    write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    assert cores() == (6, 3)
    write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "400000\n")
    assert cores() == (4, 3)


def test_cores_where_processes_are_bound_to_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores(root=tmp_path) == os.cpu_count()
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(root=tmp_path) == usable_cores(physical=True, root=tmp_path) == 1
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [100.0, 50.0])
    assert threads.idle_cores() == 0.5


def test_a_busy_core_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as loop:
        try:
            assert threads.idle_cores() < usable_cores() - threads.SPARE
        finally:
            loop.kill()


@pytest.mark.parametrize(
    ("command", "words", "own", "number"),
    [
        (pretrain, "--steps 1", {}, str(usable_cores(physical=True))),
        (pretrain, "--steps 1 --threads 3", {}, "3"),
        (pretrain, "--steps 1", {NUMBER: "7", WAIT: "active"}, "7"),
        (evaluate, ".", {}, str(usable_cores(physical=True))),
        (benchmark, "config.yaml", {NUMBER: "7", WAIT: "active"}, "7"),
    ],
)
def test_it_is_made_before_torch_is_loaded(
    command: ModuleType, words: str, own: dict[str, str], number: str, tmp_path: Path
) -> None:
    """A finder before all others ends the command at its first import of torch, and says what is set by then."""
    (tmp_path / "config.yaml").touch()
    code = f"""
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get({NUMBER!r}), os.environ.get({WAIT!r}), {CHOSEN!r} in os.environ, flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
sys.argv = {[command.__file__, *words.split()]!r}
runpy.run_path({command.__file__!r}, run_name="__main__")
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))} | own
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    found, wait, chosen = done.stdout.split()
    assert (found, chosen) == (number, "True")
    assert wait in ([own[WAIT]] if own else ["passive", "None"])
    assert done.stderr.startswith(f"{number} thread")
    assert done.stderr.endswith("choose otherwise)\n")
