"""A data set in a CSV file: its columns, paths, labels, groups and splits, and what is refused."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amimv import InputError
from amimv.pipelines import ImageStore, load_store
from amimv.pipelines.groups import encode_groups
from amimv.pipelines.sources.csv_file import list_table
from amimv.pipelines.sources.listing import SPLITS

HEADER = ("Image ID", "dx", "patient", "split", "age")


def colour(i: int) -> tuple[int, int, int]:
    return 5 * i, 100 + i, 255 - 7 * i


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """12 images of 6 patients, three classes whose names do not come in their order, four rows a split."""
    rows = []
    for i in range(12):
        where = tmp_path / "deep" / f"scan {i}.{'png' if i % 2 else 'bmp'}"
        where.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), colour(i)).save(where)
        named = where.relative_to(tmp_path)
        name = str(named.with_suffix("")) if i % 3 == 0 else str(named).replace("/", "\\") if i == 5 else f"./{named}"
        rows.append((name, ("nv", "df", "mel")[i % 3], f"p{i // 2}", ("Training", "valid", "test")[i // 4], i))
    return write(tmp_path / "scans.csv", rows)


def write(file: Path, rows: list[tuple], header: tuple[str, ...] = HEADER) -> Path:
    with file.open("w", newline="") as out:
        csv.writer(out, delimiter=";").writerows([header, *rows])
    return file


def pixels(store: ImageStore) -> list[tuple[int, ...]]:
    return [tuple(image[4, 4].tolist()) for image in store.gather(torch.arange(len(store)))]


def refused(message: str, file: Path, split: str = "train", *columns: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        list_table(file, split, columns)
    assert "\n" not in str(caught.value)


def test_every_split_has_its_rows_in_order(scans: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, split in enumerate(SPLITS):
        caplog.clear()
        store = load_store(f"csv:{scans}", split, size=8)
        own = range(4 * number, 4 * number + 4)
        assert pixels(store) == [colour(i) for i in own]
        assert store.class_names == ("df", "mel", "nv")
        assert store.known_labels("").tolist() == [(2, 0, 1)[i % 3] for i in own]
        assert store.groups is not None
        assert store.groups.tolist() == encode_groups([f"p{i // 2}" for i in own]).tolist()
        assert (store.name, store.split, store.task) == ("scans", split, "multi-class")
        told = [record.getMessage() for record in caplog.records if "scans.csv" in record.getMessage()]
        columns = "image from column Image ID, label from dx, group from patient, split from split"
        assert told == ([f"scans.csv, 3 classes (df, mel, nv): {columns}"] if split == "train" else [])
        assert store.images.paths == load_store(f"csv:{scans}", split, size=8, resident=False).images.paths


def test_columns_are_chosen_and_left_out(scans: Path) -> None:
    found = list_table(scans, "train", ("label=Age", "group=", "split="))
    assert found.class_names == tuple(map(str, range(12)))  # 10 after 9
    assert found.labels == tuple(range(12))
    assert (found.groups, found.splits) == ((), ("train",))
    bare = list_table(scans, "test", ("label=",))
    assert (bare.labels, bare.class_names, bare.splits) == ((), (), SPLITS)
    assert len(bare.paths) == 4
    store = load_store(f"csv:{scans}", size=8, columns=("label=",))
    assert store.labels is None


def test_several_columns_are_several_labels(tmp_path: Path, scans: Path) -> None:
    names = [Path(path).relative_to(tmp_path) for path in list_table(scans, "train", ("split=",)).paths]
    hot = np.random.default_rng(0).integers(0, 2, (12, 3))
    hot[:2] = [[1, 1, 0], [0, 0, 1]]
    words = {0: ("0", "0.0", "False"), 1: ("1", "1.0", "true")}
    rows = [
        (name, *(words[v][(i + j) % 3] for j, v in enumerate(row)))
        for i, (name, row) in enumerate(zip(names, hot, strict=True))
    ]
    file = write(tmp_path / "many.csv", rows, ("file", "Edema", "Mass", "None of it"))
    store = load_store(f"csv:{file}", size=8, columns=("label=Edema,Mass,None of it",))
    assert store.known_labels("").tolist() == hot.tolist()
    assert (store.class_names, store.task) == (("Edema", "Mass", "None of it"), "multi-label, binary-class")
    one = np.eye(3, dtype=int)[np.arange(12) % 3]
    file = write(tmp_path / "one.csv", [(n, *row) for n, row in zip(names, one, strict=True)], ("file", "a", "b", "c"))
    assert list_table(file, "train", ("label=a,b,c",)).labels == tuple(i % 3 for i in range(12))
    kept = list_table(file, "train", ("label=a,b,c",), "multi-label, binary-class").labels
    assert kept == tuple(map(tuple, one.tolist()))


def test_shares_keep_patients_whole_and_are_the_same_every_time(scans: Path, caplog: pytest.LogCaptureFixture) -> None:
    stores = {
        split: load_store(f"csv:{scans}", split, size=8, columns=("split=", "label="), shares=(0.5, 0.25, 0.25))
        for split in SPLITS
    }
    assert sorted(map(len, stores.values())) == [2, 4, 6]
    assert sorted(pixel for store in stores.values() for pixel in pixels(store)) == sorted(map(colour, range(12)))
    groups = [store.groups for store in stores.values() if store.groups is not None]
    assert len(torch.cat([own.unique() for own in groups])) == len(torch.cat(groups).unique()) == 6
    assert sum("from column" in record.getMessage() for record in caplog.records) == 1
    again = load_store(f"csv:{scans}", "test", size=8, columns=("split=", "label="), shares=(0.5, 0.25, 0.25))
    assert pixels(again) == pixels(stores["test"])


def test_what_is_wrong_is_told_in_a_line(tmp_path: Path, scans: Path) -> None:
    refused("has no column 'diagnose': expected one of Image ID, dx", scans, "train", "label=diagnose")
    refused("has no column 'Ages': did you mean age", scans, "train", "group=Ages")
    refused("unknown role of a column 'lable': did you mean label", scans, "train", "lable=dx")
    refused("columns has 'dx': expected image=COLUMN, label=COLUMN", scans, "train", "dx")
    refused("columns names label twice", scans, "train", "label=dx", "label=age")
    refused("row 2 has dx 'nv', expected 0 or 1", scans, "train", "label=dx,age")
    refused("row 2 has dx 'nv', expected train, val or test", scans, "train", "split=dx")
    refused("there is no file .*none.csv", tmp_path / "none.csv")
    images = [str(path) for path in (tmp_path / "deep").iterdir()]

    def table(name: str, rows: list[tuple], header: tuple[str, ...]) -> Path:
        return write(tmp_path / f"{name}.csv", rows, header)

    head = ("file", "label")
    refused("no column of image files, only label, x", table("a", [("1", "2")], ("label", "x")))
    refused("row 3 names gone.png, but there is no file", table("b", [(images[0], 1), ("gone.png", 2)], head))
    refused("rows 2 and 4 are both of", table("c", [(images[0], 1), (images[1], 2), (images[0], 2)], head))
    refused("row 3 has no label: fill it", table("d", [(images[0], 1), (images[1], "nan")], head))
    refused("row 3 names no image", table("e", [(images[0], 1), (" ", 2)], head))
    refused("all rows have label 1: expected at least two", table("f", [(images[0], 1), (images[1], 1)], head))
    whole = table("g", [(image, i % 2) for i, image in enumerate(images)], head)
    refused(r"has no split 'val', only train: add rows of it, or cut it off \(--split", whole, "val")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shares": (0.7, 0.1, 0.2)},
            r"scans has splits of its own \(train, val, test\): leave --split out, or give --re",
        ),
        ({"shares": (0.7, 0.3)}, "expected one each for train, val, test"),
        ({"shares": (0.7, 0.2, 0.2), "columns": ("split=",)}, "positive numbers whose sum is 1"),
        (
            {"shares": (0.7, 0.1, 0.2), "columns": ("split=", "group=", "label=age")},
            r"class 0 has 1 image\(s\), but each of",
        ),
        (
            {"shares": (0.7, 0.1, 0.2), "columns": ("split=", "group=dx")},
            r"class df has 1 group\(s\) of images, but each",
        ),
        ({"groups": "patient"}, r"of a CSV file, columns name its own \(group=patient\)"),
    ],
)
def test_splits_and_groups_that_cannot_be(scans: Path, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_store(f"csv:{scans}", size=8, **settings)
    assert "\n" not in str(caught.value)


def test_names_that_are_none(scans: Path) -> None:
    for name, message in ((str(scans), f"did you mean csv:{scans}"), ("csv:", "'csv:' names no file")):
        with pytest.raises(InputError, match=message):
            load_store(name)
    with pytest.raises(InputError, match="columns are those of a CSV file, and phantom is none"):
        load_store("phantom", columns=("label=a",))
