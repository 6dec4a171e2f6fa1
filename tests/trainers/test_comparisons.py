"""The paired bootstrap against plain loops, SciPy's, binomial theory, and what an interval promises."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score

from amimv import InputError
from amimv.trainers.comparisons import paired_bootstrap


def draw_case(
    sizes: list[int], accuracy: float, seeds: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Labels, shuffled, and predictions ``(seeds, N)`` that are right at this rate."""
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    wrong = (labels + generator.integers(1, len(sizes), (seeds, len(labels)))) % len(sizes)
    return labels, np.where(generator.random((seeds, len(labels))) < accuracy, labels, wrong)


def test_the_difference_is_that_of_mean_balanced_accuracies() -> None:
    generator = np.random.default_rng(0)
    labels, a = draw_case([60, 7, 30], 0.8, 3, generator)
    b = np.where(generator.random((2, 97)) < 0.3, 1, a[:2])
    expected = np.mean([balanced_accuracy_score(labels, one) for one in a]) - np.mean(
        [balanced_accuracy_score(labels, one) for one in b]
    )
    found = paired_bootstrap(labels, a, b)
    assert found.difference == pytest.approx(expected, abs=1e-12)
    assert found.low < found.difference < found.high


def test_the_interval_is_that_of_a_plain_loop_over_resampled_images() -> None:
    generator = np.random.default_rng(1)
    labels, a = draw_case([50, 8, 20], 0.7, 2, generator)
    b = np.where(generator.random((2, 78)) < 0.4, 0, a)
    drawn = []
    for _ in range(3000):
        chosen = np.concatenate([generator.choice(np.flatnonzero(labels == c), (labels == c).sum()) for c in range(3)])
        recalls = [
            np.mean([(one[chosen] == c)[labels[chosen] == c].mean() for c in range(3) for one in methods])
            for methods in (a, b)
        ]
        drawn.append(recalls[0] - recalls[1])
    found = paired_bootstrap(labels, a, b, resamples=20000)
    # One standard error of a 2.5 % quantile of 3,000 draws is some 5 % of the interval's half-width.
    np.testing.assert_allclose([found.low, found.high], np.quantile(drawn, [0.025, 0.975]), atol=0.02)


def test_the_interval_is_scipys_with_a_sample_per_class() -> None:
    generator = np.random.default_rng(2)
    labels, a = draw_case([300, 40, 90], 0.75, 1, generator)
    _, b = draw_case([300, 40, 90], 0.5, 1, generator)
    gain = (a[0] == labels).astype(float) - (b[0] == labels)
    scipys = stats.bootstrap(
        [gain[labels == c] for c in range(3)],
        lambda *samples, axis: np.mean([sample.mean(axis=axis) for sample in samples], axis=0),
        paired=False,
        vectorized=True,
        n_resamples=9999,
        method="percentile",
        rng=generator,
    ).confidence_interval
    found = paired_bootstrap(labels, a[0], b[0], resamples=20000)
    np.testing.assert_allclose([found.low, found.high], [scipys.low, scipys.high], atol=0.005)


def test_one_class_against_all_wrong_is_a_binomial_interval() -> None:
    labels = np.zeros(400, dtype=np.int64)
    a, b = np.where(np.arange(400) < 280, 0, 1), np.ones(400, dtype=np.int64)
    found = paired_bootstrap(labels, a, b, resamples=20000, level=0.9)
    expected = stats.binom(400, 0.7).ppf([0.05, 0.95]) / 400
    assert found.difference == pytest.approx(0.7)
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.0026)


def test_pairing_narrows_and_equal_methods_differ_by_nothing() -> None:
    generator = np.random.default_rng(3)
    labels, a = draw_case([500, 500], 0.7, 1, generator)
    same = paired_bootstrap(labels, a, a)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    b = a.copy()
    b[0, :10] = labels[:10]
    paired = paired_bootstrap(labels, b, a)
    # Only ten images can differ: without pairing the interval would be some eight points wide.
    assert paired.high - paired.low < 0.02


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(4)
    inside = 0
    for repeat in range(400):
        labels, a = draw_case([120, 30, 60], 0.8, 1, generator)
        keep = generator.random(210) < 0.75  # b is right where a is, three times of four
        found = paired_bootstrap(labels, a, np.where(keep, a, (labels + 1) % 3), resamples=500, seed=repeat)
        inside += found.low <= 0.8 * 0.25 <= found.high
    # 95 %, less a little for the smallest class, and five standard errors of 400 trials.
    assert 0.93 - 5 * math.sqrt(0.95 * 0.05 / 400) < inside / 400 < 0.999


def test_a_small_class_counts_as_much_as_a_large_one_and_never_vanishes() -> None:
    labels = np.array([0] * 999 + [1])
    a, b = labels, np.zeros(1000, dtype=np.int64)
    found = paired_bootstrap(labels, a, b)
    assert (found.difference, found.low, found.high) == (0.5, 0.5, 0.5)


def test_the_seed_decides_the_draw() -> None:
    labels, a = draw_case([40, 20], 0.7, 2, np.random.default_rng(5))
    assert paired_bootstrap(labels, a[0], a[1], seed=1) == paired_bootstrap(labels, a[0], a[1], seed=1)
    assert paired_bootstrap(labels, a[0], a[1], seed=1) != paired_bootstrap(labels, a[0], a[1], seed=2)


@pytest.mark.parametrize(
    ("labels", "predicted", "match"),
    [
        (np.zeros((3, 2), int), np.zeros(3, int), "one class an image"),
        (np.zeros(0, int), np.zeros(0, int), "one class an image"),
        (np.zeros(3, int), np.zeros(4, int), r"expected \(3,\)"),
        (np.zeros(3, int), np.zeros((0, 3), int), r"expected \(3,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(labels: np.ndarray, predicted: np.ndarray, match: str) -> None:
    with pytest.raises(InputError, match=match):
        paired_bootstrap(labels, predicted, predicted)
