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

Data that are all "train" can be cut into splits by ``shares``; those of data that have some are joined first with
``resplit``.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amimv import InputError, did_you_mean, user_path
from amimv.pipelines.groups import encode_groups, read_groups
from amimv.pipelines.images import Images, place_images
from amimv.pipelines.names import CSV, FILES, FOLDER
from amimv.pipelines.sources.joined import join_known, read_parts, take_images
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
    resplit: bool

    @property
    def read(self) -> str:
        """The split that is read; of data that are cut into shares their only one, or the first of those joined."""
        return "train" if self.shares else self.split

    @property
    def tells(self) -> bool:
        """Whether the log says what was read: once, of data that are cut into shares."""
        return self.split == self.read

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"unknown split {self.split!r}, expected one of {', '.join(SPLITS)}")
        if self.channels not in (None, 1, 3):
            raise InputError(f"channels is {self.channels}, expected 1, 3 or None (what the data has)")
        if self.task:
            check_task_name(self.task)
        if self.shares and len(self.shares) != len(SPLITS):
            raise InputError(f"shares are {tuple(self.shares)}, expected one each for {', '.join(SPLITS)}")
        if self.resplit and not self.shares:
            raise InputError("resplit joins splits that shares (--split 0.7 0.1 0.2) cut anew: give both, or neither")
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
    resplit: bool = False,
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
        split_seed, resplit: which of these splits; whether splits that the data have are joined first and cut anew.
        skip_damaged: of files: all are decoded once first; those that cannot be are left out, and the log lists them.

    Raises:
        InputError: for whatever is wrong with the arguments or the file.
    """
    wanted = _Wanted(
        *(str(name), split, size, root, checked_device(device), channels, seed, task, resident, groups),
        *(check_range(value_range), cache, columns, shares, split_seed, skip_damaged, resplit),
    )
    return _from_files(wanted) if wanted.name.startswith(FILES) else _from_arrays(wanted)


def _from_arrays(wanted: _Wanted) -> ImageStore:
    w, path = wanted, find_file(wanted.name, wanted.root) if wanted.name.endswith(".npz") else None
    title = Path(w.name).stem if path else w.name
    parts = read_parts(w.read, w.resplit, lambda split: _read_arrays(w, path, split))
    groups_of = [_groups(part, w, path, split, len(part.images)) for split, part in parts.items()]
    known, groups = join_known(title, parts, groups_of)
    pixels = [part.images for part in parts.values()]
    sizes = {split: len(part.images) for split, part in parts.items()}
    del parts  # so that the images of a split can be let go once its own are taken
    if w.shares:
        own = _share(w, title, known, sizes, groups)
        pixels = [take_images(pixels, own)]
        known, groups = known._replace(labels=_of(known.labels, own)), _of(groups, own)
    if pixels[0].is_floating_point():
        check_floats(pixels[0], w.value_range, f"{title}, {w.split}")
    images = place_images(_with_channels(pixels.pop(), w.channels, title), w.device, w.resident, title)
    return _store(images, known, title, w, groups)


def _read_arrays(wanted: _Wanted, path: Path | None, split: str) -> Arrays:
    """A split of an own file, if that has a path, or of a data set that is known by its name."""
    w = wanted
    if path:
        return read_own(path, split, w.size, w.task)
    if w.name == "phantom":
        return _phantom(split, w.seed, 28 if w.size is None else w.size, w.device)
    if w.name in medmnist_names():
        return read_medmnist(w.name, split, 28 if w.size is None else w.size, w.root)
    raise InputError(_unknown_name(w.name))


def _store(images: Images, known: Arrays, title: str, wanted: _Wanted, groups: Tensor | None) -> ImageStore:
    task = ""
    if known.labels is not None:
        task = wanted.task or known.task
        check_task(task, known.multi_label, len(known.class_names), title)
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
    title, folder, parts = _in_table(w) if w.name.startswith(CSV) else _in_folder(w)
    names = parts[w.read].class_names
    if w.task and not names:
        raise InputError(f"{title} has no labels, so that task {w.task!r} does not fit: leave it out")
    each = {split: _known(found) for split, found in parts.items()}
    groups_of = [_groups(each[split], w, folder, split, len(own.paths), own.paths) for split, own in parts.items()]
    known, groups = join_known(title, each, groups_of)
    for line in [line for found in parts.values() for line in found.remarks] if w.tells else ():
        _log.warning(line)
    if w.task:
        check_task(w.task, known.multi_label, len(names), title)  # before anything is decoded
    paths = tuple(path for found in parts.values() for path in found.paths)
    files = Folder(paths, folder, f"{title}, {w.split}", f"{title}-{w.split}-{size}", size, w.channels, w.device)
    if w.shares:
        own = _share(w, title, known, {split: len(found.paths) for split, found in parts.items()}, groups)
        files, known, groups = files.only(own), known._replace(labels=_of(known.labels, own)), _of(groups, own)
    left_out: tuple[str, ...] = ()
    if w.skip_damaged:
        own, left_out = find_damaged(files)
        files, known, groups = files.only(own), known._replace(labels=_of(known.labels, own)), _of(groups, own)
    images = hold(files, w.resident, user_path(w.cache) if w.cache else None)
    return replace(_store(images, known, title, w, groups), left_out=left_out)


def _known(found: Listing) -> Arrays:
    """What a listing says of images that are not read yet."""
    labels = torch.tensor(found.labels) if found.class_names else None
    task = infer_task(labels is not None and labels.ndim == 2, len(found.class_names))
    groups = np.array(found.groups) if found.groups else None
    return Arrays(torch.empty(0), labels, found.class_names, task, groups, found.splits)


def _in_folder(wanted: _Wanted) -> tuple[str, Path, dict[str, Listing]]:
    """A folder's name, itself, and the images in it by the splits that are read."""
    path = wanted.name.removeprefix(FOLDER)
    if not path:
        raise InputError(f"{FOLDER!r} names no folder: expected {FOLDER}PATH with images in PATH/train/CLASS")
    folder = user_path(path)
    parts = read_parts(wanted.read, wanted.resplit, lambda split: list_folder(folder, split))
    return folder.resolve().name, folder, parts


def _in_table(wanted: _Wanted) -> tuple[str, Path, dict[str, Listing]]:
    """A CSV file's name, the folder that its paths are relative to, and the images in it by the splits that are
    read.
    """
    from amimv.pipelines.sources.csv_file import list_table  # which loads PIL

    w, path = wanted, wanted.name.removeprefix(CSV)
    if not path:
        raise InputError(f"{CSV!r} names no file: expected {CSV}FILE with a row for each image")
    if w.groups and ".csv" not in w.groups:
        raise InputError(f"groups is {w.groups!r}: of a CSV file, columns name its own (group={w.groups})")
    file = user_path(path)
    parts = read_parts(w.read, w.resplit, lambda split: list_table(file, split, w.columns, w.task))
    return file.stem, file.parent, parts


def _share(wanted: _Wanted, title: str, known: Arrays, sizes: Mapping[str, int], groups: Tensor | None) -> Tensor:
    """Which images are this split's, by its share; says in the log what all splits have.

    Args:
        wanted: with shares.
        title: of the data.
        known: of all images.
        sizes: how many images those splits have that are joined.
        groups: of all images.

    Raises:
        InputError: the data have splits of their own, which are not to be joined, or cannot be split so.
    """
    w, labels = wanted, known.labels
    assert w.shares
    if known.splits != ("train",) and not w.resplit:
        unread = ", or do not read their column (--columns split=)" if w.name.startswith(CSV) else ""
        raise InputError(
            f"{title} has splits of its own ({', '.join(known.splits)}): leave --split out, "
            f"or give --resplit to join them and cut them anew{unread}"
        )
    by = torch.arange(sum(sizes.values())) if labels is None and groups is None else groups
    try:
        parts = split_indices(labels, w.shares, by, w.split_seed, None if labels is None else known.class_names)
    except InputError as error:
        raise InputError(f"{title}: {error}") from error
    if w.tells:
        joined = f"its own splits ({_counts(sizes)} images) joined and " if w.resplit else ""
        apart = "; no groups: by image" if w.resplit else ""
        kept = apart if groups is None else f"; {len(groups.unique())} groups, each in one of them"
        new = _counts({name: len(part) for name, part in zip(SPLITS, parts, strict=True)})
        _log.info("%s: %ssplit by seed %d into %s images%s", title, joined, w.split_seed, new, kept)
    return parts[SPLITS.index(w.split)]


def _counts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {split}" for split, n in sizes.items())


def _of(values: Tensor | None, indices: Tensor) -> Tensor | None:
    return None if values is None else values[indices]


def _groups(
    known: Arrays, wanted: _Wanted, beside: Path | None, split: str, n: int, names: Sequence[str] | None = None
) -> Tensor | None:
    """The groups of a split's ``n`` images: from "FILE.csv", "FILE.csv:COLUMN", or a column of ``NAME_index.csv``
    ``beside`` the data, whichever was asked for; otherwise those that the data have.
    """
    groups = wanted.groups
    if not groups:
        return None if known.groups is None else encode_groups(known.groups, salt=split)
    file, _, column = groups.partition(":") if ".csv" in groups else ("", "", groups)
    if not file and beside is None:
        raise InputError(f"groups is {groups!r}, but there is no file beside the data: give FILE.csv:COLUMN")
    place = user_path(file) if file else beside.with_name(f"{beside.stem}_index.csv")  # type: ignore[union-attr]
    return read_groups(place, column or None, split, n, names, wanted.tells)


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
