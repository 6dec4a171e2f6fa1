"""Schedules against their closed form."""

import math

import pytest

from amimv.trainers.schedules import warmup_cosine


def test_the_named_steps() -> None:
    total, warmup = 110, 10
    assert warmup_cosine(0, total, warmup) == pytest.approx(0.1)
    assert warmup_cosine(4, total, warmup) == pytest.approx(0.5)
    assert warmup_cosine(9, total, warmup) == pytest.approx(1.0)
    assert warmup_cosine(10, total, warmup) == pytest.approx(1.0)
    assert warmup_cosine(35, total, warmup) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert warmup_cosine(60, total, warmup) == pytest.approx(0.5)
    assert warmup_cosine(109, total, warmup) == pytest.approx((1 - math.cos(math.pi / 100)) / 2)
    assert warmup_cosine(110, total, warmup) == pytest.approx(0.0, abs=1e-12)


def test_without_a_warm_up_it_starts_at_the_peak() -> None:
    assert warmup_cosine(0, 10, 0) == 1.0
    assert warmup_cosine(5, 10, 0) == pytest.approx(0.5)


def test_it_rises_then_falls_and_never_stops_before_the_end() -> None:
    values = [warmup_cosine(step, 50, 7) for step in range(50)]
    assert values[:7] == sorted(values[:7])
    assert values[7:] == sorted(values[7:], reverse=True)
    assert all(0 < value <= 1 for value in values)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (3, 3)])
def test_very_short_trainings(total: int, warmup: int) -> None:
    values = [warmup_cosine(step, total, warmup) for step in range(total)]
    assert values[-1] == 1.0
    assert all(0 < value <= 1 for value in values)
