"""Rotation."""

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
class Rotation(Geometry):
    """Turned about the centre of the view by an angle that is uniform up to a largest one."""

    lane, uniforms = 6, 1
    examples: ClassVar[Examples] = {"rotation": {"rotation": 180.0}}
    rotation: float = setting(0.0, "largest angle of rotation, in degrees", 0, 180)

    @property
    def active(self) -> bool:
        return self.rotation > 0

    def soft(self) -> Self:
        """Half the angle."""
        return type(self)(self.rotation / 2)

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        angle = math.radians(self.rotation) * (2 * u[0] - 1)
        cos, sin = angle.cos(), angle.sin()
        return matrix([[cos, -sin, 0.0], [sin, cos, 0.0]], cos)
