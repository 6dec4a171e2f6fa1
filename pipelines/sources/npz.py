"""``.npz`` files in MedMNIST's layout: MedMNIST's own, checked by their MD5, and others."""

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from amimv import InputError, first_line, user_path
from amimv.pipelines.sources.arrays import check_images
from amimv.pipelines.sources.labels import MULTI_LABEL, check_range, infer_task, settle_labels
from amimv.pipelines.sources.listing import CUT, SPLITS, NoSplit

#: MedMNIST's sizes, in pixels.
SIZES = (28, 64, 128, 224)

_log = logging.getLogger("amimv")


class NotDownloaded(InputError):
    """A published file is not here, and could not be downloaded."""


class Arrays(NamedTuple):
    """What a file holds of a split: images ``(N, H, W, C)``, and labels ``int64`` and groups where there are any; and
    which splits it has."""

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    task: str
    groups: np.ndarray | None = None
    splits: tuple[str, ...] = SPLITS

    @property
    def multi_label(self) -> bool:
        return self.labels is not None and self.labels.ndim == 2


def medmnist_names() -> tuple[str, ...]:
    """The names of MedMNIST's twelve 2-D sets."""
    return tuple(name for name in _medmnist_info() if not name.endswith("3d"))


@cache
def _medmnist_info() -> dict[str, dict[str, Any]]:
    # Imported when called: it brings scikit-learn, and makes a folder in the home.
    from medmnist.info import INFO

    return INFO


def read_medmnist(name: str, split: str, size: int, root: str | Path | None) -> Arrays:
    """A split of an official file, which is downloaded if need be."""
    if size not in SIZES:
        raise InputError(f"{name} has no size {size}, expected one of {', '.join(map(str, SIZES))}")
    info = _medmnist_info()[name]
    path = _medmnist_file(name, size, root)
    _check_md5(path, info[f"MD5{_suffix(size)}"])
    names = tuple(info["label"][str(c)] for c in range(len(info["label"])))
    with _opened(path) as npz:
        labels = _read_labels(npz, split, path)
        check_range(labels, len(names), path, split)
        images = _read_images(npz, split, path, len(labels))
    return Arrays(images, torch.from_numpy(labels), names, info["task"])


def _suffix(size: int) -> str:
    return "" if size == 28 else f"_{size}"


def _medmnist_file(name: str, size: int, root: str | Path | None) -> Path:
    """The path of an official file, downloaded if need be."""
    import medmnist
    from medmnist.info import DEFAULT_ROOT

    given = root or os.environ.get("AMIMV_DATA") or DEFAULT_ROOT
    if given is None or not user_path(given).is_dir():
        raise InputError(f"there is no folder {given} for the MedMNIST files: make it, or set root or AMIMV_DATA")
    folder = user_path(given)
    path = folder / f"{name}{_suffix(size)}.npz"
    if not path.exists():
        _log.info("%s is not there: downloading it", path)
        data_set = getattr(medmnist, _medmnist_info()[name]["python_class"])
        try:
            data_set(split="train", download=True, root=str(folder), size=size)
        except (RuntimeError, OSError, ValueError) as error:
            url = _medmnist_info()[name][f"url{_suffix(size)}"]
            raise NotDownloaded(
                f"{path} is missing and could not be downloaded: fetch {url} into {folder}, "
                "or set root or AMIMV_DATA to a folder that has it"
            ) from error
    return path


@cache
def _md5(path: Path, size: int, mtime_ns: int) -> str:
    """The sum of a file; its size and time tell a changed file from the one already read for another split."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _check_md5(path: Path, expected: str) -> None:
    state = path.stat()
    found = _md5(path.absolute(), state.st_size, state.st_mtime_ns)
    if found != expected:
        raise InputError(
            f"{path} has MD5 {found}, expected {expected}: it is damaged or not the official file; "
            "delete it to download it again"
        )


def find_file(name: str, root: str | Path | None) -> Path:
    """The file itself, or the one of that name beside MedMNIST's files."""
    path = user_path(name)
    beside = user_path(root or os.environ.get("AMIMV_DATA") or ".") / path
    return beside if beside.is_file() and not path.exists() else path


def read_own(path: Path, split: str, size: int | None, task: str | None) -> Arrays:
    """A split of an own file; the classes are those of all its splits together, and one without ``..._labels`` has
    none."""
    if not path.is_file():
        raise InputError(f"there is no file {path}: expected an .npz in MedMNIST's layout")
    with _opened(path) as npz:
        labelled = [s for s in SPLITS if f"{s}_labels" in npz.files]
        every = {s: _read_labels(npz, s, path) for s in labelled}
        n = len(every[split]) if split in every else None
        images = _read_images(npz, split, path, n)
        groups = _read_array(npz, f"{split}_groups", path) if f"{split}_groups" in npz.files else None
        splits = tuple(s for s in SPLITS if f"{s}_images" in npz.files)
    if groups is not None and groups.shape != (len(images),):
        raise InputError(f"{path}: {split}_groups has shape {groups.shape}, expected ({len(images)},)")
    if size not in (None, min(images.shape[1:3])):
        got = " x ".join(map(str, dict.fromkeys(images.shape[1:3])))
        raise InputError(f"{path} holds images of {got} pixels, not of {size}: set size accordingly")
    if n is None:
        if task:
            raise InputError(f"{path} has no {split}_labels, so that task {task!r} does not fit: leave it out")
        return Arrays(images, None, (), "", groups, splits)
    settled, n_classes = settle_labels(every, path, task)
    labels = settled[split]
    if labels.ndim < every[split].ndim and split == labelled[0]:
        told = f"they are read as {n_classes} classes (task '{MULTI_LABEL}' keeps them multi-hot)"
        _log.warning("%s: every row of labels has one 1: %s", path, told)
    names, kind = tuple(map(str, range(n_classes))), infer_task(labels.ndim == 2, n_classes)
    return Arrays(images, torch.from_numpy(labels), names, kind, groups, splits)


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """The file's arrays, never unpickled; what cannot be read becomes one line."""
    try:
        npz = np.load(path, allow_pickle=False)
        if not isinstance(npz, np.lib.npyio.NpzFile):
            raise InputError(f"{path} is a single array, expected an .npz in MedMNIST's layout")
        with npz:
            yield npz
    except InputError:
        raise
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read as an .npz without pickle: {first_line(error)}") from error


def _read_array(npz: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    if key not in npz.files:
        found = ", ".join(npz.files) or "nothing"
        cut = "train_images" in npz.files and not {"val_images", "test_images"} & set(npz.files)
        raise NoSplit(
            f"{path} has no array {key!r}, only {found}: expected MedMNIST's layout "
            f"(train_images, train_labels, val_images, ...){f', or {CUT}' if cut else ''}"
        )
    try:
        array = npz[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise InputError(f"{path}: {key} holds Python objects (pickled), which are never read") from error
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise InputError(f"{path}: {key} holds NaN (in {array.dtype}), expected numbers")
    return array


def _read_labels(npz: np.lib.npyio.NpzFile, split: str, path: Path) -> np.ndarray:
    """``(N,)`` or multi-hot ``(N, L)``, ``int64``."""
    labels = _read_array(npz, f"{split}_labels", path)
    if labels.dtype.kind not in "iub":
        raise InputError(f"{path}: {split}_labels is {labels.dtype}, expected integers")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or 0 in labels.shape[1:]:
        raise InputError(f"{path}: {split}_labels has shape {labels.shape}, expected (N,), (N, 1) or multi-hot (N, L)")
    return labels.astype(np.int64)


def _read_images(npz: np.lib.npyio.NpzFile, split: str, path: Path, n: int | None) -> Tensor:
    """``(n, H, W, C)``."""
    where = f"{path}: {split}_images"
    images = check_images(_read_array(npz, f"{split}_images", path), where)
    if n is not None and len(images) != n:
        raise InputError(f"{where} has {len(images)} images, but {split}_labels has {n} labels: expected as many")
    return images
