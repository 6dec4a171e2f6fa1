"""Image stores: a whole data set as one ``uint8`` tensor that stays on a device.

Four sources share one face: MedMNIST's twelve 2-D sets, any ``.npz`` in MedMNIST's layout, the embedded phantom,
and folders of image files, which stay encoded and are decoded batch by batch. Everything an array can have
wrong is found here, at load, in one line; behind it nothing is checked again. A damaged image file is found when it
is decoded.
"""

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amimv import InputError, did_you_mean, first_line, user_path
from amimv.pipelines.folders import EncodedImages, inspect_files
from amimv.pipelines.labels import (
    MULTI_LABEL,
    check_range,
    check_task,
    check_task_name,
    infer_task,
    missing_classes,
    settle_labels,
)
from amimv.pipelines.listing import SPLITS, list_folder
from amimv.pipelines.pixels import PixelSummary, chunk_length, pixel_remark, summarise

#: What the name of a data set begins with that is a folder of images.
FOLDER = "folder:"
#: MedMNIST's sizes, in pixels.
SIZES = (28, 64, 128, 224)
#: Share of the device's free memory that a store may take; the rest is for networks and batches.
RESIDENT_SHARE = 0.6
#: Images, evenly spaced, of which a folder's mean and std are taken.
SAMPLE = 2048

_log = logging.getLogger("amimv")


@dataclass(frozen=True, eq=False)
class ImageStore:
    """A data set's split: images, labels and what is known about them.

    Attributes:
        images: ``(N, H, W, C)`` ``uint8``, square, C 1 or 3; on ``device``, or in host memory (pinned where
            there is CUDA) if not ``resident``; or files, still encoded, which have that shape once decoded.
        labels: ``(N,)`` ``int64`` in 0..n_classes-1, or ``(N, L)`` ``int64`` multi-hot; on ``device``.
        name: a MedMNIST name, "phantom", the stem of the ``.npz``, or the folder's name.
        split: "train", "val" or "test".
        class_names: one per class or label.
        task: one of ``TASKS``.
        device: where batches are wanted.
        mean, std: per channel, of these very images, in units of [0, 1] (of encoded images, of an evenly spaced
            sample of at most ``SAMPLE``); validation and test images are normalised with those of the training
            store. ``std`` is at least one grey level, so that a constant channel divides.
        resident: whether the images lie on ``device``.
    """

    images: Tensor | EncodedImages = field(repr=False)
    labels: Tensor = field(repr=False)
    name: str
    split: str
    class_names: tuple[str, ...]
    task: str
    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resident: bool = True

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def n_classes(self) -> int:
        """Classes, or labels of a multi-label set."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.images.shape[1]

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    def subset(self, indices: Tensor) -> "ImageStore":
        """The store of the images ``indices`` (``(M,)`` ``int64``, on any device), with its own mean and std.

        Raises:
            InputError: if the indices are no integers, none, or out of range; of a folder, if an image of the sample
                cannot be decoded.
        """
        if indices.ndim != 1 or indices.dtype != torch.int64 or not len(indices):
            got = f"{tuple(indices.shape)} {indices.dtype}"
            raise InputError(f"subset takes indices of shape (M,) and type int64, at least one; got {got}")
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= len(self):
            raise InputError(f"subset indices reach from {low} to {high}, but {self.name} has {len(self)} images")
        if isinstance(self.images, EncodedImages):
            images: Tensor | EncodedImages = self.images.subset(indices)
        else:
            images = self.images.index_select(0, indices.to(self.images.device))
            images = _placed(images, self.device, self.resident)
        found = _summary_of(images)
        labels = self.labels[indices.to(self.labels.device)]
        return replace(self, images=images, labels=labels, mean=found.mean, std=found.std)

    def gather(self, indices: Tensor) -> Tensor:
        """The images ``indices``: ``(...)`` ``int64`` to ``(..., H, W, C)`` ``uint8`` on ``device``.

        Nothing waits for the device if the store is resident. If not, the indices are brought to the host,
        which is the only wait (none if they are there already); the images are gathered into pinned memory
        and copied on a side stream, and what is queued next on the current stream waits for the copy.
        Encoded images are read and decoded while the caller waits; `stream` does that ahead.
        """
        if isinstance(self.images, EncodedImages):
            return self.images.read(indices)
        shape = (*indices.shape, *self.images.shape[1:])
        if self.resident:
            # index_select copies whole images; indexing with a tensor goes element by element on the CPU.
            return self.images.index_select(0, indices.flatten()).view(shape)
        flat = indices.flatten().cpu()
        out_shape = (len(flat), *self.images.shape[1:])
        batch = torch.empty(out_shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        torch.index_select(self.images, 0, flat, out=batch)
        return _copied_aside(batch, self.device).view(shape)

    def stream(self, parts: Tensor) -> Iterator[Tensor]:
        """What `gather` gives for each of ``parts``, in order, and prepared ahead where it is not on the device yet.

        Args:
            parts: ``(steps, ..., B)`` ``int64``, on any device; brought to the host, if need be, once for all steps.

        Yields:
            ``(..., B, H, W, C)`` ``uint8`` on ``device``, as often as there are steps.

        Raises:
            InputError: if a file cannot be read or decoded.
        """
        if isinstance(self.images, EncodedImages):
            return self.images.stream(parts.cpu().unbind(0))
        # From host memory the copies run ahead on a side stream, as nothing waits for the device in between.
        return map(self.gather, (parts if self.resident else parts.cpu()).unbind(0))

    def class_counts(self) -> list[int]:
        """Images per class, on the host; of a multi-label set the images that carry each label."""
        if self.multi_label:
            return self.labels.sum(0).tolist()
        return torch.bincount(self.labels, minlength=self.n_classes).tolist()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _copied_aside(batch: Tensor, device: torch.device) -> Tensor:
    """Copy pinned host memory to the device without queueing behind the work that is already there."""
    if device.type != "cuda":
        return batch.to(device)
    current, side = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(side):
        moved = batch.to(device, non_blocking=True)
    current.wait_stream(side)
    # Else the allocator could hand the memory out on the side stream while the current one still reads it.
    moved.record_stream(current)
    return moved


def _summary_of(images: Tensor | EncodedImages) -> PixelSummary:
    """Of all images; of encoded ones, of an evenly spaced sample of at most ``SAMPLE``."""
    length = chunk_length(images.shape)
    if isinstance(images, Tensor):
        return summarise(images.split(length), images.shape[3], images.device)
    n = images.shape[0]
    sample = torch.arange(min(n, SAMPLE)) * n // min(n, SAMPLE)
    return summarise(images.stream(sample.split(length)), images.channels, images.device)


def medmnist_names() -> tuple[str, ...]:
    """The names of MedMNIST's twelve 2-D sets."""
    return tuple(name for name in _medmnist_info() if not name.endswith("3d"))


def _medmnist_info() -> dict[str, dict]:
    # Imported when called: it brings scikit-learn, and makes a folder in the home.
    from medmnist.info import INFO

    return INFO


class _Parts(NamedTuple):
    """What a source gives: images ``(N, H, W, C)`` ``uint8`` and labels ``int64``, both checked."""

    images: Tensor | EncodedImages
    labels: Tensor
    class_names: tuple[str, ...]
    task: str


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
) -> ImageStore:
    """Load one split of a data set onto a device.

    A MedMNIST file is looked for in ``root``, else in ``$AMIMV_DATA``, else in MedMNIST's own folder; it is
    downloaded into that folder if it is not there (where several processes run, let one load first), and its
    MD5 is checked. Arrays are read without pickle. Of an own ``.npz``, the classes are those of all its
    splits together, numbered 0..C-1 without a gap; a class may lack images in one split.

    Args:
        name: "phantom", one of ``medmnist_names()``, or the path (as it is, else in ``root`` or ``$AMIMV_DATA``)
            of an ``.npz`` in MedMNIST's layout
            (``train_images`` ``(N, H, W)`` or ``(N, H, W, C)`` ``uint8``, ``train_labels`` ``(N,)``,
            ``(N, 1)`` or multi-hot ``(N, L)``, ``val_...``, ``test_...``), or "folder:PATH" with JPEG, PNG, TIFF,
            BMP or WebP files in ``PATH/{train,val,test}/CLASS/``, or in ``PATH/CLASS/``, which is all "train": see
            `list_folder`. They are decoded when they are asked for, as `EncodedImages` says. What is left out of a
            folder, or looks like a mistake, stands in the log.
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
            of its free memory, else they stay in pinned host memory and the log says so. A folder's never do.

    Raises:
        InputError: for whatever is wrong with the arguments or the file.
    """
    device = _checked_device(device)
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    if channels not in (None, 1, 3):
        raise InputError(f"channels is {channels}, expected 1, 3 or None (what the data has)")
    if task:
        check_task_name(task)
    title = str(name)
    if title == "phantom":
        parts = _phantom_parts(split, seed, 28 if size is None else size, device)
    elif title in medmnist_names():
        parts = _medmnist_parts(title, split, 28 if size is None else size, root)
    elif title.endswith(".npz"):
        parts, title = _own_parts(_own_file(title, root), split, size, task), Path(name).stem
    elif title.startswith(FOLDER):
        parts, title = _folder_parts(title.removeprefix(FOLDER), split, size, channels, device)
    else:
        raise InputError(_unknown_name(title))
    task = task or parts.task
    check_task(task, parts.labels.ndim == 2, len(parts.class_names), title)
    images, resident = _settled(parts.images, channels, device, resident, title)
    found = _summary_of(images)
    labels = parts.labels.to(device)
    store = ImageStore(images, labels, title, split, parts.class_names, task, device, found.mean, found.std, resident)
    _remark(store, found)
    return store


def _remark(store: ImageStore, found: PixelSummary) -> None:
    """Say in the log what looks like a mistake in the images or labels of a split."""
    if remark := pixel_remark(found):
        _log.warning("%s, %s: %s", store.name, store.split, remark)
    if missing := missing_classes(store.class_counts(), store.class_names):
        kind = "label" if store.multi_label else "class"
        _log.warning("%s, %s: no image of %s %s", store.name, store.split, kind, missing)


def _checked_device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise InputError(f"device is {device}, but PyTorch finds no CUDA device here: use device='cpu'")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _near(word: str, known: tuple[str, ...]) -> str:
    """What the user may have meant, as the end of a sentence."""
    return f" ({near})" if (near := did_you_mean(word, known)) else ""


def _unknown_name(name: str) -> str:
    known = ("phantom", *medmnist_names())
    near = f" (did you mean {FOLDER}{name}?)" if user_path(name).is_dir() else _near(name, known)
    return (
        f"unknown data set {name!r}{near}: expected {', '.join(known)}, "
        f"the path of an .npz file in MedMNIST's layout, or {FOLDER}PATH with images in PATH/train/CLASS"
    )


def _settled(
    images: Tensor | EncodedImages, channels: int | None, device: torch.device, resident: bool | None, title: str
) -> tuple[Tensor | EncodedImages, bool]:
    """The images with these channels where they will stay, and whether that is on the device."""
    if isinstance(images, EncodedImages):
        if resident:
            raise InputError(
                f"resident is True, but {title} is a folder, which is decoded batch by batch: leave it out"
            )
        return images, False
    images = _with_channels(images, channels, title)
    if resident is None:
        resident = _fits(images, device, title)
    return _placed(images, device, resident), resident


def _with_channels(images: Tensor, channels: int | None, title: str) -> Tensor:
    if channels == 1 and images.shape[3] == 3:
        raise InputError(f"channels is 1, but {title} is RGB: leave channels out, or give 3")
    if channels == 3 and images.shape[3] == 1:
        return images.expand(-1, -1, -1, 3).contiguous()
    return images


def _fits(images: Tensor, device: torch.device, title: str) -> bool:
    """Whether the images may lie on the device; says in the log if not."""
    if device.type != "cuda":
        return True
    free = RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    if images.nbytes <= free:
        return True
    _log.warning(
        "%s (%.2f GiB) exceeds %.0f %% of the free memory of %s (%.2f GiB): it stays in host memory",
        title,
        images.nbytes / 2**30,
        100 * RESIDENT_SHARE,
        device,
        free / 2**30,
    )
    return False


def _placed(images: Tensor, device: torch.device, resident: bool) -> Tensor:
    if resident:
        return images.to(device)
    images = images.cpu()
    return images.pin_memory() if torch.cuda.is_available() else images


def _phantom_parts(split: str, seed: int, size: int, device: torch.device) -> _Parts:
    from amimv.pipelines.phantom import CLASS_NAMES, generate_phantom

    images, labels = generate_phantom(split, seed=seed, size=size, device=device)
    return _Parts(images, labels, tuple(CLASS_NAMES), "multi-class")


def _medmnist_parts(name: str, split: str, size: int, root: str | Path | None) -> _Parts:
    if size not in SIZES:
        raise InputError(f"{name} has no size {size}, expected one of {', '.join(map(str, SIZES))}")
    info = _medmnist_info()[name]
    path = _medmnist_file(name, size, root)
    _check_md5(path, info[f"MD5{_suffix(size)}"])
    names = tuple(info["label"][str(c)] for c in range(len(info["label"])))
    with _opened(path) as npz:
        labels = _read_labels(npz, split, path)
        check_range(labels, len(names), path, split)
        images = _read_images(npz, split, path, len(labels))
    return _Parts(_tensor(images), _tensor(labels), names, info["task"])


def _suffix(size: int) -> str:
    return "" if size == 28 else f"_{size}"


def _medmnist_file(name: str, size: int, root: str | Path | None) -> Path:
    """The path of an official file, downloaded if need be."""
    import medmnist
    from medmnist.info import DEFAULT_ROOT

    given = root or os.environ.get("AMIMV_DATA") or DEFAULT_ROOT
    if given is None or not user_path(given).is_dir():
        raise InputError(f"there is no folder {given} for the MedMNIST files: make it, or set root or AMIMV_DATA")
    folder = user_path(given)
    path = folder / f"{name}{_suffix(size)}.npz"
    if not path.exists():
        _log.info("%s is not there: downloading it", path)
        data_set = getattr(medmnist, _medmnist_info()[name]["python_class"])
        try:
            data_set(split="train", download=True, root=str(folder), size=size)
        except (RuntimeError, OSError, ValueError) as error:
            url = _medmnist_info()[name][f"url{_suffix(size)}"]
            raise InputError(
                f"{path} is missing and could not be downloaded: fetch {url} into {folder}, "
                "or set root or AMIMV_DATA to a folder that has it"
            ) from error
    return path


@cache
def _md5(path: Path, size: int, mtime_ns: int) -> str:
    """The sum of a file; its size and time tell a changed file from the one already read for another split."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _check_md5(path: Path, expected: str) -> None:
    state = path.stat()
    found = _md5(path.absolute(), state.st_size, state.st_mtime_ns)
    if found != expected:
        raise InputError(
            f"{path} has MD5 {found}, expected {expected}: it is damaged or not the official file; "
            "delete it to download it again"
        )


def _folder_parts(
    path: str, split: str, size: int | None, channels: int | None, device: torch.device
) -> tuple[_Parts, str]:
    """A folder of images, of which but a few have been opened, and the folder's name."""
    size = 224 if size is None else size
    if size < 1:
        raise InputError(f"size is {size}, expected at least 1 pixel")
    if not path:
        raise InputError(f"{FOLDER!r} names no folder: expected {FOLDER}PATH with images in PATH/train/CLASS")
    folder = user_path(path)
    found, title = list_folder(folder, split), folder.resolve().name
    sixteen_bits, remarks = inspect_files(found.paths, f"{title}, {split}")
    for line in (*found.remarks, *remarks):
        _log.warning(line)
    images = EncodedImages(found.paths, size, channels or 3, device, sixteen_bits)
    task = infer_task(False, len(found.class_names))
    return _Parts(images, torch.tensor(found.labels), found.class_names, task), title


def _own_file(name: str, root: str | Path | None) -> Path:
    """The file itself, or the one of that name beside MedMNIST's files."""
    path = user_path(name)
    beside = user_path(root or os.environ.get("AMIMV_DATA") or ".") / path
    return beside if beside.is_file() and not path.exists() else path


def _own_parts(path: Path, split: str, size: int | None, task: str | None) -> _Parts:
    """An own file; its classes are those of all its splits together."""
    if not path.is_file():
        raise InputError(f"there is no file {path}: expected an .npz in MedMNIST's layout")
    with _opened(path) as npz:
        present = [s for s in SPLITS if s == split or f"{s}_labels" in npz.files]
        every = {s: _read_labels(npz, s, path) for s in present}
        settled, n_classes = settle_labels(every, path, task)
        labels = settled[split]
        images = _read_images(npz, split, path, len(labels))
    if size not in (None, images.shape[1]):
        raise InputError(f"{path} holds images of {images.shape[1]} pixels, not of {size}: set size accordingly")
    if labels.ndim < every[split].ndim and split == present[0]:
        _log.warning(
            "%s: every row of labels has one 1: they are read as %d classes (task '%s' keeps them multi-hot)",
            path,
            n_classes,
            MULTI_LABEL,
        )
    inferred = infer_task(labels.ndim == 2, n_classes)
    return _Parts(_tensor(images), _tensor(labels), tuple(map(str, range(n_classes))), inferred)


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """The file's arrays, never unpickled; what cannot be read becomes one line."""
    try:
        npz = np.load(path, allow_pickle=False)
        if not isinstance(npz, np.lib.npyio.NpzFile):
            raise InputError(f"{path} is a single array, expected an .npz in MedMNIST's layout")
        with npz:
            yield npz
    except InputError:
        raise
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read as an .npz without pickle: {first_line(error)}") from error


def _read_array(npz: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    if key not in npz.files:
        found = ", ".join(npz.files) or "nothing"
        raise InputError(
            f"{path} has no array {key!r}, only {found}: expected MedMNIST's layout "
            "(train_images, train_labels, val_images, ...)"
        )
    try:
        array = npz[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise InputError(f"{path}: {key} holds Python objects (pickled), which are never read") from error
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise InputError(f"{path}: {key} holds NaN (in {array.dtype}), expected integers")
    return array


def _read_labels(npz: np.lib.npyio.NpzFile, split: str, path: Path) -> np.ndarray:
    """``(N,)`` or multi-hot ``(N, L)``, ``int64``."""
    labels = _read_array(npz, f"{split}_labels", path)
    if labels.dtype.kind not in "iub":
        raise InputError(f"{path}: {split}_labels is {labels.dtype}, expected integers")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or 0 in labels.shape[1:]:
        raise InputError(f"{path}: {split}_labels has shape {labels.shape}, expected (N,), (N, 1) or multi-hot (N, L)")
    return labels.astype(np.int64)


def _read_images(npz: np.lib.npyio.NpzFile, split: str, path: Path, n: int) -> np.ndarray:
    """``(n, H, W, C)`` ``uint8``, square."""
    images = _read_array(npz, f"{split}_images", path)
    where = f"{path}: {split}_images"
    if images.dtype != np.uint8:
        raise InputError(f"{where} is {images.dtype}, only uint8 is accepted: scale to 0..255 and convert")
    shape = images.shape
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(f"{where} has shape {shape}, expected (N, H, W) or (N, H, W, C) with C 1 or 3")
    if len(images) != n:
        raise InputError(f"{where} has {len(images)} images, but {split}_labels has {n} labels: expected as many")
    if n == 0:
        raise InputError(f"{where} is empty: the split needs at least one image")
    if images.shape[1] != images.shape[2] or images.shape[1] == 0:
        raise InputError(f"{where} has shape {shape}: expected square images (height equal to width)")
    return images


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
