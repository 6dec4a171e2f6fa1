"""Tables in CSV files: columns of cells, found by the names that they usually have."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from amimv import InputError, check_choice, did_you_mean, first_line, shown
from amimv.pipelines.sources.labels import shortened

#: The columns that are read as groups where none is named: the first that a file has. Columns are compared in lower
#: case, blanks and hyphens as underscores ("Patient ID" is ``patient_id``).
GROUP_COLUMNS = (
    *("group", "group_id", "patient", "patient_id", "subject", "subject_id"),
    *("lesion", "lesion_id", "slide", "slide_id", "case", "case_id"),
)
#: The columns that are read as names of image files: the first that a file has.
NAME_COLUMNS = (
    *("file", "file_name", "filename", "path", "file_path", "image_path", "image"),
    *("image_name", "image_id", "image_index", "isic_id", "name"),
)
#: What a column can be, and where none is named for it, the names that it is found by: the first that a file has.
ROLES = {
    "image": NAME_COLUMNS,
    "label": ("label", "class", "target", "category", "diagnosis", "dx"),
    "group": GROUP_COLUMNS,
    "split": ("split",),
}
EXPECTED = "expected image=COLUMN, label=COLUMN (or several of 0 and 1: label=A,B), group=COLUMN, split=COLUMN"


class Table(NamedTuple):
    """A CSV file: its columns as they are written, and under their plain names."""

    file: Path
    columns: dict[str, list[str]]
    plain: dict[str, str]

    def find(self, names: Sequence[str]) -> str | None:
        """The first of these columns that there is."""
        return next((self.plain[name] for name in names if name in self.plain), None)

    def get(self, name: str) -> list[str]:
        """The cells of a column.

        Raises:
            InputError: there is none of that name, nor one that differs in case, blanks or hyphens only.
        """
        found = name if name in self.columns else self.find([_plain(name)])
        if found is None:
            hint = did_you_mean(name, self.columns) or f"expected one of {shortened(list(self.columns))}"
            raise InputError(f"{self.file} has no column {name!r}: {hint}")
        return self.columns[found]


def _plain(column: str) -> str:
    return re.sub(r"[\s-]+", "_", column.strip()).lower()


def read_table(file: Path, holds: str) -> Table:
    """A CSV file in UTF-8 with a header; comma, semicolon or tab.

    Args:
        file: its path.
        holds: what is looked for in it, for messages.

    Raises:
        InputError: no such file, or none that can be read; no rows, or rows of another length than the header.
    """
    if not file.is_file():
        raise InputError(f"there is no file {file}: expected a CSV with {holds}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            delimiter = max(",;\t", key=first.count)
            header = next(csv.reader([first], delimiter=delimiter), [])
            rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read as CSV: {first_line(error)}") from error
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise InputError(f"{file}: row {i + 2} has {len(row)} cells, the header has {len(header)}")
    if not rows:
        raise InputError(f"{file} has no rows: expected a header, and one row for each image")
    columns = {name.strip(): list(cells) for name, cells in zip(header, zip(*rows, strict=True), strict=True)}
    # In reverse, as of two columns that differ in case only the first counts.
    return Table(file, columns, {_plain(name): name for name in reversed(columns)})


def by_role(columns: Sequence[str]) -> dict[str, str | None]:
    """The column that is given for each role, as "image=NAME"; None where none is.

    Raises:
        InputError: another role, one twice, or a text of another form.
    """
    found: dict[str, str | None] = dict.fromkeys(ROLES)
    for text in columns:
        role, equals, name = text.partition("=")
        if not equals:
            raise InputError(f"columns has {shown(text)}: {EXPECTED}")
        check_choice("role of a column", role, ROLES)
        if found[role] is not None:
            raise InputError(f"columns names {role} twice: {EXPECTED}")
        found[role] = name
    return found
