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
from amimv.pipelines.kornia_backend import oversampling, to_float
from amimv.pipelines.operations import PIXELS
from amimv.pipelines.params import ViewParams, centre_square

#: On a CPU, DALI steps along a row by adding to a float32 coordinate, whose rounding errors grow with the
#: width of the row and the size of the coordinate: to 2e-3 pixels at 224. So there it warps in strips of
#: columns whose width times the size of the source is at most this: contrast, gamma and sharpness multiply the errors.
STRIP = 32 * 32


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
    side = size * oversampling(min(source), size)
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


def render_dali(images: Tensor, params: ViewParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """Render one view.

    Args:
        images: ``(B, H, W, C)``, ``uint8`` (not copied), ``uint16`` or float in [0, 1], on a CPU or a CUDA device.
        params: on the host, wherever the images are.
        dtype: of the result; the arithmetic is ``float32``.

    Returns:
        ``(B, C, size, size)`` on the device of the images, normalised, contiguous.

    Raises:
        InputError: DALI is not installed, the parameters are not on the host, or an operation has no DALI form.
    """
    if any(value.device.type != "cpu" for value in params.drawn().values()):
        raise InputError("the dali backend takes view parameters on the host: draw them from positions on the CPU")
    for operation in PIXELS:
        if operation.key() in params.pixels and not operation.has_dali_form():
            raise InputError(f"operation {operation.__name__} has no DALI form: use the kornia backend")
    ndd = _dynamic()
    if images.dtype != torch.uint8 or params.value_range is not None:
        images = to_float(images, False, params.value_range).mul_(255).permute(0, 2, 3, 1)
    source, size = (images.shape[1], images.shape[2]), params.size or min(images.shape[1:3])
    gpu = images.device.index if images.device.type == "cuda" else None
    with _context(threading.get_ident(), torch.get_num_threads(), gpu):
        view = ndd.as_batch(images.contiguous(), layout="HWC")
        if params.affine is not None:
            view = apply_affine(view, params.affine, source, size)
        elif source != (size, size):
            middle = centre_square(source[1] / source[0], torch.empty(len(images), 2, 3))
            view = apply_affine(view, middle, source, size)
        if params.colour is not None:
            view = apply_colour(view, params.colour)
        for operation in PIXELS:
            if operation.key() in params.pixels:
                view = operation.apply_dali(ndd, view, params.pixels[operation.key()])
        mean, std = [255 * m for m in params.mean], [255 * s for s in params.std]
        view = ndd.crop_mirror_normalize(ndd.as_batch(view, layout="HWC"), mean=mean, std=std)
        return view.torch().to(dtype)
