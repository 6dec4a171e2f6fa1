"""Stores by name: the phantom, MedMNIST, other ``.npz`` files, folders, CSV files.

- "phantom" is drawn from a seed.
- One of ``medmnist_names()``: its file is looked for in ``root``, else in ``$AMIMV_DATA``, else in MedMNIST's own
  folder; it is downloaded into that folder if it is not there (where several processes run, let one load first), and
  its MD5 is checked.
- The path (as it is, else in ``root`` or ``$AMIMV_DATA``) of an ``.npz`` in MedMNIST's layout: ``train_images``
  ``(N, H, W)`` or ``(N, H, W, C)``, ``train_labels`` ``(N,)``, ``(N, 1)`` or multi-hot ``(N, L)`` or left out,
  ``train_groups`` ``(N,)`` if there are any, ``val_...``, ``test_...``. Arrays are read without pickle. The classes
  are those of all splits together, numbered 0..C-1 without a gap; a class may lack images in one split.
- "folder:PATH" with JPEG, PNG, TIFF, BMP or WebP files in ``PATH/{train,val,test}/CLASS/``, or in ``PATH/CLASS/``,
  which is all "train": see `list_folder`. What is left out of a folder, or looks like a mistake, stands in the log.
- "csv:FILE" with a row for each image file: see `list_table`.

Data that are all "train" can be cut into splits by ``shares``.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amimv import InputError, did_you_mean, user_path
from amimv.pipelines.groups import encode_groups, read_groups
from amimv.pipelines.images import Images, place_images, select_images
from amimv.pipelines.names import CSV, FILES, FOLDER
from amimv.pipelines.sources.labels import check_task, check_task_name, infer_task
from amimv.pipelines.sources.listing import SPLITS, Listing, list_folder
from amimv.pipelines.sources.npz import Arrays, find_file, medmnist_names, read_medmnist, read_own
from amimv.pipelines.sources.pixels import check_floats
from amimv.pipelines.sources.value_range import check_range
from amimv.pipelines.splits import split_indices
from amimv.pipelines.store import ImageStore, checked_device

_log = logging.getLogger("amimv")


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `load_store`."""

    name: str
    split: str
    size: int | None
    root: str | Path | None
    device: torch.device
    channels: int | None
    seed: int
    task: str | None
    resident: bool | None
    groups: str | None
    value_range: tuple[float, float] | None
    cache: str | Path | None
    columns: Sequence[str]
    shares: Sequence[float] | None
    split_seed: int
    skip_damaged: bool

    @property
    def read(self) -> str:
        """The split that is read; of data that are cut into shares their only one."""
        return "train" if self.shares else self.split

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"unknown split {self.split!r}, expected one of {', '.join(SPLITS)}")
        if self.channels not in (None, 1, 3):
            raise InputError(f"channels is {self.channels}, expected 1, 3 or None (what the data has)")
        if self.task:
            check_task_name(self.task)
        if self.shares and len(self.shares) != len(SPLITS):
            raise InputError(f"shares are {tuple(self.shares)}, expected one each for {', '.join(SPLITS)}")
        if self.columns and not self.name.startswith(CSV):
            raise InputError(
                f"columns are those of a CSV file, and {self.name} is none: leave them out, or give {CSV}FILE"
            )


def load_store(
    name: str | Path,
    split: str = "train",
    size: int | None = None,
    root: str | Path | None = None,
    device: torch.device | str = "cpu",
    channels: int | None = None,
    seed: int = 0,
    task: str | None = None,
    resident: bool | None = None,
    groups: str | None = None,
    value_range: tuple[float, float] | None = None,
    cache: str | Path | None = None,
    columns: Sequence[str] = (),
    shares: Sequence[float] | None = None,
    split_seed: int = 0,
    skip_damaged: bool = False,
) -> ImageStore:
    """Load one split of a data set onto a device.

    Args:
        name: "phantom", a MedMNIST name, the path of an ``.npz``, "folder:PATH" or "csv:FILE": see the module.
        split: "train", "val" or "test".
        size: height and width in pixels; by default 28, or whatever an own ``.npz`` has, or 224 for files.
        root: folder of the MedMNIST files.
        device: where batches are wanted.
        channels: 3 repeats grey three times; by default what the data has, and 3 for a folder (1 makes it grey).
        seed: which phantom.
        task: one of ``TASKS``; by default MedMNIST's, or for own data "binary-class" (two classes), "multi-class" or
            "multi-label, binary-class" (multi-hot labels; rows with exactly one 1 are classes unless this is given).
        resident: whether the images lie on the device; by default if they fit into ``RESIDENT_SHARE`` of its free
            memory, else in pinned host memory. Files are decoded first if they fit; else (or if False) by the batch.
        groups: of images of one patient, lesion or slide: a column of ``NAME_index.csv`` beside the data, or
            "FILE.csv:COLUMN"; see `read_groups`. By default ``train_groups`` ... of an ``.npz``, if it has them.
        value_range: the values that become 0 and 1; by default that of ``uint8``, and of ``uint16`` those there are.
        cache: a folder for decoded images of files, which are mapped into memory when the same are loaded again.
        columns: of a CSV file: which is what, see `list_table`.
        shares: of train, val and test, to cut data by that are all "train", groups whole; see `split_indices`.
        split_seed: which of the possible splits of these shares.
        skip_damaged: of files: all are decoded once first; those that cannot be are left out, and the log lists them.

    Raises:
        InputError: for whatever is wrong with the arguments or the file.
    """
    place, values = checked_device(device), check_range(value_range)
    wanted = _Wanted(
        *(str(name), split, size, root, place, channels, seed, task, resident, groups, values, cache),
        *(columns, shares, split_seed, skip_damaged),
    )
    return _from_files(wanted) if wanted.name.startswith(FILES) else _from_arrays(wanted)


def _from_arrays(wanted: _Wanted) -> ImageStore:
    w, title, path = wanted, wanted.name, None
    if title == "phantom":
        arrays = _phantom(w.split, w.seed, 28 if w.size is None else w.size, w.device)
    elif title in medmnist_names():
        arrays = read_medmnist(title, w.split, 28 if w.size is None else w.size, w.root)
    elif title.endswith(".npz"):
        path = find_file(title, w.root)
        arrays, title = read_own(path, w.read, w.size, w.task), Path(title).stem
    else:
        raise InputError(_unknown_name(title))
    groups = _groups(arrays, w.groups, path, w.read)
    if w.shares:
        own = _share(w, title, arrays, len(arrays.images), groups)
        arrays = arrays._replace(images=select_images(arrays.images, own), labels=_of(arrays.labels, own))
        groups = _of(groups, own)
    if arrays.images.is_floating_point():
        check_floats(arrays.images, w.value_range, f"{title}, {w.split}")
    images = place_images(_with_channels(arrays.images, w.channels, title), w.device, w.resident, title)
    return _store(images, arrays, title, w, groups)


def _store(images: Images, known: Arrays, title: str, wanted: _Wanted, groups: Tensor | None) -> ImageStore:
    task = ""
    if known.labels is not None:
        task = wanted.task or known.task
        check_task(task, known.labels.ndim == 2, len(known.class_names), title)
    return ImageStore.build(
        images,
        known.labels,
        groups,
        name=title,
        device=wanted.device,
        split=wanted.split,
        class_names=known.class_names,
        task=task,
        value_range=wanted.value_range,
    )


def _phantom(split: str, seed: int, size: int, device: torch.device) -> Arrays:
    from amimv.pipelines.sources.phantom import CLASS_NAMES, generate_phantom

    images, labels = generate_phantom(split, seed=seed, size=size, device=device)
    return Arrays(images, labels, tuple(CLASS_NAMES), "multi-class")


def _from_files(wanted: _Wanted) -> ImageStore:
    from amimv.pipelines.sources.folder import Folder, find_damaged, hold  # which loads PIL

    w, size = wanted, 224 if wanted.size is None else wanted.size
    if size < 1:
        raise InputError(f"size is {size}, expected at least 1 pixel")
    found, folder, title = _in_table(w) if w.name.startswith(CSV) else _in_folder(w)
    names = found.class_names
    if w.task and not names:
        raise InputError(f"{title} has no labels, so that task {w.task!r} does not fit: leave it out")
    labels = torch.tensor(found.labels) if names else None
    groups = encode_groups(np.array(found.groups), salt=w.read) if found.groups else None
    if w.groups:
        groups = _read_groups(w.groups, folder, w.read, len(found.paths), found.paths)
    for line in found.remarks if w.split == w.read else ():  # once, of data that are cut
        _log.warning(line)
    multi_label = labels is not None and labels.ndim == 2
    known = Arrays(torch.empty(0), labels, names, infer_task(multi_label, len(names)), splits=found.splits)
    if w.task:
        check_task(w.task, multi_label, len(names), title)  # before anything is decoded
    files = Folder(found.paths, folder, f"{title}, {w.split}", f"{title}-{w.split}-{size}", size, w.channels, w.device)
    if w.shares:
        own = _share(w, title, known, len(files.paths), groups)
        files, known, groups = files.only(own), known._replace(labels=_of(known.labels, own)), _of(groups, own)
    left_out: tuple[str, ...] = ()
    if w.skip_damaged:
        own, left_out = find_damaged(files)
        files, known, groups = files.only(own), known._replace(labels=_of(known.labels, own)), _of(groups, own)
    images = hold(files, w.resident, user_path(w.cache) if w.cache else None)
    return replace(_store(images, known, title, w, groups), left_out=left_out)


def _in_folder(wanted: _Wanted) -> tuple[Listing, Path, str]:
    """The images in a folder, the folder, and its name."""
    path = wanted.name.removeprefix(FOLDER)
    if not path:
        raise InputError(f"{FOLDER!r} names no folder: expected {FOLDER}PATH with images in PATH/train/CLASS")
    folder = user_path(path)
    return list_folder(folder, wanted.read), folder, folder.resolve().name


def _in_table(wanted: _Wanted) -> tuple[Listing, Path, str]:
    """The images in a CSV file, the folder that their paths are relative to, and the file's name."""
    from amimv.pipelines.sources.csv_file import list_table  # which loads PIL

    w, path = wanted, wanted.name.removeprefix(CSV)
    if not path:
        raise InputError(f"{CSV!r} names no file: expected {CSV}FILE with a row for each image")
    if w.groups and ".csv" not in w.groups:
        raise InputError(f"groups is {w.groups!r}: of a CSV file, columns name its own (group={w.groups})")
    file = user_path(path)
    return list_table(file, w.read, w.columns, w.task), file.parent, file.stem


def _share(wanted: _Wanted, title: str, known: Arrays, n: int, groups: Tensor | None) -> Tensor:
    """Which of ``n`` images are this split's, by its share; says in the log what all splits have.

    Raises:
        InputError: the data have splits of their own, or cannot be split so.
    """
    w, labels = wanted, known.labels
    assert w.shares
    if known.splits != ("train",):
        unread = ", or do not read their column (--columns split=)" if w.name.startswith(CSV) else ""
        raise InputError(f"{title} has splits of its own ({', '.join(known.splits)}): leave --split out{unread}")
    by = torch.arange(n) if labels is None and groups is None else groups
    parts = split_indices(labels, w.shares, by, w.split_seed, None if labels is None else known.class_names)
    if w.split == SPLITS[0]:
        counts = ", ".join(f"{len(part)} {name}" for name, part in zip(SPLITS, parts, strict=True))
        kept = "" if groups is None else f"; {len(groups.unique())} groups, each in one of them"
        _log.info("%s: split by seed %d into %s images%s", title, w.split_seed, counts, kept)
    return parts[SPLITS.index(w.split)]


def _of(values: Tensor | None, indices: Tensor) -> Tensor | None:
    return None if values is None else values[indices]


def _groups(arrays: Arrays, groups: str | None, path: Path | None, split: str) -> Tensor | None:
    """The groups that were asked for, or those in the file."""
    if groups:
        return _read_groups(groups, path, split, len(arrays.images), None)
    return None if arrays.groups is None else encode_groups(arrays.groups, salt=split)


def _read_groups(groups: str, beside: Path | None, split: str, n: int, names: tuple[str, ...] | None) -> Tensor:
    """Groups from "FILE.csv", "FILE.csv:COLUMN", or a column of ``NAME_index.csv`` beside the data."""
    file, _, column = groups.partition(":") if ".csv" in groups else ("", "", groups)
    if not file and beside is None:
        raise InputError(f"groups is {groups!r}, but there is no file beside the data: give FILE.csv:COLUMN")
    place = user_path(file) if file else beside.with_name(f"{beside.stem}_index.csv")  # type: ignore[union-attr]
    return read_groups(place, column or None, split, n, names)


def _unknown_name(name: str) -> str:
    known = ("phantom", *medmnist_names())
    prefix = FOLDER if user_path(name).is_dir() else CSV if name.endswith(".csv") else ""
    near = f" (did you mean {prefix}{name}?)" if prefix else did_you_mean(name, known, " ({})")
    return (
        f"unknown data set {name!r}{near}: expected {', '.join(known)}, "
        f"the path of an .npz file in MedMNIST's layout, {FOLDER}PATH with images in PATH/train/CLASS, or {CSV}FILE"
    )


def _with_channels(images: Tensor, channels: int | None, title: str) -> Tensor:
    have = images.shape[3]
    if channels in (None, have):
        return images
    if channels == 3 and have == 1:
        return images.expand(-1, -1, -1, 3).contiguous()
    kind = "RGB" if have == 3 else f"of {have} channels"
    raise InputError(f"channels is {channels}, but {title} is {kind}: leave channels out, or give {have}")
