"""Shear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from amimv.fields import setting
from amimv.pipelines.operations.base import Examples, Geometry, Source, matrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Shear(Geometry):
    """Sheared along x and y about the centre of the view, each by an angle that is uniform up to a largest one."""

    lane, uniforms = 18, 2
    examples: ClassVar[Examples] = {"shear": {"shear": 20.0}}
    shear: float = setting(0.0, "largest angle of shear along each axis, in degrees", 0, 60)

    @property
    def active(self) -> bool:
        return self.shear > 0

    def soft(self) -> Self:
        """Half the angle."""
        return type(self)(self.shear / 2)

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        x, y = ((math.radians(self.shear) * (2 * v - 1)).tan() for v in u)
        return matrix([[1.0, x, 0.0], [y, 1.0, 0.0]], x)
