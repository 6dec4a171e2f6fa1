"""Agreement of rankings: against SciPy and a plain bootstrap, and on simulated studies whose truth is known."""

import math

import numpy as np
import pytest
from scipy.stats import kendalltau

from amimv import InputError
from amimv.trainers.rankings import Agreement, rank_agreement


def simulate(rng: np.random.Generator, configurations: int, seeds: int, tau: float) -> tuple[np.ndarray, ...]:
    """Scores, reference and configurations: bivariate normal, a fifth of the variance between seeds. Of normal pairs
    tau is ``2 / pi * arcsin(correlation)``.
    """
    correlation = math.sin(math.pi / 2 * tau)
    root = np.linalg.cholesky([[1, correlation], [correlation, 1]]).T
    between = math.sqrt(0.8) * rng.normal(size=(configurations, 1, 2)) @ root
    runs = (between + math.sqrt(0.2) * rng.normal(size=(configurations, seeds, 2)) @ root).reshape(-1, 2)
    return runs[:, 0], runs[:, 1], np.repeat(np.arange(configurations), seeds)


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.9])
def test_intervals_hold_the_truth_as_often_as_they_say(tau: float) -> None:
    rng = np.random.default_rng(1)
    found = [rank_agreement(*simulate(rng, 12, 2, tau), resamples=500) for _ in range(300)]
    assert all(one.runs == 24 and one.configurations == 12 for one in found)
    assert np.mean([one.tau for one in found]) == pytest.approx(tau, abs=0.03)
    assert 0.91 <= np.mean([one.low <= tau <= one.high for one in found]) <= 0.99
    # They are of the size of the chance that there is.
    spread = np.std([one.tau for one in found])
    assert np.mean([one.high - one.low for one in found]) == pytest.approx(2 * 1.96 * spread, rel=0.2)


def test_seeds_of_a_configuration_are_no_evidence_of_their_own() -> None:
    """Copies of every run change nothing: an interval over runs would be half as wide."""
    x, y, own = simulate(np.random.default_rng(2), 12, 1, 0.5)
    nudged = [np.concatenate([values + 1e-9 * copy for copy in range(4)]) for values in (x, y)]
    once, often = rank_agreement(x, y, own), rank_agreement(*nudged, np.tile(own, 4))
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.1)


def test_tau_is_scipys_and_the_interval_that_of_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(3)
    x, y, own = simulate(rng, 9, 1, 0.5)
    x = x.round(1)  # with ties
    found = rank_agreement(x, y, own, resamples=4000)
    assert found.tau == kendalltau(x, y).statistic
    # One run each: copies are ties in both numbers, which tau-b leaves out.
    taus = [kendalltau(x[drawn], y[drawn]).statistic for drawn in rng.integers(0, 9, (4000, 9))]
    assert (found.low, found.high) == pytest.approx(np.nanquantile(taus, [0.025, 0.975]), abs=0.04)
    assert rank_agreement(x, y, own, resamples=4000) == found, "the same in every call"
    assert rank_agreement(x, -y, own).tau == -found.tau


@pytest.mark.parametrize(
    ("scores", "configurations", "tau"),
    [
        ([1, 2, 3, 4, 5, 6, 7], "abcdefg", 1.0),  # not one pair disagrees
        ([7, 6, 5, 4, 3, 2, 1], "abcdefg", -1.0),
        ([1, 1, 1, 1, 1, 1, 1], "abcdefg", math.nan),  # a constant
        ([1, 3, 2, 4, 5, 7, 6], "aabbccd", 17 / 21),  # four configurations
    ],
)
def test_what_has_no_interval(scores: list[float], configurations: str, tau: float) -> None:
    found = rank_agreement(scores, list(range(7)), list(configurations))
    expected = Agreement(tau, math.nan, math.nan, 7, len(set(configurations)))
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("scores", "reference", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], r"shapes are \(2,\), \(3,\) and \(2,\)"),
        ([1.0, math.nan], [1.0, 2.0], "NaN or infinity"),
    ],
)
def test_what_cannot_be_compared(scores: list[float], reference: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rank_agreement(scores, reference, ["a", "b"])
