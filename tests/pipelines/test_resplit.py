"""Data that have splits of their own, joined and cut anew."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amimv import InputError
from amimv.pipelines import ImageStore, load_store, split_indices
from amimv.pipelines.groups import encode_groups
from amimv.pipelines.sources.listing import SPLITS

SHARES = (0.6, 0.2, 0.2)
ANEW: dict[str, Any] = {"shares": SHARES, "split_seed": 3, "resplit": True}
#: Images of the splits that the data come with; of a lesion the images lie in several of them.
SIZES = {"train": 40, "val": 12, "test": 20}
STARTS = {"train": 0, "val": 40, "test": 52}
#: Of all images in a row, the class and the lesion; one in eighteen has none.
CLASSES = np.arange(72) % 24 // 8
LESIONS = np.array(["" if i % 18 == 7 else f"lesion {i % 24}" for i in range(72)])


def numbers_of(split: str) -> range:
    return range(STARTS[split], STARTS[split] + SIZES[split])


def write_npz(path: Path, left_out: tuple[str, ...] = (), **instead: np.ndarray) -> Path:
    """Each image's pixels tell its number."""
    arrays: dict[str, np.ndarray] = {}
    for split in SIZES:
        own = np.array(numbers_of(split), dtype=np.uint8)
        arrays[f"{split}_images"] = np.broadcast_to(own[:, None, None, None], (len(own), 8, 8, 3))
        arrays |= {f"{split}_labels": CLASSES[own], f"{split}_groups": LESIONS[own]}
    np.savez(path, **{k: v for k, v in (arrays | instead).items() if k not in left_out})  # type: ignore[arg-type]
    return path


def write_files(top: Path) -> str:
    """The same images, each in its class's folder of its split, and beside these folders a table of them."""
    rows = ["file,dx,lesion_id,split"]
    for split in SIZES:
        for i in numbers_of(split):
            name = f"{split}/{'abc'[CLASSES[i]]}/{i:02}.png"
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, i, i)).save(top / name)
            rows.append(f"{name},{'abc'[CLASSES[i]]},{LESIONS[i]},{split}")
    (top / "scans.csv").write_text("\n".join(rows) + "\n")
    return f"folder:{top}"


def cut(name: Path | str, **settings: Any) -> dict[str, ImageStore]:
    return {split: load_store(name, split, **(ANEW | settings)) for split in SPLITS}


def numbers(store: ImageStore) -> list[int]:
    return store.gather(torch.arange(len(store)))[:, 0, 0, 0].tolist()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for record in caplog.records if "split by seed" in (line := record.getMessage())]


def expected_groups() -> torch.Tensor:
    """Each missing one is its own, by its place in the split that it came with."""
    return torch.cat([encode_groups(LESIONS[list(numbers_of(split))], salt=split) for split in SIZES])


def check_stores(stores: dict[str, ImageStore], order: list[int]) -> None:
    """The stores are those of `split_indices` on the images ``order`` in a row."""
    labels, groups = torch.from_numpy(CLASSES[order]), expected_groups()[order]
    indices = split_indices(labels, SHARES, groups, 3, ("a", "b", "c"))
    for (split, store), own in zip(stores.items(), indices, strict=True):
        assert store.split == split
        assert numbers(store) == torch.tensor(order)[own].tolist()
        assert torch.equal(store.known_labels(""), labels[own])
        assert store.groups is not None
        assert torch.equal(store.groups, groups[own])


def test_an_npz_is_joined_and_cut_by_groups(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amimv")
    stores = cut(write_npz(tmp_path / "x.npz"))
    check_stores(stores, list(range(72)))
    new = ", ".join(f"{len(store)} {split}" for split, store in stores.items())
    n = len(set(LESIONS)) - 1 + (LESIONS == "").sum()
    assert told(caplog) == [
        f"x: its own splits (40 train, 12 val, 20 test images) joined and split by seed 3 into {new} images; "
        f"{n} groups, each in one of them"
    ]
    places = {str(lesion): {split for split, store in stores.items() for i in numbers(store) if LESIONS[i] == lesion}
              for lesion in set(LESIONS) - {""}}  # fmt: skip
    assert {len(found) for found in places.values()} == {1}
    assert [numbers(store) for store in cut(tmp_path / "x.npz", split_seed=4).values()] != list(
        map(numbers, stores.values())
    )


def test_two_splits_or_one_are_joined_likewise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amimv")
    no_test = tuple(f"test_{what}" for what in ("images", "labels", "groups"))
    stores = cut(write_npz(tmp_path / "two.npz", no_test))
    assert sorted(i for store in stores.values() for i in numbers(store)) == list(range(52))
    assert "its own splits (40 train, 12 val images) joined" in told(caplog)[0]
    no_val = tuple(f"val_{what}" for what in ("images", "labels", "groups"))
    one = write_npz(tmp_path / "one.npz", no_test + no_val)
    assert list(map(numbers, cut(one).values())) == list(map(numbers, cut(one, resplit=False).values()))


def test_without_groups_each_image_is_placed_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amimv")
    stores = cut(write_npz(tmp_path / "x.npz", tuple(f"{split}_groups" for split in SPLITS)))
    expected = split_indices(torch.from_numpy(CLASSES), SHARES, seed=3)
    assert [numbers(store) for store in stores.values()] == [own.tolist() for own in expected]
    assert told(caplog)[0].endswith("test images; no groups: by image")


@pytest.mark.parametrize("data", ["folder", "csv"])
@pytest.mark.parametrize("resident", [True, False])
def test_files_are_joined_and_cut_by_groups(tmp_path: Path, data: str, resident: bool) -> None:
    name = write_files(tmp_path / "x")
    if data == "csv":
        stores, order = cut(f"csv:{tmp_path / 'x' / 'scans.csv'}", size=8, resident=resident), list(range(72))
    else:
        stores = cut(name, size=8, resident=resident, groups=f"{tmp_path / 'x' / 'scans.csv'}:lesion_id")
        order = [i for split in SIZES for i in sorted(numbers_of(split), key=lambda i: (CLASSES[i], i))]
        # Where one is missing, its place in the folder counts.
    labels = torch.from_numpy(CLASSES[order])
    groups, at = [], 0
    for split, n in SIZES.items():
        groups.append(encode_groups(LESIONS[order[at : at + n]], salt=split))
        at += n
    indices = split_indices(labels, SHARES, torch.cat(groups), 3, ("a", "b", "c"))
    for store, own in zip(stores.values(), indices, strict=True):
        assert numbers(store) == torch.tensor(order)[own].tolist()
        assert torch.equal(store.known_labels(""), labels[own])
        assert [Path(path).name for path in store.images.paths] == [f"{i:02}.png" for i in numbers(store)]
        assert store.groups is not None
        assert torch.equal(store.groups, torch.cat(groups)[own])


def test_a_cache_tells_the_splits_apart(tmp_path: Path) -> None:
    name, kept = write_files(tmp_path / "x"), tmp_path / "kept"
    table = {"size": 8, "groups": f"{tmp_path / 'x' / 'scans.csv'}:lesion_id"}
    for _ in range(2):  # made, then read
        for split in SPLITS:
            assert sorted(numbers(load_store(name, split, cache=kept, **table))) == list(numbers_of(split))
        stores, again = cut(name, cache=kept, **table), cut(name, **table)
        assert list(map(numbers, stores.values())) == list(map(numbers, again.values()))
    assert len(list(kept.glob("*.images"))) == 6


def test_a_published_set_is_joined_by_its_name(real_data: Path, tmp_path: Path) -> None:
    stores = cut("retinamnist", root=real_data)
    whole = [load_store("retinamnist", split, root=real_data) for split in SPLITS]
    images = torch.cat([store.gather(torch.arange(len(store))) for store in whole])
    labels = torch.cat([store.known_labels("") for store in whole])
    for store, own in zip(stores.values(), split_indices(labels, SHARES, seed=3), strict=True):
        assert torch.equal(store.gather(torch.arange(len(store))), images[own])
        assert torch.equal(store.known_labels(""), labels[own])
    assert stores["val"].task == whole[0].task
    lines = ["split,index,eye", *(f"{s.split},{i},{i % 100}" for s in whole for i in range(len(s)))]
    (tmp_path / "eyes.csv").write_text("\n".join(lines))
    by_eye = cut("retinamnist", root=real_data, groups=f"{tmp_path / 'eyes.csv'}:eye")
    eyes = [set(store.groups.tolist()) for store in by_eye.values() if store.groups is not None]
    assert len(set.union(*eyes)) == sum(map(len, eyes)) == 100


def test_a_published_set_gives_the_same_lesions_as_arrays_and_as_files(real_data: Path) -> None:
    arrays, folder = real_data / "ham10000_28.npz", real_data.parent / "ham10000_64"
    if not (arrays.is_file() and folder.is_dir()):
        pytest.skip(f"real data not found: no {arrays.name} and ham10000_64 in and beside {real_data} (AMIMV_DATA)")
    anew: dict[str, Any] = {"shares": (0.7, 0.1, 0.2), "split_seed": 1}
    small = cut(arrays, groups="lesion_id", **anew)
    large = cut(
        f"folder:{folder}",
        **{"size": 64, "resident": False, "groups": f"{real_data / 'ham10000_28_index.csv'}:lesion_id"},
        **anew,
    )
    seen: set[int] = set()
    for split in SPLITS:
        one, other = small[split], large[split]
        assert one.groups is not None
        assert other.groups is not None
        assert one.class_counts() == other.class_counts()
        assert one.groups.sort().values.tolist() == other.groups.sort().values.tolist()
        assert seen.isdisjoint(one.groups.tolist())
        seen |= set(one.groups.tolist())
    assert len(seen) == 7470


@pytest.mark.parametrize(
    ("instead", "left_out", "message"),
    [
        ({"test_images": np.zeros((20, 9, 8, 3), np.uint8)}, (), r"x: images differ .*8 x 8 x 3 torch.uint8 of train"),
        ({"val_images": np.zeros((12, 8, 8, 3), np.uint16)}, (), r"8 x 8 x 3 torch.uint16 of val, .*which --resplit"),
        ({}, ("test_labels",), r"x: labels differ between the splits \(given of train, given of val, none of test\)"),
        ({}, ("val_groups",), r"x: groups differ .*, none of val, .*: make them alike, or leave it out"),
        ({}, ("train_images",), r"has no array 'train_images'"),
        ({f"{s}_labels": (CLASSES[list(numbers_of(s))] + 1) * (np.array(numbers_of(s)) != 5) for s in SIZES}, (),
         r"class 0 has 1 group\(s\) of images, but each of the 3 splits needs one"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_one_line(
    tmp_path: Path, instead: dict[str, np.ndarray], left_out: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_store(write_npz(tmp_path / "x.npz", left_out, **instead), **ANEW)
    assert "\n" not in str(caught.value)


def test_nothing_is_joined_without_being_asked_to(tmp_path: Path) -> None:
    name = write_npz(tmp_path / "x.npz")
    with pytest.raises(
        InputError, match=r"its own \(train, val, test\): leave --split out, or give --resplit to join"
    ):
        load_store(name, shares=SHARES)
    with pytest.raises(
        InputError, match=r"^resplit joins splits that shares \(--split 0.7 0.1 0.2\) cut anew: give b"
    ):
        load_store(name, resplit=True)
