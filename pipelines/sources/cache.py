"""A folder's decoded images in one file that is mapped into memory: written once, tied to the files they are of."""

import errno
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amimv import InputError, describe_os_error
from amimv.files import locked, replacing

#: What a cache file begins with; its line of JSON follows, and after ``HEADER`` bytes the pixels.
MAGIC = b"amimv images 1\n"
HEADER = 4096
#: Threads that ask for files' sizes, which on a network drive are waited for.
READERS = 8
#: Bytes whose checksum is taken at a time.
CHUNK = 2**24
#: What decodes: another version may round otherwise.
DECODERS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "pillow", "pydicom")

_log = logging.getLogger("amimv")


class Decoded(NamedTuple):
    """Images to be kept: shape and type, remarks on their files, and themselves, in parts, once asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    remarks: list[str]
    parts: Iterator[Tensor]


class Cached(NamedTuple):
    """Images ``(N, H, W, C)`` in a mapped file, and the remarks on the files that they are of."""

    images: Tensor
    remarks: list[str]


def fingerprint(paths: tuple[str, ...], folder: Path, how: tuple[object, ...]) -> str:
    """A digest of the files' names in ``folder``, sizes and times of change, and of how they are decoded.

    Raises:
        InputError: a file cannot be looked at.
    """
    digest = hashlib.sha256(repr((how, [_version(name) for name in DECODERS])).encode())
    try:
        with ThreadPoolExecutor(READERS) as readers:
            for path, status in zip(paths, readers.map(os.stat, paths), strict=True):
                name = os.path.relpath(path, folder)
                digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise InputError(f"{describe_os_error(error)}: an image that is listed cannot be read") from error
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def cached(folder: Path, name: str, key: str, decode: Callable[[], Decoded]) -> Cached | None:
    """The images of this fingerprint out of a file in ``folder``, which is made if there is none, or a damaged one.

    One process decodes, others that start meanwhile wait for it. None, and a line in the log, if the file cannot be
    written.

    Raises:
        InputError: the file of this name holds other images; or what ``decode`` raises.
    """
    path = folder / f"{name}-{key[:16]}.images"
    try:
        if found := _read(path, key):
            _log.info("%d decoded images mapped from %s", len(found.images), path)
            return found
        with locked(folder / f"{path.name}.lock"):
            if found := _read(path, key):
                return found
            if path.exists():
                _log.warning("%s is damaged: it is made anew", path)
            _write(path, key, decode())
        return _read(path, key)
    except OSError as error:
        _log.warning("no cache of decoded images: %s: goes on without", describe_os_error(error))
        return None


def _write(path: Path, key: str, decoded: Decoded) -> None:
    wanted = int(np.prod(decoded.shape, dtype=np.int64)) * decoded.dtype.itemsize + HEADER
    if shutil.disk_usage(path.parent).free < wanted:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for {wanted / 2**30:.2f} GiB", str(path))
    checksum = zlib.crc32(key.encode())
    with replacing(path, "wb") as file:
        file.write(bytes(HEADER))
        for part in decoded.parts:
            content = part.cpu().numpy().data
            checksum = zlib.crc32(content, checksum)
            file.write(content)
        kind = str(decoded.dtype).removeprefix("torch.")
        told = {"key": key, "shape": decoded.shape, "dtype": kind, "crc32": checksum, "remarks": decoded.remarks}
        file.seek(0)
        file.write(MAGIC + json.dumps(told).encode())


def _read(path: Path, key: str) -> Cached | None:
    """The images in a file; None if there is none, or it is not whole."""
    try:
        with path.open("rb") as file:
            start = file.read(HEADER)
    except FileNotFoundError:
        return None
    try:
        told = json.loads(start.removeprefix(MAGIC).rstrip(b"\0"))
        shape, kind, remarks = tuple(told["shape"]), np.dtype(told["dtype"]), list(told["remarks"])
        # Private to this process: pages that someone writes to are copied, the file never changes.
        pixels = np.memmap(path, dtype=kind, mode="c", offset=HEADER, shape=shape)
        whole = path.stat().st_size == HEADER + pixels.nbytes and _checksum(pixels, told["key"]) == told["crc32"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    if whole and told["key"] != key:
        raise InputError(f"{path} is the cache of another folder, or of a former state of this one: delete it")
    return Cached(torch.from_numpy(pixels), remarks) if whole else None


def _checksum(pixels: np.ndarray, key: str) -> int:
    content, checksum = pixels.reshape(-1).view(np.uint8), zlib.crc32(key.encode())
    for at in range(0, len(content), CHUNK):
        checksum = zlib.crc32(content[at : at + CHUNK].data, checksum)
    return checksum
