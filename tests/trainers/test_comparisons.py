"""The paired bootstrap against a plain loop and a known law."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from amimv import InputError
from amimv.trainers.comparisons import paired_bootstrap


def made_up(seed: int, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of three unequal classes, and two methods' predictions, right for 70 and 60 %."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, n, p=[0.6, 0.3, 0.1])
    guess = rng.integers(0, 3, (2, n))
    right = rng.random((2, n)) < [[0.55], [0.4]]
    return labels, np.where(right[0], labels, guess[0]), np.where(right[1], labels, guess[1])


def test_the_difference_is_that_of_balanced_accuracies() -> None:
    labels, a, b = made_up(0)
    expected = balanced_accuracy_score(labels, a) - balanced_accuracy_score(labels, b)
    assert paired_bootstrap(labels, a, b).difference == pytest.approx(expected, abs=1e-12)


def test_seeds_count_by_their_mean() -> None:
    labels, a, b = made_up(1)
    _, other, _ = made_up(2)
    expected = np.mean([balanced_accuracy_score(labels, one) for one in (a, other)])
    expected -= balanced_accuracy_score(labels, b)
    assert paired_bootstrap(labels, np.stack([a, other]), b).difference == pytest.approx(expected, abs=1e-12)


def test_the_interval_is_that_of_a_plain_loop() -> None:
    labels, a, b = made_up(3)
    rng = np.random.default_rng(9)
    classes = [np.flatnonzero(labels == c) for c in range(3)]
    differences = []
    for _ in range(2000):
        drawn = np.concatenate([rng.choice(ids, len(ids)) for ids in classes])
        recall = [[(p[drawn] == c)[labels[drawn] == c].mean() for c in range(3)] for p in (a, b)]
        differences.append(np.mean(recall[0]) - np.mean(recall[1]))
    low, high = np.quantile(differences, [0.025, 0.975])
    found = paired_bootstrap(labels, a, b, resamples=20_000)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.008)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """One class: the gain per image is +1, 0 or -1 with known odds, its mean 0.1."""
    rng = np.random.default_rng(4)
    labels = np.zeros(200, dtype=int)
    covered = []
    for trial in range(300):
        gain = rng.choice([1, 0, -1], 200, p=[0.3, 0.5, 0.2])
        a, b = np.where(gain == 1, 0, 1), np.where(gain == -1, 0, 1)
        found = paired_bootstrap(labels, a, b, level=0.9, resamples=500, seed=trial)
        covered.append(found.low <= 0.1 <= found.high)
    assert 0.84 <= np.mean(covered) <= 0.95


def test_equal_predictions_differ_by_nothing_and_swapping_changes_the_sign() -> None:
    labels, a, b = made_up(5)
    same = paired_bootstrap(labels, a, a)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    one, other = paired_bootstrap(labels, a, b), paired_bootstrap(labels, b, a)
    assert one.difference == pytest.approx(-other.difference)
    assert one.low == pytest.approx(-other.high, abs=0.02)


def test_shapes_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(InputError, match="do not fit labels"):
        paired_bootstrap(np.zeros(4), np.zeros(3), np.zeros(4))
