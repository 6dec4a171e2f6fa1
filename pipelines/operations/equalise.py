"""Histogram equalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from amimv import InputError
from amimv.fields import setting
from amimv.pipelines.operations.base import Examples, Pixels, Source, on_host, per_sample

if TYPE_CHECKING:
    from torch import Tensor

#: Tiles along each side, and the limit of the contrast: Kornia's defaults, which are OpenCV's.
TILES, CLIP = (8, 8), 40.0


@dataclass(frozen=True)
class Equalise(Pixels):
    """Contrast-limited adaptive histogram equalisation of each channel (CLAHE; Zuiderveld 1994), by a probability,
    through Kornia. For views of more than 8 pixels. No soft counterpart, and no DALI form: DALI's works on bytes."""

    lane, uniforms = 32, 1
    examples: ClassVar[Examples] = {"equalise": {"equalise_p": 1.0}}
    equalise_p: float = setting(0.0, "probability of adaptive histogram equalisation (CLAHE)", 0, 1)

    @property
    def active(self) -> bool:
        return self.equalise_p > 0

    def soft(self) -> None:
        return None

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        """``(B,)``: 1 where it is drawn, else 0."""
        import torch

        return torch.where(u[0] < self.equalise_p, 1.0, 0.0)

    @staticmethod
    def apply(images: Tensor, drawn: Tensor) -> Tensor:
        """On a CPU only the images that are equalised are touched, in place."""
        import torch

        if on_host(images):
            chosen = (drawn > 0).nonzero().squeeze(1)
            return images.index_copy_(0, chosen, _equalise(images.index_select(0, chosen)))
        return torch.where(per_sample(drawn) > 0, _equalise(images), images)


def _equalise(images: Tensor) -> Tensor:
    from kornia.enhance import equalize_clahe

    size = images.shape[-1]
    if size <= TILES[0]:
        raise InputError(
            f"views of {size} pixels are too small for equalise_p: give at least {TILES[0] + 1}, or equalise_p 0"
        )
    if not len(images):
        return images
    return equalize_clahe(images, CLIP, TILES).view_as(images)
