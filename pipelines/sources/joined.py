"""The splits that a data set has, joined in their order: it can then be cut anew."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.images import select_images
from amimv.pipelines.sources.listing import Listing
from amimv.pipelines.sources.npz import Arrays

Part = TypeVar("Part", Arrays, Listing)


def read_parts(first: str, joined: bool, read: Callable[[str], Part]) -> dict[str, Part]:
    """What ``read`` gives for the split ``first``, and where splits are to be ``joined``, for all others that there
    are.
    """
    found = read(first)
    return {first: found} | {split: read(split) for split in found.splits if joined and split != first}


def join_known(
    title: str, parts: Mapping[str, Arrays], groups: Sequence[Tensor | None]
) -> tuple[Arrays, Tensor | None]:
    """What is known about the images of all parts, in their order, without the images themselves.

    Args:
        title: of the data, for messages.
        parts: splits of one data set.
        groups: of the images of each part.

    Raises:
        InputError: images of several shapes or types, or labels or groups of some parts only.
    """
    splits, known = list(parts), list(parts.values())
    kinds = [f"{' x '.join(map(str, part.images.shape[1:]))} {part.images.dtype}" for part in known]
    for what, found in (
        ("images", kinds),
        ("labels", ["none" if part.labels is None else "given" for part in known]),
        ("groups", ["none" if one is None else "given" for one in groups]),
    ):
        if len(set(found)) > 1:
            told = ", ".join(f"{one} of {split}" for one, split in zip(found, splits, strict=True))
            raise InputError(
                f"{title}: {what} differ between the splits ({told}), which --resplit joins: "
                "make them alike, or leave it out"
            )
    labels = [part.labels for part in known if part.labels is not None]
    numbers = [one for one in groups if one is not None]
    return (
        known[0]._replace(images=torch.empty(0), labels=torch.cat(labels) if labels else None, groups=None),
        torch.cat(numbers) if numbers else None,
    )


def take_images(parts: list[Tensor], indices: Tensor) -> Tensor:
    """The images ``indices``, ``(M,)`` sorted ``int64``, of all ``parts`` ``(N, H, W, C)`` in a row.

    The list is emptied, so that no image is held twice for longer than its part is read.
    """
    like, indices = parts[0], indices.to(parts[0].device)
    out = torch.empty((len(indices), *like.shape[1:]), dtype=like.dtype, device=like.device)
    start = at = 0
    del like
    while parts:
        part = parts.pop(0)
        own = indices[(indices >= start) & (indices < start + len(part))] - start
        select_images(part, own, out=out[at : at + len(own)])
        start, at = start + len(part), at + len(own)
    return out
