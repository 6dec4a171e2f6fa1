"""Images that are not square, and any number of channels: what a view shows of them, in both backends."""

from typing import Any

import pytest
import torch
from torch import Tensor

from amimv.pipelines import BACKENDS, HARD, Key, ViewParams, ViewPolicy, build_policy, draw_view_params, render
from amimv.pipelines.operations import OPERATIONS, Pixels

KEY = Key(seed=3, stream=1000, epoch=2, step=5)
#: Height and width.
SHAPES = [(28, 40), (40, 28), (30, 61), (96, 32)]
MEANS, STDS = (0.4, 0.5, 0.6, 0.45, 0.55), (0.2, 0.25, 0.3, 0.22, 0.28)
#: What both backends have, one after the other. Solarisation is left out: a rounding decides at its threshold.
COMMON = {
    name: value
    for kind in OPERATIONS
    if kind.key() != "solarise" and (not issubclass(kind, Pixels) or kind.has_dali_form())
    for example in kind.examples.values()
    for name, value in example.items()
}


def needs(backend: str) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali.experimental.dynamic", reason="nvidia.dali is not installed")


def noise(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(height + width + channels)
    return torch.randint(0, 256, (batch, height, width, channels), dtype=torch.uint8, generator=generator)


def policy(size: int | None, channels: int = 3, **settings: Any) -> ViewPolicy:
    return build_policy(settings, size, MEANS[:channels], STDS[:channels])


def draw(chosen: ViewPolicy, images: Tensor) -> ViewParams:
    return draw_view_params(chosen, torch.arange(len(images)), KEY, images.shape[2] / images.shape[1])


def linear(params: ViewParams, height: int, width: int) -> Tensor:
    """``(B, 2, 2)`` from the view, [-1, 1] along both axes, to pixels of the image."""
    assert params.affine is not None
    return params.affine[:, :, :2].double() * torch.tensor([[width / 2], [height / 2]], dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("size", [None, 20])
def test_a_normalised_view_is_the_square_in_the_middle(
    height: int, width: int, size: int | None, backend: str
) -> None:
    needs(backend)
    images, side = noise(3, height, width), min(height, width)
    top, left = (height - side) / 2, (width - side) / 2
    view = render(images, draw(policy(size), images), backend)
    assert view.shape[2:] == (size or side, size or side)
    if top.is_integer() and left.is_integer():
        square = images[:, int(top) : int(top) + side, int(left) : int(left) + side].contiguous()
        torch.testing.assert_close(view, render(square, draw(policy(size), square), backend), rtol=0, atol=1e-3)
    elif size is None:  # half a pixel off: the mean of two neighbours
        pair = [images[:, int(top) : int(top) + side, int(left) + k : int(left) + k + side] for k in (0, 1)]
        halves = torch.stack([render(p.contiguous(), draw(policy(None), p), backend) for p in pair]).mean(0)
        torch.testing.assert_close(view, halves, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_a_crop_keeps_its_aspect_ratio_in_pixels(height: int, width: int) -> None:
    images = noise(1, height, width).expand(5000, -1, -1, -1)
    params = draw(policy(28, crop_min=0.02, crop_max=0.3, crop_ratio=(3 / 4, 4 / 3)), images)
    assert params.affine is not None
    shares = params.affine[:, :, :2].diagonal(dim1=1, dim2=2)
    fits = (shares < 1).all(1)
    assert fits.float().mean() > 0.5
    sides = 2 * linear(params, height, width).diagonal(dim1=1, dim2=2)[fits]
    ratio = sides[:, 0] / sides[:, 1]
    assert 3 / 4 - 1e-5 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 4 / 3 + 1e-5
    assert abs(ratio.log().mean()) < 0.02
    area = sides.prod(1) / (height * width)
    assert 0.02 - 1e-5 < area.min() < 0.03
    assert area.max() < 0.3 + 1e-5
    inside = params.affine[:, :, 2].abs() + shares
    assert inside.max() <= 1 + 1e-5
    square = draw(policy(28, crop_min=0.02, crop_max=0.1, crop_ratio=(1.0, 1.0)), images)
    across, down = linear(square, height, width).diagonal(dim1=1, dim2=2).unbind(1)
    torch.testing.assert_close(across, down, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"crop_min": 0.05, "crop_max": 0.2}], ids=["whole", "crop"])
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_what_is_turned_mirrored_and_moved_is_not_stretched(
    height: int, width: int, settings: dict[str, float]
) -> None:
    """The view's axes are as long as each other in the image, and at a right angle."""
    images = noise(64, height, width)
    params = draw(policy(28, **settings, rotation=180.0, hflip=0.5, vflip=0.5, translation=0.2), images)
    axes = linear(params, height, width)
    gram = axes.transpose(1, 2) @ axes
    scale = gram[:, 0, 0]
    torch.testing.assert_close(gram, scale[:, None, None] * torch.eye(2, dtype=torch.float64), rtol=1e-4, atol=1e-3)
    if not settings:
        torch.testing.assert_close(scale.sqrt(), torch.full_like(scale, min(height, width) / 2))


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("size", [28, 12])
def test_the_backends_agree_on_images_that_are_not_square(height: int, width: int, size: int) -> None:
    needs("dali")
    images = noise(8, height, width)
    for chosen in (policy(size, **COMMON), policy(size, blur_p=1.0), policy(size, rotation=90.0)):
        params = draw(chosen, images)
        views = [render(images, params, backend) for backend in ("kornia", "dali")]
        assert views[0].shape == (8, 3, size, size)
        torch.testing.assert_close(views[0], views[1], rtol=0, atol=1e-3)


def test_square_images_do_not_say_their_shape() -> None:
    images = noise(4, 28, 28)
    chosen = policy(28, **COMMON)
    without, given = draw_view_params(chosen, torch.arange(4), KEY), draw(chosen, images)
    assert all(torch.equal(value, given.drawn()[name]) for name, value in without.drawn().items())


# --- channels -------------------------------------------------------------------------------------

CHANNELS = [1, 2, 3, 4, 5]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_brightness_and_contrast_work_for_any_channels(name: str, channels: int) -> None:
    images = noise(6, 16, 16, channels)
    params = draw(policy(16, channels, jitter_p=1.0, **{name: 0.5}), images)
    assert params.colour is not None
    view = render(images, params)
    luma = MEANS[0] * 0.299 + MEANS[1] * 0.587 + MEANS[2] * 0.114
    for k in range(6):
        factor = params.colour[k, 0, 0].item()
        assert abs(factor - 1) > 1e-3
        for c in range(channels):
            pixels = images[k, :, :, c].double() / 255
            pivot = 0.0 if name == "brightness" else luma if channels == 3 else MEANS[c]
            changed = (pivot + factor * (pixels - pivot)).clamp(0, 1)
            expected = (changed - MEANS[c]) / STDS[c]
            torch.testing.assert_close(view[k, c].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_saturation_hue_and_greyscale_are_of_red_green_and_blue(channels: int, backend: str) -> None:
    needs(backend)
    images = noise(6, 16, 16, channels)
    plain = render(images, draw(policy(16, channels), images), backend)
    for settings in ({"saturation": 0.9, "jitter_p": 1.0}, {"hue": 0.5, "jitter_p": 1.0}, {"grey_p": 1.0}):
        view = render(images, draw(policy(16, channels, **settings), images), backend)
        if channels == 3:
            assert (view - plain).abs().max() > 0.1
        else:
            torch.testing.assert_close(view, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", CHANNELS)
def test_the_backends_agree_on_any_channels(channels: int) -> None:
    needs("dali")
    images = noise(8, 28, 28, channels)
    strong = policy(28, channels, **COMMON)
    for chosen in (strong, policy(28, channels), policy(28, channels, **HARD.settings())):
        params = draw(chosen, images)
        views = [render(images, params, backend) for backend in ("kornia", "dali")]
        assert views[0].shape == (8, channels, 28, 28)
        torch.testing.assert_close(views[0], views[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", OPERATIONS, ids=lambda kind: kind.__name__)
def test_every_operation_takes_any_channels(kind: Any, channels: int) -> None:
    images = noise(3, 20, 20, channels)
    for settings in kind.examples.values():
        view = render(images, draw(policy(20, channels, **settings), images))
        assert view.shape == (3, channels, 20, 20)
        assert view.isfinite().all()
