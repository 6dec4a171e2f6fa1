"""What an operation is: one kind of augmentation, in one file, with everything that is known about it.

An operation has settings (its fields), a lane of uniform numbers that is its own for good, and a draw: a pure function
of these numbers, before any pixel is touched. It belongs to one of three stages:

- *geometry*: a matrix from output to input coordinates; all of them compose to one matrix and one resample per view;
- *colour*: a gain, an offset and a turn of the chroma; all of them compose to one matrix per view;
- *pixels*: what works on the finished picture, one after the other, in the order of ``OPERATIONS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from amimv.fields import check_numbers

if TYPE_CHECKING:
    from torch import Tensor

#: Settings of an operation that show what it does, by name.
Examples = Mapping[str, Mapping[str, Any]]
#: Luma weights of ITU-R BT.601, as torchvision and Kornia use for greyscale.
LUMA = (0.299, 0.587, 0.114)


class Source(NamedTuple):
    """What a draw may know of the images: mean per channel in [0, 1], and width / height."""

    mean: tuple[float, ...]
    aspect: float = 1.0

    @property
    def coloured(self) -> bool:
        """Whether the channels are red, green and blue, which saturation, hue and greyscale are defined for."""
        return len(self.mean) == 3


@dataclasses.dataclass(frozen=True)
class Operation:
    """One kind of augmentation. Fields are made by `amimv.fields.setting`, and no two operations share a field's name.

    Attributes:
        lane: number of its first uniform; no two operations' lanes overlap, and none ever moves.
        uniforms: how many it draws per sample.
        examples: settings that show what it does, by name: for tests and tables.
    """

    lane: ClassVar[int]
    uniforms: ClassVar[int]
    examples: ClassVar[Examples]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_numbers(field, getattr(self, field.name))

    @classmethod
    def key(cls) -> str:
        """Its name in `ViewParams.pixels`, in tables and in messages."""
        return cls.__name__.lower()

    @property
    def active(self) -> bool:
        """Whether it can change a view; one that cannot is not drawn."""
        raise NotImplementedError

    def soft(self) -> Self | None:
        """Its soft counterpart; None leaves it out."""
        return self


class Geometry(Operation):
    """A stage-one operation: ``draw`` gives a matrix, output to input."""

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        """``(B, 2, 3)`` in coordinates [-1, 1], from its ``uniforms`` numbers in [0, 1), each ``(B,)``."""
        raise NotImplementedError


class ColourChange(NamedTuple):
    """``gain * chroma(colour) + offset``: what brightness, contrast, saturation, hue and greyscale amount to.

    Attributes:
        gain: ``(B,)``, of all channels.
        chroma: ``(B,)`` complex, scales and turns the (I, Q) plane of YIQ; luma stays. None: nothing, and for
            channels that are not red, green and blue.
        offset: ``(B, C)``, or ``(B, 1)`` for all channels, in units of [0, 1]; None: nothing.
    """

    gain: Tensor | None = None
    chroma: Tensor | None = None
    offset: Tensor | None = None

    def then(self, after: ColourChange) -> ColourChange:
        """This change, and another behind it (a turn of the chroma leaves a grey offset as it is)."""
        offset = self.offset
        if offset is not None and after.gain is not None:
            offset = offset * after.gain[:, None]
        return ColourChange(
            _product(self.gain, after.gain), _product(self.chroma, after.chroma), _sum(offset, after.offset)
        )


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class Colour(Operation):
    """A stage-two operation: ``draw`` gives a `ColourChange`."""

    def draw(self, u: Sequence[Tensor], source: Source) -> ColourChange:
        """From its ``uniforms`` numbers in [0, 1), each ``(B,)``."""
        raise NotImplementedError


class Pixels(Operation):
    """A stage-three operation: ``draw`` gives numbers, ``apply`` and ``apply_dali`` the same pixels from them."""

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        """``(B,)`` or ``(B, K)`` ``float32``, from its ``uniforms`` numbers in [0, 1), each ``(B,)``.

        They say everything about the sample, so that ``apply`` needs no settings; where the operation is not drawn
        they make it an identity.
        """
        raise NotImplementedError

    @staticmethod
    def apply(images: Tensor, drawn: Tensor) -> Tensor:
        """``(B, C, H, W)`` ``float32`` in [0, 1] to the same; ``images`` may be written to."""
        raise NotImplementedError

    @staticmethod
    def apply_dali(ndd: Any, view: Any, drawn: Tensor) -> Any:
        """The same with DALI's dynamic mode: ``HWC`` ``float32`` in [0, 255]; ``drawn`` is on the host."""
        raise NotImplementedError

    @classmethod
    def has_dali_form(cls) -> bool:
        return cls.apply_dali is not Pixels.apply_dali


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """``(B, 2, 3)``: first ``inner``, then ``outer``, on coordinates. Element by element, whatever autocast says."""
    product = (outer[:, :, :2, None] * inner[:, None]).sum(2)
    product[:, :, 2] += outer[:, :, 2]
    return product


def matrix(rows: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    """``(B, 2, 3)`` from two rows of three entries, each ``(B,)`` or a number."""
    import torch

    entries = [[e if isinstance(e, torch.Tensor) else torch.full_like(like, e) for e in row] for row in rows]
    return torch.stack([torch.stack(row, dim=1) for row in entries], dim=1)


def spread(u: Tensor, limits: tuple[float, float]) -> Tensor:
    """Uniform numbers in [0, 1) as numbers between the limits."""
    low, high = limits
    return low + (high - low) * u


def on_host(images: Tensor) -> bool:
    """Whether there is no device to wait for, and no fixed graph to keep to: then values may be looked at."""
    import torch

    return images.device.type == "cpu" and not torch.compiler.is_compiling()


def per_sample(values: Tensor) -> Tensor:
    """``(B,)`` as ``(B, 1, 1, 1)``."""
    return values[:, None, None, None]
