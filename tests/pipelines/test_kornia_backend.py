"""The Kornia backend against float64 loops and Kornia's and torchvision's own functions; and the draw."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from kornia.filters import gaussian_blur2d
from torch import Tensor

from amimv import InputError
from amimv.pipelines import BACKENDS, kornia_backend, render
from amimv.pipelines.kornia_backend import (
    apply_affine,
    apply_colour,
    oversampling,
    render_kornia,
    to_float,
)
from amimv.pipelines.operations import Blur, Solarise, blur
from amimv.pipelines.operations.base import LUMA
from amimv.pipelines.operations.blur import NO_BLUR, blur_window
from amimv.pipelines.operations.solarise import NO_SOLARISE
from amimv.pipelines.params import ViewParams, draw_view_params
from amimv.pipelines.policy import ViewPolicy, build_policy
from amimv.pipelines.recipes import HARD
from amimv.pipelines.rng import Key

KEY = Key(seed=3, stream=1000, epoch=2, step=5)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
STATISTICS: dict[str, Any] = {"mean": MEAN, "std": STD}
BOUND = replace(HARD, **STATISTICS)
STRENGTHS: dict[str, Any] = {
    "crop_min": 0.2,
    "crop_ratio": (3 / 4, 4 / 3),
    "hflip": 0.5,
    "vflip": 0.3,
    "rotation": 30.0,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "jitter_p": 0.8,
    "grey_p": 0.2,
    "blur_p": 0.5,
    "solarise_p": 0.2,
}
STRONG = build_policy(STRENGTHS, 28, MEAN, STD)
SETTINGS = SimpleNamespace(**STRONG.settings())
GREY = replace(STRONG, mean=(0.4,), std=(0.2,))


def random_images(batch: int, size: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(size + channels)
    return torch.randint(0, 256, (batch, size, size, channels), dtype=torch.uint8, generator=generator)


def random_floats(batch: int, size: int, channels: int = 3) -> Tensor:
    return random_images(batch, size, channels).permute(0, 3, 1, 2).contiguous().float() / 255


def draw(policy: ViewPolicy, batch: int) -> ViewParams:
    return draw_view_params(policy, torch.arange(batch), KEY)


def drawn(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def plain_affine(image: Tensor, affine: Tensor, side: int) -> Tensor:
    """One ``(C, H, W)`` image, resampled pixel by pixel in float64."""
    pixels, matrix = image.double(), affine.double().tolist()
    channels, height, width = pixels.shape
    out = torch.zeros(channels, side, side, dtype=torch.float64)
    for i in range(side):
        for j in range(side):
            x, y = (2 * j + 1) / side - 1, (2 * i + 1) / side - 1
            u = matrix[0][0] * x + matrix[0][1] * y + matrix[0][2]
            v = matrix[1][0] * x + matrix[1][1] * y + matrix[1][2]
            column = min(max((u + 1) * width / 2 - 0.5, 0.0), width - 1.0)
            row = min(max((v + 1) * height / 2 - 0.5, 0.0), height - 1.0)
            left, top = min(int(column), width - 2), min(int(row), height - 2)
            right_share, low_share = column - left, row - top
            upper = (1 - right_share) * pixels[:, top, left] + right_share * pixels[:, top, left + 1]
            lower = (1 - right_share) * pixels[:, top + 1, left] + right_share * pixels[:, top + 1, left + 1]
            out[:, i, j] = (1 - low_share) * upper + low_share * lower
    return out


# --- resampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "size", "factor"), [(12, 12, 1), (12, 9, 1), (9, 12, 1), (13, 4, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_affine_is_clamped_bilinear_sampling(source: int, size: int, factor: int, channels: int) -> None:
    images = random_floats(4, source, channels)
    # Crops, flips and rotations, and two hand-made maps that leave the image on every side.
    affine = drawn(draw(STRONG.changed(rotation=180.0), 4).affine)
    affine[2] = torch.tensor([[1.7, 0.0, 0.3], [0.0, 1.9, -0.2]])
    affine[3] = torch.tensor([[0.9, -1.1, 0.0], [1.1, 0.9, 0.5]])
    view = apply_affine(images, affine, size)
    for image, matrix, result in zip(images, affine, view, strict=True):
        expected = plain_affine(image, matrix, size * factor)
        expected = expected.reshape(channels, size, factor, size, factor).mean((2, 4))
        torch.testing.assert_close(result.double(), expected, atol=2e-5, rtol=0)


def test_identity_and_mirrors_are_exact() -> None:
    images = random_floats(1, 28)
    whole = torch.eye(2, 3)[None]
    torch.testing.assert_close(apply_affine(images, whole, 28), images, atol=1e-5, rtol=0)
    for policy, mirror in (
        (build_policy({"hflip": 1.0}, **STATISTICS), tv.horizontal_flip),
        (build_policy({"vflip": 1.0}, **STATISTICS), tv.vertical_flip),
    ):
        affine = drawn(draw(policy, 1).affine)
        assert affine is not None
        torch.testing.assert_close(apply_affine(images, affine, 28), mirror(images), atol=1e-5, rtol=0)


def test_how_many_samples_are_averaged() -> None:
    pairs = {(28, 28): 1, (28, 224): 1, (56, 28): 1, (64, 28): 2, (128, 28): 4, (224, 96): 2, (224, 28): 4}
    assert {pair: oversampling(*pair) for pair in pairs} == pairs


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("size", [96, 28])
def test_shrinking_is_low_passed(size: int) -> None:
    """A texture that the view cannot hold has to average out; plain bilinear sampling folds it back."""
    axis = torch.arange(224, dtype=torch.float64)
    slow = torch.sin(2 * math.pi * axis / 112)[:, None] * torch.cos(2 * math.pi * axis / 160)[None, :]
    generator = torch.Generator().manual_seed(0)
    fast = torch.where(torch.rand(224, 224, generator=generator) < 0.5, -1.0, 1.0)
    texture = (127.5 + 60 * slow + 60 * fast).round().to(torch.uint8)[None, :, :, None]
    floats = texture.permute(0, 3, 1, 2).double() / 255
    view = render_kornia(texture, ViewParams(size, (0.0,), (1.0,))).double()
    area = F.interpolate(floats, size=(size, size), mode="area")
    plain = F.interpolate(floats, size=(size, size), mode="bilinear", align_corners=False)
    error, plain_error = root_mean_square(view - area), root_mean_square(plain - area)
    assert error < plain_error / 2, (error, plain_error)
    if 224 % size == 0:  # the samples lie between two pixels each, so together they are the area
        torch.testing.assert_close(view, area, atol=1e-5, rtol=0)


# --- colour ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_is_a_matrix_and_an_offset_clamped(channels: int) -> None:
    images = random_floats(3, 5, channels)
    colour = torch.randn(3, channels, channels + 1, generator=torch.Generator().manual_seed(0))
    view = apply_colour(images, colour)
    for b in range(3):
        for i in range(5):
            for j in range(5):
                for c in range(channels):
                    value = colour[b, c, channels].double()
                    for d in range(channels):
                        value = value + colour[b, c, d].double() * images[b, d, i, j].double()
                    expected = min(max(value.item(), 0.0), 1.0)
                    assert abs(view[b, c, i, j].item() - expected) < 1e-6


def jitter(**strength: Any) -> ViewPolicy:
    return build_policy({"jitter_p": 1.0, **strength}, **STATISTICS)


def recolour(policy: ViewPolicy, images: Tensor) -> tuple[Tensor, Tensor]:
    colour = drawn(draw(policy, len(images)).colour)
    return apply_colour(images, colour), colour


def test_brightness_is_torchvisions() -> None:
    images = random_floats(8, 6)
    view, colour = recolour(jitter(brightness=0.6), images)
    for image, result, matrix in zip(images, view, colour, strict=True):
        torch.testing.assert_close(result, tv.adjust_brightness(image, matrix[0, 0].item()), atol=1e-5, rtol=0)


def test_saturation_and_grey_are_torchvisions() -> None:
    images = random_floats(8, 6)
    view, colour = recolour(jitter(saturation=0.9), images)
    factors = (colour[:, 0, 0] - LUMA[0]) / (1 - LUMA[0])
    assert factors.std() > 0.1
    for image, result, factor in zip(images, view, factors, strict=True):
        # torchvision rounds red's weight to 0.2989
        torch.testing.assert_close(result, tv.adjust_saturation(image, factor.item()), atol=3e-4, rtol=0)
    view, _ = recolour(build_policy({"grey_p": 1.0}, **STATISTICS), images)
    torch.testing.assert_close(view, tv.rgb_to_grayscale(images, num_output_channels=3), atol=3e-4, rtol=0)


def test_contrast_is_torchvisions_around_the_given_pivot() -> None:
    """torchvision pivots on the image's own mean luma, so the data set is that image here."""
    image = 0.3 + 0.4 * random_floats(1, 16)
    luma = tv.rgb_to_grayscale(image).mean().item()
    view, colour = recolour(replace(jitter(contrast=0.6), mean=(luma,) * 3), image)
    factor = colour[0, 0, 0].item()
    assert abs(factor - 1) > 0.05
    torch.testing.assert_close(view, tv.adjust_contrast(image, factor), atol=3e-4, rtol=0)
    # A grey image's pivot is its only mean.
    view, colour = recolour(replace(jitter(contrast=0.6), mean=(0.3,), std=(1.0,)), image[:, :1])
    factor = colour[0, 0, 0].item()
    torch.testing.assert_close(view, (0.3 + factor * (image[:, :1] - 0.3)).clamp(0, 1), atol=1e-6, rtol=0)


def chroma_turns(images: Tensor, hue: float) -> tuple[Tensor, Tensor]:
    """How luma changes, and the complex factor of (I, Q), of every pixel: ``(B, H, W)`` each."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    images = 0.4 + 0.2 * images  # so near to grey that nothing is clamped
    view, _ = recolour(jitter(hue=hue), images)
    before, after = (torch.einsum("yc,bchw->byhw", to_yiq, x).double() for x in (images, view))
    turns = torch.complex(after[:, 1], after[:, 2]) / torch.complex(before[:, 1], before[:, 2])
    return after[:, 0] - before[:, 0], turns


def test_hue_turns_chroma_and_keeps_luma() -> None:
    luma, turns = chroma_turns(random_floats(8, 6), hue=0.2)
    assert luma.abs().max() < 1e-6
    assert (turns.abs() - 1).abs().max() < 1e-3
    angles = turns.angle().flatten(1) / (2 * math.pi)
    assert (angles.amax(1) - angles.amin(1)).max() < 1e-3  # one angle an image
    _, turns = chroma_turns(random_floats(4000, 1), hue=0.2)
    angles = turns.angle().flatten() / (2 * math.pi)
    assert 0.195 < angles.abs().max() < 0.201
    assert abs(angles.mean()) < 0.01
    assert abs(angles.std() - 0.4 / math.sqrt(12)) < 0.005


def test_jitter_parts_compose_in_the_stated_order() -> None:
    images = random_floats(6, 5).double()
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    params = draw(jitter(**strengths), 6)
    parts = {name: drawn(draw(jitter(**{name: strength}), 6).colour) for name, strength in strengths.items()}
    brightness, contrast = parts["brightness"][:, 0, 0], parts["contrast"][:, 0, 0]
    pivot = sum(m * w for m, w in zip(MEAN, LUMA, strict=True)) * brightness
    view = images * brightness[:, None, None, None]
    view = pivot[:, None, None, None] + contrast[:, None, None, None] * (view - pivot[:, None, None, None])
    for name in ("saturation", "hue"):
        view = torch.einsum("bij,bjhw->bihw", parts[name][:, :, :3].double(), view)
    expected = view.clamp(0, 1)
    torch.testing.assert_close(
        apply_colour(images.float(), drawn(params.colour)).double(), expected, atol=1e-5, rtol=0
    )


# --- blur, solarise -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 28, 64, 224])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("host", [False, True])
def test_blur_is_kornias_with_a_sigma_per_sample(
    size: int, separable: bool, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blur, "on_host", lambda images: host)
    images = random_floats(4, size)
    sigma = torch.tensor([0.1, NO_BLUR, 0.7, 2.0])
    window = blur_window(size)
    expected = gaussian_blur2d(images, (window, window), sigma[:, None].expand(4, 2), "reflect", separable)
    torch.testing.assert_close(Blur.apply(images, sigma), expected, atol=1e-5, rtol=0)


def test_blur_windows_are_odd_and_near_a_tenth() -> None:
    assert [blur_window(size) for size in (8, 28, 64, 96, 128, 224)] == [3, 3, 7, 9, 13, 23]


@pytest.mark.parametrize("size", [28, 96])
@pytest.mark.parametrize("host", [False, True])
def test_no_blur_is_the_identity(size: int, host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blur, "on_host", lambda images: host)
    images = random_floats(2, size)
    torch.testing.assert_close(Blur.apply(images.clone(), torch.full((2,), NO_BLUR)), images, atol=1e-6, rtol=0)


def test_solarise_inverts_from_the_threshold_on() -> None:
    images = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).expand(3, 1, 1, 5)
    view = Solarise.apply(images, torch.tensor([0.5, 0.3, NO_SOLARISE]))[:, 0, 0]
    assert view.tolist() == [[0, 0.25, 0.5, 0.25, 0], [0, 0.25, 0.5, 0.25, 0], [0, 0.25, 0.5, 0.75, 1]]
    # At the threshold itself, as torchvision.
    tie = Solarise.apply(torch.full((1, 1, 1, 1), 0.6), torch.tensor([0.6]))
    torch.testing.assert_close(tie, tv.solarize(torch.full((1, 1, 1, 1), 0.6), 0.6))


# --- the whole view -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_view_is_a_scaling(channels: int) -> None:
    images = random_images(3, 28, channels)
    policy = (STRONG if channels == 3 else GREY).normalised()
    view = render_kornia(images, draw(policy, 3))
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (policy.mean, policy.std))
    expected = (images.permute(0, 3, 1, 2).double() / 255 - mean) / std
    torch.testing.assert_close(view.double(), expected, atol=2e-6, rtol=0)
    assert view.dtype == torch.float32
    assert view.is_contiguous()


@pytest.mark.parametrize("policy", [STRONG, GREY], ids=["rgb", "grey"])
def test_view_is_the_operations_in_order(policy: ViewPolicy) -> None:
    images = random_images(16, 28, len(policy.statistics[0]))
    params = draw(policy, 16)
    affine, colour = drawn(params.affine), drawn(params.colour)
    sigma, threshold = params.pixels["blur"], params.pixels["solarise"][:, None, None, None]
    view = images.permute(0, 3, 1, 2).float() / 255
    view = F.grid_sample(
        view, F.affine_grid(affine, list(view.shape), align_corners=False), "bilinear", "border", False
    )
    view = apply_colour(view, colour)
    view = gaussian_blur2d(view, (3, 3), sigma[:, None].expand(-1, 2), "reflect")
    mean, std = (torch.tensor(v)[:, None, None] for v in (policy.mean, policy.std))
    expected = (torch.where(view < threshold, view, 1 - view) - mean) / std
    # A value within rounding of its threshold may fall on either side.
    clear = (view - threshold).abs() > 1e-4
    difference = (render_kornia(images, params) - expected).abs()
    assert difference[clear].max() < 1e-4
    assert clear.float().mean() > 0.99


def test_no_size_keeps_the_images() -> None:
    images = random_images(4, 32)
    view = render_kornia(images, draw(replace(STRONG, size=None), 4))
    assert torch.equal(view, render_kornia(images, draw(replace(STRONG, size=32), 4)))


def test_bfloat16_is_the_rounded_float32() -> None:
    images, params = random_images(4, 28), draw(STRONG, 4)
    view = render_kornia(images, params, torch.bfloat16)
    assert view.dtype == torch.bfloat16
    assert torch.equal(view, render_kornia(images, params).to(torch.bfloat16))


def take(params: ViewParams, index: slice) -> ViewParams:
    pixels = {name: value[index] for name, value in params.pixels.items()}
    return replace(params, affine=drawn(params.affine)[index], colour=drawn(params.colour)[index], pixels=pixels)


def test_a_sample_does_not_depend_on_the_others() -> None:
    images, params = random_images(8, 64), draw(STRONG, 8)
    view = render_kornia(images, params)
    for i in range(8):
        alone = render_kornia(images[i : i + 1], take(params, slice(i, i + 1)))
        torch.testing.assert_close(alone[0], view[i], atol=1e-5, rtol=0)
    assert torch.equal(images, random_images(8, 64))  # and the store is left alone


# --- the draw -------------------------------------------------------------------------------------

MANY = 20_000


def assert_share(hits: Tensor, probability: float) -> None:
    """Within five standard deviations of a binomial."""
    share, sd = hits.double().mean().item(), math.sqrt(probability * (1 - probability) / len(hits))
    assert abs(share - probability) <= 5 * sd, (share, probability)


def test_probabilities() -> None:
    params = draw(STRONG, MANY)
    colour, sigma, threshold = drawn(params.colour), params.pixels["blur"], params.pixels["solarise"]
    blurred = sigma != NO_BLUR
    assert_share(blurred, SETTINGS.blur_p)
    assert_share(threshold == SETTINGS.solarise_threshold, SETTINGS.solarise_p)
    assert ((threshold == SETTINGS.solarise_threshold) | (threshold == NO_SOLARISE)).all()
    # A grey sample has three equal rows; an untouched one is the identity, unless it turned grey.
    grey = (colour[:, 0] - colour[:, 1]).abs().amax(1) < 1e-6
    assert_share(grey, SETTINGS.grey_p)
    untouched = (colour - torch.eye(3, 4)).abs().amax((1, 2)) < 1e-6
    assert_share(untouched, (1 - SETTINGS.jitter_p) * (1 - SETTINGS.grey_p))
    low, high = SETTINGS.blur_sigma
    strengths = sigma[blurred]
    assert low <= strengths.min() < low + 0.01
    assert high - 0.01 < strengths.max() <= high
    assert abs(strengths.mean() - (low + high) / 2) < 0.05


def test_flips_are_independent_and_as_often_as_asked() -> None:
    affine = drawn(draw(build_policy({"hflip": 0.5, "vflip": 0.3}, **STATISTICS), MANY).affine)
    across, down = affine[:, 0, 0] < 0, affine[:, 1, 1] < 0
    assert_share(across, 0.5)
    assert_share(down, 0.3)
    assert_share(across & down, 0.15)


def test_crops_lie_in_the_image_and_have_the_area_and_ratio_asked_for() -> None:
    affine = drawn(draw(STRONG.changed(rotation=0.0), MANY).affine)
    width, height = affine[:, 0, 0].abs(), affine[:, 1, 1].abs()
    assert (affine[:, 0, 1].abs() + affine[:, 1, 0].abs()).max() < 1e-6
    assert (affine[:, :, 2].abs() + torch.stack([width, height], 1)).max() <= 1 + 1e-6
    area, ratio = width * height, width / height
    assert area.max() <= SETTINGS.crop_max + 1e-5
    fits = (width < 1) & (height < 1)  # a side that is too long is cut
    assert fits.float().mean() > 0.7
    assert area[fits].min() >= SETTINGS.crop_min - 1e-5
    assert SETTINGS.crop_ratio[0] - 1e-5 <= ratio[fits].min() < 0.76
    assert 1.32 < ratio[fits].max() <= SETTINGS.crop_ratio[1] + 1e-5
    # Uniform in area, log-uniform in ratio; small crops always fit.
    small = drawn(draw(STRONG.changed(rotation=0.0, crop_max=0.6), MANY).affine)
    width, height = small[:, 0, 0].abs(), small[:, 1, 1].abs()
    assert abs((width * height).mean() - 0.4) < 0.005
    assert abs((width / height).log().mean()) < 0.01
    place = small[:, 0, 2] / (1 - width)
    assert abs(place.mean()) < 0.03
    assert place.min() < -0.99
    assert place.max() > 0.99


def test_rotation_is_uniform_in_its_range() -> None:
    affine = drawn(draw(build_policy({"rotation": 30.0}, **STATISTICS), MANY).affine)
    degrees = torch.rad2deg(torch.atan2(affine[:, 1, 0], affine[:, 0, 0]))
    assert degrees.abs().max() <= 30.001
    assert degrees.min() < -29.9
    assert degrees.max() > 29.9
    assert abs(degrees.mean()) < 0.7
    torch.testing.assert_close(torch.linalg.det(affine[:, :, :2].double()), torch.ones(MANY, dtype=torch.float64))


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_jitter_factors_are_uniform_and_never_negative(strength: float) -> None:
    colour = drawn(draw(jitter(brightness=strength), MANY).colour)
    factor, low = colour[:, 0, 0], max(0.0, 1 - strength)
    assert low <= factor.min() < low + 0.01
    assert 0.99 + strength < factor.max() <= 1 + strength
    assert abs(factor.mean() - (low + 1 + strength) / 2) < 0.02


def test_nothing_asked_is_nothing_drawn() -> None:
    params = draw(STRONG.normalised(), 4)
    assert (params.affine, params.colour, params.pixels, params.drawn()) == (None, None, {}, {})
    assert draw(build_policy({"jitter_p": 1.0}, **STATISTICS), 4).colour is None
    assert draw(GREY.changed(jitter_p=0.0), 4).colour is None  # grey_p does nothing to a grey image


def assert_same(a: ViewParams, b: ViewParams) -> None:
    assert (a.size, a.mean, a.std) == (b.size, b.mean, b.std)
    assert a.drawn().keys() == b.drawn().keys()
    for name, value in a.drawn().items():
        assert torch.equal(value, b.drawn()[name]), name


@pytest.mark.parametrize("policy", [STRONG, GREY], ids=["rgb", "grey"])
def test_a_rank_draws_its_slice_of_the_whole(policy: ViewPolicy) -> None:
    positions = torch.arange(64)
    whole = draw_view_params(policy, positions, KEY)
    for start in range(0, 64, 16):
        part = slice(start, start + 16)
        assert_same(draw_view_params(policy, positions[part], KEY), take(whole, part))


def test_a_step_may_be_a_tensor() -> None:
    positions = torch.arange(16)
    assert_same(
        draw_view_params(STRONG, positions, KEY._replace(step=torch.tensor(5))),
        draw_view_params(STRONG, positions, KEY),
    )


@pytest.mark.parametrize("field", ["seed", "stream", "epoch", "step"])
def test_every_part_of_the_key_matters(field: str) -> None:
    positions = torch.arange(16)
    other = draw_view_params(STRONG, positions, KEY._replace(**{field: 77}))
    assert (
        not torch.isclose(drawn(other.affine), drawn(draw_view_params(STRONG, positions, KEY).affine))
        .flatten(1)
        .all(1)
        .any()
    )


@pytest.mark.parametrize(
    ("off", "unchanged"),
    [
        ({"crop_min": 1.0, "crop_ratio": (1.0, 1.0)}, ("colour", "blur", "solarise")),
        ({"hflip": 0.0}, ("colour", "blur", "solarise")),
        ({"rotation": 0.0}, ("colour", "blur", "solarise")),
        ({"jitter_p": 0.0}, ("affine", "blur", "solarise")),
        ({"grey_p": 0.0}, ("affine", "blur", "solarise")),
        ({"blur_p": 0.0}, ("affine", "colour", "solarise")),
        ({"solarise_p": 0.0}, ("affine", "colour", "blur")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_switching_one_off_leaves_the_others_alone(off: dict[str, Any], unchanged: tuple[str, ...]) -> None:
    full, less = draw(STRONG, 64).drawn(), draw(STRONG.changed(**off), 64).drawn()
    for name in unchanged:
        assert torch.equal(full[name], less[name]), name


def test_within_one_matrix_too() -> None:
    full = drawn(draw(STRONG, 64).affine)
    unflipped = drawn(draw(STRONG.changed(hflip=0.0, vflip=0.0), 64).affine)
    torch.testing.assert_close(full.abs(), unflipped.abs())
    coloured = drawn(draw(STRONG, 64).colour)
    never_grey = drawn(draw(STRONG.changed(grey_p=0.0), 64).colour)
    same = (coloured == never_grey).flatten(1).all(1)
    grey = (coloured[:, 0] - coloured[:, 1]).abs().amax(1) < 1e-6
    assert torch.equal(same, ~grey)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": (0.5,)},
        {"hflip": 1.1},
        {"crop_min": 0.0},
        {"crop_min": 0.5, "crop_max": 0.2},
        {"crop_ratio": (0.0, 1.0)},
        {"blur_sigma": (0.0, 1.0)},
        {"hue": 0.6},
        {"size": 2},
    ],
    ids=str,
)
def test_a_wrong_policy_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))) as error:
        replace(STRONG, **wrong) if wrong.keys() < {"mean", "std", "size"} else STRONG.changed(**wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("chunk", [1, 700, 5000])
@pytest.mark.parametrize("policy", [BOUND, BOUND.normalised(), replace(BOUND, size=8).changed(solarise_p=0.5)])
def test_parts_of_a_batch_are_rendered_as_the_whole(
    chunk: int, policy: ViewPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(0, 256, (11, 16, 16, 3), dtype=torch.uint8)
    params = draw_view_params(policy, torch.arange(11), KEY)
    monkeypatch.setattr(kornia_backend, "CHUNK", 10**9)
    whole = render_kornia(images, params)
    seen = []
    monkeypatch.setattr(
        kornia_backend, "to_float", lambda images, *how: seen.append(len(images)) or to_float(images, *how)
    )
    monkeypatch.setattr(kornia_backend, "CHUNK", chunk)
    torch.testing.assert_close(render_kornia(images, params), whole, atol=1e-6, rtol=0)
    assert sum(seen) == 11
    assert max(seen) == {1: 1, 700: 1, 5000: 6}[chunk]


def test_parameters_are_split_like_tensors() -> None:
    params = draw_view_params(BOUND.changed(solarise_p=0.5), torch.arange(9), KEY)
    parts = params.split([2, 4, 3])
    assert [len(part.colour) for part in parts if part.colour is not None] == [2, 4, 3]
    assert params.drawn().keys() == {"affine", "colour", "blur", "solarise"}
    for name, whole in params.drawn().items():
        assert torch.equal(torch.cat([part.drawn()[name] for part in parts]), whole)
    assert all((part.size, part.mean, part.std) == (params.size, params.mean, params.std) for part in parts)
    nothing = draw_view_params(BOUND.normalised(), torch.arange(9), KEY)
    assert nothing.split([2, 7]) == [nothing, nothing]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", [BOUND, BOUND.normalised()])
def test_floats_are_rendered_as_the_bytes_they_stand_for(backend: str, policy: ViewPolicy) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali.experimental.dynamic", reason="nvidia.dali is not installed")
    images, params = random_images(6, 28), draw(policy, 6)
    floats = images.float() / 255
    kept = floats.clone()
    torch.testing.assert_close(render(floats, params, backend), render(images, params, backend), rtol=0, atol=1e-3)
    assert torch.equal(floats, kept)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.bool])
def test_images_of_another_type_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(
        InputError, match=rf"images are {dtype}, expected uint8, uint16, or float with values in \[0, 1\]$"
    ):
        render(random_images(2, 8).to(dtype), draw(BOUND, 2))


@pytest.mark.parametrize("policy", [HARD, HARD.normalised(), build_policy({"hflip": 0.5})])
def test_nothing_is_drawn_by_a_policy_that_does_not_know_its_data(policy: ViewPolicy) -> None:
    """Contrast would pivot on some grey, and the view be normalised by some mean."""
    with pytest.raises(InputError, match=r"no mean and std: .*with_statistics\(store.mean, store.std\)$"):
        draw(policy, 4)
