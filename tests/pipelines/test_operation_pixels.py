"""Each operation beside an independent one: float64 loops, torchvision, Kornia, and the laws of what is drawn."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from kornia.enhance import equalize_clahe
from scipy.stats import kstest
from torch import Tensor

from amimv import InputError
from amimv.pipelines import Key
from amimv.pipelines.kornia_backend import apply_affine
from amimv.pipelines.operations import (
    Elastic,
    Equalise,
    Erasing,
    Gamma,
    Noise,
    Operation,
    Sharpness,
    Shear,
    Source,
    Translation,
)
from amimv.pipelines.rng import uniforms

MEAN = (0.4, 0.5, 0.6)
MANY = 20_000


def floats(batch: int, size: int, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(size + channels))


def draw(operation: Operation, batch: int, seed: int = 0) -> Tensor:
    u = uniforms(Key(seed, 1000), torch.arange(batch), operation.uniforms).unbind(1)
    return operation.draw(u, Source(MEAN))  # type: ignore[attr-defined]


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    assert kstest(values.double().numpy(), "uniform", (low, high - low)).pvalue > 1e-4


def sample(image: Tensor, row: float, column: float) -> Tensor:
    """``(C,)`` at a place in pixels of a ``(C, H, W)`` image: bilinear in float64, clamped to the border."""
    _, height, width = image.shape
    row, column = min(max(row, 0.0), height - 1.0), min(max(column, 0.0), width - 1.0)
    top, left = min(int(row), height - 2), min(int(column), width - 2)
    y, x = row - top, column - left
    upper = (1 - x) * image[:, top, left] + x * image[:, top, left + 1]
    lower = (1 - x) * image[:, top + 1, left] + x * image[:, top + 1, left + 1]
    return (1 - y) * upper + y * lower


# --- geometry -------------------------------------------------------------------------------------


def test_translation_moves_by_pixels_and_repeats_the_border() -> None:
    images, size = floats(4, 11), 11
    affine = draw(Translation(0.6), 4)
    views = apply_affine(images, affine, size).double()
    u = uniforms(Key(0, 1000), torch.arange(4), 2).double()
    for image, view, (across, down) in zip(images.double(), views, u.tolist(), strict=True):
        right, low = (0.6 * (2 * share - 1) * size for share in (across, down))
        for i, j in product(range(size), repeat=2):
            torch.testing.assert_close(view[:, i, j], sample(image, i + low, j + right), rtol=0, atol=2e-5)


def test_translation_is_uniform_along_each_axis() -> None:
    shift = draw(Translation(0.3), MANY)[:, :, 2] / 2  # as a share of the side
    for axis in shift.unbind(1):
        assert_uniform(axis, -0.3, 0.3)
    assert abs(torch.corrcoef(shift.T)[0, 1]) < 0.04
    assert torch.equal(draw(Translation(0.3), 4)[:, :, :2], torch.eye(2).expand(4, 2, 2))


def test_shear_is_about_the_centre() -> None:
    images, size = floats(4, 10), 10
    views = apply_affine(images, draw(Shear(40.0), 4), size).double()
    u = uniforms(Key(0, 1000), torch.arange(4), 2).double()
    middle = (size - 1) / 2
    for image, view, (first, second) in zip(images.double(), views, u.tolist(), strict=True):
        along_x, along_y = (math.tan(math.radians(40) * (2 * share - 1)) for share in (first, second))
        for i, j in product(range(size), repeat=2):
            row = i + along_y * (j - middle)
            column = j + along_x * (i - middle)
            torch.testing.assert_close(view[:, i, j], sample(image, row, column), rtol=0, atol=2e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_shear_along_one_axis_is_torchvisions(axis: int) -> None:
    """Away from the border, where torchvision fills with zero."""
    image = floats(1, 32)
    affine = draw(Shear(15.0), 1)
    degrees = math.degrees(math.atan(affine[0, axis, 1 - axis].item()))
    affine[0, 1 - axis, axis] = 0.0
    shear = [0.0, 0.0]
    shear[axis] = degrees
    candidates = [
        tv.affine(image, 0.0, [0, 0], 1.0, [sign * s for s in shear], tv.InterpolationMode.BILINEAR)
        for sign in (1, -1)  # the direction in which an angle counts is a convention
    ]
    inner = (..., slice(8, -8), slice(8, -8))
    view = apply_affine(image, affine, 32)
    assert min((view - candidate)[inner].abs().max().item() for candidate in candidates) < 1e-3


def test_angles_of_shear_are_uniform() -> None:
    affine = draw(Shear(25.0), MANY)
    for entry in (affine[:, 0, 1], affine[:, 1, 0]):
        assert_uniform(torch.rad2deg(entry.double().atan()), -25.0, 25.0)
    assert (affine[:, :, 2] == 0).all()


# --- values ---------------------------------------------------------------------------------------


def test_gamma_is_torchvisions() -> None:
    images = floats(6, 9)
    images[:, :, 0, 0], images[:, :, 0, 1] = 0.0, 1.0
    drawn = draw(Gamma(1.0, (0.4, 2.5)), 6)
    expected = torch.stack([tv.adjust_gamma(i, g) for i, g in zip(images, drawn.tolist(), strict=True)])
    torch.testing.assert_close(Gamma.apply(images.clone(), drawn), expected, rtol=0, atol=1e-6)
    assert_uniform(draw(Gamma(1.0, (0.4, 2.5)), MANY).double().log(), math.log(0.4), math.log(2.5))


def test_sharpness_is_torchvisions_inside_and_reflected_at_the_border() -> None:
    images = floats(5, 8)
    drawn = draw(Sharpness(1.0, (-1.0, 3.0)), 5)
    drawn[0] = -1.0
    views = Sharpness.apply(images.clone(), drawn)
    for image, view, strength in zip(images, views, drawn.tolist(), strict=True):
        expected = tv.adjust_sharpness(image, 1 + strength)
        torch.testing.assert_close(view[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], rtol=0, atol=1e-5)
        for c, i, j in product(range(3), range(8), range(8)):
            total = 0.0
            for di, dj in product((-1, 0, 1), repeat=2):
                row, column = (7 - abs(7 - abs(k)) for k in (i + di, j + dj))
                total += (5 if di == dj == 0 else 1) * image[c, row, column].item()
            value = image[c, i, j].item()
            value += strength * (value - total / 13)
            assert abs(view[c, i, j].item() - min(max(value, 0.0), 1.0)) < 1e-5
    assert_uniform(draw(Sharpness(1.0, (-1.0, 3.0)), MANY), -1.0, 3.0)


@pytest.mark.parametrize("size", [16, 28, 50, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_equalise_is_kornias_of_each_image_alone(size: int, channels: int) -> None:
    images = 0.3 + 0.2 * floats(3, size, channels)
    drawn = torch.tensor([1.0, 0.0, 1.0])
    views = Equalise.apply(images.clone(), drawn)
    for k in (0, 2):
        torch.testing.assert_close(views[k], equalize_clahe(images[k], 40.0, (8, 8)), rtol=0, atol=1e-6)
    assert torch.equal(views[1], images[1])
    assert views[0].std() > 2 * images[0].std()


def test_views_too_small_to_be_equalised_are_refused_in_one_line() -> None:
    with pytest.raises(
        InputError, match=r"views of 8 pixels are too small for equalise_p: give at least 9, or equalise_p 0$"
    ):
        Equalise.apply(floats(2, 8), torch.zeros(2))
    assert Equalise.apply(floats(2, 9), torch.ones(2)).isfinite().all()


def test_noise_is_normal_and_of_the_strength_asked_for() -> None:
    drawn = draw(Noise(1.0, (0.02, 0.08)), 8)
    grey = torch.full((8, 3, 64, 64), 0.5)  # far from being clamped
    noise = (Noise.apply(grey.clone(), drawn) - grey).double()
    for sample_noise, std in zip(noise, drawn[:, 0].tolist(), strict=True):
        count = sample_noise.numel()
        assert kstest((sample_noise / std).flatten().numpy(), "norm").pvalue > 1e-4
        assert abs(sample_noise.mean().item()) < 5 * std / math.sqrt(count)
        assert abs(sample_noise.std().item() / std - 1) < 5 / math.sqrt(2 * count)
    flat = noise.flatten(1)
    between = torch.corrcoef(flat) - torch.eye(8)
    assert between.abs().max() < 5 / math.sqrt(flat.shape[1])
    for shift in (1, 64, 64 * 64, flat.shape[1] // 2):  # of columns, rows, channels, and what one hash gives
        lagged = torch.corrcoef(torch.stack([flat[:, shift:].flatten(), flat[:, :-shift].flatten()]))
        assert abs(lagged[0, 1]) < 5 / math.sqrt(flat[:, shift:].numel())
    assert_uniform(draw(Noise(1.0, (0.02, 0.08)), MANY)[:, 0], 0.02, 0.08)


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_is_a_function_of_what_was_drawn(channels: int) -> None:
    images, drawn = floats(5, 7, channels), draw(Noise(1.0, (0.1, 0.2)), 5)
    views = Noise.apply(images.clone(), drawn)
    assert torch.equal(Noise.apply(images.clone(), drawn), views)
    assert torch.equal(Noise.apply(images[3:4].clone(), drawn[3:4])[0], views[3])
    other = Noise.apply(images.clone(), draw(Noise(1.0, (0.1, 0.2)), 5, seed=1))
    assert ((other - views).abs().amax((1, 2, 3)) > 0.01).all()
    stronger = Noise.apply(torch.full_like(images, 0.5), torch.stack([2e-2 * torch.ones(5), drawn[:, 1]], 1)) - 0.5
    weaker = Noise.apply(torch.full_like(images, 0.5), torch.stack([1e-2 * torch.ones(5), drawn[:, 1]], 1)) - 0.5
    torch.testing.assert_close(stronger, 2 * weaker, rtol=0, atol=1e-6)
    clamped = Noise.apply(images.round(), drawn)
    assert clamped.min() == 0
    assert clamped.max() == 1


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [12, 28])
def test_erasing_is_a_rectangle_of_the_mean(size: int) -> None:
    images, drawn = floats(16, size), draw(Erasing(0.7), 16)
    views = Erasing.apply(images.clone(), drawn)
    for image, view, (left, top, right, bottom, *fill) in zip(images, views, drawn.tolist(), strict=True):
        edges = [round(edge * size) for edge in (left, top, right, bottom)]
        assert 0 <= edges[0] <= edges[2] <= size
        assert 0 <= edges[1] <= edges[3] <= size
        assert fill == pytest.approx(MEAN)
        for i, j in product(range(size), repeat=2):
            inside = edges[1] <= i < edges[3] and edges[0] <= j < edges[2]
            assert view[:, i, j].tolist() == (fill if inside else image[:, i, j].tolist())


def test_area_ratio_and_place_of_what_is_erased() -> None:
    left, top, right, bottom = draw(Erasing(1.0, (0.02, 0.25)), MANY)[:, :4].double().unbind(1)
    width, height = right - left, bottom - top
    assert_uniform(width * height, 0.02, 0.25)  # of which every one fits
    assert_uniform((width / height).log(), math.log(0.3), -math.log(0.3))
    assert_uniform(left / (1 - width), 0, 1)
    assert_uniform(top / (1 - height), 0, 1)
    full = draw(Erasing(1.0, (1.0, 1.0)), 500)[:, :4]
    assert full.min() >= 0
    assert full.max() <= 1


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def field_at(control: Tensor, i: int, j: int, size: int) -> Tensor:
    """``(2,)``: the ``(2, 4, 4)`` control points, whose corners are the view's, interpolated at a pixel."""
    total = torch.zeros(2, dtype=torch.float64)
    row, column = (k * 3 / (size - 1) for k in (i, j))
    for di, dj in product(range(-1, 3), repeat=2):
        r, c = int(row) + di, int(column) + dj
        weight = cubic(row - r) * cubic(column - c)
        total += weight * control[:, min(max(r, 0), 3), min(max(c, 0), 3)]
    return total


def test_elastic_is_a_bicubic_field_of_shifts_sampled_bilinearly() -> None:
    size, images = 9, floats(3, 9)
    drawn = draw(Elastic(1.0, 0.2), 3)
    views = Elastic.apply(images.clone(), drawn).double()
    for image, view, shifts in zip(images.double(), views, drawn.double().view(3, 2, 4, 4), strict=True):
        for i, j in product(range(size), repeat=2):
            across, down = (field_at(shifts, i, j, size) * size / 2).tolist()
            torch.testing.assert_close(view[:, i, j], sample(image, i + down, j + across), rtol=0, atol=2e-5)
    assert torch.allclose(Elastic.apply(images.clone(), torch.zeros(3, 32)), images, rtol=0, atol=1e-6)


def test_shifts_of_elastic_are_uniform_and_independent() -> None:
    shifts = draw(Elastic(1.0, 0.1), 4000) / 2  # as shares of the side
    assert_uniform(shifts.flatten(), -0.1, 0.1)
    between = torch.corrcoef(shifts.T) - torch.eye(32)
    assert between.abs().max() < 5.5 / math.sqrt(4000)
    smooth = F.interpolate(shifts[:1].view(1, 2, 4, 4), size=(28, 28), mode="bicubic", align_corners=True)
    assert smooth.diff(dim=2).abs().max() < 0.05  # neighbours move alike
