"""How far two renderings of the same images and parameters lie apart: every operation singly, and all together."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amimv.pipelines.dali_backend import render_dali
from amimv.pipelines.kornia_backend import render_kornia
from amimv.pipelines.params import ViewParams, ViewPolicy, draw_view_params
from amimv.pipelines.rng import Key

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
#: (side of the images, side of the views) in pixels.
SIZES = [(28, 28), (64, 64), (224, 224), (224, 96), (64, 28)]
#: Of pixels in [0, 1], and of normalised values.
TOLERANCE = 1e-3
NEAR_THRESHOLD = 1e-4

ALL: dict[str, Any] = {
    "crop": (0.2, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "hflip": 0.5,
    "vflip": 0.5,
    "rotation": 180.0,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.5,
    "jitter_p": 0.8,
    "grey_p": 0.2,
    "blur_p": 0.5,
    "solarise_p": 0.5,
}
OPERATIONS: dict[str, dict[str, Any]] = {
    "normalise": {},
    "crop": {"crop": (0.2, 1.0), "ratio": (3 / 4, 4 / 3)},
    "hflip": {"hflip": 1.0},
    "vflip": {"vflip": 1.0},
    "rotation": {"rotation": 180.0},
    "brightness": {"brightness": 0.8, "jitter_p": 1.0},
    "contrast": {"contrast": 0.8, "jitter_p": 1.0},
    "saturation": {"saturation": 0.8, "jitter_p": 1.0},
    "hue": {"hue": 0.5, "jitter_p": 1.0},
    "grey": {"grey_p": 1.0},
    "blur": {"blur_p": 1.0},
    "sometimes blur": {"blur_p": 0.5},
    "solarise": {"solarise_p": 1.0},
    "all": ALL,
}
COLOUR_ONLY = {"saturation", "hue", "grey"}


class Difference(NamedTuple):
    """The largest absolute difference: of pixels in [0, 1], and of normalised values."""

    pixels: float
    normalised: float


def applies(operation: str, channels: int) -> bool:
    """Whether the operation exists for images of so many channels."""
    return channels == 3 or operation not in COLOUR_ONLY


def build_case(operation: str, channels: int, source: int, size: int) -> tuple[Tensor, ViewParams]:
    """Noise ``(B, source, source, channels)`` ``uint8``, the hardest to resample alike, and an operation's parameters.

    Both on the CPU.
    """
    generator = torch.Generator().manual_seed(source + channels)
    batch = 16 if source < 224 else 4
    images = torch.randint(0, 256, (batch, source, source, channels), dtype=torch.uint8, generator=generator)
    settings = {"size": size, "mean": MEAN[:channels], "std": STD[:channels], **OPERATIONS[operation]}
    policy = ViewPolicy(**settings)
    return images, draw_view_params(policy, torch.arange(batch), Key(seed=1, stream=1000))


def render_on(backend: str, device: str, images: Tensor, params: ViewParams) -> Tensor:
    """The view by a backend on a device, of images and parameters on the CPU."""
    images = images.to(device)
    return render_dali(images, params) if backend == "dali" else render_kornia(images, params.to(device))


def compare(first: Tensor, second: Tensor, images: Tensor, params: ViewParams) -> Difference:
    """The largest differences of two renderings ``(B, C, H, W)`` of the same images and parameters.

    A value within rounding of its solarising threshold may fall on either side of it and is left out.

    Raises:
        ValueError: if that is one value in a hundred or more, or a rendering is not finite.
    """
    device = first.device
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (params.mean, params.std))
    apart = (first - second.to(device)).abs()
    if params.solarise is not None:
        on_device = replace(params, solarise=None).to(device)
        before = render_kornia(images.to(device), on_device) * std + mean
        near = (before - params.solarise.to(device)[:, None, None, None]).abs() < NEAR_THRESHOLD
        if near.float().mean() >= 0.01:
            raise ValueError(f"{100 * near.float().mean():.1f} % of the values lie at their threshold, expected < 1 %")
        apart = apart.masked_fill(near, 0)
    if not apart.isfinite().all():
        raise ValueError("a rendering holds values that are not finite")
    return Difference((apart * std).max().item(), apart.max().item())


def worst_differences(
    first: tuple[str, str],
    second: tuple[str, str],
    operations: Iterable[str] = tuple(OPERATIONS),
    sizes: Iterable[tuple[int, int]] = tuple(SIZES),
) -> dict[str, dict[str, Any]]:
    """For every operation the largest difference between two (backend, device), grey and colour, over all sizes.

    Returns:
        By operation ``pixels`` and ``normalised`` (see `Difference`), each the largest, and ``worst_at``: the
        channels, side of the images and side of the views at which the pixels differ most.
    """
    table = {}
    for operation in operations:
        found = {}
        for channels in (1, 3):
            for source, size in sizes if applies(operation, channels) else ():
                images, params = build_case(operation, channels, source, size)
                views = [render_on(*where, images, params) for where in (first, second)]
                found[channels, source, size] = compare(views[0], views[1], images, params)
        at = max(found, key=lambda case: found[case].pixels)
        table[operation] = {
            "pixels": found[at].pixels,
            "normalised": max(difference.normalised for difference in found.values()),
            "worst_at": dict(zip(("channels", "source", "size"), at, strict=True)),
        }
    return table
