"""The `kornia` backend: torch and Kornia's functional API, on the device of the images, batched throughout."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from kornia.filters import filter2d, filter2d_separable
from torch import Tensor

from amimv.pipelines.params import ViewParams, blur_window


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A per-channel constant ``(1, C, 1, 1)``, copied to the device once and not at every batch."""
    return torch.tensor(values, device=device).reshape(1, -1, 1, 1)


def oversampling(source: int, size: int) -> int:
    """How many samples a side of a view's pixel are averaged, so that no more than 2 source pixels lie between two.

    1 unless the source is more than twice the size of the view; then the next power of two (224 to 96: 2; 224 to
    28: 4). It low-passes where a view shrinks its source, and does next to nothing to a crop that does not shrink.
    """
    factor = 1
    while source > 2 * factor * size:
        factor *= 2
    return factor


def apply_affine(images: Tensor, affine: Tensor, size: int) -> Tensor:
    """Resample ``(B, C, H, W)`` floats to ``(B, C, size, size)``: bilinear, border clamped; output to input.

    torch's own sampling and not Kornia's ``warp_affine``, which inverts a matrix that is already in the direction that
    sampling needs; and a grid that is added from its two axes, ten times as fast here as ``affine_grid``.
    """
    factor = oversampling(images.shape[-1], size)
    side = size * factor
    centres = (2 * torch.arange(side, device=images.device) + 1) / side - 1
    along_x = torch.addcmul(affine[:, None, :, 2], affine[:, None, :, 0], centres[:, None])  # (B, side, 2)
    along_y = affine[:, None, :, 1] * centres[:, None]
    grid = along_x[:, None, :] + along_y[:, :, None]
    view = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return view if factor == 1 else F.avg_pool2d(view, factor)


def apply_colour(images: Tensor, colour: Tensor) -> Tensor:
    """``(B, C, C + 1)`` matrix and offset on ``(B, C, H, W)`` values in [0, 1], clamped to [0, 1] again."""
    flat = images.flatten(2)
    matrix, offset = colour[:, :, :-1], colour[:, :, -1:]
    return torch.baddbmm(offset, matrix, flat).clamp_(0, 1).view_as(images)


def apply_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of ``(B, C, H, W)`` with a sigma per sample ``(B,)`` in pixels, reflected at the border."""
    window = blur_window(images.shape[-1])
    offsets = torch.arange(window, device=images.device, dtype=images.dtype) - window // 2
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    if window <= 5:  # one small dense kernel is faster than two passes
        return filter2d(images, kernel[:, :, None] * kernel[:, None, :], "reflect")
    return filter2d_separable(images, kernel, kernel, "reflect")


def apply_solarise(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values of ``(B, C, H, W)`` in [0, 1] that are at or above their sample's threshold ``(B,)``."""
    return torch.where(images < threshold[:, None, None, None], images, 1 - images)


def render_kornia(images: Tensor, params: ViewParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """Render one view.

    Args:
        images: ``(B, H, W, C)`` ``uint8``.
        params: on the same device.
        dtype: of the result; the arithmetic is ``float32``.

    Returns:
        ``(B, C, size, size)``, normalised, contiguous.
    """
    mean, std = _constant(params.mean, images.device), _constant(params.std, images.device)
    # Contiguous (B, C, H, W): channels-last makes the sampling and the blur several times slower on a CPU.
    view = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    size = params.size or images.shape[1]
    if params.affine is not None:
        view = apply_affine(view, params.affine, size)
    elif images.shape[1] != size:
        whole = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
        view = apply_affine(view, whole, size)
    if params.colour is not None:
        view = apply_colour(view, params.colour)
    if params.sigma is not None:
        view = apply_blur(view, params.sigma)
    if params.solarise is not None:
        view = apply_solarise(view, params.solarise)
    return ((view - mean) / std).to(dtype)
