"""Files and folders without labels, with groups, of more than 8 bits and not square."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amimv import InputError
from amimv.pipelines import ImageStore, PairLoader, load_store
from amimv.pipelines.sources.listing import SPLITS, list_folder

SIZES = {"train": 10, "val": 6, "test": 8}


def images_of(split: str, kind: str = "uint8", shape: tuple[int, ...] = (12, 12, 3), top: int = 255) -> np.ndarray:
    values = np.random.default_rng(SIZES[split]).random((SIZES[split], *shape))
    return values.astype(kind) if kind.startswith("float") else (values * top).round().astype(kind)


def write(path: Path, labelled: tuple[str, ...] = (), groups: tuple[str, ...] = (), **settings: Any) -> Path:
    """An ``.npz`` of three splits, of which some have labels or groups."""
    arrays: dict[str, np.ndarray] = {f"{split}_images": images_of(split, **settings) for split in SPLITS}
    arrays |= {f"{split}_labels": np.arange(SIZES[split]) % 3 for split in labelled}
    arrays |= {f"{split}_groups": np.arange(SIZES[split]) // 2 for split in groups}
    np.savez(path, **arrays)
    return path


def refused(message: str, *args: Any, **settings: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_store(*args, **settings)
    assert "\n" not in str(caught.value)


def stored(store: ImageStore) -> np.ndarray:
    return store.gather(torch.arange(len(store))).numpy()


def unlabelled(store: ImageStore) -> bool:
    known = (store.labels, store.class_names, store.task, store.n_classes, store.class_counts(), store.multi_label)
    return known == (None, (), "", 0, [], False)


# .npz files


@pytest.mark.parametrize("split", SPLITS)
def test_a_file_without_labels(tmp_path: Path, split: str, caplog: pytest.LogCaptureFixture) -> None:
    store = load_store(write(tmp_path / "scans.npz"), split)
    assert unlabelled(store)
    assert (store.name, store.split, store.groups) == ("scans", split, None)
    assert np.array_equal(stored(store), images_of(split))
    assert not caplog.records
    assert next(iter(PairLoader(store, "two-view", 6))).labels is None


def test_labels_of_some_splits(tmp_path: Path) -> None:
    """Training without labels, and a table from those that there are."""
    path = write(tmp_path / "x.npz", labelled=("val", "test"))
    assert unlabelled(load_store(path))
    for split in ("val", "test"):
        store = load_store(path, split)
        assert store.labels is not None
        assert store.labels.tolist() == [i % 3 for i in range(SIZES[split])]
        assert (store.n_classes, store.task) == (3, "multi-class")
    refused(
        "x.npz has no train_labels, so that task 'multi-class' does not fit: leave it out", path, task="multi-class"
    )
    assert load_store(path, "test", task="ordinal-regression").task == "ordinal-regression"
    np.savez(tmp_path / "y.npz", train_images=images_of("train"))
    assert unlabelled(load_store(tmp_path / "y.npz"))
    refused("y.npz has no array 'val_images', only train_images", tmp_path / "y.npz", "val")


def test_groups_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", SPLITS, groups=("train", "test"))
    for split in ("train", "test"):
        groups = load_store(path, split).groups
        assert groups is not None
        assert (groups[1:] == groups[:-1]).tolist() == [i % 2 == 0 for i in range(SIZES[split] - 1)]
    assert load_store(path, "val").groups is None
    train, test = (load_store(path, split).groups for split in ("train", "test"))
    assert train is not None
    assert test is not None
    assert sorted(set(train.tolist()) & set(test.tolist())) == sorted(set(test.tolist()))  # the same in every split
    loader = PairLoader(load_store(path), "A(x) | A(y)", 10, partner="same-group")
    bare = load_store(write(tmp_path / "y.npz", groups=("train",)))  # labels are not needed for them
    assert unlabelled(bare)
    assert bare.groups is not None
    assert torch.equal(bare.groups, train)
    anchors, partners = next(iter(loader)).indices
    assert torch.equal(partners, anchors ^ 1)  # the other one of the two


@pytest.mark.parametrize("wrong", [np.arange(9), np.arange(11), np.arange(10)[:, None], np.array(3)])
def test_groups_of_another_length(tmp_path: Path, wrong: np.ndarray) -> None:
    np.savez(tmp_path / "x.npz", train_images=images_of("train"), train_groups=wrong)
    refused(r"x.npz: train_groups has shape \(.*\), expected \(10,\)", tmp_path / "x.npz")


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("shape", [(8, 12, 3), (12, 8, 1), (9, 7), (8, 8, 5)])
@pytest.mark.parametrize(("kind", "top"), [("uint8", 255), ("uint16", 4095), ("float32", 1), ("float64", 1)])
def test_images_of_every_type_and_shape(
    tmp_path: Path, kind: str, top: int, shape: tuple[int, ...], resident: bool
) -> None:
    store = load_store(write(tmp_path / "x.npz", kind=kind, shape=shape, top=top), resident=resident)
    images = images_of("train", kind, shape, top).reshape(10, *shape[:2], *(shape[2:] or (1,)))
    expected = ImageStore.from_arrays(images)
    assert np.array_equal(stored(store), images.astype("float32") if kind == "float64" else images)
    assert (store.mean, store.std, store.value_range) == (expected.mean, expected.std, expected.value_range)
    assert (store.size, store.aspect) == (min(shape[:2]), shape[1] / shape[0])
    if kind == "uint16":
        assert store.value_range == (images.min(), images.max())
        assert load_store(tmp_path / "x.npz", value_range=(0, 4095)).value_range == (0, 4095)


def test_size_and_channels_of_images_that_are_not_square(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", shape=(8, 12, 1))
    assert load_store(path, size=8).images.shape == (10, 8, 12, 1)
    refused("x.npz holds images of 8 x 12 pixels, not of 12: set size accordingly", path, size=12)
    assert load_store(path, channels=3).images.shape == (10, 8, 12, 3)
    five = write(tmp_path / "y.npz", shape=(8, 12, 5))
    refused("channels is 3, but y is of 5 channels: leave channels out, or give 5", five, channels=3)


def test_sixteen_bits_of_one_channel_repeated(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", kind="uint16", shape=(8, 12), top=4095)
    one, three = load_store(path), load_store(path, channels=3)
    assert three.images.dtype == torch.uint16
    assert (three.mean, three.std, three.value_range) == (one.mean * 3, one.std * 3, one.value_range)
    assert all(np.array_equal(stored(three)[..., c], stored(one)[..., 0]) for c in range(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value_range": (9, 0)}, r"value_range is \(9, 0\), expected two numbers \(low, high\) with low < high"),
        ({"value_range": (0, float("nan"))}, "value_range is .*, expected two numbers"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    refused(message, write(tmp_path / "x.npz"), **settings)
    refused(message, "phantom", **settings)


def test_floats_out_of_range(tmp_path: Path) -> None:
    np.savez(tmp_path / "ct.npz", train_images=images_of("train", "float32") * 3000 - 1000)
    refused(r"ct, train: float images reach from -\d+.* to \d+.*, expected \[0, 1\]: scale them", tmp_path / "ct.npz")
    store = load_store(tmp_path / "ct.npz", value_range=(-160, 240))
    view = next(iter(PairLoader(store, "mimv", 10))).sides[0][0]
    ends = [(end - store.mean[0]) / store.std[0] for end in (0, 1)]
    assert [view[:, 0].min(), view[:, 0].max()] == pytest.approx(ends, rel=1e-5)  # clamped
    np.savez(tmp_path / "inf.npz", train_images=np.full((3, 8, 8), np.inf))
    refused("inf, train: images hold NaN or infinity", tmp_path / "inf.npz")


# Folders without classes


def draw(top: Path, *places: str, n: int = 4, size: int = 12) -> Path:
    """PNG files in these folders."""
    rng = np.random.default_rng(0)
    for place in places:
        (top / place).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(top / place / f"{i}.png")
    return top


def test_images_in_the_folder_itself_are_an_unlabelled_training_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("nvidia.dali.experimental.dynamic")
    top = draw(tmp_path / "scans", ".")
    store = load_store(f"folder:{top}", size=12)
    assert unlabelled(store)
    assert (store.name, store.split, len(store)) == ("scans", "train", 4)
    expected = np.stack([np.asarray(Image.open(top / f"{i}.png")) for i in range(4)])
    assert np.array_equal(stored(store), expected)
    assert not caplog.records
    batch = next(iter(PairLoader(store, "amimv", 4)))
    assert batch.labels is None
    part = store.subset(torch.tensor([2, 0]))
    assert unlabelled(part)
    assert np.array_equal(stored(part), expected[[2, 0]])
    refused("has no split 'val'", f"folder:{top}", "val", size=12)
    refused("scans has no labels, so that task 'multi-class' does not fit", f"folder:{top}", task="multi-class")
    for resident in (True, False):
        window = load_store(f"folder:{top}", size=12, value_range=(50, 90), resident=resident)
        assert np.array_equal(stored(window), expected)
        assert window.value_range == (50, 90)
        scaled = ((expected - 50.0) / 40).clip(0, 1)
        assert window.mean == pytest.approx(scaled.mean((0, 1, 2)))


def test_flat_splits(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali.experimental.dynamic")
    top = draw(tmp_path / "scans", "train", "val", "Testing")
    (top / "train" / "4.png").write_bytes((top / "train" / "0.png").read_bytes())
    for split, n in (("train", 5), ("val", 4), ("test", 4)):
        store = load_store(f"folder:{top}", split, size=12)
        assert unlabelled(store)
        assert (store.split, len(store)) == (split, n)


def test_training_images_without_classes_beside_those_with(tmp_path: Path) -> None:
    """Each split by itself: as in an ``.npz`` without ``train_labels``."""
    top = draw(tmp_path / "x", "train", "val/a", "val/b")
    flat, classes = list_folder(top, "train"), list_folder(top, "val")
    assert (flat.labels, flat.class_names, len(flat.paths)) == ((), (), 4)
    assert (classes.class_names, set(classes.labels)) == (("a", "b"), {0, 1})
    assert not flat.remarks
    assert not classes.remarks
    draw(top, "more")
    assert list_folder(top, "train").remarks == ("x: left out beside the splits 1 folder more (4 images)",)


def test_what_is_left_out_of_a_flat_folder_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("nvidia.dali.experimental.dynamic")
    caplog.set_level(logging.INFO, "amimv")
    top = draw(tmp_path / "scans", ".")
    for name in ("notes.txt", "x.gif", ".hidden.png"):
        (top / name).touch()
    (top / "empty").mkdir()
    assert len(load_store(f"folder:{top}", size=12)) == 4
    (line,) = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert line.startswith("scans, train: left out ")
    for told in ("1 .txt", "1 .gif", "1 hidden", "1 folder(s) without images (empty)"):
        assert told in line
    assert "image(s)" not in line


def test_folders_without_any_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").touch()
    (tmp_path / "x" / "scan.gif").touch()
    refused(r"x has no class folders with images \(left out: .*1 .gif.*\), at least two", f"folder:{tmp_path / 'x'}")
    (tmp_path / "x" / "train").mkdir()
    refused("no class folders with images", f"folder:{tmp_path / 'x'}")


def test_images_beside_one_class_folder_are_not_taken_for_a_flat_set(tmp_path: Path) -> None:
    top = draw(tmp_path / "x", "train", "train/a")
    refused(r"one class folder with images \(a\) \(left out: 4 image.s. beside the folders\)", f"folder:{top}")
