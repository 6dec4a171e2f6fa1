"""The two backends give the same pixels for the same parameters, every operation singly and all together."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from amimv import InputError
from amimv.pipelines.dali_backend import render_dali
from amimv.pipelines.kornia_backend import render_kornia
from amimv.pipelines.params import ViewParams
from amimv.tools.throughput.parity import (
    CASES,
    MEAN,
    SIZES,
    STD,
    TOLERANCE,
    Difference,
    build_case,
    compare,
    render_on,
)


def needs_dali() -> None:
    pytest.importorskip("nvidia.dali.experimental.dynamic", reason="nvidia.dali is not installed")


def difference(operation: str, channels: int, source: int, size: int, device: str = "cpu") -> Difference:
    """Between the backends on one device, over whole images."""
    images, params = build_case(operation, channels, source, size)
    kornia, dali = (render_on(backend, device, images, params) for backend in ("kornia", "dali"))
    assert dali.device == kornia.device == images.to(device).device
    assert dali.shape == kornia.shape == (len(images), channels, size, size)
    assert dali.dtype == kornia.dtype == torch.float32
    assert dali.is_contiguous()
    return compare(kornia, dali, images, params)


PAIRS = [(operation, channels) for operation in CASES for channels in (1, 3)]


@pytest.mark.parametrize(("source", "size"), SIZES)
@pytest.mark.parametrize(("operation", "channels"), PAIRS)
def test_the_backends_agree(operation: str, channels: int, source: int, size: int) -> None:
    needs_dali()
    pixel, normalised = difference(operation, channels, source, size)
    assert pixel < TOLERANCE
    assert normalised < TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("source", "size"), SIZES)
@pytest.mark.parametrize(("operation", "channels"), PAIRS)
def test_the_backends_agree_on_a_gpu(operation: str, channels: int, source: int, size: int) -> None:
    needs_dali()
    pixel, normalised = difference(operation, channels, source, size, "cuda")
    assert pixel < TOLERANCE
    assert normalised < TOLERANCE


@pytest.mark.parametrize("operation", [name for name in CASES if name != "normalise"])
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
        first, _ = params.split([length, len(images) - length])
        torch.testing.assert_close(render_dali(images[:length], first), whole[:length])
    every_other = images[::2]  # not contiguous
    assert params.affine is not None
    assert params.colour is not None
    pixels = {name: value[::2] for name, value in params.pixels.items()}
    of_them = replace(params, affine=params.affine[::2], colour=params.colour[::2], pixels=pixels)
    torch.testing.assert_close(render_dali(every_other, of_them), whole[::2])


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


@pytest.mark.slow
def test_dali_is_imported_only_when_it_renders() -> None:
    code = "import sys, amimv.pipelines.dali_backend; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
