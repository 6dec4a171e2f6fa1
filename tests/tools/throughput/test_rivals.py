"""Every rival gives two views of the same operations and strengths as our own, and leaves nothing behind."""

import importlib
import math
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines import HARD, ImageStore, Key, ViewPolicy, draw_view_params, render
from amimv.pipelines.operations.blur import blur_window
from amimv.pipelines.sources.phantom import generate_phantom
from amimv.tools.throughput.rivals import RIVALS, Rival, batched, dali_pil_views, kornia_views, lightly_views, loaders
from amimv.tools.throughput.rivals.common import Views

#: One row per way to make views: those that differ in the number of workers only are left out.
KINDS = [r for r in RIVALS if (r.threads == "workers") == (r.module == "lightly")]
OPEN = Callable[..., Iterator[Views]]
PLAIN = ViewPolicy()
STRENGTHS = SimpleNamespace(**HARD.settings())


def by_name(rival: Rival) -> str:
    return rival.name


def build_store(images: Tensor) -> ImageStore:
    """A store of ``(N, H, W, C)`` ``uint8`` images without classes."""
    return ImageStore.from_arrays(images, name="made up", device=images.device)


def phantom(size: int = 28, channels: int = 3) -> ImageStore:
    images, _ = generate_phantom("train", seed=1, size=size, counts=(6,) * 7)
    return build_store(images if channels == 3 else images[..., 1:2].contiguous())


def constant(colour: tuple[int, int, int], batch: int = 256) -> ImageStore:
    """Images of one colour; mean and std are set so that views are pixels in levels of 0 to 255."""
    images = torch.tensor(colour, dtype=torch.uint8).expand(batch, 28, 28, 3).contiguous()
    return in_levels(build_store(images))


def in_levels(store: ImageStore) -> ImageStore:
    return replace(store, mean=(0.0,) * 3, std=(1 / 255,) * 3)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (Lightly's blur draws from it)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[OPEN]:
    """Opens a rival's views, skips by name where its library is missing, and closes what was opened."""
    generators: list[Any] = []

    def open_views(rival: Rival, store: ImageStore, batch: int, threads: int = 0, policy: ViewPolicy = HARD) -> Any:
        pytest.importorskip(rival.module, reason=f"{rival.module} is not installed")
        if rival.batches is dali_pil_views and not torch.cuda.is_available():
            # What it does can be seen on a CPU if it is kept from asking for a CUDA stream.
            types = importlib.import_module("nvidia.dali.types")
            monkeypatch.setattr(types, "_get_default_stream_for_array", lambda array: None)
            generators.append(batched.dali_pil_batches(store, batch, policy))
        else:
            generators.append(rival.batches(store, batch, threads, policy=policy))
        return generators[-1]

    yield open_views
    for generator in generators:
        generator.close()


def rendered(store: ImageStore, policy: ViewPolicy) -> Tensor:
    """Our view of every image, ``(N, C, H, W)``."""
    positions = torch.arange(len(store))
    params = draw_view_params(replace(policy, mean=store.mean, std=store.std), positions, Key(0, 1000))
    return render(store.gather(positions), params)


def nearest(views: Tensor, images: Tensor) -> tuple[Tensor, float]:
    """For each view the image that it is, and the largest difference."""
    index = torch.cdist(views.flatten(1), images.flatten(1)).argmin(1)
    return index, (views - images[index]).abs().max().item()


@pytest.mark.parametrize(("size", "channels"), [(28, 3), pytest.param(64, 3, marks=pytest.mark.slow), (28, 1)])
@pytest.mark.parametrize("rival", KINDS, ids=by_name)
def test_two_normalised_views(rival: Rival, size: int, channels: int, opened: OPEN) -> None:
    if rival.batches is dali_pil_views and channels == 1:
        pytest.skip("DALI's torchvision transforms take no grey images")
    store = phantom(size, channels)
    batches = opened(rival, store, 16)
    first, second = next(batches)
    kept, seen = first, first.clone()
    for view in (first, second):
        assert view.shape == (16, channels, size, size)
        assert view.dtype == torch.float32
        assert view.device == store.device
        assert view.is_contiguous()
        assert view.isfinite().all()
        assert abs(view.mean()) < 1
        assert 0.6 < view.std() < 2.5
    assert (first - second).abs().mean() > 0.1
    assert (next(batches)[0] - first).abs().mean() > 0.1
    for _ in range(6):
        next(batches)
    assert torch.equal(kept, seen)  # no buffer is used again


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("rival", KINDS, ids=by_name)
def test_nothing_drawn_is_the_normalised_image_once_an_epoch(rival: Rival, channels: int, opened: OPEN) -> None:
    if rival.batches is dali_pil_views and channels == 1:
        pytest.skip("DALI's torchvision transforms take no grey images")
    store = phantom(28, channels)
    images, batches = rendered(store, PLAIN), opened(rival, store, 16, policy=PLAIN)
    epochs = []
    for _ in range(2):
        indices = []
        for _ in range(42 // 16):
            first, second = next(batches)
            index, difference = nearest(first, images)
            assert difference < 1e-4
            torch.testing.assert_close(second, first, rtol=0, atol=1e-4)
            indices += index.tolist()
        assert len(set(indices)) == 32
        epochs.append(indices)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("operation", ["hflip", "grey_p"])
@pytest.mark.parametrize("rival", KINDS, ids=by_name)
def test_flip_and_greyscale_are_ours(rival: Rival, operation: str, opened: OPEN) -> None:
    policy = PLAIN.changed(**{operation: 1.0})
    store = phantom()
    ours = rendered(store, policy)
    first, second = next(opened(rival, store, 16, policy=policy))
    level = 1.01 / 255 / min(store.std)  # of 8 bits, in normalised units
    for view in (first, second):
        assert nearest(view, ours)[1] < (1e-4 if operation == "hflip" else level)


def cropped(store: ImageStore, views: Tensor) -> tuple[Tensor, Tensor]:
    """Width (negative if mirrored) and height of the crops, as shares, of a ramp along x in red and y in green."""
    pixels = views * views.new_tensor(store.std)[:, None, None] + views.new_tensor(store.mean)[:, None, None]
    inner = slice(6, -6)  # the border is clamped
    step = 1 / (store.size - 1)
    width = pixels[:, 0, :, inner].diff(dim=2).mean((1, 2)) / step
    return width, pixels[:, 1, inner].diff(dim=1).mean((1, 2)) / step


def crops_that_fit() -> tuple[Tensor, Tensor]:
    """Areas and logarithms of the ratio, drawn as ours but drawn again instead of cut."""
    draws = torch.rand(2, 20000, dtype=torch.float64)
    area = STRENGTHS.crop_min + (STRENGTHS.crop_max - STRENGTHS.crop_min) * draws[0]
    low, high = (math.log(r) for r in STRENGTHS.crop_ratio)
    ratio = low + (high - low) * draws[1]
    fits = ((area * ratio.exp()) <= 1) & ((area / ratio.exp()) <= 1)
    return area[fits], ratio[fits]


@pytest.mark.parametrize("rival", KINDS, ids=by_name)
def test_crops_and_flips_are_as_strong_and_as_frequent(rival: Rival, opened: OPEN) -> None:
    ramp = torch.linspace(0, 255, 64).round().to(torch.uint8).expand(64, 64)
    image = torch.stack([ramp, ramp.T, ramp], dim=2)
    store = build_store(image.expand(256, 64, 64, 3).contiguous())
    policy = PLAIN.changed(crop_min=STRENGTHS.crop_min, crop_ratio=STRENGTHS.crop_ratio, hflip=STRENGTHS.hflip)
    views = torch.cat(next(opened(rival, store, 256, policy=policy)))
    width, height = cropped(store, views)
    expected_area, expected_ratio = crops_that_fit()
    area, ratio = width.abs() * height, (width.abs() / height).log()
    assert abs(area.mean() - expected_area.mean()) < 0.05
    assert abs(area.std() - expected_area.std()) < 0.05
    assert 0.05 < area.min() < 0.16
    assert area.max() > 0.85
    assert abs(ratio.mean()) < 0.05
    assert abs(ratio.std() - expected_ratio.std()) < 0.03
    assert 0.38 < (width < 0).float().mean() < 0.62


def red_over_blue(views: Tensor) -> Tensor:
    return (views[:, 0] - views[:, 2]).mean((1, 2)) / 40


def turns(views: Tensor) -> Tensor:
    """How far red was turned about the grey axis, in turns."""
    r, g, b = views.mean((2, 3)).unbind(1)
    return torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b) / (2 * math.pi)


def turns_in_yiq(views: Tensor) -> Tensor:
    """How far red was turned in the plane of I and Q, in turns."""
    r, g, b = views.mean((2, 3)).unbind(1)
    red = math.atan2(0.211, 0.596)
    angle = torch.atan2(0.211 * r - 0.523 * g + 0.312 * b, 0.596 * r - 0.274 * g - 0.322 * b)
    return (angle - red) / (2 * math.pi)


JITTERS: dict[str, tuple[tuple[int, int, int], Callable[[Tensor], Tensor], float]] = {
    "brightness": ((100, 100, 100), lambda views: views.mean((1, 2, 3)) / 100, 1.0),
    "saturation": ((120, 100, 80), red_over_blue, 1.0),
    "hue": ((160, 100, 100), turns, 0.0),
}


@pytest.mark.parametrize("operation", [*JITTERS, "contrast"])
@pytest.mark.parametrize("rival", KINDS, ids=by_name)
def test_jitter_is_as_strong_and_as_frequent(rival: Rival, operation: str, opened: OPEN) -> None:
    """Uniform in 1 - v to 1 + v (hue: -v to v) for four images in five, else unchanged."""
    strength = getattr(STRENGTHS, operation)
    policy = PLAIN.changed(jitter_p=STRENGTHS.jitter_p, **{operation: strength})
    if operation == "contrast":  # about 128, which is each image's mean, the data set's, and mid-grey
        stripes = torch.full((256, 28, 28, 3), 100, dtype=torch.uint8)
        stripes[:, ::2] = 156
        views = torch.cat(next(opened(rival, in_levels(build_store(stripes)), 256, policy=policy)))
        assert (views.mean((1, 2, 3)) - 128).abs().max() < 1.1
        drawn, unchanged = (views.amax((1, 2, 3)) - views.amin((1, 2, 3))) / 56, 1.0
    else:
        colour, measured, unchanged = JITTERS[operation]
        if operation == "hue" and rival.module.startswith("nvidia.dali"):
            measured = turns_in_yiq
        drawn = measured(torch.cat(next(opened(rival, constant(colour), 256, policy=policy))))
    drawn = drawn - unchanged
    assert abs(drawn.mean()) < 0.15 * strength
    assert drawn.abs().max() < 1.15 * strength
    assert drawn.abs().max() > 0.9 * strength
    assert drawn.std() == pytest.approx(math.sqrt(STRENGTHS.jitter_p / 3) * strength, rel=0.18)
    assert 0.12 < (drawn.abs() < 0.02 * strength).float().mean() < 0.33


@pytest.mark.parametrize("rival", KINDS, ids=by_name)
def test_greyscale_is_as_frequent(rival: Rival, opened: OPEN) -> None:
    views = torch.cat(
        next(opened(rival, constant((160, 100, 40)), 256, policy=PLAIN.changed(grey_p=STRENGTHS.grey_p)))
    )
    grey = (views.amax((1, 2, 3)) - views.amin((1, 2, 3))) < 2
    assert 0.12 < grey.float().mean() < 0.28


@pytest.mark.parametrize("size", [28, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rival", KINDS, ids=by_name)
def test_blur_is_as_strong_and_as_frequent(rival: Rival, size: int, opened: OPEN) -> None:
    """What is left of a single bright pixel, beside ours."""
    images = torch.zeros(256, size, size, 3, dtype=torch.uint8)
    images[:, size // 2, size // 2] = 255
    store = in_levels(build_store(images))
    policy = PLAIN.changed(blur_p=STRENGTHS.blur_p, blur_sigma=STRENGTHS.blur_sigma)
    views = torch.cat(next(opened(rival, store, 256, policy=policy))) / 255
    low, high = STRENGTHS.blur_sigma
    peak = views[:, 0, size // 2, size // 2]
    offsets = torch.arange(blur_window(size)) - blur_window(size) // 2
    kernel = torch.exp(-0.5 * (offsets / torch.linspace(low, high, 2000)[:, None]) ** 2)
    blurred = (kernel.amax(1) / kernel.sum(1)) ** 2
    expected = 0.5 + 0.5 * blurred.mean().item()
    assert peak.mean().item() == pytest.approx(expected, abs=0.07)
    untouched = 0.5 + 0.5 * (blurred > 0.98).double().mean().item()
    assert (peak > 0.98).double().mean().item() == pytest.approx(untouched, abs=0.12)
    if rival.batches is not lightly_views:  # Pillow has no window
        assert abs(peak.min() - blurred.min()) < 0.03
        reach = blur_window(size) // 2 + 1
        assert views[:, :, size // 2, size // 2 + reach].abs().max() < 0.01


@pytest.mark.parametrize("rival", [r for r in RIVALS if r.threads == "workers"], ids=by_name)
def test_workers_end_with_the_generator(rival: Rival, opened: OPEN) -> None:
    batches = opened(rival, phantom(), 16, threads=2)
    assert multiprocessing.active_children() == []
    views = [next(batches) for _ in range(5)]  # beyond two epochs
    assert len(multiprocessing.active_children()) == 2
    assert (views[0][0] - views[4][0]).abs().mean() > 0.1
    batches.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("rival", [r for r in RIVALS if r.threads != "workers"], ids=by_name)
def test_others_start_no_process(rival: Rival, opened: OPEN) -> None:
    next(opened(rival, phantom(), 16, threads=int(rival.threads == "threads")))
    assert multiprocessing.active_children() == []


def test_threads_of_kornia_are_put_back() -> None:
    batches = kornia_views(phantom(), 16, 2)
    assert torch.get_num_threads() == 1
    next(batches)
    assert torch.get_num_threads() == 2
    batches.close()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("rival", [r for r in RIVALS if r.threads == "workers"], ids=by_name)
def test_spawned_workers_can_be_sent_the_data_set(rival: Rival, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(rival.module, reason=f"{rival.module} is not installed")
    sent: list[Any] = []
    monkeypatch.setattr(loaders, "loaded", lambda dataset, *rest: sent.append(dataset))
    rival.batches(phantom(), 16, 2)
    first, second = pickle.loads(pickle.dumps(sent[0]))[0]
    assert first.shape == second.shape == (3, 28, 28)


@pytest.mark.parametrize("rival", RIVALS, ids=by_name)
def test_a_batch_larger_than_the_store_is_refused(rival: Rival) -> None:
    pytest.importorskip(rival.module, reason=f"{rival.module} is not installed")
    for size in (0, 43):
        with pytest.raises(InputError, match=rf"^batch size is {size}, expected 1 to 42.*$"):
            rival.batches(phantom(), size, 0)


@pytest.mark.parametrize("rival", KINDS, ids=by_name)
def test_images_that_are_not_in_memory_are_refused(rival: Rival) -> None:
    pytest.importorskip(rival.module, reason=f"{rival.module} is not installed")
    elsewhere: Any = object()
    with pytest.raises(InputError, match=r"^made up is not on the device as a whole: give a .* its memory$"):
        rival.batches(replace(phantom(), images=elsewhere), 16, 0)


def test_dali_torchvision_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^DALI's torchvision.*grey images.*$"):
        dali_pil_views(phantom(channels=1), 16, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^DALI's torchvision.*need an NVIDIA GPU$"):
        dali_pil_views(phantom(), 16, 0)


def test_rows_are_told_apart() -> None:
    assert len({r.name for r in RIVALS}) == len(RIVALS)
    assert all("\n" not in r.differences for r in RIVALS)
