"""Random resized crop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from amimv import InputError
from amimv.fields import setting
from amimv.pipelines.operations.base import Examples, Geometry, Source, matrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Crop(Geometry):
    """A random part of the image, resized to the view (Szegedy et al. 2015; torchvision's ``RandomResizedCrop``).

    Area uniform, aspect ratio log-uniform, place uniform. Where torchvision draws again when a crop does not fit, the
    side that is too long is cut. Of images that are not square the aspect ratio is that of the crop in pixels.
    """

    lane, uniforms = 0, 4
    examples: ClassVar[Examples] = {"crop": {"crop_min": 0.2, "crop_ratio": (3 / 4, 4 / 3)}}
    crop_min: float = setting(1.0, "smallest area of the random crop, as a share of the image", 0, 1, above=True)
    crop_max: float = setting(1.0, "largest area of the random crop", 0, 1, above=True)
    crop_ratio: tuple[float, float] = setting(
        (1.0, 1.0), "smallest and largest width / height of the crop", 0, above=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_min > self.crop_max:
            raise InputError(f"crop_min is {self.crop_min}, expected at most crop_max, which is {self.crop_max}")

    @property
    def active(self) -> bool:
        return (self.crop_min, self.crop_max, self.crop_ratio) != (1.0, 1.0, (1.0, 1.0))

    def soft(self) -> Self:
        """Crops that keep at least half of what these may cut away."""
        return type(self)((self.crop_min + 1) / 2, 1.0, self.crop_ratio)

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        import torch

        area = self.crop_min + (self.crop_max - self.crop_min) * u[0]
        low, high = (math.log(r) for r in self.crop_ratio)
        ratio = torch.exp(low + (high - low) * u[1]) / source.aspect
        width = (area * ratio).sqrt().clamp(max=1)
        height = (area / ratio).sqrt().clamp(max=1)
        centre_x = (1 - width) * (2 * u[2] - 1)
        centre_y = (1 - height) * (2 * u[3] - 1)
        return matrix([[width, 0.0, centre_x], [0.0, height, centre_y]], width)
