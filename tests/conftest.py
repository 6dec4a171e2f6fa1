"""What all tests share: one thread, and the folder of real data where it exists."""

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

#: A finished run of version 0.1.0 beside the images that it saw.
OLD_RUN = Path(__file__).parent / "data" / "run-0.1.zip"
# The same examples in every run: what fails once fails again.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-golden", action="store_true", help="write the losses of the golden runs anew")


LEFT_OUT = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Counts the slow ones; a worker of pytest-xdist hands its count to the process that prints."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config = slow[0].config
        config.stash[LEFT_OUT] = len(slow)
        if hasattr(config, "workeroutput"):
            config.workeroutput["left_out"] = len(slow)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left_out = terminalreporter.config.stash.get(LEFT_OUT, 0)
    if left_out and terminalreporter.config.option.markexpr == "not slow":
        terminalreporter.line(f"left out: {left_out} slow tests, run nightly (pytest -m slow)")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--record-golden"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors on two busy threads cost more than they gain."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _log_as_a_library() -> None:
    """A command that an earlier test ran within this process has made the log speak."""
    logging.getLogger("amimv").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with RetinaMNIST, BreastMNIST and HAM10000."""
    folder = Path(os.environ.get("AMIMV_DATA") or Path(__file__).resolve().parents[2] / "shared" / "medmnist")
    if not (folder / "retinamnist.npz").is_file():
        pytest.skip(f"real data not found: no retinamnist.npz in {folder} (set AMIMV_DATA)")
    return folder


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the old run, below the working folder, where its images are ``tiny.npz``."""
    with zipfile.ZipFile(OLD_RUN) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path("runs/old")
