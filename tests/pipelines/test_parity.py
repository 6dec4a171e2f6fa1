"""The two backends give the same pixels for the same parameters, every operation singly and all together.

``python tests/pipelines/test_parity.py [cuda]`` prints the worst difference of every operation.
"""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.dali_backend import render_dali
from amimv.pipelines.kornia_backend import render_kornia
from amimv.pipelines.params import ViewParams, ViewPolicy, draw_view_params
from amimv.pipelines.rng import Key

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZES = [(28, 28), (64, 64), (224, 224), (224, 96), (64, 28)]
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


def needs_dali() -> None:
    pytest.importorskip("nvidia.dali.experimental.dynamic", reason="nvidia.dali is not installed")


def build_case(operation: str, channels: int, source: int, size: int) -> tuple[Tensor, ViewParams]:
    """Noise, which is the hardest to resample alike, and the parameters of one operation."""
    generator = torch.Generator().manual_seed(source + channels)
    batch = 16 if source < 224 else 4
    images = torch.randint(0, 256, (batch, source, source, channels), dtype=torch.uint8, generator=generator)
    settings = {"size": size, "mean": MEAN[:channels], "std": STD[:channels], **OPERATIONS[operation]}
    policy = ViewPolicy(**settings)
    return images, draw_view_params(policy, torch.arange(batch), Key(seed=1, stream=1000))


def difference(operation: str, channels: int, source: int, size: int, device: str = "cpu") -> tuple[float, float]:
    """The largest absolute difference over whole images: of pixels in [0, 1], and of normalised values."""
    images, params = build_case(operation, channels, source, size)
    images, on_device = images.to(device), params.to(device)
    kornia, dali = render_kornia(images, on_device), render_dali(images, params)
    assert dali.device == images.device
    assert dali.shape == kornia.shape == (len(images), channels, size, size)
    assert dali.dtype == kornia.dtype == torch.float32
    assert dali.is_contiguous()
    normalised = (kornia - dali).abs()
    mean, std = (torch.tensor(v[:channels], device=device)[:, None, None] for v in (MEAN, STD))
    if on_device.solarise is not None:
        # A value within rounding of its threshold may fall on either side of it.
        before = render_kornia(images, replace(on_device, solarise=None)) * std + mean
        near = (before - on_device.solarise[:, None, None, None]).abs() < NEAR_THRESHOLD
        assert near.float().mean() < 0.01
        normalised = normalised.masked_fill(near, 0)
    return (normalised * std).max().item(), normalised.max().item()


def applies(operation: str, channels: int) -> bool:
    return channels == 3 or operation not in COLOUR_ONLY


def worst_differences(device: str = "cpu") -> dict[str, tuple[float, float]]:
    """For every operation the largest difference over all sizes and channels, in [0, 1] and normalised."""
    table = {}
    for operation in OPERATIONS:
        rows = [
            difference(operation, channels, *sizes, device)
            for channels in (1, 3)
            for sizes in SIZES
            if applies(operation, channels)
        ]
        table[operation] = (max(pixel for pixel, _ in rows), max(value for _, value in rows))
    return table


CASES = [(operation, c) for operation in OPERATIONS for c in (1, 3) if applies(operation, c)]


@pytest.mark.parametrize(("source", "size"), SIZES)
@pytest.mark.parametrize(("operation", "channels"), CASES)
def test_the_backends_agree(operation: str, channels: int, source: int, size: int) -> None:
    needs_dali()
    pixel, normalised = difference(operation, channels, source, size)
    assert pixel < TOLERANCE
    assert normalised < TOLERANCE


@pytest.mark.gpu
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("source", "size"), SIZES)
@pytest.mark.parametrize(("operation", "channels"), CASES)
def test_the_backends_agree_on_a_gpu(operation: str, channels: int, source: int, size: int) -> None:
    needs_dali()
    pixel, normalised = difference(operation, channels, source, size, "cuda")
    assert pixel < TOLERANCE
    assert normalised < TOLERANCE


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "normalise"])
def test_every_operation_changes_the_view(operation: str) -> None:
    """So that agreement means something."""
    images, params = build_case(operation, 3, 28, 28)
    changed = (render_kornia(images, params) - render_kornia(images, ViewParams(28, MEAN, STD))).abs()
    assert changed.max() > 0.1


def test_a_result_outlives_the_next_call() -> None:
    """DALI owns the memory of a result: the next batch must not be written into it."""
    needs_dali()
    images, params = build_case("all", 3, 28, 28)
    first = render_dali(images, params)
    kept = first.clone()
    others = [render_dali(255 - images, params) for _ in range(3)]
    assert torch.equal(first, kept)
    assert not torch.equal(first, others[0])
    assert torch.equal(images, build_case("all", 3, 28, 28)[0])


def test_batches_of_other_sizes_and_views() -> None:
    """An operator that DALI keeps for a batch size must serve the next one too."""
    needs_dali()
    images, params = build_case("all", 3, 28, 28)
    whole = render_dali(images, params)
    for length in (1, 5, 16, 3):
        fields = {name: getattr(params, name)[:length] for name in ("affine", "colour", "sigma", "solarise")}
        torch.testing.assert_close(render_dali(images[:length], replace(params, **fields)), whole[:length])
    every_other = images[::2]  # not contiguous
    fields = {name: getattr(params, name)[::2] for name in ("affine", "colour", "sigma", "solarise")}
    torch.testing.assert_close(render_dali(every_other, replace(params, **fields)), whole[::2])


def test_no_size_keeps_the_images() -> None:
    needs_dali()
    images, params = build_case("all", 3, 64, 64)
    assert torch.equal(render_dali(images, replace(params, size=None)), render_dali(images, params))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_the_rounded_float32(dtype: torch.dtype) -> None:
    needs_dali()
    images, params = build_case("all", 3, 28, 28)
    view = render_dali(images, params, dtype)
    assert view.dtype == dtype
    assert torch.equal(view, render_dali(images, params).to(dtype))


def test_parameters_must_be_on_the_host() -> None:
    images, params = build_case("all", 3, 28, 28)
    with pytest.raises(InputError, match="host"):
        render_dali(images, params.to("meta"))


def test_without_dali_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali.experimental.dynamic", None)
    images, params = build_case("normalise", 3, 28, 28)
    with pytest.raises(InputError, match=r"pip install nvidia-dali-cuda130.*--backend kornia") as error:
        render_dali(images, params)
    assert "\n" not in str(error.value)


def test_dali_is_imported_only_when_it_renders() -> None:
    code = "import sys, amimv.pipelines.dali_backend; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


if __name__ == "__main__":
    print("| operation | pixels in [0, 1] | normalised |\n|---|---|---|")
    for name, (in_pixels, in_normalised) in worst_differences(*sys.argv[1:]).items():
        print(f"| {name} | {in_pixels:.1e} | {in_normalised:.1e} |")
