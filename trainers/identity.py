"""What ties a run to its data: a digest of every split, written before training and compared ever after."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from amimv import InputError
from amimv.pipelines import ImageStore
from amimv.pipelines.images import spaced
from amimv.pipelines.sources.encoded import READERS
from amimv.pipelines.sources.pixels import looked_at

#: Files, evenly spaced, whose bytes are compared; of the others the name and the size.
FILES_READ = 256
#: Bytes that leave the device at a time.
CHUNK = 2**26

#: What is compared, in this order, and how a difference is said.
FIELDS = {
    "images": "{split} images: {now} now, {then} when the run began",
    "shape": "shape of the {split} images: {now} now, {then} when the run began",
    "classes": "the names of the classes of the {split} images are not those of the run's beginning",
    "labels": "the labels of the {split} images are not those of the run's beginning",
    "groups": "the groups of the {split} images are not those of the run's beginning",
    "left_out": "the damaged files that are left out of the {split} images are not those of the run's beginning",
    "indices": "the training subset is of other images than when the run began",
    "files": "names or sizes of the {split} files are not those of the run's beginning",
    "content": "the pixels of the {split} images are not those of the run's beginning",
}

logger = logging.getLogger("amimv")


def identify(store: ImageStore, indices: Tensor | None = None) -> dict[str, Any]:
    """What tells this split from another.

    Covered are the number and shape of the images, the names of the classes, every label and group, every byte of an
    array; of files the names (below the folder that they share) and sizes of all, and the bytes of ``FILES_READ``
    evenly spaced ones, so that a changed pixel in another file of the same size goes unseen. 55 MB of array take about
    a tenth of a second.

    Args:
        store: the images of a split, or of its subset.
        indices: ``(M,)`` which images of the published split they are.

    Returns:
        Numbers, digests and names by the names of ``FIELDS``, ready for JSON; beside them the images of each class.

    Raises:
        OSError: a file is not there, or cannot be read.
    """
    found: dict[str, Any] = {"images": len(store), "shape": list(store.images.shape[1:])}
    found["classes"] = _digest([repr(store.class_names).encode()])
    found["per_class"] = store.class_counts()
    if store.left_out:
        found["left_out"] = list(store.left_out)
    for name, column in (("labels", store.labels), ("groups", store.groups)):
        if column is not None:
            found[name] = _digest(_bytes_of(column))
    if indices is not None:
        found["indices"] = _digest(_bytes_of(indices))
    if store.images.paths:
        return found | _identify_files([Path(path) for path in store.images.paths])
    # Chunks of whole images, so that the digest is that of all bytes in order.
    return found | {"content": _digest(part for images in looked_at(store.images) for part in _bytes_of(images))}


def _identify_files(paths: list[Path]) -> dict[str, str]:
    top = os.path.commonpath([path.parent for path in paths])
    sample = [paths[i] for i in spaced(len(paths), FILES_READ).tolist()]
    with ThreadPoolExecutor(READERS) as readers:  # on a network drive each file is waited for
        sizes = readers.map(lambda path: path.stat().st_size, paths)
        listed = (f"{os.path.relpath(path, top)}\0{size}\0".encode() for path, size in zip(paths, sizes, strict=True))
        return {"files": _digest(listed), "content": _digest(readers.map(Path.read_bytes, sample))}


def _bytes_of(values: Tensor) -> Iterable[memoryview]:
    """The bytes of a tensor, little by little where it lies on a device."""
    flat = values.contiguous().view(-1)
    return (part.cpu().numpy().data for part in flat.split(max(1, CHUNK // flat.element_size())))


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def identify_all(
    train: ImageStore, indices: Tensor, val: ImageStore | None, test: ImageStore | None
) -> dict[str, dict[str, Any]]:
    """`identify` for the splits that there are."""
    held_out = {"val": val, "test": test}
    return {"train": identify(train, indices)} | {
        name: identify(store) for name, store in held_out.items() if store is not None
    }


def find_difference(now: Mapping[str, Mapping[str, Any]], then: Mapping[str, Mapping[str, Any]]) -> str:
    """The first thing in which two records differ, in words; empty if they agree on what both have."""
    names = {"train": "training", "val": "validation", "test": "test"}
    for split, said in names.items():
        one, other = now.get(split, {}), then.get(split, {})
        for field, line in FIELDS.items():
            if field in one and field in other and one[field] != other[field]:
                return line.format(split=said, now=one[field], then=other[field])
    return ""


def check_data(folder: Path, now: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """Compare the data with those that the run in ``folder`` began with.

    Returns:
        The record, with the splits that were not looked at then; None if an older version left none.

    Raises:
        InputError: they differ.
    """
    path = folder / "data.json"
    if not path.is_file():
        logger.info("%s has no data.json: its data are taken to be those that it began with", folder)
        return None
    try:
        then = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged: delete it if the data are those that the run began with") from error
    if difference := find_difference(now, then):
        raise InputError(f"{folder}: {difference}: bring the data back, or train anew under another name")
    return now | then
