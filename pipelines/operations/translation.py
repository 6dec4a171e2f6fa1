"""Translation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from amimv.fields import setting
from amimv.pipelines.operations.base import Examples, Geometry, Source, matrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Translation(Geometry):
    """Shifted along both axes, each uniform up to a largest share of the view; what comes in repeats the border."""

    lane, uniforms = 16, 2
    examples: ClassVar[Examples] = {"translation": {"translation": 0.25}}
    translation: float = setting(0.0, "largest shift along each axis, as a share of the view's side", 0, 1)

    @property
    def active(self) -> bool:
        return self.translation > 0

    def soft(self) -> Self:
        """Half the shift."""
        return type(self)(self.translation / 2)

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        # The side is 2 in these coordinates.
        x, y = (2 * self.translation * (2 * v - 1) for v in u)
        return matrix([[1.0, 0.0, x], [0.0, 1.0, y]], x)
