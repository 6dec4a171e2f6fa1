"""Groups: images of one patient, lesion or slide. A group is never a label.

A group is a number. What the user has (names of patients in a file, a column, an array) becomes numbers that are the
same in every split and every run, so that groups of different splits can be compared. Nothing here is on the hot path:
it runs once, when data are loaded.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.rng import Key, Stream, integers
from amimv.pipelines.sources.labels import shortened
from amimv.pipelines.sources.listing import SPLIT_NAMES
from amimv.pipelines.sources.table import GROUP_COLUMNS, NAME_COLUMNS, Table, read_table

#: How a missing group looks as text, in lower case: empty cells, and what NumPy and pandas make of None and NaN.
MISSING = ("", "nan", "none", "null", "<na>", "nat")
#: The end of a file's name; digits are none, as in the names of DICOM files.
_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}$")

_log = logging.getLogger("amimv")


def encode_groups(values: Any, *, salt: str = "") -> Tensor:
    """Groups as numbers: integers stay as they are, and text becomes a hash, the same in every split and run.

    Args:
        values: ``(N,)``: a tensor, array, list or pandas column of integers or of text (blanks around it do not
            count). What is missing (None, NaN, or text that is one of ``MISSING``) becomes a group of its own.
        salt: of the missing ones, such as the name of the split: with another, they are other groups.

    Returns:
        ``(N,)`` ``int64``, on the device of ``values`` (of text, 63 bits of BLAKE2b, never negative).

    Raises:
        InputError: for another shape, fractions, or integers beyond 64 bits.
    """
    if isinstance(values, Tensor):
        device = values.device
        if values.ndim == 1 and not values.is_floating_point() and not values.is_complex():
            return values.long()
        values = values.cpu().numpy()
    else:
        device = torch.device("cpu")
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iubfOUSTM":
        raise InputError(f"groups are {array.shape} {array.dtype}, expected (N,) integers or text, one for each image")
    if array.dtype.kind in "OUSTM":
        return _encode_text(array, salt).to(device)
    missing = np.isnan(array) if array.dtype.kind == "f" else np.zeros(len(array), dtype=bool)
    return _with_own_groups(_whole_numbers(array, missing), missing, salt).to(device)


def _encode_text(array: np.ndarray, salt: str) -> Tensor:
    text = np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array.astype(object).astype(str)
    unique, inverse = np.unique(text, return_inverse=True)
    names = [name.strip() for name in unique.tolist()]
    missing = np.array([name.lower() in MISSING for name in names], dtype=bool)[inverse]
    if array.dtype.kind == "O" and len(array):
        kinds = set(map(type, array[~missing]))
        if kinds and all(issubclass(kind, (int, float, np.integer, np.floating)) for kind in kinds):
            return _with_own_groups(_whole_numbers(array, missing), missing, salt)
    numbers = np.array([_hash(name) for name in names], dtype=np.int64)
    return _with_own_groups(numbers[inverse], missing, salt)


def _hash(text: str) -> int:
    """63 bits, so that the number is not negative."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def _whole_numbers(array: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """``int64``, 0 where missing."""
    known = np.where(missing, 0, array)
    limit = 2 ** (np.finfo(array.dtype).nmant + 1) if array.dtype.kind == "f" else 2**63  # larger floats lost digits
    if len(known) and (known.max() >= limit or known.min() < -limit):
        raise InputError(f"groups reach from {known.min()} to {known.max()}, too far to be whole numbers: give text")
    whole = known.astype(np.int64)
    if (wrong := np.flatnonzero(whole != known)).size:
        raise InputError(f"groups are fractions ({known[wrong[0]]}, ...), expected integers or text")
    return whole


def _with_own_groups(numbers: np.ndarray, missing: np.ndarray, salt: str) -> Tensor:
    """Each missing one gets the number of its place under this salt."""
    positions = torch.arange(len(numbers))
    own = integers(Key(_hash(salt), Stream.OWN_GROUP), positions, 1, 2**63 - 1)[:, 0]
    return torch.where(torch.from_numpy(missing), own, torch.from_numpy(numbers))


def read_groups(
    file: Path, column: str | None, split: str, n: int, names: Sequence[str] | None = None, tells: bool = True
) -> Tensor:
    """The groups of a split's images, from a CSV file.

    The file has the columns ``split`` and ``index`` (from 0, in the order of the images; other columns do not
    matter), or, where ``names`` are given, one of ``NAME_COLUMNS``. A file's name is found where the cell is the end
    of its path, or the other way round (``ISIC_1``, ``ISIC_1.jpg``, ``train/nv/ISIC_1.jpg``), with or without the
    ending; where rows of one name differ in their groups, that of this split counts.

    Args:
        file: the CSV, in UTF-8, with a header; comma, semicolon or tab.
        column: of the groups; None: the first of ``GROUP_COLUMNS`` that the file has.
        split: "train", "val" or "test".
        n: number of images.
        names: of the images' files, N paths, as a folder gives them.
        tells: whether the log says what was read.

    Returns:
        ``(N,)`` ``int64`` on the CPU, as `encode_groups` makes them of text.

    Raises:
        InputError: no such file or column, a name or an index that is not there, or there twice, or another length.
    """
    rows = read_table(file, "the groups of the images")
    column = column or rows.find(GROUP_COLUMNS)
    if column is None:
        found = shortened(list(rows.columns), 6)
        raise InputError(f"{file} has no column group, patient_id, lesion_id, ...: name one of its columns {found}")
    cells = rows.get(column)
    values = _by_index(rows, cells, split, n) if names is None else _by_name(rows, cells, split, n, names)
    groups = encode_groups(np.array(values, dtype=str), salt=split)
    missing = sum(value.strip().lower() in MISSING for value in values)
    told = f" ({missing} without one: each its own)" if missing else ""
    if tells:
        _log.info(
            "%s, %s: column %s gives %d groups of %d images%s", file, split, column, len(groups.unique()), n, told
        )
    return groups


def _is_split(cell: str, split: str) -> bool:
    cell = cell.strip().lower()
    return SPLIT_NAMES.get(cell, cell) == split


def _by_index(rows: Table, cells: list[str], split: str, n: int) -> list[str]:
    """The cells of a split in the order of its images."""
    of_split = [i for i, cell in enumerate(rows.get("split")) if _is_split(cell, split)]
    written = rows.get("index")
    found: dict[int, str] = {}
    for i in of_split:
        if not written[i].strip().isdecimal():
            raise InputError(f"{rows.file}: index {written[i]!r} of {split} is no number, expected 0..{n - 1}")
        if (index := int(written[i])) in found:
            raise InputError(f"{rows.file}: index {index} of {split} stands there twice, expected each once")
        found[index] = cells[i]
    missing = next((index for index in range(n) if index not in found), None)
    if len(found) != n or missing is not None:
        which = f" (none of index {missing})" if missing is not None else ""
        raise InputError(f"{rows.file} has {len(found)} rows of {split}{which} for {n} images: expected each once")
    return [found[index] for index in range(n)]


def _by_name(rows: Table, cells: list[str], split: str, n: int, names: Sequence[str]) -> list[str]:
    """The cells of these files."""
    if len(names) != n:
        raise InputError(f"{len(names)} names of files were given for {n} images: expected one for each")
    column = rows.find(NAME_COLUMNS)
    if column is None:
        expected = f"expected one of {shortened(NAME_COLUMNS, 5)}"
        raise InputError(
            f"{rows.file} has no column of file names, only {shortened(list(rows.columns), 6)}: {expected}"
        )
    paths = [_parts(cell) for cell in rows.columns[column]]
    splits = rows.columns[rows.plain["split"]] if "split" in rows.plain else [""] * len(paths)
    wholes: dict[str, str | None] = {}
    ends: dict[str, str | None] = {}
    for own in (False, True):
        chosen = [i for i, cell in enumerate(splits) if _is_split(cell, split) == own]
        wholes |= _table((key, cells[i]) for i in chosen for key in _keys(paths[i]))
        ends |= _table((key, cells[i]) for i in chosen for end in _ends(paths[i]) for key in _keys(end))
    taken: dict[str, str] = {}
    groups = []
    for name in names:
        parts = _parts(name)
        known = (key for end in _ends(parts) for key in _keys(end) if key in wholes)
        key = next(known, None) or next((key for key in _keys(parts) if key in ends), None)
        if key is None:
            raise InputError(f"{rows.file} has no row for {name}: expected its name in column {column}")
        group = wholes.get(key, ends.get(key))
        if group is None:
            raise InputError(f"{rows.file} has several rows for {name}, of different groups: keep one")
        if taken.setdefault(key, name) != name:
            raise InputError(f"{rows.file}: row {key} fits both {taken[key]} and {name}: write their paths")
        groups.append(group)
    return groups


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[/\\]", path.strip()) if part not in ("", "."))


def _ends(parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The path, then without its first folder, ..., then the name alone."""
    return (parts[i:] for i in range(len(parts)))


def _keys(parts: tuple[str, ...]) -> list[str]:
    """A path with and without its ending."""
    path = "/".join(parts)
    return [path, short] if (short := _ENDING.sub("", path)) != path else [path]


def _table(pairs: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    """One group for each key; None where they differ."""
    table: dict[str, str | None] = {}
    for key, group in pairs:
        if table.setdefault(key, group) != group:
            table[key] = None
    return table


def check_groups(groups: Tensor, n: int | None = None) -> None:
    """Raise an `InputError` unless groups are ``(N,)`` integers, where given one for each of ``n`` images."""
    wrong = groups.ndim != 1 or groups.is_floating_point() or groups.is_complex()
    if wrong or n not in (None, len(groups)):
        many = "each image" if n is None else f"each of the {n} images"
        raise InputError(f"groups are {tuple(groups.shape)} {groups.dtype}, expected one integer for {many}")


def leaked(train_groups: Tensor, test_groups: Tensor) -> Tensor:
    """Which test images share a group with training.

    Args:
        train_groups, test_groups: ``(N,)`` and ``(M,)`` integers, as of `encode_groups`.

    Returns:
        ``(M,)`` ``bool``, on the device of ``test_groups``.

    Raises:
        InputError: for groups of another shape or type.
    """
    check_groups(train_groups)
    check_groups(test_groups)
    return torch.isin(test_groups, train_groups.to(test_groups.device))
