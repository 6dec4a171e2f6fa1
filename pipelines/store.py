"""Image stores: a whole data set that stays on a device, with what is known about its images."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.groups import encode_groups
from amimv.pipelines.images import Images, Parts, place_images
from amimv.pipelines.sources.arrays import check_images, check_labels
from amimv.pipelines.sources.labels import missing_classes
from amimv.pipelines.sources.pixels import check_floats, found_range, looked_at, pixel_remark, summarise
from amimv.pipelines.sources.value_range import check_range

_log = logging.getLogger("amimv")


@dataclass(frozen=True, eq=False)
class ImageStore:
    """A data set's split: images, and what is known about them.

    Made by `from_arrays`, `from_dataset` and `load_store`; for what was read already by `build`.

    Attributes:
        images: ``(N, H, W, C)`` ``uint8``, ``uint16`` or ``float32``: on ``device``, in host memory, or in files that
            have that shape once decoded; see `Images`.
        labels: ``(N,)`` ``int64`` in 0..n_classes-1, or ``(N, L)`` ``int64`` multi-hot; on ``device``. None without.
        groups: ``(N,)`` ``int64``, equal for images of one patient, lesion or slide; on ``device``. None without.
        name: of the data set.
        split: "train", "val" or "test".
        class_names: one per class or label; none without labels.
        task: one of ``TASKS``; empty without labels.
        device: where batches are wanted.
        mean, std: per channel, of these very images, in units of [0, 1] (of files, of an evenly spaced sample);
            validation and test images are normalised with those of the training store.
        value_range: what stored values become 0 and 1, for validation and test images that of the training store,
            too; None: the range of ``uint8``, or floats as they are.
        left_out: files of this split that could not be decoded, where they were to be skipped.
    """

    images: Images = field(repr=False)
    labels: Tensor | None = field(repr=False)
    groups: Tensor | None = field(repr=False)
    name: str
    split: str
    class_names: tuple[str, ...]
    task: str
    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_range: tuple[float, float] | None = None
    left_out: tuple[str, ...] = ()

    @classmethod
    def build(
        cls,
        images: Images,
        labels: Tensor | None = None,
        groups: Tensor | None = None,
        *,
        name: str,
        device: torch.device,
        split: str = "train",
        class_names: Sequence[str] = (),
        task: str = "",
        value_range: tuple[float, float] | None = None,
    ) -> "ImageStore":
        """A store of what has been read and checked; looks at the pixels, and says in the log what looks like a
        mistake.

        Args:
            images: N.
            labels, groups, name, device, split, class_names, task: see the attributes.
            value_range: None takes that of ``uint8``, of ``uint16`` the values that there are.
        """
        if value_range is None and images.dtype == torch.uint16:
            value_range = found_range(looked_at(images))
        found = summarise(looked_at(images), images.shape[3], value_range)
        labels, groups = (None if values is None else values.to(device) for values in (labels, groups))
        names = tuple(class_names)
        store = cls(images, labels, groups, name, split, names, task, device, found.mean, found.std, value_range)
        if remark := pixel_remark(found):
            _log.warning("%s, %s: %s", name, split, remark)
        if labels is not None and (missing := missing_classes(store.class_counts(), names)):
            _log.warning("%s, %s: no image of %s %s", name, split, "label" if store.multi_label else "class", missing)
        return store

    @classmethod
    def from_arrays(
        cls,
        images: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | Sequence[int] | None = None,
        groups: Tensor | np.ndarray | Sequence[Any] | None = None,
        *,
        device: torch.device | str = "cpu",
        name: str = "arrays",
        split: str = "train",
        class_names: Sequence[str] | None = None,
        task: str | None = None,
        value_range: tuple[float, float] | None = None,
        resident: bool | None = None,
    ) -> "ImageStore":
        """A store of arrays.

        Args:
            images: ``(N, H, W)`` or ``(N, H, W, C)``, ``uint8``, ``uint16``, or float in [0, 1] (any C, H and W).
            labels: ``(N,)`` integers from 0, or ``(N, L)`` multi-hot; None without.
            groups: one integer or text for each image, the same for those of one patient, lesion or slide.
            device: where batches are wanted.
            name, split: for titles and the log.
            class_names: by default the numbers of the classes.
            task: one of ``TASKS``; by default "binary-class" (two classes), "multi-class" or, of multi-hot labels,
                "multi-label, binary-class".
            value_range: the values that become 0 and 1 (12 bits in 16: ``(0, 4095)``; a CT window); what lies
                outside is clamped. By default that of ``uint8``, and of ``uint16`` the values that there are.
            resident: whether the images lie on the device; by default if they fit.

        Raises:
            InputError: for arrays of other shapes, types or values.
        """
        device = checked_device(device)
        pixels, value_range = check_images(images, name), check_range(value_range)
        if pixels.is_floating_point():
            check_floats(pixels, value_range, name)
        numbers, names, task = check_labels(labels, len(pixels), class_names, task, name)
        return cls.build(
            place_images(pixels, device, resident, name),
            numbers,
            None if groups is None else _encoded(groups, len(pixels), split, name),
            name=name,
            device=device,
            split=split,
            class_names=names,
            task=task,
            value_range=value_range,
        )

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        image: str | int = "image",
        label: str | int | None = None,
        group: str | int | None = None,
        size: int | None = None,
        **settings: Any,
    ) -> "ImageStore":
        """A store of a torch or Hugging Face data set, read once, example by example.

        Args:
            dataset: sized and indexed; its examples are mappings or tuples, its images PIL's, arrays or tensors
                (``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``).
            image, label, group: where an example has them: a name, or a place in the tuple.
            size: images are resized to this height and width in pixels, the shorter side, and cropped to the square in
                the middle; None: they all have one shape already.
            settings: as of `from_arrays`.

        Raises:
            InputError: no such column, no image in it, or images of several shapes.
        """
        from amimv.pipelines.sources.dataset import read_dataset

        images, labels, groups, names = read_dataset(dataset, image, label, group, size)
        return cls.from_arrays(images, labels, groups, **({"class_names": names} | settings))

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def n_classes(self) -> int:
        """Classes, or labels of a multi-label set; 0 without labels."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    @property
    def size(self) -> int:
        """Height and width in pixels of the square that a whole view shows: the shorter side."""
        return min(self.images.shape[1:3])

    @property
    def aspect(self) -> float:
        """Width / height."""
        return self.images.shape[2] / self.images.shape[1]

    @property
    def multi_label(self) -> bool:
        return self.labels is not None and self.labels.ndim == 2

    def known_labels(self, what: str) -> Tensor:
        """The labels, for what needs them.

        Raises:
            InputError: naming ``what`` if the store has none.
        """
        if self.labels is None:
            raise InputError(f"{what} needs labels, and {self.name} ({self.split}) has none")
        return self.labels

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
        images = self.images.subset(indices)
        found = summarise(looked_at(images), self.channels, self.value_range)
        own = indices.to(self.device)
        labels, groups = (None if values is None else values[own] for values in (self.labels, self.groups))
        return replace(self, images=images, labels=labels, groups=groups, mean=found.mean, std=found.std)

    def gather(self, indices: Tensor) -> Tensor:
        """The images ``indices``, ``(...)`` ``int64`` to ``(..., H, W, C)`` on ``device``, as they are stored."""
        return self.images.gather(indices)

    def stream(self, parts: Parts) -> Iterator[Tensor]:
        """What `gather` gives for each of ``parts`` ``(steps, ..., B)``, prepared ahead; see `Images.stream`.

        Raises:
            InputError: if a file cannot be read or decoded.
        """
        return self.images.stream(parts)

    def class_counts(self) -> list[int]:
        """Images per class, on the host; of a multi-label set the images that carry each label; none without."""
        if self.labels is None:
            return []
        counts = self.labels.sum(0) if self.labels.ndim == 2 else torch.bincount(self.labels, minlength=self.n_classes)
        numbers: list[int] = counts.tolist()
        return numbers


def _encoded(groups: Tensor | np.ndarray | Sequence[Any], n: int, split: str, name: str) -> Tensor:
    """``(n,)`` ``int64``."""
    encoded = encode_groups(groups, salt=split)
    if encoded.shape != (n,):
        raise InputError(f"{name}: {len(encoded)} groups for {n} images: expected one for each")
    return encoded


def checked_device(device: torch.device | str) -> torch.device:
    """The device with its index.

    Raises:
        InputError: if it is not there.
    """
    try:
        device = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}, expected cpu, cuda or cuda:NUMBER") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise InputError(f"device is {device}, but PyTorch finds no CUDA device here: use device='cpu'")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
