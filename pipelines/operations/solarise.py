"""Solarisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from amimv.fields import setting
from amimv.pipelines.operations.base import Examples, Pixels, Source, per_sample

if TYPE_CHECKING:
    from torch import Tensor

#: A threshold that no value in [0, 1] reaches.
NO_SOLARISE = 2.0


@dataclass(frozen=True)
class Solarise(Pixels):
    """Values at or above a threshold are inverted, by a probability. No soft counterpart."""

    lane, uniforms = 15, 1
    examples: ClassVar[Examples] = {"solarise": {"solarise_p": 1.0}}
    solarise_p: float = setting(0.0, "probability of solarisation", 0, 1)
    solarise_threshold: float = setting(0.5, "values at or above it are inverted, in [0, 1]", 0, 1)

    @property
    def active(self) -> bool:
        return self.solarise_p > 0

    def soft(self) -> None:
        return None

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        """Threshold ``(B,)``, ``NO_SOLARISE`` where it is not drawn."""
        import torch

        return torch.where(u[0] < self.solarise_p, self.solarise_threshold, NO_SOLARISE)

    @staticmethod
    def apply(images: Tensor, drawn: Tensor) -> Tensor:
        import torch

        return torch.where(images < per_sample(drawn), images, 1 - images)

    @staticmethod
    def apply_dali(ndd: Any, view: Any, drawn: Tensor) -> Any:
        inverted = view >= ndd.as_batch(drawn * 255, device=view.device)
        return ndd.math.abs(inverted * 255.0 - view)  # x or 255 - x, without a branch
