"""A data set in a CSV file: a row for each image, with its path, and its label, group and split where it has them."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from amimv import InputError
from amimv.pipelines.groups import MISSING
from amimv.pipelines.sources.encoded import READERS
from amimv.pipelines.sources.labels import settle_labels, shortened
from amimv.pipelines.sources.listing import CUT, EXTENSIONS, SPLIT_NAMES, SPLITS, Listing, NoSplit
from amimv.pipelines.sources.table import EXPECTED, ROLES, Table, by_role, read_table


def list_table(file: Path, split: str, columns: Sequence[str] = (), task: str | None = None) -> Listing:
    """Find the images of a split in a CSV file, in the order of its rows.

    Paths are relative to the file's folder; one without an ending may stand for a file with one of ``EXTENSIONS``. Of
    one column of labels the classes are what stands in it in any split, sorted, whole numbers by their size; several
    columns are 0 or 1 each. Without a column of splits all rows are "train".

    Args:
        file: see `read_table`.
        split: "train", "val" or "test".
        columns: which column is what, as "image=NAME", "label=NAME" or "label=NAME,NAME", "group=NAME", "split=NAME";
            without a name ("split=") there is none. By default those of ``ROLES`` that there are.
        task: what the user says that it is, see `settle_labels`.

    Raises:
        InputError: no such column, split or image, an image that stands there twice, or a cell that is none of what
            its column must hold.
    """
    table = read_table(file, "a row for each image")
    chosen = {role: _columns(table, role, given) for role, given in by_role(columns).items()}
    if not chosen["image"]:
        raise InputError(f"{file} has no column of image files, only {shortened(list(table.columns), 6)}: {EXPECTED}")
    cells = [cell.strip().replace("\\", "/") for cell in table.get(chosen["image"][0])]
    _check_each_once(file, cells)
    labels, class_names = _labels(table, chosen["label"], task)
    of_row = _splits(table, chosen["split"], len(cells))
    splits = tuple(name for name in SPLITS if name in of_row)
    if split not in splits:
        raise NoSplit(f"{file} has no split {split!r}, only {', '.join(splits)}: add rows of it, or {CUT}")
    rows = [i for i, name in enumerate(of_row) if name == split]
    groups = table.get(chosen["group"][0]) if chosen["group"] else []
    return Listing(
        _paths(file, cells, rows),
        tuple(labels[i] for i in rows) if labels else (),
        class_names,
        (_told(file, chosen, class_names),) if split == splits[0] else (),
        splits,
        tuple(groups[i] for i in rows) if groups else (),
    )


def _columns(table: Table, role: str, given: str | None) -> list[str]:
    """The columns of a role, which the table has."""
    if given is None:
        usual = table.find(ROLES[role])
        return [usual] if usual else []
    names = [name.strip() for name in given.split(",")] if role == "label" else [given.strip()]
    names = [name for name in names if name]
    for name in names:
        table.get(name)
    return names


def _check_each_once(file: Path, cells: list[str]) -> None:
    seen: dict[str, int] = {}
    for row, cell in enumerate(cells, start=2):
        if not cell:
            raise InputError(f"{file}: row {row} names no image: fill it, or leave the row out")
        if (first := seen.setdefault(os.path.normpath(cell), row)) != row:
            raise InputError(f"{file}: rows {first} and {row} are both of {cell}: keep one of them")


def _labels(
    table: Table, columns: list[str], task: str | None
) -> tuple[list[int] | list[tuple[int, ...]], tuple[str, ...]]:
    """The labels of all rows, and the names of their classes."""
    if not columns:
        return [], ()
    cells = [[cell.strip() for cell in table.get(name)] for name in columns]
    for name, column in zip(columns, cells, strict=True):
        if (empty := next((i for i, cell in enumerate(column) if cell.lower() in MISSING), None)) is not None:
            raise InputError(f"{table.file}: row {empty + 2} has no {name}: fill it, or leave the row out")
    if len(columns) == 1:
        names = sorted(set(cells[0]), key=_in_order(cells[0]))
        if len(names) == 1:
            raise InputError(f"{table.file}: all rows have {columns[0]} {names[0]}: expected at least two classes")
        number = {name: i for i, name in enumerate(names)}
        return [number[cell] for cell in cells[0]], tuple(names)
    hot = np.array([_zeros_and_ones(table, name, column) for name, column in zip(columns, cells, strict=True)]).T
    settled = settle_labels({"all": hot}, table.file, task)[0]["all"]
    return settled.tolist() if settled.ndim == 1 else [tuple(row) for row in settled.tolist()], tuple(columns)


def _in_order(names: list[str]) -> "type[int] | None":
    """How classes are sorted: as whole numbers if all of them are."""
    return int if all(name.removeprefix("-").isdecimal() for name in names) else None


def _zeros_and_ones(table: Table, name: str, column: list[str]) -> list[int]:
    known = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
    values = [known.get(cell.lower(), -1) for cell in column]
    if -1 in values:
        row = values.index(-1)
        raise InputError(
            f"{table.file}: row {row + 2} has {name} {column[row]!r}, expected 0 or 1 in each label column"
        )
    return values


def _splits(table: Table, columns: list[str], n: int) -> list[str]:
    """The split of each row."""
    if not columns:
        return ["train"] * n
    cells = [cell.strip() for cell in table.get(columns[0])]
    found = [SPLIT_NAMES.get(cell.lower(), "") for cell in cells]
    if "" in found:
        row = found.index("")
        raise InputError(
            f"{table.file}: row {row + 2} has {columns[0]} {cells[row]!r}, expected train, val or test "
            "(or leave the column out: split=)"
        )
    return found


def _paths(file: Path, cells: list[str], rows: list[int]) -> tuple[str, ...]:
    """The files of these rows, all of which are there."""
    with ThreadPoolExecutor(READERS) as readers:  # on a network drive each is waited for
        found = list(readers.map(lambda i: _file(file.parent / cells[i]), rows))
    if None in found:
        row = rows[found.index(None)]
        raise InputError(
            f"{file}: row {row + 2} names {cells[row]}, but there is no file {file.parent / cells[row]}: "
            "expected paths relative to the CSV's folder"
        )
    return tuple(path for path in found if path is not None)


def _file(path: Path) -> str | None:
    if path.is_file():
        return str(path)
    return next((f"{path}{ending}" for ending in EXTENSIONS if Path(f"{path}{ending}").is_file()), None)


def _told(file: Path, chosen: dict[str, list[str]], class_names: tuple[str, ...]) -> str:
    """Which column is taken for what."""
    said = [f"{role} from {shortened(names, 3)}" if names else f"no {role}" for role, names in chosen.items()]
    classes = f", {len(class_names)} classes ({shortened(class_names)})" if class_names else ""
    return f"{file.name}{classes}: {', '.join(said).replace('from', 'from column', 1)}"
