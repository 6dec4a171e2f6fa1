"""Elastic deformation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from amimv.fields import setting
from amimv.pipelines.operations.base import Examples, Pixels, Source, on_host

if TYPE_CHECKING:
    from torch import Tensor

#: Control points along each side.
POINTS = 4


@dataclass(frozen=True)
class Elastic(Pixels):
    """Bent by a smooth random field, by a probability: ``POINTS`` x ``POINTS`` control points are shifted, each
    coordinate uniform up to a largest share of the view, and what lies between follows by bicubic interpolation
    (after Simard et al. 2003; control points as in U-Net, Ronneberger et al. 2015). No DALI form."""

    lane, uniforms = 33, 1 + 2 * POINTS**2
    examples: ClassVar[Examples] = {"elastic": {"elastic_p": 1.0}}
    elastic_p: float = setting(0.0, "probability of elastic deformation", 0, 1)
    elastic: float = setting(0.05, "largest shift of its control points, as a share of the view's side", 0, 0.5)

    @property
    def active(self) -> bool:
        return self.elastic_p > 0 and self.elastic > 0

    def soft(self) -> Self:
        """Half the shift, as often."""
        return type(self)(self.elastic_p, self.elastic / 2)

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        """``(B, 2 * POINTS**2)``: shifts along x, then along y, in coordinates [-1, 1]; 0 where it is not drawn."""
        import torch

        shifts = 2 * self.elastic * (2 * torch.stack(list(u[1:]), dim=1) - 1)
        return torch.where((u[0] < self.elastic_p)[:, None], shifts, 0.0)

    @staticmethod
    def apply(images: Tensor, drawn: Tensor) -> Tensor:
        """On a CPU only the images that are bent are touched, in place."""
        if on_host(images):
            bent = drawn.any(dim=1).nonzero().squeeze(1)
            return images.index_copy_(0, bent, _bend(images.index_select(0, bent), drawn.index_select(0, bent)))
        return _bend(images, drawn)


def _bend(images: Tensor, shifts: Tensor) -> Tensor:
    import torch
    from torch.nn import functional as F

    if not len(images):
        return images
    size = images.shape[-1]
    control = shifts.view(-1, 2, POINTS, POINTS)
    field = F.interpolate(control, size=(size, size), mode="bicubic", align_corners=True)
    centres = (2 * torch.arange(size, device=images.device) + 1) / size - 1
    at = torch.stack(torch.meshgrid(centres, centres, indexing="xy"))
    grid = (at + field).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
