"""Schedules of momentum and temperature against their closed forms at the first, the middle and the last step."""

import math

import pytest

from amimv.models.methods.dino import warmup_temperature
from amimv.models.methods.simclr_ts import swinging_temperature
from amimv.models.teacher import cosine_momentum


@pytest.mark.parametrize("total", [4, 1000])
@pytest.mark.parametrize("start", [0.0, 0.99, 0.9995])
def test_momentum_follows_half_a_cosine_to_one(total: int, start: float) -> None:
    away = 1 - start
    assert cosine_momentum(0, total, start) == pytest.approx(start)
    assert cosine_momentum(total // 4, total, start) == pytest.approx(1 - away * (0.5 + math.sqrt(0.125)))
    assert cosine_momentum(total // 2, total, start) == pytest.approx(1 - away / 2)
    last = away * math.sin(math.pi / (2 * total)) ** 2
    assert 1 - cosine_momentum(total - 1, total, start) == pytest.approx(last, rel=1e-6)
    assert cosine_momentum(total, total, start) == 1
    values = [cosine_momentum(step, total, start) for step in range(total + 1)]
    assert values == sorted(values)


def test_momentum_of_a_single_step_is_the_start() -> None:
    assert cosine_momentum(0, 1, 0.99) == pytest.approx(0.99)


@pytest.mark.parametrize("step", [0, 1, 50, 99])
def test_a_momentum_of_one_stays(step: int) -> None:
    assert cosine_momentum(step, 100, 1.0) == 1


@pytest.mark.parametrize(("total", "warmup", "steps"), [(100, 0.5, 50), (1000, 0.05, 50), (8, 0.25, 2), (6, 1.0, 6)])
def test_teacher_temperature_is_a_line_and_then_flat(total: int, warmup: float, steps: int) -> None:
    for step in range(total + 1):
        expected = 0.04 + 0.03 * step / steps if step < steps else 0.07
        assert warmup_temperature(step, total, 0.04, 0.07, warmup) == pytest.approx(expected, rel=1e-12)
    assert warmup_temperature(steps // 2, total, 0.04, 0.07, warmup) == pytest.approx(0.055)


def test_teacher_temperature_of_a_warmup_shorter_than_a_step() -> None:
    assert warmup_temperature(0, 10, 0.04, 0.07, 0.01) == 0.04
    assert warmup_temperature(1, 10, 0.04, 0.07, 0.01) == pytest.approx(0.07)


@pytest.mark.parametrize("step", [0, 5, 10])
def test_teacher_temperature_without_a_warmup(step: int) -> None:
    assert warmup_temperature(step, 10, 0.04, 0.07, 0.0) == pytest.approx(0.07)


@pytest.mark.parametrize("periods", [1, 2, 10])
def test_temperature_swings_from_high_to_low_and_back(periods: int) -> None:
    """Kukleva et al. 2023, equation 5, in quarters of a period of 40 steps."""
    total = 40 * periods
    for start in range(0, total, 40):
        quarters = [swinging_temperature(start + step, total, 0.1, 1.0, periods) for step in (0, 10, 20, 30, 40)]
        assert quarters == pytest.approx([1.0, 0.55, 0.1, 0.55, 1.0])
    eighth = swinging_temperature(5, total, 0.1, 1.0, periods)
    assert eighth == pytest.approx(0.1 + 0.9 * (0.5 + math.sqrt(0.125)))
    last = swinging_temperature(total - 1, total, 0.1, 1.0, periods)
    assert last == pytest.approx(1.0 - 0.9 * math.sin(math.pi / 40) ** 2)


def test_half_a_period_ends_at_the_low_temperature() -> None:
    assert swinging_temperature(0, 10, 0.1, 1.0, 0.5) == pytest.approx(1.0)
    assert swinging_temperature(5, 10, 0.1, 1.0, 0.5) == pytest.approx(0.55)
    assert swinging_temperature(10, 10, 0.1, 1.0, 0.5) == pytest.approx(0.1)


def test_equal_temperatures_do_not_swing() -> None:
    assert {swinging_temperature(step, 10, 0.2, 0.2, 3.0) for step in range(11)} == {0.2}
