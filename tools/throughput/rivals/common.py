"""What all of them share: the views that they give, and the store that they read."""

from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.images import ResidentImages
from amimv.pipelines.store import ImageStore

#: Two views of the same images, each ``(B, C, H, W)`` ``float32``, normalised, on the store's device.
Views = tuple[Tensor, Tensor]
#: ``(store, batch_size, threads, policy=HARD)`` to endless batches, epoch after epoch in random order, each without
#: its last incomplete batch; ``close()`` ends workers and pipelines. Of the policy the operations named above are read
#: (not its size, mean and std). Raises `InputError` for a store that it cannot take.
Batches = Callable[..., Generator[Views, None, None]]


def checked_images(store: ImageStore, batch_size: int) -> Tensor:
    """The store's ``(N, H, W, C)`` images; an `InputError` unless they are in memory and an epoch has a batch."""
    if not isinstance(store.images, ResidentImages):
        raise InputError(f"{store.name} is not on the device as a whole: give a data set that fits into its memory")
    if not 1 <= batch_size <= len(store):
        raise InputError(f"batch size is {batch_size}, expected 1 to {len(store)}, the number of images")
    return store.images.tensor


def shuffled(store: ImageStore, batch_size: int) -> Iterator[Tensor]:
    """``(B, H, W, C)`` ``uint8`` batches on the store's device, without end."""
    whole = len(store) // batch_size * batch_size
    while True:
        order = torch.randperm(len(store), device=store.device)[:whole]
        yield from map(store.gather, order.split(batch_size))
