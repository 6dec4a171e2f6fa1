"""torch and Hugging Face data sets, read into arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from amimv import InputError, did_you_mean
from amimv.pipelines.sources.arrays import channels_first

#: PIL's modes that become one grey channel; all others become RGB, but those of 16 bits.
GREY = ("1", "L", "LA")


def read_dataset(
    dataset: Any, image: str | int, label: str | int | None, group: str | int | None, size: int | None
) -> tuple[np.ndarray, list[Any] | None, list[Any] | None, tuple[str, ...] | None]:
    """Images ``(N, H, W, C)``, labels, groups and class names (None without); see `ImageStore.from_dataset`.

    Raises:
        InputError: an empty data set, no such column, no image in it, or images of several shapes.
    """
    _check_dataset(dataset, size)
    columns: list[list[Any]] = [[], []]
    images: np.ndarray | None = None
    for i in tqdm(range(len(dataset)), desc="reading images", unit="image", leave=False, disable=len(dataset) < 2000):
        example = dataset[i]
        pixels = _pixels(_entry(example, image, i), image, i, size)
        if images is None:
            images = np.empty((len(dataset), *pixels.shape), pixels.dtype)
        if pixels.shape != images.shape[1:] or pixels.dtype != images.dtype:
            got, first = (f"{shape} {kind}" for shape, kind in _kinds(pixels, images[0]))
            remedy = "give size=..., or convert" if size is None else "convert"
            raise InputError(f"image {i} is {got}, the first {first}: {remedy} them to one kind")
        images[i] = pixels
        for column, name in zip(columns, (label, group), strict=True):
            if name is not None:
                column.append(_plain(_entry(example, name, i)))
    assert images is not None
    labels, groups = (None if name is None else column for column, name in zip(columns, (label, group), strict=True))
    return images, labels, groups, _class_names(dataset, label)


def _check_dataset(dataset: Any, size: int | None) -> None:
    if isinstance(dataset, Mapping):
        raise InputError(f"this is several data sets by name, {', '.join(map(str, dataset))}: give one of them")
    try:
        length = len(dataset)
    except TypeError:
        kind = type(dataset).__name__
        raise InputError(f"a {kind} has no length: expected a data set that is sized and indexed") from None
    if not length:
        raise InputError("the data set is empty: expected at least one example")
    if size is not None and size < 1:
        raise InputError(f"size is {size}, expected at least 1 pixel")


def _kinds(*arrays: np.ndarray) -> list[tuple[tuple[int, ...], np.dtype]]:
    return [(array.shape, array.dtype) for array in arrays]


def _entry(example: Any, name: str | int, at: int) -> Any:
    """An example's entry of this name or place."""
    if isinstance(example, Mapping):
        if name not in example:
            hint = did_you_mean(str(name), map(str, example), ", {}")
            raise InputError(f"the data set has no column {name!r}, only {', '.join(map(str, example))}{hint}")
        return example[name]
    if isinstance(example, Image.Image | torch.Tensor | np.ndarray) and name in ("image", 0):
        return example  # an image alone
    if not isinstance(example, Sequence) or isinstance(name, str):
        # The names that are given by default stand for the first and second place of a tuple.
        places = {"image": 0, "label": 1}
        if not isinstance(example, Sequence) or name not in places:
            kind = type(example).__name__
            raise InputError(f"example {at} is a {kind}, which has no column {name!r}: give a place such as image=0")
        name = places[name]
    if not -len(example) <= name < len(example):
        raise InputError(f"example {at} has {len(example)} entries, so there is none at place {name}")
    return example[name]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else value


def _pixels(value: Any, name: str | int, at: int, size: int | None) -> np.ndarray:
    """``(H, W, C)``, resized if asked for."""
    if isinstance(value, Image.Image):
        array = _from_pil(value)
    elif isinstance(value, torch.Tensor | np.ndarray):
        array = value if isinstance(value, np.ndarray) else _from_tensor(value)
        if array.ndim == 3 and channels_first(array.shape):
            array = array.transpose(1, 2, 0)
    else:
        kind = type(value).__name__
        raise InputError(
            f"column {name!r} holds no image (example {at} has a {kind}), expected PIL's, arrays or tensors"
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.dtype.kind not in "uf":
        raise InputError(
            f"column {name!r} holds no image (example {at} has {array.shape} {array.dtype}), expected (H, W, C)"
        )
    return array if size is None else _squared(array, size)


def _from_pil(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return np.asarray(image, dtype=np.uint16)
    if image.mode in ("I", "F"):
        return np.asarray(image, dtype=np.float32)
    return np.asarray(image.convert("L" if image.mode in GREY else "RGB"))


def _from_tensor(tensor: torch.Tensor) -> np.ndarray:
    values = tensor.detach().cpu()
    array: np.ndarray = (values.float() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
    return array


def _squared(array: np.ndarray, size: int) -> np.ndarray:
    """Resized along the shorter side (linear, antialiased) and cropped to the square in the middle."""
    height, width = array.shape[:2]
    if (height, width) == (size, size):
        return array
    pixels = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)[None]
    scale = size / min(height, width)
    shape = [max(size, round(height * scale)), max(size, round(width * scale))]
    resized = torch.nn.functional.interpolate(pixels, shape, mode="bilinear", antialias=True)[0]
    top, left = ((side - size) // 2 for side in shape)
    square = resized[:, top : top + size, left : left + size].permute(1, 2, 0).numpy()
    return square.round().astype(array.dtype) if array.dtype.kind == "u" else square.astype(array.dtype)


def _class_names(dataset: Any, label: str | int | None) -> tuple[str, ...] | None:
    """Of a Hugging Face column of classes, or of torchvision's ``classes``."""
    feature = getattr(dataset, "features", None)
    if label is not None and isinstance(feature, Mapping) and (names := getattr(feature.get(label), "names", None)):
        return tuple(names)
    classes = getattr(dataset, "classes", None)
    return tuple(map(str, classes)) if label is not None and isinstance(classes, list | tuple) else None
