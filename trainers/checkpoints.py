"""Checkpoints that are whole or not there, and logs that can be cut back to them."""

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from amimv.files import naming, replacing

if TYPE_CHECKING:
    from amimv.trainers.build import Training

logger = logging.getLogger("amimv")

KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``step-N.pt`` atomically (write, fsync, rename) and delete all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"step-{step:08d}.pt", "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # Where writing fails within a large tensor, torch's own complaint on closing the file hides the reason.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    for old in (*_newest_first(folder)[KEPT:], *folder.glob("*.partial")):  # of a process that was killed
        old.unlink()


def check_space(folder: Path, size: int) -> None:
    """Whether a run's checkpoints, of so many bytes each, will find room; two are kept while a third is written.

    Raises:
        OSError: they will not, as far as the file system knows; a quota it may not.
    """
    more = KEPT + 1 - len(_newest_first(folder / "checkpoints"))
    free = shutil.disk_usage(folder).free
    if free < size * more:
        reason = f"{free / 1e6:,.0f} MB are free, the checkpoints need {size * more / 1e6:,.0f} MB or more"
        raise OSError(errno.ENOSPC, reason, str(folder))


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("*.pt") if re.fullmatch(r"step-\d+\.pt", p.name)), reverse=True)


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the host; None if there is none. Torn ones are passed over."""
    for path in _newest_first(folder):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a torn file fails in many ways, and each means: take the one before
            logger.warning("%s cannot be read (%s); going back one checkpoint", path, type(error).__name__)
            continue
        return state
    return None


def state_of(training: "Training") -> dict[str, Any]:
    """Everything that the next step depends on."""
    scaler = training.accelerator.scaler
    return {
        "step": training.step,
        "method": training.method.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "loader": training.loader.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "processes": training.accelerator.num_processes,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def load_state(training: "Training", state: dict[str, Any]) -> None:
    """Go on from such a state, maybe that of another number of processes, none of which has anything of its own."""
    before, now = state["processes"], training.accelerator.num_processes
    if before != now:
        logger.info(
            "goes on on %d process(es), where %d were: with the same pairs; batch statistics and rounding differ",
            now,
            before,
        )
    training.step = state["step"]
    training.method.load_state_dict(state["method"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.loader.load_state_dict(state["loader"])
    if state["scaler"] is not None and training.accelerator.scaler is not None:
        training.accelerator.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    for device, generator in enumerate(state["cuda_rng"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)


def checkpoint_bytes(training: "Training") -> int:
    """At least; the optimiser has one number or more for each that it trains."""
    tensors = [*training.method.state_dict().values(), *training.method.online.parameters()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


class JsonLines:
    """A log of one JSON object a line, each with a ``step``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, rows: list[dict[str, Any]]) -> None:
        with naming(self.path), self.path.open("a") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def cut(self, step: int) -> int:
        """Drop the lines after ``step``, and a torn last line, atomically; the last step that there was, or 0."""
        if not self.path.exists():
            return 0
        rows = self._rows()
        with replacing(self.path) as file:
            file.writelines(line for line, row in rows if row["step"] <= step)
        return rows[-1][1]["step"] if rows else 0

    def read(self) -> list[dict[str, Any]]:
        return [row for _, row in self._rows()]

    def _rows(self) -> list[tuple[str, dict[str, Any]]]:
        rows = []
        for line in self.path.read_text().splitlines(keepends=True):
            try:
                rows.append((line, json.loads(line)))
            except json.JSONDecodeError:
                break
            if not line.endswith("\n"):
                rows.pop()
        return rows
