"""Splits by shares: without groups each image is placed by itself; stores that are cut so."""

import csv
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amimv import InputError
from amimv.pipelines import ImageStore, load_store, split_indices
from amimv.pipelines.groups import encode_groups
from amimv.pipelines.sources.csv_file import list_table
from amimv.pipelines.sources.listing import SPLITS

SHARES = (Fraction(7, 10), Fraction(1, 10), Fraction(2, 10))


@pytest.mark.parametrize("seed", range(3))
def test_each_class_is_shared_out_to_the_nearest_whole_number(seed: int) -> None:
    sizes = [200, 57, 10, 3]
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    splits = split_indices(labels, [float(share) for share in SHARES], seed=seed)
    assert torch.cat(splits).sort().values.tolist() == list(range(len(labels)))
    for split, share in zip(splits, SHARES, strict=True):
        found = torch.bincount(labels[split], minlength=4).tolist()
        for have, size in zip(found, sizes, strict=True):
            assert have >= 1
            assert abs(have - share * size) <= 1 or have == 1
    again = split_indices(labels, [float(share) for share in SHARES], seed=seed)
    assert all(torch.equal(one, other) for one, other in zip(splits, again, strict=True))
    assert not torch.equal(splits[2], split_indices(labels, [float(share) for share in SHARES], seed=seed + 1)[2])


def test_every_column_of_multi_hot_labels_is_shared_out() -> None:
    labels = (
        torch.rand(400, 5, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.5, 0.3, 0.2, 0.1, 0.03])
    ).long()
    for split, share in zip(split_indices(labels), SHARES, strict=True):
        assert (labels[split].sum(0) / labels.sum(0)).tolist() == pytest.approx([float(share)] * 5, abs=0.09)
        assert labels[split].any(0).all()


def test_a_class_of_one_image_is_named() -> None:
    with pytest.raises(ValueError, match=r"^class df has 1 image\(s\), but each of the 3 splits needs one"):
        split_indices(torch.tensor([0] * 20 + [1]), class_names=("nv", "df"))


# Stores cut by shares


def write_whole(folder: Path, *, groups: bool = True, images: int = 60) -> Path:
    """Images whose pixels tell their number, three to a patient."""
    number = np.arange(images)
    arrays = {"train_images": np.broadcast_to(number.astype(np.uint8)[:, None, None, None], (images, 8, 8, 3))}
    arrays |= {"train_labels": number // 3 % 2} | ({"train_groups": number // 3} if groups else {})
    np.savez(folder / "whole.npz", **arrays)
    return folder / "whole.npz"


def numbers(store: ImageStore) -> list[int]:
    return store.gather(torch.arange(len(store)))[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("groups", [True, False])
def test_an_npz_of_training_arrays_alone_is_cut(
    tmp_path: Path, groups: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_whole(tmp_path, groups=groups)
    with caplog.at_level("INFO", "amimv"):
        stores = [load_store(file, split, shares=(0.6, 0.2, 0.2), split_seed=3) for split in SPLITS]
    told = [line for record in caplog.records if "split by seed" in (line := record.getMessage())]
    kept = "; 20 groups, each in one of them" if groups else ""
    assert told == [f"whole: split by seed 3 into 36 train, 12 val, 12 test images{kept}"]
    by_number = {i: store.split for store in stores for i in numbers(store)}
    assert sorted(by_number) == list(range(60))
    whole = [len({by_number[3 * g + i] for i in range(3)}) == 1 for g in range(20)]
    assert all(whole) == groups
    for store in stores:
        assert store.known_labels("").tolist() == [i // 3 % 2 for i in numbers(store)]
        assert (store.groups is None) != groups
        if store.groups is not None:
            assert store.groups.tolist() == [i // 3 for i in numbers(store)]


def test_a_folder_without_splits_is_cut_as_its_listing_would_be(tmp_path: Path) -> None:
    for i in range(40):
        path = tmp_path / "set" / ("a", "b")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(path)
    whole = load_store(f"folder:{tmp_path / 'set'}", size=8)
    expected = split_indices(whole.labels, (0.5, 0.25, 0.25), seed=1)
    for split, indices in zip(SPLITS, expected, strict=True):
        for resident in (True, False):
            store = load_store(
                *(f"folder:{tmp_path / 'set'}", split),
                **{"size": 8, "shares": (0.5, 0.25, 0.25), "split_seed": 1, "resident": resident},
            )
            assert numbers(store) == numbers(whole.subset(indices))
            assert store.images.paths == whole.subset(indices).images.paths
            assert torch.equal(store.known_labels(""), whole.known_labels("")[indices])


def test_data_with_splits_are_not_cut(tmp_path: Path) -> None:
    for name in ("phantom", str(write_whole(tmp_path))):
        if name != "phantom":
            with np.load(name) as npz:
                np.savez(name, **npz, val_images=npz["train_images"], val_labels=npz["train_labels"])
        with pytest.raises(InputError, match=r"has splits of its own \(train, val.*: leave --split out"):
            load_store(name, shares=(0.7, 0.1, 0.2))


def test_a_missing_split_says_how_to_cut_one_off(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no array 'val_images'.*, or cut it off \(--split 0\.7 0\.1 0\.2\)"):
        load_store(write_whole(tmp_path), "val")


def test_lesions_of_real_images_are_kept_whole(real_data: Path, tmp_path: Path) -> None:
    index, folder = real_data / "ham10000_28_index.csv", real_data.parent / "ham10000_64"
    if not (index.is_file() and folder.is_dir()):
        pytest.skip(f"real folder not found: no {index.name} and ham10000_64 in and beside {real_data} (AMIMV_DATA)")
    with index.open() as lines:
        rows = list(csv.DictReader(lines))
    with (tmp_path / "ham.csv").open("w") as file:
        print("image,dx,lesion_id", file=file)
        for row in rows:
            print(folder / row["split"] / row["dx"] / row["image_id"], row["dx"], row["lesion_id"], sep=",", file=file)
    found = list_table(tmp_path / "ham.csv", "train")
    assert found.class_names == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    groups = encode_groups(found.groups)
    splits = split_indices(torch.tensor(found.labels), (0.7, 0.1, 0.2), groups, class_names=found.class_names)
    lesions = [{rows[i]["lesion_id"] for i in split.tolist()} for split in splits]
    assert sum(map(len, lesions)) == len(set.union(*lesions)) == 7470
    total = Counter(row["dx"] for row in rows)
    for split, share in zip(splits, (0.7, 0.1, 0.2), strict=True):
        of_split = Counter(rows[i]["dx"] for i in split.tolist())
        assert {dx: of_split[dx] / n for dx, n in total.items()} == pytest.approx(
            dict.fromkeys(total, share), abs=0.01
        )
