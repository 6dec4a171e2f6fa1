"""Stores by name: the phantom, MedMNIST, other ``.npz`` files, folders."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from amimv import InputError, did_you_mean, user_path
from amimv.pipelines.groups import encode_groups, read_groups
from amimv.pipelines.images import Images, place_images
from amimv.pipelines.sources.arrays import check_range
from amimv.pipelines.sources.labels import check_task, check_task_name, infer_task
from amimv.pipelines.sources.listing import SPLITS, list_folder
from amimv.pipelines.sources.npz import Arrays, find_file, medmnist_names, read_medmnist, read_own
from amimv.pipelines.sources.pixels import check_floats
from amimv.pipelines.store import ImageStore, checked_device

#: What the name of a data set begins with that is a folder of images.
FOLDER = "folder:"

_log = logging.getLogger("amimv")


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
) -> ImageStore:
    """Load one split of a data set onto a device.

    A MedMNIST file is looked for in ``root``, else in ``$AMIMV_DATA``, else in MedMNIST's own folder; it is
    downloaded into that folder if it is not there (where several processes run, let one load first), and its
    MD5 is checked. Arrays are read without pickle. Of an own ``.npz``, the classes are those of all its
    splits together, numbered 0..C-1 without a gap; a class may lack images in one split.

    Args:
        name: "phantom", one of ``medmnist_names()``, or the path (as it is, else in ``root`` or ``$AMIMV_DATA``)
            of an ``.npz`` in MedMNIST's layout (``train_images`` ``(N, H, W)`` or ``(N, H, W, C)``, ``train_labels``
            ``(N,)``, ``(N, 1)`` or multi-hot ``(N, L)`` or left out, ``train_groups`` ``(N,)`` if there are any,
            ``val_...``, ``test_...``), or "folder:PATH" with JPEG, PNG, TIFF, BMP or WebP files in
            ``PATH/{train,val,test}/CLASS/``, or in ``PATH/CLASS/``, which is all "train": see `list_folder`. What is
            left out of a folder, or looks like a mistake, stands in the log.
        split: "train", "val" or "test".
        size: height and width in pixels; by default 28, or whatever an own ``.npz`` has, or 224 for a folder.
        root: folder of the MedMNIST files.
        device: where batches are wanted.
        channels: 3 repeats grey three times; by default what the data has, and 3 for a folder (1 makes it grey).
        seed: which phantom.
        task: one of ``TASKS``; by default MedMNIST's, or for own data "binary-class" (two classes),
            "multi-class" or "multi-label, binary-class" (multi-hot labels). Labels of which every row has exactly
            one 1 are classes, unless the task is "multi-label, binary-class".
        resident: whether the images lie on the device; by default they do if they fit into ``RESIDENT_SHARE``
            of its free memory, else they stay in pinned host memory and the log says so. A folder's are decoded
            first, with a bar on a terminal, if they fit there; else (or if False) batch by batch.
        groups: of images of one patient, lesion or slide: a column of ``NAME_index.csv`` beside the
            data, or "FILE.csv:COLUMN"; see `read_groups`. By
            default ``train_groups`` ... of an ``.npz``, if it has them.
        value_range: the values that become 0 and 1; by default that of ``uint8``, and of ``uint16`` those there are.
        cache: a folder in which a folder's decoded images are kept, in a file that is mapped into memory when the
            same images (by names, sizes and times of change) are loaded again.

    Raises:
        InputError: for whatever is wrong with the arguments or the file.
    """
    device = checked_device(device)
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    if channels not in (None, 1, 3):
        raise InputError(f"channels is {channels}, expected 1, 3 or None (what the data has)")
    if task:
        check_task_name(task)
    title, path, value_range = str(name), None, check_range(value_range)
    if title.startswith(FOLDER):
        return _from_folder(
            title.removeprefix(FOLDER), split, size, channels, device, task, resident, groups, value_range, cache
        )
    if title == "phantom":
        arrays = _phantom(split, seed, 28 if size is None else size, device)
    elif title in medmnist_names():
        arrays = read_medmnist(title, split, 28 if size is None else size, root)
    elif title.endswith(".npz"):
        path = find_file(title, root)
        arrays, title = read_own(path, split, size, task), Path(name).stem
    else:
        raise InputError(_unknown_name(title))
    if arrays.images.is_floating_point():
        check_floats(arrays.images, value_range, f"{title}, {split}")
    images = place_images(_with_channels(arrays.images, channels, title), device, resident, title)
    return _store(images, arrays, title, split, device, task, _groups(arrays, groups, path, split), value_range)


def _store(
    images: Images,
    known: Arrays,
    title: str,
    split: str,
    device: torch.device,
    task: str | None,
    groups: Tensor | None,
    value_range: tuple[float, float] | None,
) -> ImageStore:
    if known.labels is not None:
        task = task or known.task
        check_task(task, known.labels.ndim == 2, len(known.class_names), title)
    return ImageStore.build(
        images,
        known.labels,
        groups,
        name=title,
        device=device,
        split=split,
        class_names=known.class_names,
        task=task or "",
        value_range=value_range,
    )


def _phantom(split: str, seed: int, size: int, device: torch.device) -> Arrays:
    from amimv.pipelines.sources.phantom import CLASS_NAMES, generate_phantom

    images, labels = generate_phantom(split, seed=seed, size=size, device=device)
    return Arrays(images, labels, tuple(CLASS_NAMES), "multi-class")


def _from_folder(
    path: str,
    split: str,
    size: int | None,
    channels: int | None,
    device: torch.device,
    task: str | None,
    resident: bool | None,
    groups: str | None,
    value_range: tuple[float, float] | None,
    cache: str | Path | None,
) -> ImageStore:
    from amimv.pipelines.sources.folder import Folder, hold  # which loads PIL

    size = 224 if size is None else size
    if size < 1:
        raise InputError(f"size is {size}, expected at least 1 pixel")
    if not path:
        raise InputError(f"{FOLDER!r} names no folder: expected {FOLDER}PATH with images in PATH/train/CLASS")
    folder = user_path(path)
    found, title = list_folder(folder, split), folder.resolve().name
    if task and not found.class_names:
        raise InputError(f"{title} has no class folders, so that task {task!r} does not fit: leave it out")
    if task:
        check_task(task, False, len(found.class_names), title)
    numbers = _read_groups(groups, folder, split, len(found.paths), found.paths) if groups else None
    for line in found.remarks:
        _log.warning(line)
    files = Folder(found.paths, folder, f"{title}, {split}", f"{title}-{split}-{size}", size, channels, device)
    images = hold(files, resident, user_path(cache) if cache else None)
    labels = torch.tensor(found.labels) if found.class_names else None
    known = Arrays(torch.empty(0), labels, found.class_names, infer_task(False, len(found.class_names)))
    return _store(images, known, title, split, device, task, numbers, value_range)


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
    near = f" (did you mean {FOLDER}{name}?)" if user_path(name).is_dir() else did_you_mean(name, known, " ({})")
    return (
        f"unknown data set {name!r}{near}: expected {', '.join(known)}, "
        f"the path of an .npz file in MedMNIST's layout, or {FOLDER}PATH with images in PATH/train/CLASS"
    )


def _with_channels(images: Tensor, channels: int | None, title: str) -> Tensor:
    have = images.shape[3]
    if channels in (None, have):
        return images
    if channels == 3 and have == 1:
        return images.expand(-1, -1, -1, 3).contiguous()
    kind = "RGB" if have == 3 else f"of {have} channels"
    raise InputError(f"channels is {channels}, but {title} is {kind}: leave channels out, or give {have}")
