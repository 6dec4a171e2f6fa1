"""How far two renderings of the same images and parameters lie apart: every operation singly, and all together.

``python -m amimv.tools.throughput.parity`` prints the worst difference of every operation; exit status 1 if one is
over the bound.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from amimv import check_choice, run_command, user_path
from amimv.pipelines.dali_backend import render_dali
from amimv.pipelines.kornia_backend import render_kornia
from amimv.pipelines.operations import OPERATIONS, PIXELS, Pixels
from amimv.pipelines.operations.solarise import Solarise
from amimv.pipelines.params import ViewParams, draw_view_params
from amimv.pipelines.policy import build_policy
from amimv.pipelines.rng import Key
from amimv.trainers.run_folder import write_json

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
#: (side of the images, side of the views) in pixels.
SIZES = [(28, 28), (64, 64), (224, 224), (224, 96), (64, 28)]
#: Of pixels in [0, 1], and of normalised values.
TOLERANCE = 1e-3
NEAR_THRESHOLD = 1e-4


def _cases() -> dict[str, dict[str, Any]]:
    """Settings of policies by name: every example of every operation that both backends have, and all together."""
    kinds = [kind for kind in OPERATIONS if not issubclass(kind, Pixels) or kind.has_dali_form()]
    single = {name: dict(settings) for kind in kinds for name, settings in kind.examples.items()}
    everything = {name: value for settings in single.values() for name, value in settings.items()}
    some = {name: 0.5 if name.endswith("_p") else value for name, value in everything.items()}
    return {"normalise": {}, **single, "all": everything, "all, sometimes": some}


CASES = _cases()


class Difference(NamedTuple):
    """The largest absolute difference: of pixels in [0, 1], and of normalised values."""

    pixels: float
    normalised: float


def build_case(operation: str, channels: int, source: int, size: int) -> tuple[Tensor, ViewParams]:
    """Noise ``(B, source, source, channels)`` ``uint8``, the hardest to resample alike, and an operation's parameters.

    Both on the CPU.
    """
    generator = torch.Generator().manual_seed(source + channels)
    batch = 16 if source < 224 else 4
    images = torch.randint(0, 256, (batch, source, source, channels), dtype=torch.uint8, generator=generator)
    policy = build_policy(CASES[operation], size, MEAN[:channels], STD[:channels])
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
    if (threshold := params.pixels.get(Solarise.key())) is not None:
        earlier = [kind.key() for kind in PIXELS[: PIXELS.index(Solarise)]]
        kept = {name: drawn for name, drawn in params.pixels.items() if name in earlier}
        before = render_kornia(images.to(device), replace(params, pixels=kept).to(device)) * std + mean
        near = (before - threshold.to(device)[:, None, None, None]).abs() < NEAR_THRESHOLD
        if near.float().mean() >= 0.01:
            raise ValueError(f"{100 * near.float().mean():.1f} % of the values lie at their threshold, expected < 1 %")
        apart = apart.masked_fill(near, 0)
    if not apart.isfinite().all():
        raise ValueError("a rendering holds values that are not finite")
    return Difference((apart * std).max().item(), apart.max().item())


def worst_differences(
    first: tuple[str, str],
    second: tuple[str, str],
    operations: Iterable[str] = tuple(CASES),
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
            for source, size in sizes:
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


@dataclass(frozen=True)
class ParitySettings:
    backend: Literal["kornia", "dali"] = "kornia"
    """rendered on the device; beside kornia: on the same device, or on the CPU if it is kornia itself"""
    device: Literal["cpu", "cuda"] = "cpu"
    """of the backend"""
    operations: tuple[str, ...] = tuple(CASES)
    """what is compared"""
    json: str = ""
    """file for the differences"""


def compare_backends(s: ParitySettings) -> int:
    """Print and write the worst differences; returns the exit status: 1 if one is not under the bound."""
    for operation in s.operations:
        check_choice("operation", operation, CASES)
    beside = "cpu" if s.backend == "kornia" else s.device
    table = worst_differences((s.backend, s.device), ("kornia", beside), s.operations)
    for name, row in table.items():
        print(f"| {name} | {row['pixels']:.1e} | {row['normalised']:.1e} |")
    if s.json:
        write_json(user_path(s.json), {"tolerance": TOLERANCE, "operations": table})
    over = [name for name, row in table.items() if not (row["pixels"] < TOLERANCE and row["normalised"] < TOLERANCE)]
    print(f"over {TOLERANCE:g}: {', '.join(over)}" if over else f"all under {TOLERANCE:g}, in pixels and normalised")
    return int(bool(over))


def main() -> None:
    """The command: settings in, exit status out."""
    prog = "python -m amimv.tools.throughput.parity"
    run_command(lambda: sys.exit(compare_backends(tyro.cli(ParitySettings, prog=prog, description=__doc__))))


if __name__ == "__main__":
    main()
