"""Groups from names: their numbers, and the files they are read from, against plain loops and on real lesions."""

import csv
import logging
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.groups import encode_groups, read_groups


def same_partition(groups: Tensor, names: list) -> bool:
    """Whether two images have one number just where they have one name; a missing name (None) is like no other."""
    told = [(i,) if name is None else name for i, name in enumerate(names)]
    return len(set(zip(groups.tolist(), told, strict=True))) == len(set(told)) == len(groups.unique())


def test_integers_stay_and_text_has_one_number_everywhere() -> None:
    for ints in ([5, -3, 5, 2**62], np.array([5, -3, 5, 2**62]), torch.tensor([5, -3, 5, 2**62])):
        assert encode_groups(ints).tolist() == [5, -3, 5, 2**62]
    assert encode_groups(np.array([7, 7], dtype=np.uint8)).dtype == torch.int64
    # Fixed for ever: another number would tear a study's splits apart.
    pinned = encode_groups(["p1", "Müller"]).tolist()
    assert pinned == [8361833091136382792, 5958810791802794335]
    forms = [
        ["p1", "Müller"],
        np.array(["p1", "Müller"]),
        np.array([" p1", "Müller \t"], dtype=object),
        np.array(["p1", "Müller"], dtype=np.dtypes.StringDType()),
        np.array([b"p1", "Müller".encode()]),
        pd.Series(["p1", "Müller"]),
        pd.Series(["p1", "Müller"], dtype="string"),
        pd.Series(["p1", "Müller"], dtype="category"),
    ]
    for form in forms:
        assert encode_groups(form, salt="any").tolist() == pinned


@pytest.mark.parametrize("seed", range(5))
def test_equal_names_are_equal_numbers_and_the_missing_are_alone(seed: int) -> None:
    draw = random.Random(seed)
    names = [draw.choice([f"p{draw.randrange(40)}", str(draw.randrange(40)), None]) for _ in range(300)]
    blank = [draw.choice(["", " ", "NaN", None, float("nan"), pd.NA]) if name is None else name for name in names]
    groups = encode_groups(blank)
    assert groups.min() >= 0
    assert same_partition(groups, names)
    other = encode_groups(blank, salt="test")
    lone = torch.tensor([name is None for name in names])
    assert torch.equal(groups[~lone], other[~lone])
    assert not torch.isin(other[lone], groups).any()
    assert torch.equal(encode_groups(blank, salt="test"), other)


def test_numbers_with_gaps_stay_numbers() -> None:
    gaps = [
        [4, None, 4, 9],
        np.array([4, np.nan, 4, 9]),
        pd.Series([4, None, 4, 9], dtype="Int64"),
        pd.Series([4, None, 4, 9]),
        torch.tensor([4, torch.nan, 4, 9]),
    ]
    found = [encode_groups(values).tolist() for values in gaps]
    assert [groups[0::2] + groups[3:] for groups in found] == [[4, 4, 9]] * len(gaps)
    assert len({groups[1] for groups in found}) == 1
    assert found[0][1] not in (0, 4, 9)
    assert encode_groups([]).tolist() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 2), dtype=int), r"groups are \(3, 2\) int64, expected \(N,\) integers or text"),
        (torch.zeros(3, 1, dtype=torch.int64), r"groups are \(3, 1\)"),
        ([1.5, 2.0], r"fractions \(1\.5"),
        ([1, 2.5, None], r"fractions \(2\.5"),
        (np.array([2**64 - 1], dtype=np.uint64), "too far .*: give text"),
        ([2**70, 1], "too far .*: give text"),
        ([float(2**60)], "too far .*: give text"),
        ([float("inf")], "too far .*: give text"),
        (np.array([1j]), "expected"),
    ],
)
def test_values_that_are_no_groups(values: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        encode_groups(values)
    assert "\n" not in str(caught.value)


def write(path: Path, header: str, *rows: str) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("seed", range(3))
def test_rows_by_index_equal_a_plain_loop(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    sizes = {"train": 40, "val": 15, "test": 20}
    rows = [(split, i, draw.choice(["", "p1", "p2", "p3"])) for split, n in sizes.items() for i in range(n)]
    draw.shuffle(rows)
    spelt = {"train": "Train", "val": "validation", "test": "test"}
    file = write(tmp_path / "i.csv", "split,other,index,Patient ID", *(f"{spelt[s]},x,{i},{p}" for s, i, p in rows))
    seen: dict[str, Tensor] = {}
    for split, n in sizes.items():
        expected: list[str | None] = [None] * n
        for s, i, patient in rows:
            if s == split and patient:
                expected[i] = patient
        seen[split] = read_groups(file, None, split, n)
        assert same_partition(seen[split], expected)
        known = [i for i, name in enumerate(expected) if name]
        assert seen[split][known].tolist() == encode_groups([expected[i] for i in known]).tolist()
    together = torch.cat(list(seen.values()))
    assert len(together.unique()) == 3 + sum(not patient for *_, patient in rows)


def test_which_column_was_read_stands_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="amimv")
    header = "split;index;slide;patient_id;other"
    file = write(tmp_path / "i.csv", header, "train;0;s1;a;x", "train;1;s2;a;y", "train;2;s2;;z")
    assert same_partition(read_groups(file, None, "train", 3), ["a", "a", None])
    assert same_partition(read_groups(file, "slide", "train", 3), ["1", "2", "2"])
    assert same_partition(read_groups(file, "Patient-ID", "train", 3), ["a", "a", None])
    assert caplog.messages[0].endswith(
        "train: column patient_id gives 2 groups of 3 images (1 without one: each its own)"
    )
    assert caplog.messages[1].endswith("train: column slide gives 2 groups of 3 images")


def test_files_by_name_in_every_way_of_writing_it(tmp_path: Path) -> None:
    names = [f"/data/set/train/{kind}/{stem}.jpg" for kind, stem in (("nv", "I_1"), ("mel", "I_2"), ("mel", "1.2.84"))]
    ways = [
        ("file", [Path(name).name for name in names]),
        ("image_id", [Path(name).stem for name in names]),
        ("Path", ["/".join(name.split("/")[-2:]) for name in names]),
        ("Image Index", ["\\".join(name.split("/")[-3:])[:-4] for name in names]),
        ("filename", names),
        ("filename", [f"./{'/'.join(name.split('/')[-3:])}" for name in names]),
    ]
    for column, written in ways:
        rows = [f"{name},{group}" for name, group in zip(written, "aba", strict=True)]
        file = write(tmp_path / "i.csv", f"{column},group", "other,c", *reversed(rows))
        for given in (names, [name.removeprefix("/data/set/") for name in names]):
            assert read_groups(file, None, "train", 3, given).tolist() == encode_groups(["a", "b", "a"]).tolist()
    # The ending may be another one, and the cell the longer of the two paths.
    file = write(tmp_path / "i.csv", "path,group", "old/train/nv/I_1.dcm,a")
    assert read_groups(file, None, "train", 1, ["nv/I_1.jpg"]).tolist() == encode_groups(["a"]).tolist()


def test_of_rows_with_one_name_that_of_the_split_counts(tmp_path: Path) -> None:
    file = write(tmp_path / "i.csv", "split,file,group", "test,0.png,a", "train,0.png,b", "val,0.png,c", "val,1.png,d")
    for split, group in (("train", "b"), ("val", "c"), ("test", "a")):
        assert read_groups(file, None, split, 1, [f"{split}/x/0.png"]).tolist() == encode_groups([group]).tolist()
    # Images that were moved between the splits keep their groups.
    assert read_groups(file, None, "test", 1, ["1.png"]).tolist() == encode_groups(["d"]).tolist()


INDEXED = ("split,index,group", "train,0,a", "train,1,b")


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (INDEXED, {"column": "groop"}, "has no column 'groop': did you mean group?"),
        (INDEXED, {"column": "zzz"}, "has no column 'zzz': expected one of split, index, group"),
        (("split,index,x", "train,0,a"), {}, "has no column group, .* name one of its columns split, index, x"),
        (("index,group", "0,a"), {}, "has no column 'split'"),
        ((*INDEXED, "train,1,c"), {}, "index 1 of train stands there twice"),
        (INDEXED, {"n": 3}, r"has 2 rows of train \(none of index 2\) for 3 images: expected each once"),
        (INDEXED, {"n": 1}, "has 2 rows of train for 1 images"),
        (INDEXED, {"split": "val"}, r"has 0 rows of val \(none of index 0\) for 2"),
        (("split,index,group", "train,0,a", "train,5,b"), {}, r"has 2 rows of train \(none of index 1\) for 2"),
        (("split,index,group", "train,0,a", "train,-1,b"), {}, "index '-1' of train is no number, expected 0..1"),
        (("split,index,group", "train,0,a", "train,1"), {}, "row 3 has 2 cells, the header has 3"),
        (("split,index,group", "train,0", "train,1,b"), {}, "row 2 has 2 cells, the header has 3"),
        (("split,index,group",), {}, "has no rows"),
        (INDEXED, {"names": ["a.jpg", "b.jpg"]}, "has no column of file names, only split, index, group"),
        (("file,group", "a,1"), {"names": ["x/a.jpg", "x/b.jpg"]}, "has no row for x/b.jpg: .* in column file"),
        (
            ("file,group", "a,1", "a.jpg,2"),
            {"n": 1, "names": ["a.png"]},
            "several rows for a.png, of different groups",
        ),
        (("file,group", "a,1"), {"names": ["x/a.jpg", "y/a.jpg"]}, "row a fits both x/a.jpg and y/a.jpg"),
        (("file,group", "a,1"), {"names": ["a.jpg"]}, "1 names of files were given for 2 images"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, lines: tuple[str, ...], settings: dict, message: str) -> None:
    file = write(tmp_path / "i.csv", *lines)
    with pytest.raises(InputError, match=message.replace("?", r"\?")) as caught:
        read_groups(file, **{"column": None, "split": "train", "n": 2, **settings})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(file), "")) < 150


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*none\.csv"):
        read_groups(tmp_path / "none.csv", None, "train", 1)
    (tmp_path / "i.csv").write_bytes("split,index,group\ntrain,0,é".encode("utf-16"))
    with pytest.raises(InputError, match="cannot be read as CSV"):
        read_groups(tmp_path / "i.csv", None, "train", 1)


def test_real_files_find_their_lesions_by_name(real_data: Path) -> None:
    file, folder = real_data / "ham10000_28_index.csv", real_data.parent / "ham10000_64"
    if not (file.is_file() and folder.is_dir()):
        pytest.skip(f"HAM10000 as a folder not found: no {folder} or no {file}")
    names = sorted(str(path) for path in (folder / "val").rglob("*.jpg"))
    with file.open() as lines:
        lesions = {row["image_id"]: row["lesion_id"] for row in csv.DictReader(lines)}
    expected = encode_groups([lesions[Path(name).stem] for name in names])
    assert torch.equal(read_groups(file, None, "val", len(names), names), expected)
