"""What the pixels of a store say before any training: mean, std, and whether they look like a mistake."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

#: Distinct values that the images of a set must have together not to be remarked on.
FEW_LEVELS = 32


class PixelSummary(NamedTuple):
    """Of ``(N, H, W, C)`` ``uint8`` images.

    Attributes:
        mean, std: per channel, in units of [0, 1]; std (of the population) is at least 1/255.
        levels: the distinct values, sorted.
        images: N.
        constant: images of one colour.
        unscaled: other images that hold nothing but 0 and 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    levels: tuple[int, ...]
    images: int
    constant: int
    unscaled: int


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (of the population) per channel, in units of [0, 1].

    Args:
        images: ``(N, H, W, C)`` ``uint8``, N at least 1, on any device.

    Returns:
        Mean and std, C numbers each: the sums are exact integers, the last steps ``float64``. std is at least
            1/255.
    """
    found = summarise(images.split(chunk_length(images.shape)), images.shape[3], images.device)
    return found.mean, found.std


def chunk_length(shape: tuple[int, ...]) -> int:
    """Images at a time, which bounds the memory that a summary takes."""
    return max(1, 2**22 // math.prod(shape[1:]))


def summarise(parts: Iterable[Tensor], channels: int, device: torch.device) -> PixelSummary:
    """One pass over images that come in parts ``(n, H, W, C)`` ``uint8`` on ``device``, at least one image."""
    counts = torch.zeros(channels, 256, dtype=torch.int64, device=device)
    oddities = torch.zeros(2, dtype=torch.int64, device=device)
    images = 0
    for part in parts:
        images += len(part)
        for c, values in enumerate(part.unbind(3)):
            counts[c] += torch.bincount(values.flatten(), minlength=256)
        low, high = part.flatten(1, 2).aminmax(dim=1)
        constant = (low == high).all(1)
        unscaled = (high <= 1).all(1) & ~constant
        oddities += torch.stack([constant.sum(), unscaled.sum()])
    value = torch.arange(256)
    counts = counts.cpu()
    n = int(counts[0].sum())
    sums = [((row * value).sum().item(), (row * value.square()).sum().item()) for row in counts]
    mean = tuple(s / (255 * n) for s, _ in sums)
    std = tuple(max(math.sqrt(n * q - s * s) / (255 * n), 1 / 255) for s, q in sums)
    levels = tuple(counts.sum(0).nonzero().flatten().tolist())
    return PixelSummary(mean, std, levels, images, *oddities.tolist())


def pixel_remark(summary: PixelSummary) -> str:
    """What looks like a mistake in the values, with numbers, as the end of a line; empty where nothing does."""
    s, remarks = summary, []
    if s.constant:
        remarks.append(f"{s.constant} are of one colour each")
    if s.unscaled:
        remarks.append(f"{s.unscaled} hold nothing but 0 and 1 (floats cast without scaling to 0..255?)")
    if len(s.levels) < FEW_LEVELS:
        remarks.append(f"all together have {len(s.levels)} distinct values, {s.levels[0]} to {s.levels[-1]}")
    return f"of {s.images} images looked at, {'; '.join(remarks)}" if remarks else ""
