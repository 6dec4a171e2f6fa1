"""What the pixels of a store say before any training: mean, std, and whether they look like a mistake."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.images import Images, spaced

#: Distinct values that the images of a set must have together not to be remarked on.
FEW_LEVELS = 32
#: Images, evenly spaced, that are looked at where all would have to be decoded.
SAMPLE = 2048
#: The values that become 0 and 1 where none are declared.
TYPE_RANGES = {torch.uint8: (0.0, 255.0), torch.uint16: (0.0, 65535.0), torch.float32: (0.0, 1.0)}


class PixelSummary(NamedTuple):
    """Of images ``(N, H, W, C)``.

    Attributes:
        mean, std: per channel, in units of the range that becomes [0, 1]; std (of the population) is at least 1/255,
            so that a constant channel divides.
        levels: distinct values, and the lowest and the highest.
        images: how many were looked at.
        constant: images of one colour.
        unscaled: other images that hold nothing but 0 and 1, of a type whose range is wider.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    levels: tuple[int, float, float]
    images: int
    constant: int
    unscaled: int


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (of the population) per channel, in units of [0, 1].

    Args:
        images: ``(N, H, W, C)``, ``uint8``, ``uint16`` or float in [0, 1], N at least 1, on any device.

    Returns:
        Mean and std, C numbers each; std is at least 1/255.
    """
    found = summarise(images.split(chunk_length(tuple(images.shape))), images.shape[3])
    return found.mean, found.std


def chunk_length(shape: tuple[int, ...]) -> int:
    """Images at a time, which bounds the memory that a summary takes."""
    return max(1, 2**22 // math.prod(shape[1:]))


def looked_at(images: Images) -> Iterator[Tensor]:
    """All images, or an evenly spaced sample of at most ``SAMPLE`` of those that have to be decoded, in parts."""
    n = images.shape[0]
    chosen = spaced(n, n if images.decoded else SAMPLE)
    return images.stream(chosen.split(chunk_length(images.shape)))


def summarise(parts: Iterable[Tensor], channels: int, value_range: tuple[float, float] | None = None) -> PixelSummary:
    """One pass over images that come in parts ``(n, H, W, C)``, at least one image."""
    levels = _Levels(channels, value_range)
    oddities = torch.zeros(2, dtype=torch.int64)
    images = 0
    for part in parts:
        images += len(part)
        wide = part.to(torch.float32) if part.dtype == torch.uint16 else part
        levels.add(wide, part.dtype)
        low, high = wide.flatten(1, 2).aminmax(dim=1)
        constant = (low == high).all(1)
        unscaled = (high <= 1).all(1) & ~constant & (not part.is_floating_point())
        oddities += torch.stack([constant.sum(), unscaled.sum()]).cpu()
    return PixelSummary(*levels.statistics(), levels.told(), images, *oddities.tolist())


class _Levels:
    """Counts of whole numbers, or sums of floats, per channel: exact integers as far as there are any."""

    def __init__(self, channels: int, value_range: tuple[float, float] | None) -> None:
        self.channels, self.value_range = channels, value_range
        self.counts: Tensor | None = None
        self.n = 0
        self.sums = torch.zeros(2, channels, dtype=torch.float64)
        self.ends = (math.inf, -math.inf)

    def add(self, values: Tensor, dtype: torch.dtype) -> None:
        self.low, self.high = self.value_range or TYPE_RANGES.get(dtype, (0.0, 1.0))
        flat = values.flatten(0, 2)
        self.n += len(flat)
        if dtype.is_floating_point:
            scaled = ((flat.double() - self.low) / (self.high - self.low)).clamp(0, 1)
            self.sums += torch.stack([scaled.sum(0), scaled.square().sum(0)]).cpu()
            self.ends = (min(self.ends[0], float(flat.min())), max(self.ends[1], float(flat.max())))
            return
        bins = 256 if dtype == torch.uint8 else 65536
        if self.counts is None:
            self.counts = torch.zeros(self.channels, bins, dtype=torch.int64, device=values.device)
        for c, channel in enumerate(flat.unbind(1)):
            self.counts[c] += torch.bincount(channel.long(), minlength=bins)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.counts is None:
            mean = self.sums[0] / self.n
            std = (self.sums[1] / self.n - mean.square()).clamp(min=0).sqrt()
            return tuple(mean.tolist()), tuple(max(s, 1 / 255) for s in std.tolist())
        counts = self.counts.cpu()
        if self.value_range is None:
            return _exact(counts, self.n, int(self.high))
        value = ((torch.arange(counts.shape[1]).double() - self.low) / (self.high - self.low)).clamp(0, 1)
        mean = (counts * value).sum(1) / self.n
        std = ((counts * value.square()).sum(1) / self.n - mean.square()).clamp(min=0).sqrt()
        return tuple(mean.tolist()), tuple(max(s, 1 / 255) for s in std.tolist())

    def told(self) -> tuple[int, float, float]:
        if self.counts is None:
            return FEW_LEVELS, *self.ends  # how many a float has is not counted
        values = self.counts.sum(0).nonzero().flatten().tolist()
        return len(values), values[0], values[-1]


def _exact(counts: Tensor, n: int, top: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """From counts of values 0..top: the sums are exact integers, the last steps ``float64``."""
    value = torch.arange(counts.shape[1])
    sums = [((row * value).sum().item(), (row * value.square()).sum().item()) for row in counts]
    mean = tuple(s / (top * n) for s, _ in sums)
    return mean, tuple(max(math.sqrt(n * q - s * s) / (top * n), 1 / 255) for s, q in sums)


def found_range(images: Iterable[Tensor]) -> tuple[float, float]:
    """The lowest and the highest value of images that come in parts; one more, where all values are the same."""
    ends = [part.to(torch.float32).aminmax() for part in images]
    lowest = min(float(low) for low, _ in ends)
    return lowest, max(lowest + 1, *(float(high) for _, high in ends))


def check_floats(images: Tensor, value_range: tuple[float, float] | None, title: str) -> None:
    """Raise an `InputError` for floats that are no numbers, or outside of [0, 1] without a declared range."""
    low, high = (float(end) for end in images.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{title}: images hold NaN or infinity, expected numbers")
    if value_range is None and (low < 0 or high > 1):
        raise InputError(
            f"{title}: float images reach from {low:g} to {high:g}, expected [0, 1]: scale them, "
            "or give value_range=(low, high)"
        )


def pixel_remark(summary: PixelSummary) -> str:
    """What looks like a mistake in the values, with numbers, as the end of a line; empty where nothing does."""
    s, remarks = summary, []
    if s.constant:
        remarks.append(f"{s.constant} are of one colour each")
    if s.unscaled:
        remarks.append(f"{s.unscaled} hold nothing but 0 and 1 (floats cast without scaling to 0..255?)")
    if s.levels[0] < FEW_LEVELS:
        remarks.append(f"all together have {s.levels[0]} distinct values, {s.levels[1]:g} to {s.levels[2]:g}")
    return f"of {s.images} images looked at, {'; '.join(remarks)}" if remarks else ""
