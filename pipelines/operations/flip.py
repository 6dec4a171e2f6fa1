"""Mirroring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from amimv.fields import setting
from amimv.pipelines.operations.base import Examples, Geometry, Source, matrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Flip(Geometry):
    """Mirrored left-right, up-down, each by a probability."""

    lane, uniforms = 4, 2
    examples: ClassVar[Examples] = {"hflip": {"hflip": 1.0}, "vflip": {"vflip": 1.0}}
    hflip: float = setting(0.0, "probability of mirroring left-right", 0, 1)
    vflip: float = setting(0.0, "probability of mirroring up-down", 0, 1)

    @property
    def active(self) -> bool:
        return bool(self.hflip or self.vflip)

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        import torch

        flip_x = torch.where(u[0] < self.hflip, -1.0, 1.0)
        flip_y = torch.where(u[1] < self.vflip, -1.0, 1.0)
        return matrix([[flip_x, 0.0, 0.0], [0.0, flip_y, 0.0]], flip_x)
