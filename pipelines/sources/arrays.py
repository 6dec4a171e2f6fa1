"""Arrays of images and labels, checked: everything that they can have wrong is found here, in one line."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.sources.labels import check_task, infer_task

#: How arrays that hold no numbers are told, by NumPy's kind.
NO_NUMBERS = {"U": "text", "S": "text", "O": "Python objects", "M": "dates"}


def _tensor(values: Any, what: str, expected: str) -> Tensor:
    """Of whatever is like an array, without a copy where there is none needed."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"{what} several lengths or shapes, expected {expected}") from None
    if array.dtype.kind in NO_NUMBERS:
        raise InputError(f"{what} {NO_NUMBERS[array.dtype.kind]}, expected {expected}")
    with warnings.catch_warnings():
        # Of arrays that are read only, such as mapped files: nothing writes to a store.
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.as_tensor(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))


def channels_first(shape: Sequence[int]) -> bool:
    """Whether this is ``(C, H, W)``, which would else pass as an image of few rows and many channels."""
    first, second, last = shape
    return first < last and (first < 8 or second == last)


def check_images(images: Tensor | np.ndarray, where: str) -> Tensor:
    """``(N, H, W, C)`` ``uint8``, ``uint16`` or ``float32``, contiguous.

    Args:
        images: ``(N, H, W)`` or ``(N, H, W, C)``, of these types or wider floats.
        where: what errors begin with.

    Raises:
        InputError: for another shape or type, or no image.
    """
    tensor = _tensor(images, f"{where} is", "uint8, uint16 or float (N, H, W) or (N, H, W, C)")
    shape = tuple(tensor.shape)
    if tensor.dtype not in (torch.uint8, torch.uint16) and not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{where} is {kind}, expected uint8, uint16 or float: convert it, with its range in mind")
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(3)
    if tensor.ndim != 4:
        raise InputError(f"{where} has shape {shape}, expected (N, H, W) or (N, H, W, C)")
    if not shape[0]:
        raise InputError(f"{where} is empty: expected at least one image")
    if 0 in shape:
        raise InputError(f"{where} has shape {shape}: expected at least one pixel and channel")
    if tensor.shape[3] > 64 or channels_first(tensor.shape[1:]):
        raise InputError(f"{where} has shape {shape}, expected channels last: (N, H, W, C) with C at most 64")
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def check_labels(
    labels: Tensor | np.ndarray | Sequence[int] | None,
    images: int,
    class_names: Sequence[str] | None,
    task: str | None,
    where: str,
) -> tuple[Tensor | None, tuple[str, ...], str]:
    """Labels ``(N,)`` or ``(N, L)`` ``int64``, the names of their classes, and the task; (None, (), "") without.

    Raises:
        InputError: for another shape, type or range, or a task that does not fit.
    """
    if labels is None:
        if task:
            raise InputError(f"{where}: task {task!r} is given, but there are no labels")
        return None, (), ""
    numbers = _tensor(labels, f"{where}: labels are", "integers (N,) or multi-hot (N, L)")
    if numbers.ndim == 2 and numbers.shape[1] == 1:
        numbers = numbers[:, 0]
    if numbers.is_floating_point() or numbers.is_complex() or numbers.ndim not in (1, 2) or 0 in numbers.shape[1:]:
        got = f"{tuple(numbers.shape)} {numbers.dtype}"
        raise InputError(f"{where}: labels are {got}, expected integers (N,) or multi-hot (N, L)")
    if len(numbers) != images:
        raise InputError(f"{where}: {len(numbers)} labels for {images} images: expected as many")
    numbers = numbers.to(torch.int64)
    low, high = int(numbers.min()), int(numbers.max())
    multi = numbers.ndim == 2
    found = numbers.shape[1] if multi else max(high + 1, 2)
    names = tuple(class_names) if class_names else tuple(map(str, range(found)))
    top = 1 if multi else len(names) - 1
    if multi and len(names) != found:
        raise InputError(f"{where}: {len(names)} class names for labels of {found} columns: expected one for each")
    if low < 0 or high > top:
        raise InputError(f"{where}: labels reach from {low} to {high}, expected 0..{top} ({len(names)} classes)")
    task = task or infer_task(multi, len(names))
    check_task(task, multi, len(names), where)
    return numbers, names, task
