"""Brightness, contrast, saturation and hue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from amimv.fields import setting
from amimv.pipelines.operations.base import LUMA, Colour, ColourChange, Examples, Source

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Jitter(Colour):
    """Brightness, contrast, saturation and hue, in this order, applied together or not at all (as in SimCLR).

    It differs from torchvision's ``ColorJitter`` in three ways: the order is fixed, where that shuffles it; contrast
    pivots on the data set's mean luma (of channels that are not red, green and blue, on each one's mean; times the
    brightness factor), where that takes each image's own; and values are clamped to [0, 1] once, at the end. Hue is a
    rotation about the grey axis in YIQ, as in DALI, where that goes through HSV. Factors are uniform in
    [max(0, 1 - v), 1 + v]. Saturation and hue leave other images than RGB as they are.
    """

    lane, uniforms = 7, 5
    examples: ClassVar[Examples] = {
        "brightness": {"brightness": 0.8, "jitter_p": 1.0},
        "contrast": {"contrast": 0.8, "jitter_p": 1.0},
        "saturation": {"saturation": 0.8, "jitter_p": 1.0},
        "hue": {"hue": 0.5, "jitter_p": 1.0},
    }
    brightness: float = setting(0.0, "strength of the jitter of brightness")
    contrast: float = setting(0.0, "strength of the jitter of contrast")
    saturation: float = setting(0.0, "strength of the jitter of saturation (RGB only)")
    hue: float = setting(0.0, "strength of the jitter of hue, in turns (RGB only)", 0, 0.5)
    jitter_p: float = setting(0.0, "probability of the jitter", 0, 1)

    @property
    def active(self) -> bool:
        return self.jitter_p > 0 and any((self.brightness, self.contrast, self.saturation, self.hue))

    def soft(self) -> Self:
        """Half the strengths, as often."""
        return type(self)(self.brightness / 2, self.contrast / 2, self.saturation / 2, self.hue / 2, self.jitter_p)

    def draw(self, u: Sequence[Tensor], source: Source) -> ColourChange:
        import torch

        applied = u[0] < self.jitter_p
        brightness = _factor(self.brightness, u[1], applied)
        contrast = _factor(self.contrast, u[2], applied)
        shift = (1 - contrast) * brightness
        if not source.coloured:
            return ColourChange(brightness * contrast, None, torch.stack([shift * m for m in source.mean], dim=1))
        saturation = _factor(self.saturation, u[3], applied)
        hue = torch.where(applied, self.hue * (2 * u[4] - 1), 0.0)
        pivot = sum(m * w for m, w in zip(source.mean, LUMA, strict=True))
        chroma = saturation * torch.exp(2j * math.pi * hue)
        return ColourChange(brightness * contrast, chroma, (shift * pivot)[:, None])


def _factor(strength: float, u: Tensor, applied: Tensor) -> Tensor:
    import torch

    low = max(0.0, 1 - strength)
    return torch.where(applied, low + (1 + strength - low) * u, 1.0)
