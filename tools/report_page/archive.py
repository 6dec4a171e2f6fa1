"""A study's runs as one ``.zip``, which the report reads as it reads their folder."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from amimv.files import replacing

#: Of a run, in this order; checkpoints, weights and curves can be made again by its command.
FILES = ("config.yaml", "environment.json", "results.csv", "predictions.npz")


def write_archive(folder: Path, runs: list[str], path: Path) -> None:
    """Pack finished runs, the plan and what failed; the same runs give the same bytes.

    Args:
        folder: of a study.
        runs: names of the run folders in it that are kept.
        path: of the ``.zip``; whole or not at all.
    """
    with replacing(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in _members(folder, runs):
            # Without a time of its own a member is of 1980.
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, compresslevel=9)


def _members(folder: Path, runs: list[str]) -> Iterator[tuple[str, bytes]]:
    for path in (folder / "plan.csv", *sorted(folder.glob("failed/*.txt"))):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()
    for run in sorted(runs):
        for name in FILES:
            path = folder / run / name
            if path.is_file():
                yield f"{run}/{name}", pack_predictions(path) if name.endswith(".npz") else path.read_bytes()


def pack_predictions(path: Path) -> bytes:
    """A ``predictions.npz`` in as few bits as its numbers need: classes exact, of the projection each coordinate's
    place between its smallest and largest value, in 255 steps. Not compressed, since the archive is.
    """
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: _packed(name, stored[name]) for name in stored}
    packed = io.BytesIO()
    np.savez(packed, **arrays)  # type: ignore[arg-type]
    return packed.getvalue()


def _packed(name: str, values: np.ndarray) -> np.ndarray:
    if name == "projection" and len(values):
        values = values.astype(np.float64)  # which may have been packed before
        low, high = values.min(axis=0), values.max(axis=0)
        return np.rint(255 * (values - low) / np.where(high > low, high - low, 1)).astype(np.uint8)
    if values.dtype.kind in "iu" and values.size:
        return values.astype(np.result_type(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))
    return values
