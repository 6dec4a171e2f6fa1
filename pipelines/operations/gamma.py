"""Gamma."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from amimv.fields import setting
from amimv.pipelines.operations.base import Examples, Pixels, Source, per_sample, spread

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Gamma(Pixels):
    """Values in [0, 1] to a power that is log-uniform, by a probability: exposure, and what a display makes of it."""

    lane, uniforms = 20, 2
    examples: ClassVar[Examples] = {"gamma": {"gamma_p": 1.0}}
    gamma_p: float = setting(0.0, "probability of a change of gamma", 0, 1)
    gamma: tuple[float, float] = setting((0.5, 2.0), "smallest and largest exponent of gamma", 0, 20, above=True)

    @property
    def active(self) -> bool:
        return self.gamma_p > 0

    def soft(self) -> Self:
        """The square roots of the exponents, as often."""
        low, high = self.gamma
        return type(self)(self.gamma_p, (low**0.5, high**0.5))

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        """Exponent ``(B,)``, 1 where it is not drawn."""
        import torch

        low, high = (math.log(g) for g in self.gamma)
        return torch.where(u[0] < self.gamma_p, torch.exp(spread(u[1], (low, high))), 1.0)

    @staticmethod
    def apply(images: Tensor, drawn: Tensor) -> Tensor:
        return images.pow_(per_sample(drawn))

    @staticmethod
    def apply_dali(ndd: Any, view: Any, drawn: Tensor) -> Any:
        return ndd.math.pow(view * (1 / 255), ndd.as_batch(drawn.contiguous(), device=view.device)) * 255.0
