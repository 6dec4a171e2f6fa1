"""What the tests of the commands share: the pre-training command within this process, and a few small images."""

import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from amimv.trainers import pretrain

#: A finished run of version 0.1.0 beside the images that it saw.
OLD_RUN = Path(__file__).resolve().parents[1] / "data" / "run-0.1.zip"


@pytest.fixture
def pretrain_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``pretrain_here(*flags)`` is the exit status of the command's own main, whatever was drawn before it."""

    def command(*flags: str) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags])
        torch.manual_seed(int.from_bytes(os.urandom(4)))
        try:
            pretrain.main()
        except SystemExit as status:
            return int(status.code or 0)
        return 0

    return command


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the old run, below the working folder, where its images are ``tiny.npz``."""
    with zipfile.ZipFile(OLD_RUN) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path("runs/old")
