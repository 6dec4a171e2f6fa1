"""Checkpoints that are whole or not there, and logs that can be cut back to them."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("amimv")

KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``step-N.pt`` atomically (write, fsync, rename) and delete all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(folder)
    for old in _newest_first(folder)[KEPT:]:
        old.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        with self.path.open("a") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def cut(self, step: int) -> None:
        """Drop the lines after ``step``, and a torn last line, atomically."""
        if not self.path.exists():
            return
        kept = [line for line, row in self._rows() if row["step"] <= step]
        partial = self.path.with_suffix(".partial")
        with partial.open("w") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

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
