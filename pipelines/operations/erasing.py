"""Random erasing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from amimv.fields import setting
from amimv.pipelines.operations.base import Examples, Pixels, Source, per_sample, spread

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Erasing(Pixels):
    """A rectangle is filled with the data set's mean, by a probability (Zhong et al. 2020, "Random erasing data
    augmentation"). Area uniform, aspect ratio log-uniform in [0.3, 1 / 0.3], place uniform, in whole pixels; a side
    that is too long is cut. No soft counterpart."""

    lane, uniforms = 25, 5
    examples: ClassVar[Examples] = {"erasing": {"erase_p": 1.0}}
    erase_p: float = setting(0.0, "probability of erasing a rectangle", 0, 1)
    erase_area: tuple[float, float] = setting(
        (0.02, 0.33), "smallest and largest area of the erased rectangle, as shares of the view", 0, 1, above=True
    )

    @property
    def active(self) -> bool:
        return self.erase_p > 0

    def soft(self) -> None:
        return None

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        """``(B, 4 + C)``: left, top, right, bottom as shares of the view, 0 where it is not drawn; then the fill."""
        import torch

        area, log_ratio = spread(u[1], self.erase_area), -math.log(0.3) * (2 * u[2] - 1)
        width = (area * torch.exp(log_ratio)).sqrt().clamp(max=1)
        height = (area * torch.exp(-log_ratio)).sqrt().clamp(max=1)
        left, top = u[3] * (1 - width), u[4] * (1 - height)
        box = torch.stack([left, top, left + width, top + height], dim=1)
        box = torch.where((u[0] < self.erase_p)[:, None], box, 0.0)
        fill = [torch.full_like(left, mean) for mean in source.mean]
        return torch.cat([box, torch.stack(fill, dim=1)], dim=1)

    @staticmethod
    def apply(images: Tensor, drawn: Tensor) -> Tensor:
        import torch

        size = images.shape[-1]
        left, top, right, bottom = (per_sample(edge) for edge in _pixels(drawn, size).unbind(1))
        place = torch.arange(size, device=images.device)
        rows, columns = place[:, None], place
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        return torch.where(inside, drawn[:, 4:, None, None], images)

    @staticmethod
    def apply_dali(ndd: Any, view: Any, drawn: Tensor) -> Any:
        import torch

        left, top, right, bottom = _pixels(drawn, view.shape[0][1]).float().unbind(1)
        anchor, shape = torch.stack([top, left], dim=1), torch.stack([bottom - top, right - left], dim=1)
        # Of bytes, which nothing has changed so far, the fill would be a whole number.
        view = ndd.as_batch(ndd.cast(view, dtype=ndd.float32), layout="HWC")
        fill = (drawn[0, 4:] * 255).tolist()
        return ndd.erase(
            view, anchor=ndd.as_batch(anchor), shape=ndd.as_batch(shape), axis_names="HW", fill_value=fill
        )


def _pixels(drawn: Tensor, size: int) -> Tensor:
    """The box's edges ``(B, 4)`` ``int64`` in pixels of the view."""
    return (drawn[:, :4] * size).round().long()
