"""Listing a folder: which files, classes and splits, links, and a line for whatever is left out or looks wrong."""

import os
from pathlib import Path

import pytest

from amimv import InputError
from amimv.pipelines.sources.listing import EXTENSIONS, SPLITS, Listing, list_folder


def touch(top: Path, *names: str) -> Path:
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    return top


def below(top: Path, found: Listing) -> list[str]:
    return [str(Path(path).relative_to(top)) for path in found.paths]


def refused(message: str, folder: Path, split: str = "train") -> None:
    with pytest.raises(InputError, match=message) as caught:
        list_folder(folder, split)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(folder), "PATH")) < 200


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A set without a fault."""
    return touch(tmp_path / "set", *(f"{split}/{c}/{i}.png" for split in SPLITS for c in "ab" for i in range(2)))


def test_nothing_is_said_of_a_set_without_a_fault(top: Path) -> None:
    for split in SPLITS:
        found = list_folder(top, split)
        assert (below(top, found), found.labels) == (
            [f"{split}/{c}/{i}.png" for c in "ab" for i in "01"],
            (0, 0, 1, 1),
        )
        assert (found.class_names, found.remarks) == (("a", "b"), ())


def test_which_files_are_images_and_in_which_order(tmp_path: Path) -> None:
    taken = ["train/b/Z.JPG", "train/b/a.jpeg", "train/b/b.PnG", "train/b/deep/er/c.jpg", "train/c d/x.png"]
    top = touch(tmp_path / "set", *taken)
    touch(top, "train/loose.png", "train/b/.hidden.png", "train/b/notes.txt", "train/b/x.gif", "train/b/png")
    touch(top, "train/b/.cache/x.png", "train/.trash/x.png", "other/b/x.png", "loose.png", "val/readme.md")
    (top / "train" / "a").mkdir()
    (top / "test" / "z").mkdir(parents=True)
    (top / "test" / "z" / "link.png").symlink_to(top / "train" / "c d" / "x.png")
    found = list_folder(top, "train")
    assert below(top, found) == taken
    assert found.labels == (0, 0, 0, 0, 1)
    assert found.class_names == ("b", "c d", "z")
    beside, inside = found.remarks
    assert beside == "set: left out beside the splits 1 image(s) beside the folders, 1 folder other (1 images)"
    assert inside.startswith("set, train: left out 3 hidden, ")
    for told in ("1 .txt", "1 .gif", "1 without an ending", "1 image(s) beside", "1 folder(s) without images (a)"):
        assert told in inside
    assert list_folder(top, "test")[:4] == ((str(top / "test/z/link.png"),), (2,), found.class_names, ())


@pytest.mark.parametrize("ending", [*EXTENSIONS, *(ending.upper() for ending in EXTENSIONS)])
def test_every_ending_of_an_image(top: Path, ending: str) -> None:
    touch(top, f"train/b/more{ending}")
    found = list_folder(top, "train")
    assert f"train/b/more{ending}" in below(top, found)
    assert not found.remarks


def test_a_class_of_files_that_are_no_images(top: Path) -> None:
    touch(top, *(f"train/c/{i}.mha" for i in range(7)), "val/c/0.mha")
    found = list_folder(top, "train")
    assert found.class_names == ("a", "b")
    assert found.remarks == ("set, train: left out 7 .mha, 1 folder(s) without images (c)",)
    touch(top, "test/c/0.png")  # then it is one
    assert list_folder(top, "train")[1:4] == ((0, 0, 1, 1), ("a", "b", "c"), ("set, train: left out 7 .mha",))


def test_a_split_without_an_image(top: Path) -> None:
    for path in (top / "val").glob("*/*"):
        path.rename(path.with_suffix(".mha"))
    refused(r"val has no .jpg, .*.dcm file in its class folders \(left out: 4 .mha\)", top, "val")


# Splits


@pytest.mark.parametrize(
    "names", [("Train", "VAL", "Test"), ("training", "validation", "testing"), ("TRAIN", "Valid", "test")]
)
def test_splits_by_other_names(top: Path, names: tuple[str, str, str]) -> None:
    for split, name in zip(SPLITS, names, strict=True):
        (top / split).rename(top / name)
    for split, name in zip(SPLITS, names, strict=True):
        found = list_folder(top, split)
        assert below(top, found) == [f"{name}/{c}/{i}.png" for c in "ab" for i in "01"]
        assert (found.class_names, found.remarks) == (("a", "b"), ())


@pytest.mark.parametrize(("one", "two", "split"), [("val", "Validation", "val"), ("TRAIN", "train", "train")])
def test_two_folders_for_a_split(top: Path, one: str, two: str, split: str) -> None:
    touch(top, f"{one}/a/0.png", f"{two}/a/0.png")
    for asked in SPLITS:
        refused(f"has both .* and .*, which mean the same split '{split}': keep one", top, asked)


def test_what_lies_beside_the_splits_is_told_once_and_is_no_class(top: Path) -> None:
    touch(top, "metadata/a.csv", "extra/deep/1.png", "extra/deep/2.tif", "labels.csv", "loose.jpg")
    found = list_folder(top, "train")
    assert found.class_names == ("a", "b")
    (line,) = found.remarks
    for told in ("1 .csv", "1 image(s) beside", "folder extra (2 images)", "folder metadata (0 images)"):
        assert told in line
    assert not list_folder(top, "val").remarks
    (top / "test").rename(top / "tset")
    refused(r"no split 'test' \(only train, val, besides extra, metadata, tset\): expected PATH/train", top, "test")


def test_splits_inside_of_classes(tmp_path: Path) -> None:
    top = touch(tmp_path / "set", *(f"{c}/{split}/0.png" for c in "ab" for split in ("Train", "test")))
    refused("a holds Train and test, splits inside of a class: expected PATH/train/CLASS", top)


# Classes


def test_names_that_differ_in_case_between_splits_are_one_class(top: Path) -> None:
    (top / "val" / "a").rename(top / "val" / "A")
    touch(top, "train/Na\u0308vus/0.png", "test/n\xe4vus/0.png")  # accents apart, and not
    for split, labels in (("train", (0, 0, 1, 1, 2)), ("val", (0, 0, 1, 1)), ("test", (0, 0, 1, 1, 2))):
        found = list_folder(top, split)
        assert found.class_names == ("Na\u0308vus", "a", "b")
        assert sorted((label - 1) % 3 for label in found.labels) == list(labels)
    (line,) = list_folder(top, "train").remarks
    assert line.endswith("one class each, though written differently in the splits: Na\u0308vus/n\xe4vus, a/A")


@pytest.mark.parametrize("split", SPLITS)
def test_names_that_differ_in_case_in_one_split(top: Path, split: str) -> None:
    touch(top, f"{split}/A/0.png")
    refused(f"{split} has both A and a: rename one, or put them together", top)


def test_a_folder_without_images_in_any_split_is_no_class(top: Path) -> None:
    touch(top, "train/metadata/x.csv", "val/Metadata/x.csv")
    (top / "test" / "metadata").mkdir()
    for split in SPLITS:
        assert list_folder(top, split).class_names == ("a", "b")
    assert list_folder(top, "val").remarks == ("set, val: left out 1 .csv, 1 folder(s) without images (Metadata)",)


# Links


def test_linked_folders_and_files_are_read(top: Path, tmp_path: Path) -> None:
    elsewhere = touch(tmp_path / "elsewhere", "p1/1.png", "p1/deep/2.tif", "3.png")
    (top / "train/a/patient").symlink_to(elsewhere / "p1")
    (top / "train/a/one.png").symlink_to(elsewhere / "3.png")
    (top / "train/c").symlink_to(elsewhere / "p1")  # of another class too: its own business
    found = list_folder(top, "train")
    linked = ["train/a/one.png", "train/a/patient/1.png", "train/a/patient/deep/2.tif"]
    mine = ["train/a/0.png", "train/a/1.png", *linked, "train/b/0.png", "train/b/1.png"]
    assert below(top, found) == [*mine, "train/c/1.png", "train/c/deep/2.tif"]
    assert not found.remarks
    (tmp_path / "all").symlink_to(top)
    assert list_folder(tmp_path / "all", "train").labels == found.labels


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "self", "deep"])
def test_links_in_a_circle_end(top: Path, target: str) -> None:
    touch(top, "train/a/deep/9.png")
    loop = top / "train/a/deep/loop" if target == "deep" else top / "train/a/loop"
    loop.symlink_to({"self": "loop", "deep": "../../a/deep"}.get(target, target))
    found = list_folder(top, "train")
    assert below(top, found)[:3] == ["train/a/0.png", "train/a/1.png", "train/a/deep/9.png"]
    assert len(found.paths) == 5
    kind = "broken link(s)" if target == "self" else "folder(s) reached twice"
    assert found.remarks == (f"set, train: left out 1 {kind}",)


def test_a_folder_that_is_linked_twice_in_a_class_is_read_once(top: Path) -> None:
    touch(top, "train/a/patient/9.png")
    (top / "train/a/again").symlink_to("patient")
    found = list_folder(top, "train")
    assert below(top, found)[:3] == ["train/a/0.png", "train/a/1.png", "train/a/patient/9.png"]
    assert found.remarks == ("set, train: left out 1 folder(s) reached twice",)


def test_links_to_nowhere_and_files_that_are_none(top: Path) -> None:
    (top / "train/a/gone.png").symlink_to("nowhere.png")
    os.mkfifo(top / "train/b/pipe.png")
    found = list_folder(top, "train")
    assert len(found.paths) == 4
    assert found.remarks == ("set, train: left out 1 broken link(s), 1 special file(s)",)


def test_a_folder_that_cannot_be_read(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def closed(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    touch(top, "train/a/locked/0.png")
    monkeypatch.setattr(os, "scandir", closed)
    refused("locked cannot be read: Permission denied", top)


def test_lines_stay_short(top: Path) -> None:
    touch(top, *(f"train/a/x.{kind}" for kind in range(50)), *(f"train/empty{i}/x" for i in range(50)))
    (line,) = list_folder(top, "train").remarks
    assert len(line) < 250
    assert line.startswith("set, train: left out 50 without an ending, 50 folder(s) without images (empty0, empty1, ")
