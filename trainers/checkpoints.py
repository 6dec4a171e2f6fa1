"""Checkpoints that are whole or not there, and logs that can be cut back to them."""

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from amimv.files import naming, replacing

logger = logging.getLogger("amimv")

KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``step-N.pt`` atomically (write, fsync, rename) and delete all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"step-{step:08d}.pt", "wb") as file:
        torch.save(state, file)
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


class JsonLines:
    """A log of one JSON object a line, each with a ``step``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, rows: list[dict[str, Any]]) -> None:
        with naming(self.path), self.path.open("a") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def cut(self, step: int) -> None:
        """Drop the lines after ``step``, and a torn last line, atomically."""
        if not self.path.exists():
            return
        kept = [line for line, row in self._rows() if row["step"] <= step]
        with replacing(self.path) as file:
            file.writelines(kept)

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
