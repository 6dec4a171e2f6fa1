"""Gaussian blur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from amimv.fields import setting
from amimv.pipelines.constants import kept
from amimv.pipelines.operations.base import Examples, Pixels, Source, on_host, spread

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Blur strength, in pixels, that changes nothing: in a window of 3 or more the neighbours weigh exp(-200). (0 is an
#: error in Kornia and "choose for me" in DALI.)
NO_BLUR = 0.05


def blur_window(size: int) -> int:
    """Side of the blur's window: the odd number nearest to a tenth of the view's size, at least 3 (28: 3, 224: 23).

    A tenth of the image is SimCLR's choice (Chen et al. 2020, appendix A).
    """
    return max(3, 2 * round((size / 10 - 1) / 2) + 1)


@dataclass(frozen=True)
class Blur(Pixels):
    """Gaussian blur with a sigma of each sample's own, reflected at the border. No soft counterpart."""

    lane, uniforms = 13, 2
    examples: ClassVar[Examples] = {"blur": {"blur_p": 1.0}}
    blur_p: float = setting(0.0, "probability of Gaussian blur", 0, 1)
    blur_sigma: tuple[float, float] = setting(
        (0.1, 2.0), "smallest and largest sigma of the blur, in pixels of the view", 0, above=True
    )

    @property
    def active(self) -> bool:
        return self.blur_p > 0

    def soft(self) -> None:
        return None

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        """Sigma ``(B,)``, ``NO_BLUR`` where it is not drawn."""
        import torch

        return torch.where(u[0] < self.blur_p, spread(u[1], self.blur_sigma), NO_BLUR)

    @staticmethod
    def apply(images: Tensor, drawn: Tensor) -> Tensor:
        """On a CPU, where nothing waits for a device to say how many there are, only the images with a sigma above
        ``NO_BLUR`` are blurred, in place."""
        import torch

        window = blur_window(images.shape[-1])
        offsets = torch.arange(window, device=images.device, dtype=images.dtype) - window // 2
        kernel = torch.exp(-0.5 * (offsets / drawn[:, None]) ** 2)
        kernel = kernel / kernel.sum(1, keepdim=True)
        if on_host(images):
            blurred = (drawn > NO_BLUR).nonzero().squeeze(1)
            part = _convolve_shifted(images.index_select(0, blurred), kernel.index_select(0, blurred))
            return images.index_copy_(0, blurred, part)
        return _multiply_bands(images, kernel)

    @staticmethod
    def apply_dali(ndd: Any, view: Any, drawn: Tensor) -> Any:
        view = ndd.as_batch(view, layout="HWC")  # the blur has to know the channels, and an operator may forget them
        sigma, window = ndd.as_batch(drawn.contiguous()), blur_window(view.shape[0][1])
        return ndd.gaussian_blur(view, sigma=sigma, window_size=window, dtype=ndd.float32)


def _convolve_shifted(images: Tensor, kernel: Tensor) -> Tensor:
    """Both passes with a kernel per sample ``(B, window)`` as a weighted sum of shifted images: on a CPU twice as fast
    as a convolution, whose threads wait for each other while they change the layout."""
    from torch.nn import functional as F

    window, size = kernel.shape[1], images.shape[-1]
    weights = kernel[:, :, None, None, None].unbind(1)
    images = F.pad(images, (window // 2,) * 4, "reflect")
    for axis in (2, 3):
        blurred = images.narrow(axis, 0, size) * weights[0]
        for shift in range(1, window):
            blurred.addcmul_(images.narrow(axis, shift, size), weights[shift])
        images = blurred
    return images


def _multiply_bands(images: Tensor, kernel: Tensor) -> Tensor:
    """Both passes with a kernel per sample ``(B, window)`` as products with a banded matrix ``(B, size, size)``: on a
    GPU, where a convolution with a kernel per sample is far from what the memory can give."""
    size = images.shape[-1]
    bands = (kernel @ _band_basis(kernel.shape[1], size, images.device)).view(-1, 1, size, size)
    return bands @ images @ bands.mT


@kept
def _band_basis(window: int, size: int, device: torch.device) -> Tensor:
    """``(window, size * size)``: how often a tap, applied at pixel i, reads pixel j, the borders reflected."""
    import torch

    pixels = torch.arange(size, device=device)
    read = pixels + torch.arange(window, device=device)[:, None] - window // 2
    read = size - 1 - (size - 1 - read.abs()).abs()
    return (read[:, :, None] == pixels).to(torch.float32).flatten(1)
