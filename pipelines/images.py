"""What holds a store's images: on the device, in host memory, or (`sources.encoded`) in their files."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

#: Share of the device's free memory that a store may take; the rest is for networks and batches.
RESIDENT_SHARE = 0.6

_log = logging.getLogger("amimv")


#: Indices, part by part.
Parts = Tensor | Sequence[Tensor]


class Images(Protocol):
    """N images of one shape that batches are taken of, on one device."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, H, W, C)``."""

    @property
    def dtype(self) -> torch.dtype:
        """``uint8``, ``uint16`` or ``float32``."""

    @property
    def decoded(self) -> bool:
        """Whether all of them can be looked at in passing."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The files that they are of, one each; none of arrays."""

    def gather(self, indices: Tensor) -> Tensor:
        """The images ``indices``: ``(...)`` ``int64``, on any device, to ``(..., H, W, C)`` on the device."""

    def stream(self, parts: Parts) -> Iterator[Tensor]:
        """What `gather` gives for each of ``parts``, in order, and prepared ahead where it is not on the device yet.

        Args:
            parts: ``int64``: ``(steps, ..., B)``, on any device, brought to the host, if need be, once for all steps;
                or a sequence of parts of any shape.
        """

    def subset(self, indices: Tensor) -> "Images":
        """The images ``indices`` (``(M,)`` ``int64``, on any device), held likewise."""


def select_images(images: Tensor, indices: Tensor, out: Tensor | None = None) -> Tensor:
    """``images[indices]`` by whole images; indexing with a tensor goes element by element on the CPU.

    As signed numbers, since torch gathers no ``uint16`` on every device.
    """
    if images.dtype != torch.uint16:
        return torch.index_select(images, 0, indices, out=out)
    out = None if out is None else out.view(torch.int16)
    return torch.index_select(images.view(torch.int16), 0, indices, out=out).view(torch.uint16)


def spaced(n: int, most: int, device: torch.device | str = "cpu") -> Tensor:
    """``int64`` places of up to ``most`` of ``n`` things, evenly spaced, in their order."""
    count = min(n, most)
    return torch.arange(count, device=device) * n // count


def on_the_host(parts: Parts) -> Sequence[Tensor]:
    """The parts, brought to the host at once."""
    return parts.cpu().unbind(0) if isinstance(parts, Tensor) else [part.cpu() for part in parts]


def chosen(paths: tuple[str, ...], indices: Tensor) -> tuple[str, ...]:
    """The paths ``indices``, if there are any."""
    return tuple(paths[i] for i in indices.tolist()) if paths else ()


class _OneTensor:
    """What images that are one tensor, wherever it lies, say of themselves."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def decoded(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class ResidentImages(_OneTensor):
    """Images on the device; nothing waits for it."""

    tensor: Tensor = field(repr=False)
    paths: tuple[str, ...] = field(default=(), repr=False)

    def gather(self, indices: Tensor) -> Tensor:
        flat = indices.flatten().to(self.tensor.device)
        return select_images(self.tensor, flat).view(*indices.shape, *self.shape[1:])

    def stream(self, parts: Parts) -> Iterator[Tensor]:
        return map(self.gather, parts.to(self.tensor.device).unbind(0) if isinstance(parts, Tensor) else parts)

    def subset(self, indices: Tensor) -> "ResidentImages":
        return ResidentImages(select_images(self.tensor, indices.to(self.tensor.device)), chosen(self.paths, indices))


@dataclass(frozen=True, eq=False)
class HostImages(_OneTensor):
    """Images in host memory (pinned where there is CUDA; or a mapped file), for a device that they do not fit on.

    Indices are brought to the host, which is the only wait (none if they are there already); the images are gathered
    into pinned memory and copied on a side stream, and what is queued next on the current stream waits for the copy.
    """

    tensor: Tensor = field(repr=False)
    device: torch.device
    paths: tuple[str, ...] = field(default=(), repr=False)

    def gather(self, indices: Tensor) -> Tensor:
        flat = indices.flatten().cpu()
        shape = (len(flat), *self.shape[1:])
        batch = torch.empty(shape, dtype=self.dtype, pin_memory=torch.cuda.is_available())
        select_images(self.tensor, flat, out=batch)
        return _copied_aside(batch, self.device).view(*indices.shape, *self.shape[1:])

    def stream(self, parts: Parts) -> Iterator[Tensor]:
        # The copies run ahead on the side stream, as nothing waits for the device in between.
        return map(self.gather, on_the_host(parts))

    def subset(self, indices: Tensor) -> "HostImages":
        return HostImages(_pinned(select_images(self.tensor, indices.cpu())), self.device, chosen(self.paths, indices))


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


def _pinned(images: Tensor) -> Tensor:
    return images.pin_memory() if torch.cuda.is_available() else images


def place_images(
    images: Tensor, device: torch.device, resident: bool | None, title: str, paths: tuple[str, ...] = ()
) -> Images:
    """Images ``(N, H, W, C)`` where they will stay.

    Args:
        images: on any device.
        device: where batches are wanted.
        resident: whether that is where they stay; None: if they fit into ``RESIDENT_SHARE`` of its free memory.
        title: of the data set, for the log.
        paths: the files that they are of.
    """
    if _fits(images, device, title) if resident is None else resident:
        return ResidentImages(images.to(device), paths)
    return HostImages(_pinned(images.cpu()), device, paths)


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
