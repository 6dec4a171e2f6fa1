"""What the tests of the commands share: the pre-training command within this process, and a few small images."""

import os
import sys
from collections.abc import Callable

import pytest
import torch
from accelerate.state import AcceleratorState

from amimv.trainers import pretrain


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
