"""What all tests share: one thread, and the folder of real data where it exists."""

import os
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-golden", action="store_true", help="write the losses of the golden runs anew")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--record-golden"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors on two busy threads cost more than they gain."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with RetinaMNIST, BreastMNIST and HAM10000."""
    folder = Path(os.environ.get("AMIMV_DATA") or Path(__file__).resolve().parents[2] / "shared" / "medmnist")
    if not (folder / "retinamnist.npz").is_file():
        pytest.skip(f"real data not found: no retinamnist.npz in {folder} (set AMIMV_DATA)")
    return folder
