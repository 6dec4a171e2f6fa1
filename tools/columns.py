"""Columns of any length in a file, part by part: parquet through pyarrow, or NumPy's ``.npz``."""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from amimv import InputError
from amimv.files import replacing

#: A part of the columns: ``(n, ...)`` numbers, or n texts; the names, types and shapes of all parts are the same.
Part = Mapping[str, np.ndarray | list[str]]
#: Texts that are read at a time when they are written as an array.
TEXTS = 4096


class Columns(Protocol):
    """What takes parts of columns, and keeps none of them."""

    def write(self, part: Part) -> None:
        """Append it."""


Opener = Callable[[Path], AbstractContextManager[Columns]]


@contextmanager
def open_columns(path: Path) -> Iterator[Columns]:
    """Columns to be written to ``path``, which is there once all are; see `Parquet` and `Npz`.

    Raises:
        InputError: the name ends in neither ``.parquet`` nor ``.npz``, or pyarrow is missing.
    """
    check_kind(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with KINDS[path.suffix](path) as columns:
        yield columns


def check_kind(path: Path) -> None:
    """Raise an `InputError` for a name that says no kind of file."""
    if path.suffix not in KINDS:
        raise InputError(f"output is {path}, expected a name that ends in {' or '.join(KINDS)}")


class Parquet:
    """A row group for each part; rows of more than one number are lists of a fixed size."""

    def __init__(self, file: IO[bytes], arrow: Any, parquet: Any) -> None:
        self.file, self.arrow, self.parquet = file, arrow, parquet
        self.writer: Any = None

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator["Parquet"]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise InputError("parquet is written by pyarrow, which is missing: install it, or give a .npz") from error
        with replacing(path, "wb") as file:
            columns = cls(file, pyarrow, parquet)
            try:
                yield columns
            finally:
                if columns.writer is not None:
                    columns.writer.close()

    def write(self, part: Part) -> None:
        table = self.arrow.table({name: self._array(values) for name, values in part.items()})
        if self.writer is None:
            self.writer = self.parquet.ParquetWriter(self.file, table.schema)
        self.writer.write_table(table)

    def _array(self, values: np.ndarray | list[str]) -> Any:
        if isinstance(values, list) or values.ndim == 1:
            return self.arrow.array(values)
        return self.arrow.FixedSizeListArray.from_arrays(self.arrow.array(values.ravel()), values.shape[1])


class Npz:
    """An array for each column, not compressed. Until all is there, a file for each lies in a folder beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows, self.width = 0, dict[str, int]()
        self.like: Part = {}

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator["Npz"]:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
            columns = cls(Path(folder))
            yield columns
            with replacing(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
                for name in columns.like:
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        columns.copy(name, entry)

    def write(self, part: Part) -> None:
        self.like = {name: values[:0] for name, values in part.items()}
        self.rows += len(next(iter(part.values())))
        for name, values in part.items():
            with (self.folder / name).open("ab") as file:
                if isinstance(values, list):  # how wide the array has to be is known in the end
                    self.width[name] = max(self.width.get(name, 1), *map(len, values))
                    file.writelines(json.dumps(text).encode() + b"\n" for text in values)
                else:
                    file.write(np.ascontiguousarray(values).tobytes())

    def copy(self, name: str, entry: IO[bytes]) -> None:
        """A column as ``.npy``."""
        like = self.like[name]
        empty = np.zeros(0, f"U{self.width[name]}") if isinstance(like, list) else like
        header = {"descr": np.lib.format.dtype_to_descr(empty.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(entry, header | {"shape": (self.rows, *empty.shape[1:])})
        with (self.folder / name).open("rb") as file:
            if not isinstance(like, list):
                shutil.copyfileobj(file, entry)
                return
            while lines := file.readlines(TEXTS):  # of so many bytes
                entry.write(np.array([json.loads(line) for line in lines], empty.dtype).tobytes())


#: By the end of the file's name.
KINDS: dict[str, Opener] = {".parquet": Parquet.opened, ".npz": Npz.opened}
