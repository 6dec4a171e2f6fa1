"""The `dali` backend: NVIDIA DALI's dynamic mode, which runs its operators one by one on torch tensors.

The same pixels as `kornia_backend` to within 1e-3. Operators take their arguments on the host, so the
parameters are drawn there, which gives the same numbers; the images stay where they are.
"""

import threading
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.kornia_backend import oversampling
from amimv.pipelines.params import ViewParams, blur_window

#: On a CPU, DALI steps along a row by adding to a float32 coordinate, whose rounding errors grow with the
#: width of the row and the size of the coordinate: to 2e-3 pixels at 224. So there it warps in strips of
#: columns whose width times the size of the source is at most this.
STRIP = 64 * 64


def _dynamic() -> Any:
    """DALI's dynamic mode; it takes seconds to import, so only who renders with it does."""
    try:
        import nvidia.dali.experimental.dynamic as ndd
    except ImportError as error:
        raise InputError(
            f"the dali backend needs NVIDIA DALI 2 or later ({error}): pip install nvidia-dali-cuda130, "
            "or use --backend kornia"
        ) from error
    return ndd


@lru_cache(maxsize=16)
def _context(thread: int, threads: int, gpu: int | None) -> Any:
    """DALI's operators and worker threads: one per calling thread, as no two may enter the same one at once.

    On a GPU it has a stream of its own, which waits for torch's when images come in and for which torch's
    waits when they go out (that is DLPack's protocol), so the host never waits. It is not torch's own:
    the default one has the handle 0, which torch refuses when DALI passes it back.
    """
    return _dynamic().EvalContext(num_threads=threads, device_id=gpu)


def _corner_matrix(affine: Tensor, source: tuple[int, int], side: int, left: int) -> Tensor:
    """``(B, 2, 3)`` output to input, from [-1, 1] to DALI's unit: pixels from the corner of the first pixel.

    ``left`` is the column, of a view of ``side`` pixels, at which the output starts.
    """
    height, width = source
    half = torch.tensor([[width / 2], [height / 2]], dtype=torch.float64)
    linear = affine[:, :, :2] * half * (2 / side)
    offset = (1 + affine[:, :, 2:] - affine[:, :, :2].sum(2, keepdim=True)) * half + linear[:, :, :1] * left
    return torch.cat([linear, offset], dim=2).float()


def apply_affine(view: Any, affine: Tensor, source: tuple[int, int], size: int) -> Any:
    """Resample ``HWC`` images to ``(size, size, C)`` ``float32``, low-passed as in `kornia_backend`."""
    ndd = _dynamic()
    side = size * oversampling(source[1], size)
    width = max(1, STRIP // max(source)) if view.device.device_type == "cpu" else side
    strips = []
    for left in range(0, side, width):
        matrix = ndd.as_batch(_corner_matrix(affine.double(), source, side, left))
        # No fill value: coordinates outside the image are clamped to its border.
        shape = [side, min(width, side - left)]
        strips.append(ndd.warp_affine(view, matrix=matrix, size=shape, dtype=ndd.float32))
    view = ndd.cat(*strips, axis=1) if len(strips) > 1 else strips[0]
    while side > size:  # at exactly half the size linear interpolation is the mean of 2 x 2
        side //= 2
        view = ndd.resize(view, size=[side, side], antialias=False)
    return view


def apply_colour(view: Any, colour: Tensor) -> Any:
    """``(B, C, C + 1)`` matrix and offset, meant for [0, 1], on values in [0, 255], clamped to it again."""
    ndd = _dynamic()
    # DALI's MT is this matrix and offset side by side; only the offset carries the unit.
    scaled = torch.cat([colour[:, :, :-1], colour[:, :, -1:] * 255], dim=2)
    view = ndd.coord_transform(view, MT=ndd.as_batch(scaled))
    return ndd.math.min(ndd.math.max(view, 0.0), 255.0)  # twice as fast as DALI's clamp


def apply_blur(view: Any, sigma: Tensor, size: int) -> Any:
    """Gaussian blur with a sigma per sample ``(B,)`` in pixels, reflected at the border."""
    ndd = _dynamic()
    window = blur_window(size)
    view = ndd.as_batch(view, layout="HWC")  # the blur has to know the channels, and an operator may forget them
    return ndd.gaussian_blur(view, sigma=ndd.as_batch(sigma.contiguous()), window_size=window, dtype=ndd.float32)


def apply_solarise(view: Any, threshold: Tensor) -> Any:
    """Invert the values in [0, 255] at or above their sample's threshold ``(B,)``, which is in [0, 1]."""
    ndd = _dynamic()
    inverted = view >= ndd.as_batch(threshold * 255, device=view.device)
    return ndd.math.abs(inverted * 255.0 - view)  # x or 255 - x, without a branch


def render_dali(images: Tensor, params: ViewParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """Render one view.

    Args:
        images: ``(B, H, W, C)``, ``uint8`` (not copied) or float in [0, 1], on a CPU or a CUDA device.
        params: on the host, wherever the images are.
        dtype: of the result; the arithmetic is ``float32``.

    Returns:
        ``(B, C, size, size)`` on the device of the images, normalised, contiguous.

    Raises:
        InputError: DALI is not installed, or the parameters are not on the host.
    """
    drawn = (params.affine, params.colour, params.sigma, params.solarise)
    if any(value is not None and value.device.type != "cpu" for value in drawn):
        raise InputError("the dali backend takes view parameters on the host: draw them from positions on the CPU")
    ndd = _dynamic()
    if images.is_floating_point():
        images = images.float() * 255
    source, size = (images.shape[1], images.shape[2]), params.size or images.shape[1]
    gpu = images.device.index if images.device.type == "cuda" else None
    with _context(threading.get_ident(), torch.get_num_threads(), gpu):
        view = ndd.as_batch(images.contiguous(), layout="HWC")
        if params.affine is not None:
            view = apply_affine(view, params.affine, source, size)
        elif source != (size, size):
            view = apply_affine(view, torch.eye(2, 3).expand(len(images), 2, 3), source, size)
        if params.colour is not None:
            view = apply_colour(view, params.colour)
        if params.sigma is not None:
            view = apply_blur(view, params.sigma, size)
        if params.solarise is not None:
            view = apply_solarise(view, params.solarise)
        mean, std = [255 * m for m in params.mean], [255 * s for s in params.std]
        view = ndd.crop_mirror_normalize(ndd.as_batch(view, layout="HWC"), mean=mean, std=std)
        return view.torch().to(dtype)
