"""Losses against plain Python loops written from the papers, and against lightly; every way to degenerate."""

import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from amimv import InputError
from amimv.models.losses import mimv_loss, nt_xent

Rows = list[list[float]]
BOUNDS: dict[str, dict[str, float | None]] = {
    "all": {},
    "no-high": {"high": None},
    "no-low": {"low": None},
    "no-near-zero": {"near_zero": None},
    "imagenet": {"high": None, "low": None},
    "none": {"high": None, "low": None, "near_zero": None},
    "tight": {"high": 0.6, "low": -0.5, "near_zero": 0.2},
}


VARIANTS: list[dict[str, Any]] = [
    {},
    {"spare_positives": True},
    {"average": "logs"},
    {"spare_positives": True, "average": "logs"},
]
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS[1:], ids=["spared", "logs", "spared-logs"])


def draw_pair(batch: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two ``(batch, width)`` in float64: positives from nearly equal to unrelated, rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    za, noise = torch.randn(2, batch, width, generator=generator, dtype=torch.float64)
    zb = za + noise * torch.linspace(0.05, 3, batch, dtype=torch.float64)[:, None]
    return za * torch.linspace(0.5, 4, batch, dtype=torch.float64)[:, None], zb


def cosine(u: list[float], v: list[float]) -> float:
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(a * a for a in u)) / math.sqrt(sum(b * b for b in v))


def interleave(za: Rows, zb: Rows) -> Rows:
    """e1, e1', e2, e2', ...: the positive of row k is row k ^ 1, the image of row k is k // 2."""
    return [row for pair in zip(za, zb, strict=True) for row in pair]


def mimv_columns(
    za: Rows,
    zb: Rows,
    *,
    temperature: float = 0.3,
    self_term: str = "once",
    high: float | None = 0.9,
    low: float | None = -0.9,
    near_zero: float | None = 0.1,
    spare_positives: bool = False,
    ids: list[int] | None = None,
) -> list[tuple[float, float]]:
    """Per column j of P: the positive's entry (0 if it is eliminated), and the denominator."""
    rows = interleave(za, zb)
    columns = []
    for j in range(len(rows)):
        numerator, denominator = 0.0, 0.0
        for i in range(len(rows)):
            s = 1.0 if i == j else cosine(rows[i], rows[j])
            extreme = (high is not None and s > high) or (low is not None and s < low)
            extreme = extreme or (near_zero is not None and abs(s) < near_zero)
            same_image = ids is not None and ids[i // 2] == ids[j // 2] and i not in (j, j ^ 1)
            if spare_positives and i == j ^ 1:
                extreme = False
            if extreme or same_image or (i == j and self_term == "once"):
                continue
            p = math.exp(s / temperature)
            denominator += p
            if i == j ^ 1:
                numerator = p
        if self_term == "published":
            denominator -= math.exp(1 / temperature)
        columns.append((numerator, denominator))
    return columns


def mimv_by_loop(za: Rows, zb: Rows, *, average: str = "ratios", **settings: Any) -> float:
    columns = mimv_columns(za, zb, **settings)
    if average == "logs":
        logs = [-math.log(numerator / denominator) for numerator, denominator in columns if numerator > 0]
        return sum(logs) / len(logs) if logs else 0.0
    ratios = [0.0 if denominator == 0 else numerator / denominator for numerator, denominator in columns]
    mean = sum(ratios) / len(ratios)
    return -math.log(mean) if mean > 0 else math.nan


def nt_xent_by_loop(za: Rows, zb: Rows, *, temperature: float = 0.2, ids: list[int] | None = None) -> float:
    """Chen et al. 2020, equation 1, one anchor at a time."""
    rows = interleave(za, zb)
    total = 0.0
    for j in range(len(rows)):
        denominator = 0.0
        for k in range(len(rows)):
            same_image = ids is not None and ids[k // 2] == ids[j // 2] and k != j ^ 1
            if k != j and not same_image:
                denominator += math.exp(cosine(rows[j], rows[k]) / temperature)
        total -= math.log(math.exp(cosine(rows[j], rows[j ^ 1]) / temperature) / denominator)
    return total / len(rows)


def slopes_along(loss: Callable[[Rows, Rows], float], za: Tensor, zb: Tensor, ways: Tensor, h: float = 1e-6) -> Tensor:
    """Central differences of a function of plain numbers along each of ``(K, 2, B, D)``: ``(K,)``."""
    found = []
    for way_a, way_b in ways:
        above = loss((za + h * way_a).tolist(), (zb + h * way_b).tolist())
        below = loss((za - h * way_a).tolist(), (zb - h * way_b).tolist())
        found.append((above - below) / (2 * h))
    return torch.tensor(found, dtype=torch.float64)


def value_and_gradient(loss: Callable[..., Tensor], za: Tensor, zb: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    za, zb = za.clone().requires_grad_(), zb.clone().requires_grad_()
    value = loss(za, zb, **settings)
    value.backward()
    assert za.grad is not None
    assert zb.grad is not None
    assert za.grad.dtype == za.dtype
    return value.detach(), torch.stack([za.grad, zb.grad])


def assert_as_loop(
    loss: Callable[..., Tensor],
    by_loop: Callable[..., float],
    za: Tensor,
    zb: Tensor,
    ids: list[int] | None = None,
    **settings: Any,
) -> None:
    expected = by_loop(za.tolist(), zb.tolist(), ids=ids, **settings)
    assert math.isfinite(expected)
    # Random directions through all numbers at once: a gradient that is wrong anywhere is wrong along these.
    ways = torch.randn(4, *torch.stack([za, zb]).shape, dtype=za.dtype, generator=torch.Generator().manual_seed(7))
    slopes = slopes_along(lambda a, b: by_loop(a, b, ids=ids, **settings), za, zb, ways)
    assert slopes.abs().max() > 1e-5  # else the comparison below would be one of zeros
    tensor_ids = None if ids is None else torch.tensor(ids)
    value, gradient = value_and_gradient(loss, za, zb, ids=tensor_ids, **settings)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert float(value) == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close((ways * gradient).sum((1, 2, 3)), slopes, rtol=1e-5, atol=1e-6)


# MIMV


def clear_of_bounds(za: Tensor, zb: Tensor) -> bool:
    """No similarity so near a bound that a finite difference steps over it."""
    rows = torch.stack([za, zb], dim=1).flatten(0, 1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    s = (rows @ rows.T).abs().flatten()
    bounds = torch.tensor([0.9, 0.1, 0.6, 0.5, 0.2], dtype=s.dtype)
    return bool((s[:, None] - bounds).abs().min() > 1e-4)


@settings(max_examples=150)
@given(
    batch=st.integers(2, 8),
    width=st.integers(3, 24),
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 1),
    bounds=st.sampled_from(list(BOUNDS.values())),
    variant=st.sampled_from(VARIANTS),
    images=st.integers(2, 20),
)
def test_mimv_once_value_and_gradient_equal_a_loop(
    batch: int, width: int, seed: int, temperature: float, bounds: Any, variant: Any, images: int
) -> None:
    za, zb = draw_pair(batch, width, seed)
    ids = [i % images for i in range(batch)] if images < batch else None
    chosen = {"temperature": temperature, "ids": ids, **bounds, **variant}
    expected = mimv_by_loop(za.tolist(), zb.tolist(), **chosen)
    assume(clear_of_bounds(za, zb) and math.isfinite(expected) and expected != 0)
    assert_as_loop(mimv_loss, mimv_by_loop, za, zb, **chosen)


@settings(max_examples=40)
@given(
    batch=st.integers(12, 16),
    seed=st.integers(0, 1000),
    temperature=st.floats(1, 4),
    bounds=st.sampled_from(list(BOUNDS.values())),
    variant=st.sampled_from(VARIANTS),
    images=st.integers(8, 20),
)
def test_mimv_published_value_and_gradient_equal_a_loop(
    batch: int, seed: int, temperature: float, bounds: Any, variant: Any, images: int
) -> None:
    """Few dimensions and high temperatures: elsewhere a denominator less exp(1 / T) is seldom above 0."""
    za, zb = draw_pair(batch, 3, seed)
    ids = [i % images for i in range(batch)] if images < batch else None
    chosen = {"temperature": temperature, "self_term": "published", "ids": ids, **bounds, **variant}
    assume(
        clear_of_bounds(za, zb)
        and all(
            below > 0.1
            for _, below in mimv_columns(
                za.tolist(), zb.tolist(), **{name: value for name, value in chosen.items() if name != "average"}
            )
        )
    )
    assert_as_loop(mimv_loss, mimv_by_loop, za, zb, **chosen)


def test_the_pairs_above_lose_some_positives_and_feel_every_bound() -> None:
    za, zb = (z.tolist() for z in draw_pair(8, 3, seed=1))
    kept = [numerator > 0 for numerator, _ in mimv_columns(za, zb)]
    assert 0 < sum(kept) < len(kept)
    assert len({mimv_by_loop(za, zb, **BOUNDS[name]) for name in ("all", "no-high", "no-low", "no-near-zero")}) == 4


@pytest.mark.parametrize("self_term", ["once", "published"])
def test_every_variant_is_another_loss_where_positives_are_extreme(self_term: str) -> None:
    pair = draw_pair(16, 3, seed=1)
    values = [mimv_loss(*pair, self_term=self_term, temperature=1.0, **variant) for variant in VARIANTS]
    assert all(value.isfinite() for value in values)
    assert len({round(float(value), 6) for value in values}) == 4


@pytest.mark.parametrize("s", [0.95, -0.95, 0.05])
def test_each_bound_spares_positives(s: float) -> None:
    """Two pairs at similarity s, orthogonal to each other: only the positives are left, if they are spared."""
    za = torch.zeros(2, 4, dtype=torch.float64)
    zb = za.clone()
    za[0, 0] = za[1, 2] = 1
    zb[0, :2] = zb[1, 2:] = torch.tensor([s, math.sqrt(1 - s * s)], dtype=torch.float64)
    assert float(mimv_loss(za, zb, spare_positives=True)) == pytest.approx(0, abs=1e-12)
    assert float(mimv_loss(za, zb)) == pytest.approx(-math.log(torch.finfo(torch.float64).tiny))


@pytest.mark.parametrize("self_term", ["once", "published"])
def test_variants_without_effect_agree(self_term: str) -> None:
    """Sparing is nothing where no positive is extreme, and both averages are one where all columns are alike."""
    za, zb = draw_pair(16, 3, seed=1)
    off = BOUNDS["none"]
    kept = mimv_loss(za, zb, self_term=self_term, **off)
    assert torch.equal(mimv_loss(za, zb, self_term=self_term, spare_positives=True, **off), kept)
    alike = torch.eye(4, dtype=torch.float64)
    settings: dict[str, Any] = {"self_term": self_term, **off}
    ratios, logs = (mimv_loss(alike, alike.clone(), average=name, **settings) for name in ("ratios", "logs"))
    torch.testing.assert_close(logs, ratios)
    assert float(logs) == pytest.approx(math.log(1 + 6 * math.exp(-1 / 0.3)))


def test_mimv_without_bounds_averaged_as_logs_is_nt_xent() -> None:
    za, zb = draw_pair(8, 6, seed=4)
    value, gradient = value_and_gradient(mimv_loss, za, zb, temperature=0.2, average="logs", **BOUNDS["none"])
    expected, slopes = value_and_gradient(nt_xent, za, zb, temperature=0.2)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, slopes)


def test_mimv_defaults_are_the_published_treatment_of_positives() -> None:
    pair = draw_pair(8, 3, seed=1)
    for self_term in ("once", "published"):
        written_out = mimv_loss(*pair, self_term=self_term, spare_positives=False, average="ratios")
        assert torch.equal(mimv_loss(*pair, self_term=self_term), written_out) or written_out.isnan()


def test_mimv_ids_of_distinct_images_change_nothing() -> None:
    za, zb = draw_pair(6, 4)
    assert mimv_loss(za, zb, ids=torch.arange(6)) == mimv_loss(za, zb)
    assert mimv_loss(za, zb, ids=torch.zeros(6, dtype=torch.int64)) != mimv_loss(za, zb)


@pytest.mark.parametrize("near_zero", [0.1, None])
def test_published_and_once_agree_where_the_upper_bound_is_off(near_zero: float | None) -> None:
    """The self term is removed twice only because the bound removes it too (not so in the ImageNet setting)."""
    za, zb = draw_pair(12, 8)
    off: dict[str, Any] = {"high": None, "low": None, "near_zero": near_zero}
    torch.testing.assert_close(mimv_loss(za, zb, self_term="published", **off), mimv_loss(za, zb, **off))
    with_bound = {**off, "high": 0.9}
    assert not torch.isclose(mimv_loss(za, zb, self_term="published", **with_bound), mimv_loss(za, zb, **with_bound))


def negative_share(batch: int, width: int, related: bool) -> tuple[float, Tensor]:
    """Share of columns with a denominator <= 0 on random embeddings, by the text, and the published loss."""
    generator = torch.Generator().manual_seed(batch)
    za, zb = torch.randn(2, batch, width, generator=generator, dtype=torch.float64)
    zb = za + zb if related else zb
    rows = torch.stack([za, zb], dim=1).flatten(0, 1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    s = rows @ rows.T
    kept = (s <= 0.9) & (s >= -0.9) & (s.abs() >= 0.1)
    denominator = (kept * (s / 0.3).exp()).sum(0) - math.exp(1 / 0.3)
    return (denominator <= 0).double().mean().item(), mimv_loss(za, zb, self_term="published")


@pytest.mark.parametrize(
    ("related", "width", "batch", "low", "high"),
    [
        (False, 128, 16, 1, 1),
        (False, 128, 96, 0, 0.01),
        (False, 512, 64, 1, 1),
        (False, 512, 256, 0.99, 1),
        (True, 128, 16, 0.85, 1),
        (True, 128, 32, 0.3, 0.6),
        (True, 128, 64, 0, 0.03),
        (True, 512, 64, 1, 1),
        (True, 512, 256, 0.7, 0.95),
        (True, 512, 512, 0.03, 0.15),
        (True, 512, 1024, 0, 0),
    ],
)
def test_published_variant_breaks_down_in_small_batches(
    related: bool, width: int, batch: int, low: float, high: float
) -> None:
    """D = 128: nearly all columns at B = 16, some at 32, hardly any from 64; D = 512: all up to 64, none at 1024.
    Where positives are related (cosine 0.7), fewer than where they are independent."""
    share, loss = negative_share(batch, width, related)
    assert low <= share <= high
    if share == 1:
        assert loss.isnan()
    if share == 0:
        assert loss.isfinite()


@pytest.mark.parametrize(("width", "batch"), [(128, 16), (512, 64)])
def test_once_is_finite_where_the_published_variant_is_not(width: int, batch: int) -> None:
    za, zb = torch.randn(2, batch, width, generator=torch.Generator().manual_seed(batch))
    value, gradient = value_and_gradient(mimv_loss, za, zb)
    assert mimv_loss(za, zb, self_term="published").isnan()
    assert value < -math.log(torch.finfo(torch.float32).tiny)
    assert gradient.isfinite().all()
    assert gradient.any()


def all_positives_eliminated() -> tuple[Tensor, Tensor]:
    za, _ = draw_pair(6, 5)
    return za, za * 2


def one_column_eliminated() -> tuple[Tensor, Tensor]:
    """Row 0 of both is orthogonal to everything, to its positive too."""
    za, zb = draw_pair(6, 5)
    za[:, :2] = zb[:, :2] = 0
    za[0], zb[0] = torch.eye(5, dtype=za.dtype)[:2]
    return za, zb


def identical() -> tuple[Tensor, Tensor]:
    rows = torch.ones(4, 3, dtype=torch.float64)
    return rows, rows.clone()


def opposite() -> tuple[Tensor, Tensor]:
    rows = torch.ones(4, 3, dtype=torch.float64)
    return rows, -rows


def zeros() -> tuple[Tensor, Tensor]:
    return torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)


def one_zero_row() -> tuple[Tensor, Tensor]:
    za, zb = draw_pair(6, 5)
    za[2] = 0
    return za, zb


def one_pair() -> tuple[Tensor, Tensor]:
    return torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([[0.3, 1.0]], dtype=torch.float64)


def one_eliminated_pair() -> tuple[Tensor, Tensor]:
    return torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([[1.0, 0.4]], dtype=torch.float64)


def two_pairs() -> tuple[Tensor, Tensor]:
    return draw_pair(2, 3)


DEGENERATE = (
    all_positives_eliminated,
    one_column_eliminated,
    identical,
    opposite,
    zeros,
    one_zero_row,
    one_pair,
    one_eliminated_pair,
    two_pairs,
)
NOTHING_LEFT = (all_positives_eliminated, identical, opposite, zeros, one_eliminated_pair)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("case", DEGENERATE)
def test_mimv_once_is_finite_with_finite_gradients(
    case: Callable[[], tuple[Tensor, Tensor]], temperature: float, dtype: torch.dtype
) -> None:
    za, zb = (z.to(dtype) for z in case())
    value, gradient = value_and_gradient(mimv_loss, za, zb, temperature=temperature)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite()
    assert gradient.isfinite().all()
    if case in NOTHING_LEFT:
        assert float(value) == pytest.approx(-math.log(torch.finfo(value.dtype).tiny))
        assert not gradient.any()


@EACH_VARIANT
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("case", DEGENERATE)
def test_mimv_variants_are_finite_with_finite_gradients(
    case: Callable[[], tuple[Tensor, Tensor]], temperature: float, dtype: torch.dtype, variant: dict[str, Any]
) -> None:
    za, zb = (z.to(dtype) for z in case())
    value, gradient = value_and_gradient(mimv_loss, za, zb, temperature=temperature, **variant)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite()
    assert gradient.isfinite().all()
    if case in NOTHING_LEFT and variant == {"average": "logs"}:
        assert float(value) == 0
        assert not gradient.any()


def test_logs_of_a_batch_without_positives_are_zero_in_the_published_variant_too() -> None:
    """Orthogonal rows: the self entry is all of a column, and taking it off leaves exactly nothing."""
    za, zb = torch.eye(6, dtype=torch.float64).split(3)
    settings: dict[str, Any] = {"self_term": "published", "high": None, "average": "logs"}
    value, gradient = value_and_gradient(mimv_loss, za, zb, **settings)
    assert float(value) == 0
    assert not gradient.any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [8, 64, 128])
@EACH_VARIANT
def test_mimv_variants_in_single_precision_are_right_at_small_temperatures(
    variant: dict[str, Any], width: int, seed: int
) -> None:
    """Ratios down to exp(-200), whose logarithms float32 holds and which themselves it does not."""
    generator = torch.Generator().manual_seed(seed)
    za, zb = torch.randn(2, 6, width, generator=generator, dtype=torch.float64)
    value, gradient = value_and_gradient(mimv_loss, za.float(), zb.float(), temperature=0.01, **variant)
    expected = mimv_by_loop(za.tolist(), zb.tolist(), temperature=0.01, **variant)
    assert gradient.isfinite().all()
    assert float(value) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_an_eliminated_column_counts_with_a_ratio_of_zero() -> None:
    za, zb = one_column_eliminated()
    columns = mimv_columns(za.tolist(), zb.tolist())
    assert columns[0] == columns[1] == (0.0, 0.0)
    value, gradient = value_and_gradient(mimv_loss, za, zb)
    assert float(value) == pytest.approx(mimv_by_loop(za.tolist(), zb.tolist()), rel=1e-10)
    assert not gradient[:, 0].any()
    assert gradient[:, 1:].any()


def test_one_kept_pair_has_nothing_to_learn() -> None:
    value, gradient = value_and_gradient(mimv_loss, *one_pair())
    assert float(value) == 0
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("bounds", ["all", "none"])
def test_mimv_in_single_precision_is_right_at_small_temperatures(width: int, seed: int, bounds: str) -> None:
    """exp((s - 1) / 0.01) leaves float32 below s = 0.13: wide random embeddings have columns of such entries only."""
    generator = torch.Generator().manual_seed(seed)
    za, zb = torch.randn(2, 6, width, generator=generator, dtype=torch.float64)
    settings = {"temperature": 0.01, **BOUNDS[bounds]}
    value, gradient = value_and_gradient(mimv_loss, za.float(), zb.float(), **settings)
    expected = mimv_by_loop(za.tolist(), zb.tolist(), **settings)
    if math.isnan(expected):  # no positive is left
        expected = -math.log(torch.finfo(torch.float32).tiny)
    assert gradient.isfinite().all()
    assert float(value) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("s", [0.101, 0.11, 0.125, 0.13, -0.11, -0.5, 0.5, 0.89])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_temperatures_with_every_entry_at_one_similarity(s: float, dtype: torch.dtype) -> None:
    """One pair at similarity s, whose ratio is 1 however small its exponential."""
    za = torch.tensor([[1.0, 0.0]], dtype=dtype)
    zb = torch.tensor([[s, math.sqrt(1 - s * s)]], dtype=dtype)
    value, gradient = value_and_gradient(mimv_loss, za, zb, temperature=0.01)
    assert float(value) == pytest.approx(0, abs=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [mimv_loss, nt_xent])
def test_half_precision_embeddings_are_computed_in_single(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    za, zb = (z.to(dtype) for z in draw_pair(8, 16))
    value, gradient = value_and_gradient(loss, za, zb)
    expected, slopes = value_and_gradient(loss, za.float(), zb.float())
    assert value == expected
    assert gradient.dtype == dtype
    assert torch.equal(gradient, slopes.to(dtype))


@pytest.mark.parametrize("loss", [mimv_loss, nt_xent])
def test_autocast_does_not_lower_the_precision(loss: Callable[..., Tensor]) -> None:
    za, zb = (z.float() for z in draw_pair(8, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(za, zb)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(za, zb))


def test_mimv_refuses_an_unknown_self_term() -> None:
    with pytest.raises(InputError, match=r"twice.*expected 'once' or 'published'"):
        mimv_loss(*draw_pair(2, 3), self_term="twice")


def test_mimv_refuses_an_unknown_average() -> None:
    with pytest.raises(InputError, match=r"unknown average 'log': did you mean logs.*choose from ratios, logs"):
        mimv_loss(*draw_pair(2, 3), average="log")


@pytest.mark.parametrize("loss", [mimv_loss, nt_xent])
@pytest.mark.parametrize(("shape_a", "shape_b"), [((4, 3), (4, 2)), ((4, 3), (2, 3)), ((4, 3, 1), (4, 3, 1))])
def test_losses_refuse_other_shapes(loss: Callable[..., Tensor], shape_a: tuple, shape_b: tuple) -> None:
    with pytest.raises(InputError, match=r"expected two equal \(B, D\)"):
        loss(torch.ones(shape_a), torch.ones(shape_b))


@pytest.mark.parametrize("loss", [mimv_loss, nt_xent])
@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1, 1, 2, 3, 0, 4])])
def test_losses_know_no_order_sides_or_scale(loss: Callable[..., Tensor], ids: Tensor | None) -> None:
    za, zb = draw_pair(7, 5)
    expected = loss(za, zb, ids=ids)
    shuffled = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    torch.testing.assert_close(loss(zb, za, ids=ids), expected)
    torch.testing.assert_close(loss(za[shuffled], zb[shuffled], ids=None if ids is None else ids[shuffled]), expected)
    torch.testing.assert_close(loss(za * 1e-3, zb * 1e4, ids=ids), expected)


# NT-Xent


@settings(max_examples=30)
@given(
    batch=st.integers(2, 8),
    width=st.integers(3, 16),
    seed=st.integers(0, 1000),
    temperature=st.floats(0.07, 1),
    images=st.integers(2, 16),
)
def test_nt_xent_value_and_gradient_equal_a_loop(
    batch: int, width: int, seed: int, temperature: float, images: int
) -> None:
    ids = [i % images for i in range(batch)] if images < batch else None
    assert_as_loop(nt_xent, nt_xent_by_loop, *draw_pair(batch, width, seed), ids=ids, temperature=temperature)


def test_nt_xent_ids_drop_other_rows_of_the_same_image() -> None:
    za, zb = draw_pair(6, 4, seed=5)
    assert_as_loop(nt_xent, nt_xent_by_loop, za, zb, ids=[3, 1, 3, 3, 1, 0])
    assert nt_xent(za, zb, ids=torch.arange(6)) == nt_xent(za, zb)
    # With one image only the positive is left.
    assert float(nt_xent(za, zb, ids=torch.zeros(6, dtype=torch.int64))) == 0


@pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="needs the package lightly")
@pytest.mark.parametrize("temperature", [0.1, 0.2, 0.5])
def test_nt_xent_equals_lightly(temperature: float) -> None:
    from lightly.loss import NTXentLoss

    published = NTXentLoss(temperature=temperature)
    for batch, width in itertools.product([2, 16], [4, 64]):
        za, zb = draw_pair(batch, width, seed=batch)
        value, gradient = value_and_gradient(nt_xent, za, zb, temperature=temperature)
        expected, slopes = value_and_gradient(published, za, zb)
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(gradient, slopes, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 0.01])
@pytest.mark.parametrize("case", DEGENERATE)
def test_nt_xent_is_finite_with_finite_gradients(
    case: Callable[[], tuple[Tensor, Tensor]], temperature: float, dtype: torch.dtype
) -> None:
    value, gradient = value_and_gradient(nt_xent, *(z.to(dtype) for z in case()), temperature=temperature)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [zeros, one_zero_row])
@pytest.mark.parametrize(("loss", "settings"), [(nt_xent, {}), (mimv_loss, BOUNDS["none"]), (mimv_loss, {})])
def test_a_zero_row_has_no_gradient(
    loss: Callable[..., Tensor],
    settings: dict[str, Any],
    case: Callable[[], tuple[Tensor, Tensor]],
    dtype: torch.dtype,
) -> None:
    """It has no direction; through a normalisation with an eps of 1e-12 it would get one of 1e10."""
    za, zb = (z.to(dtype) for z in case())
    value, gradient = value_and_gradient(loss, za, zb, **settings)
    assert not gradient[torch.stack([za, zb]) == 0].any()
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_nt_xent_of_known_similarities() -> None:
    """All rows equal: every one of the 2B - 1 candidates is as likely. One pair: nothing to tell apart."""
    assert float(nt_xent(*identical())) == pytest.approx(math.log(7))
    assert float(nt_xent(*one_pair())) == 0
