"""Columns written part by part: what is read again, and that nothing is kept."""

import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from amimv import InputError
from amimv.tools.columns import open_columns

WORDS = ["", "a", "naïve 𝄞", "two\nlines", "longer than the others"]


def parts(sizes: tuple[int, ...], width: int = 3) -> Iterator[dict]:
    start = 0
    for n in sizes:
        place = np.arange(start, start + n)
        start += n
        yield {
            "name": [WORDS[i % 5] + "x" * (i == 6) for i in place.tolist()],
            "place": place,
            "values": (place[:, None] * 10 + np.arange(width)).astype(np.float32),
            "bits": (place[:, None] % 2 + np.zeros((1, 2))).astype(np.uint8),
        }


def write(path: Path, sizes: tuple[int, ...], width: int = 3) -> None:
    with open_columns(path) as columns:
        for part in parts(sizes, width):
            columns.write(part)


SIZES = (4, 4, 1)


def whole() -> dict:
    (expected,) = parts((sum(SIZES),))
    return expected


def test_an_npz_has_arrays_that_are_read_without_pickle(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", SIZES)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert list(found) == list(whole())
        for name, values in whole().items():
            assert found[name].tolist() == np.asarray(values).tolist(), name
        assert found["values"].dtype == np.float32
        assert found["name"].dtype == "U22"
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_parquet_file_has_a_row_group_for_each_part(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", SIZES)
    file = parquet.ParquetFile(tmp_path / "a.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == list(SIZES)
    table = file.read()
    for name, values in whole().items():
        assert table[name].to_pylist() == np.asarray(values).tolist(), name
    assert table.schema.field("values").type == pyarrow.list_(pyarrow.float32(), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    """Ten times the rows (40 MB of them) take no more than one part more."""

    def peak(n: int) -> int:
        tracemalloc.start()
        arrow = pyarrow.total_allocated_bytes()
        with open_columns(tmp_path / f"a.{kind}") as columns:
            for part in parts((256,) * n, width=256):
                columns.write(part)
                assert pyarrow.total_allocated_bytes() - arrow < 4 * 256 * 256 * 4
                del part
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(16), peak(160)
    assert many < few + 256 * 256 * 4


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_what_fails_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_text("before")

    def fail() -> None:
        with open_columns(path) as columns:
            columns.write(next(parts((2,))))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [(path.name, "before")]


def test_other_names_and_a_missing_library_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"a.csv, expected a name that ends in .parquet or .npz$"):
        write(tmp_path / "a.csv", SIZES)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"^parquet is written by pyarrow, which is missing: [^\n]*\.npz$"):
        write(tmp_path / "a.parquet", SIZES)
    assert list(tmp_path.iterdir()) == []
