"""Sharpness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from amimv.fields import setting
from amimv.pipelines.operations.base import Examples, Pixels, Source, per_sample, spread

if TYPE_CHECKING:
    from torch import Tensor

#: PIL's smoothing kernel, which its and torchvision's sharpness is relative to: 5 in the middle, 1 around it, over 13.
MIDDLE, AROUND = 5 / 13, 1 / 13


@dataclass(frozen=True)
class Sharpness(Pixels):
    """``view + s * (view - smoothed)``, s uniform, by a probability: sharper above 0, smoother below.

    As torchvision's ``adjust_sharpness`` with the factor ``1 + s``, but for the outermost pixels, which that leaves
    as they are and which here are smoothed with the picture reflected.
    """

    lane, uniforms = 30, 2
    examples: ClassVar[Examples] = {"sharpness": {"sharpness_p": 1.0, "sharpness": (2.0, 4.0)}}
    sharpness_p: float = setting(0.0, "probability of a change of sharpness", 0, 1)
    sharpness: tuple[float, float] = setting((-1.0, 2.0), "smallest and largest strength of the sharpening", -1)

    @property
    def active(self) -> bool:
        return self.sharpness_p > 0

    def soft(self) -> Self:
        """Half the strengths, as often."""
        low, high = self.sharpness
        return type(self)(self.sharpness_p, (low / 2, high / 2))

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        """Strength ``(B,)``, 0 where it is not drawn."""
        import torch

        return torch.where(u[0] < self.sharpness_p, spread(u[1], self.sharpness), 0.0)

    @staticmethod
    def apply(images: Tensor, drawn: Tensor) -> Tensor:
        import torch
        from torch.nn import functional as F

        # A kernel on the host would be copied to the device, and waited for, at every batch.
        nine = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), "reflect"), 3, stride=1, divisor_override=1)
        smoothed = AROUND * nine + (MIDDLE - AROUND) * images
        return torch.lerp(smoothed, images, 1 + per_sample(drawn)).clamp_(0, 1)

    @staticmethod
    def apply_dali(ndd: Any, view: Any, drawn: Tensor) -> Any:
        import torch

        view = ndd.as_batch(view, layout="HWC")
        kernel = torch.full((len(drawn), 3, 3), AROUND)
        kernel[:, 1, 1] = MIDDLE
        kernel = ndd.as_batch(kernel, device=view.device)
        smoothed = ndd.filter(view, kernel, border="reflect_101", dtype=ndd.float32)
        factor = ndd.as_batch((1 + drawn).contiguous(), device=view.device)
        sharpened = smoothed + (view - smoothed) * factor
        return ndd.math.min(ndd.math.max(sharpened, 0.0), 255.0)
