"""The `kornia` backend: torch and Kornia's functional API, on the device of the images, batched throughout."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from amimv.pipelines.constants import kept
from amimv.pipelines.operations import PIXELS
from amimv.pipelines.operations.base import on_host
from amimv.pipelines.params import ViewParams, centre_square

#: On a CPU a batch is rendered in parts of at most so many values (2.5 MB): they stay in the caches, and the C library
#: keeps buffers of that size for the next part, where it gives larger ones back and has every page faulted in again.
CHUNK = 640 * 1024


@kept
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A per-channel constant ``(1, C, 1, 1)``."""
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
    sampling needs; and a grid that is added from its two axes, each coordinate a plane of its own, twenty times as
    fast here as ``affine_grid``.
    """
    factor = oversampling(min(images.shape[-2:]), size)
    side = size * factor
    centres = (2 * torch.arange(side, device=images.device) + 1) / side - 1
    along_x = torch.addcmul(affine[:, :, 2:], affine[:, :, :1], centres)  # (B, 2, side)
    along_y = affine[:, :, 1:2] * centres
    grid = (along_x[:, :, None, :] + along_y[:, :, :, None]).permute(0, 2, 3, 1)
    view = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return view if factor == 1 else F.avg_pool2d(view, factor)


def apply_colour(images: Tensor, colour: Tensor) -> Tensor:
    """``(B, C, C + 1)`` matrix and offset on ``(B, C, H, W)`` values in [0, 1], clamped to [0, 1] again."""
    flat = images.flatten(2)
    matrix, offset = colour[:, :, :-1], colour[:, :, -1:]
    return torch.baddbmm(offset, matrix, flat).clamp_(0, 1).view_as(images)


def to_float(images: Tensor, contiguous: bool = True, value_range: tuple[float, float] | None = None) -> Tensor:
    """``(B, H, W, C)`` to ``(B, C, H, W)`` ``float32`` in [0, 1], contiguous unless any layout will do.

    By ``value_range``, else ``uint8`` is divided by 255, ``uint16`` by 65535, and floats are in [0, 1] already.

    Channels-last, as images are stored, is the quicker here by far, and as good to sample from; but colours and blur
    are several times slower on it.
    """
    layout = torch.contiguous_format if contiguous else torch.preserve_format
    # A copy in any case: what follows works in place.
    floats = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout, copy=True)
    if value_range is not None:
        low, high = value_range
        return floats.sub_(low).div_(high - low).clamp_(0, 1)
    return floats if images.is_floating_point() else floats.div_(255 if images.dtype == torch.uint8 else 65535)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], out: Tensor) -> None:
    """Write ``(B, C, H, W)`` less mean, over std, per channel; the images are spent."""
    torch.div(images.sub_(_constant(mean, images.device)), _constant(std, images.device), out=out)


def render_into(out: Tensor, images: Tensor, params: ViewParams) -> None:
    """Render one view of ``(B, H, W, C)`` images into ``(B, C, size, size)``."""
    size, (height, width) = out.shape[-1], images.shape[1:3]
    affine = params.affine
    if affine is None and (height, width) != (size, size):
        affine = centre_square(width / height, images.new_empty(len(images), 2, 3, dtype=torch.float32))
    view = to_float(images, affine is None, params.value_range)
    if affine is not None:
        view = apply_affine(view, affine, size)
    if params.colour is not None:
        view = apply_colour(view, params.colour)
    for operation in PIXELS:
        if operation.key() in params.pixels:
            view = operation.apply(view, params.pixels[operation.key()])
    normalise(view, params.mean, params.std, out)


def render_kornia(images: Tensor, params: ViewParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """Render one view.

    Args:
        images: ``(B, H, W, C)``, ``uint8`` or float in [0, 1].
        params: on the same device.
        dtype: of the result; the arithmetic is ``float32``.

    Returns:
        ``(B, C, size, size)``, normalised, contiguous.
    """
    batch, height, width, channels = images.shape
    size = params.size or min(height, width)
    out = torch.empty(batch, channels, size, size, dtype=dtype, device=images.device)
    parts = 1
    if on_host(images):
        parts = max(1, min(batch, math.ceil(batch * channels * max(height * width, size**2) / CHUNK)))
    sizes = [batch * (i + 1) // parts - batch * i // parts for i in range(parts)]
    with torch.autocast(images.device.type, enabled=False):  # the caller's would make the colours bfloat16
        for into, some, drawn in zip(out.split(sizes), images.split(sizes), params.split(sizes), strict=True):
            render_into(into, some, drawn)
    return out
