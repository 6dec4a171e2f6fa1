"""Greyscale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from amimv.fields import setting
from amimv.pipelines.operations.base import Colour, ColourChange, Examples, Source

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Grey(Colour):
    """Luma in all three channels, by a probability. Other images than RGB stay as they are. No soft counterpart."""

    lane, uniforms = 12, 1
    examples: ClassVar[Examples] = {"grey": {"grey_p": 1.0}}
    grey_p: float = setting(0.0, "probability of greyscale (RGB only)", 0, 1)

    @property
    def active(self) -> bool:
        return self.grey_p > 0

    def soft(self) -> None:
        return None

    def draw(self, u: Sequence[Tensor], source: Source) -> ColourChange:
        import torch

        if not source.coloured:
            return ColourChange()
        return ColourChange(chroma=torch.where(u[0] < self.grey_p, 0.0, 1.0))
