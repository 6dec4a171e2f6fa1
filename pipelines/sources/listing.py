"""What lies in a folder of images: splits, classes, files, and what is left out of it.

No file is opened, but those without an ending of their own, which may be DICOM.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from amimv import InputError
from amimv.pipelines.sources.labels import shortened

SPLITS = ("train", "val", "test")
#: What folders of splits are called, in any case.
SPLIT_NAMES = {
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}
#: The files that are images, by the end of their names in lower case.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".dcm")
LAYOUT = "expected PATH/train/CLASS/*.png (.jpg, .tif, .bmp, .webp, .dcm), likewise val and test"
#: What to do about data that are "train" alone.
CUT = "cut it off (--split 0.7 0.1 0.2)"
#: Kinds of what lies in a folder, besides the ends of other files' names.
IMAGE, FOLDER, HIDDEN = "image", "folder", "hidden"
IMAGES_BESIDE = "image(s) beside the folders"


class NoSplit(InputError):
    """The data have no such split."""


class Listing(NamedTuple):
    """The images of a split, in their files.

    Attributes:
        paths: of the files, in a fixed order.
        labels: the class of each, or a row of 0 and 1 for each; none without labels.
        class_names: of the classes (or labels) of all splits.
        remarks: lines on what is left out or looks like a mistake; what concerns all splits comes with the first.
        splits: the splits that there are.
        groups: of each image, as text; none without.
    """

    paths: tuple[str, ...]
    labels: tuple[int | tuple[int, ...], ...]
    class_names: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)
    groups: tuple[str, ...] = ()


class _Found(NamedTuple):
    """Images, sorted folder by folder, and how many entries of which kind are none."""

    images: list[Path]
    left_out: Counter[str]


def list_folder(folder: Path, split: str) -> Listing:
    """Find the images of a split in ``folder/{train,val,test}/CLASS/**``, or, as "train", in ``folder/CLASS/**``.

    The splits' folders are called as in ``SPLIT_NAMES``, in any case. The classes are the sub-folders of all splits
    together that hold images, sorted; names that differ in case only, between splits, are one class. Taken are the
    files whose names end in one of ``EXTENSIONS``, in any case, or have no ending and DICOM's mark, sorted. Links are
    followed, into no folder twice.

    Where no sub-folder of a split holds images, those in its own folder are taken, and have no classes.

    Raises:
        InputError: if there is no such folder or split, two folders for a split or a class, fewer than two classes,
            no image in the split, or a folder that cannot be read.
    """
    tops = _split_folders(folder)
    if split not in tops:
        hint = f", or {CUT}" if tuple(tops) == ("train",) else ""
        raise NoSplit(f"{folder} has no split {split!r} ({_splits_told(folder, tops)}): {LAYOUT}{hint}")
    places = {name: _class_folders(top) for name, top in tops.items()}
    found = {key: _walk(place) for key, place in places[split].items()}
    names = _class_names(places, split, {key for key, inside in found.items() if inside.images})
    left_out = sum((inside.left_out for inside in found.values()), _beside(tops[split]))
    if empty := [place.name for key, place in places[split].items() if key not in names]:
        left_out[f"folder(s) without images ({shortened(empty, 3)})"] += len(empty)
    told = f" (left out: {_told(left_out)})" if left_out else ""
    title = folder.resolve().name
    remarks = _layout_remarks(folder, title, tops, places) if split == next(iter(tops)) else []
    flat = [entry.path for entry in _scan(tops[split]) if _kind(entry) == IMAGE]
    if flat and not any(inside.images for inside in found.values()):
        return Listing(tuple(flat), (), (), (*remarks, *_flat_remarks(folder, tops, split)), tuple(tops))
    if len(names) < 2:
        got = (
            f"one class folder with images ({', '.join(names.values())})" if names else "no class folders with images"
        )
        raise InputError(f"{folder} has {got}{told}, at least two are needed: {LAYOUT}")
    keys = sorted(names, key=names.__getitem__)
    images = [(str(path), label) for label, key in enumerate(keys) if key in found for path in found[key].images]
    if not images:
        raise InputError(f"{tops[split]} has no {', '.join(EXTENSIONS)} file in its class folders{told}")
    if left_out:
        remarks.append(f"{title}, {split}: left out {_told(left_out)}")
    paths, labels = zip(*images, strict=True)
    return Listing(paths, labels, tuple(names[key] for key in keys), tuple(remarks), tuple(tops))


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folder of each split that there is; without any, the folder itself is "train"."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: {LAYOUT}")
    found: dict[str, Path] = {}
    for name in _folder_names(folder):
        split = SPLIT_NAMES.get(name.lower())
        if split in found:
            both = f"both {found[split].name} and {name}"
            raise InputError(f"{folder} has {both}, which mean the same split {split!r}: keep one of them")
        if split:
            found[split] = folder / name
    if not found:
        _check_no_splits_inside(folder)
    return {split: found[split] for split in SPLITS if split in found} or {"train": folder}


def _splits_told(folder: Path, tops: dict[str, Path]) -> str:
    if tops == {"train": folder}:
        return "class folders only, which are all 'train'"
    others = [name for name in _folder_names(folder) if name.lower() not in SPLIT_NAMES]
    return f"only {', '.join(tops)}" + (f", besides {shortened(others, 3)}" if others else "")


def _check_no_splits_inside(folder: Path) -> None:
    for name in _folder_names(folder):
        inside = [part for part in _folder_names(folder / name) if part.lower() in SPLIT_NAMES]
        if len(inside) > 1:
            raise InputError(f"{folder / name} holds {' and '.join(inside[:2])}, splits inside of a class: {LAYOUT}")


def _class_folders(top: Path) -> dict[str, Path]:
    """The folders of a split by the names that tell classes apart: in any case, and however accents are encoded."""
    found: dict[str, Path] = {}
    for name in _folder_names(top):
        key = unicodedata.normalize("NFC", name).casefold()
        if key in found:
            raise InputError(f"{top} has both {found[key].name} and {name}: rename one, or put them together")
        found[key] = top / name
    return found


def _class_names(places: dict[str, dict[str, Path]], split: str, with_images: set[str]) -> dict[str, str]:
    """Folders that hold images in any split, named as in the first; of ``split`` those ``with_images`` do."""
    names: dict[str, str] = {}
    classes = set(with_images)
    for name, folders in places.items():
        for key, place in folders.items():
            names.setdefault(key, place.name)
            if key not in classes and name != split and any(kind == IMAGE for kind, _ in _entries(place)):
                classes.add(key)
    return {key: name for key, name in names.items() if key in classes}


def _flat_remarks(folder: Path, tops: dict[str, Path], split: str) -> list[str]:
    """What is left out of a split without class folders."""
    left_out = _beside(tops[split])
    del left_out[IMAGES_BESIDE]
    empty = [name for name in _folder_names(tops[split]) if name.lower() not in SPLIT_NAMES]
    if empty:
        left_out[f"folder(s) without images ({shortened(empty, 3)})"] += len(empty)
    return [f"{folder.resolve().name}, {split}: left out {_told(left_out)}"] if left_out else []


def _layout_remarks(folder: Path, title: str, tops: dict[str, Path], places: dict[str, dict[str, Path]]) -> list[str]:
    """What lies beside the splits, and classes whose names differ between splits."""
    remarks = []
    if tops != {"train": folder}:
        beside = _beside(folder)
        for name in _folder_names(folder):
            if name.lower() not in SPLIT_NAMES:
                beside[f"folder {name} ({len(_walk(folder / name).images)} images)"] += 1
        if beside:
            remarks.append(f"{title}: left out beside the splits {_told(beside)}")
    spellings: dict[str, list[str]] = {}
    for folders in places.values():
        for key, place in folders.items():
            spellings.setdefault(key, []).append(place.name)
    if differ := ["/".join(dict.fromkeys(names)) for names in spellings.values() if len(set(names)) > 1]:
        remarks.append(
            f"{title}: read as one class each, though written differently in the splits: {shortened(differ)}"
        )
    return remarks


def _folder_names(folder: Path) -> list[str]:
    return [entry.name for entry in _scan(folder) if _kind(entry) == FOLDER]


def _beside(top: Path) -> Counter[str]:
    """What lies beside the folders in it."""
    kinds = Counter(kind for kind in map(_kind, _scan(top)) if kind != FOLDER)
    if images := kinds.pop(IMAGE, 0):
        kinds[IMAGES_BESIDE] = images
    return kinds


def _walk(folder: Path) -> _Found:
    found = _Found([], Counter())
    for kind, path in _entries(folder):
        if kind == IMAGE:
            found.images.append(path)
        else:
            found.left_out[kind] += 1
    found.images.sort(key=lambda path: path.parts)
    return found


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Kind and path of all but folders, at any depth; neither a folder around this one nor one twice is gone into."""
    around = {*folder.absolute().parents, *folder.resolve().parents}
    seen = {_identity(parent) for parent in around}
    waiting = [folder]
    while waiting:
        where = waiting.pop()
        if (identity := _identity(where)) in seen:
            yield "folder(s) reached twice", where
            continue
        seen.add(identity)
        folders = []
        for entry in _scan(where):
            if (kind := _kind(entry)) == FOLDER:
                folders.append(entry)
            else:
                yield kind, Path(entry.path)
        # The last is read first: folders in order, before the links that may lead to them.
        folders.sort(key=lambda entry: (entry.is_symlink(), entry.name), reverse=True)
        waiting += [Path(entry.path) for entry in folders]


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from error


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.name.startswith("."):
        return HIDDEN
    try:
        if entry.is_dir():
            return FOLDER
        if not entry.is_file():
            return "broken link(s)" if entry.is_symlink() else "special file(s)"
    except OSError:  # a link to itself
        return "broken link(s)"
    suffix = Path(entry.name).suffix.lower()
    if suffix in EXTENSIONS or ((not suffix or suffix[1:].isdigit()) and _is_dicom(entry)):
        return IMAGE
    return suffix or "without an ending"


def _is_dicom(entry: os.DirEntry[str]) -> bool:
    """By the mark after the first 128 bytes; their names are often unique identifiers, such as 1.2.840.10008. The
    directory of a medium has the mark, and no image.
    """
    try:
        with open(entry.path, "rb") as file:
            return file.read(132)[128:] == b"DICM" and entry.name.upper() != "DICOMDIR"
    except OSError:
        return False


def _told(kinds: Counter[str]) -> str:
    return shortened([f"{count} {kind}" for kind, count in kinds.most_common()])
