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
    found = paired_bootstrap(labels, a, b, resamples=20000, sources=["images"])
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


def simulate(
    generator: np.random.Generator, levels: tuple[int, int], spreads: dict[str, float], sizes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and predictions ``(S, D, N)`` of two methods that are equally good over all seeds, draws and images.

    Each is right with probability 0.6 plus normal effects of its seed and of the draw (for each method its own), by a
    latent normal that holds an effect of the image, the same for both.
    """
    seeds, draws = levels
    labels = np.repeat(np.arange(len(sizes)), sizes)
    image = generator.normal(0, spreads["images"], len(labels))
    made = []
    for _ in range(2):
        rate = 0.6 + generator.normal(0, spreads["seeds"], (seeds, 1)) + generator.normal(0, spreads["draws"], draws)
        latent = stats.norm.ppf(rate)[..., None] * math.sqrt(1 + spreads["images"] ** 2) + image
        right = latent + generator.normal(size=(seeds, draws, len(labels))) > 0
        made.append(np.where(right, labels, (labels + 1) % len(sizes)))
    return labels, *made


@pytest.mark.parametrize(
    ("levels", "spreads"),
    [
        ((4, 4), {"seeds": 0.05, "draws": 0.05, "images": 1.0}),
        ((5, 1), {"seeds": 0.05, "draws": 0.0, "images": 1.0}),
        ((2, 6), {"seeds": 0.0, "draws": 0.06, "images": 0.5}),
    ],
)
def test_intervals_over_three_sources_hold_the_truth_as_often_as_they_say(
    levels: tuple[int, int], spreads: dict[str, float]
) -> None:
    generator = np.random.default_rng(6)
    inside, trials = dict.fromkeys(["all", "images"], 0), 400
    for trial in range(trials):
        labels, a, b = simulate(generator, levels, spreads, (300, 120, 60))
        whole = paired_bootstrap(labels, a, b, resamples=400, seed=trial)
        images = paired_bootstrap(labels, a, b, resamples=400, seed=trial, sources=["images"])
        inside["all"] += whole.low <= 0 <= whole.high
        inside["images"] += images.low <= 0 <= images.high
    error = math.sqrt(0.95 * 0.05 / trials)
    assert abs(inside["all"] / trials - 0.95) < 3 * error
    assert inside["images"] / trials < 0.95 - 5 * error  # what is left out is missed


@pytest.mark.parametrize("left_out", ["seeds", "draws", "images"])
def test_an_interval_without_a_source_is_narrower(left_out: str) -> None:
    spreads = {"seeds": 0.06, "draws": 0.06, "images": 1.0}
    labels, a, b = simulate(np.random.default_rng(7), (8, 8), spreads, (60, 30, 20))
    whole = paired_bootstrap(labels, a, b)
    part = paired_bootstrap(labels, a, b, sources=[source for source in whole.errors if source != left_out])
    assert part.difference == whole.difference
    assert part.high - part.low < 0.98 * (whole.high - whole.low)
    assert set(whole.errors) == {"images", "draws", "seeds"}
    assert part.errors == {source: error for source, error in whole.errors.items() if source != left_out}


def test_standard_errors_are_those_of_plain_loops() -> None:
    labels, a, b = simulate(
        np.random.default_rng(8), (3, 4), {"seeds": 0.1, "draws": 0.1, "images": 1.0}, (50, 20, 10)
    )
    scores = np.array([[[balanced_accuracy_score(labels, one) for one in seed] for seed in m] for m in (a, b)])
    seeds = [stats.sem([draws.mean() for draws in method]) for method in scores]
    draws = stats.sem([scores[0, :, d].mean() - scores[1, :, d].mean() for d in range(4)])
    found = paired_bootstrap(labels, a, b).errors
    assert found["seeds"] == pytest.approx(math.hypot(*seeds))
    assert found["draws"] == pytest.approx(draws)
    wide = paired_bootstrap(labels, a, b, resamples=20000, level=0.6827, sources=["images"])
    assert found["images"] == pytest.approx((wide.high - wide.low) / 2, rel=0.05)


def test_two_seeds_alone_are_worth_what_students_t_says() -> None:
    """Of many images the seeds are all there is: Welch's interval, in the normal form of the expanded percentile."""
    labels = np.repeat([0, 1], 10**5)
    within = np.tile(np.arange(10**5), 2)
    a, b = (
        np.stack([np.where(within < 10**5 * rate, labels, 1 - labels) for rate in rates])
        for rates in ((0.80, 0.82, 0.87), (0.70, 0.75, 0.74, 0.71))
    )
    found = paired_bootstrap(labels, a, b, resamples=40000, sources=["seeds"])
    means = [(one == labels).mean(axis=1) for one in (a, b)]
    welch = stats.ttest_ind(*means, equal_var=False).confidence_interval(0.95)
    assert found.difference == pytest.approx((welch.low + welch.high) / 2)
    # Resamples of three and four reach less far than a normal's.
    assert 0.75 < (found.high - found.low) / (welch.high - welch.low) < 1.05


def test_one_seed_and_draw_leave_the_images_alone() -> None:
    labels, a = draw_case([40, 20], 0.7, 2, np.random.default_rng(9))
    plain = paired_bootstrap(labels, a[0], a[1])
    assert plain == paired_bootstrap(labels, a[:1], a[1:, None])
    assert set(plain.errors) == {"images"}
    assert plain == paired_bootstrap(labels, a[0], a[1], sources=["images"])


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
        (np.zeros(3, int), np.zeros((2, 2, 4), int), r"or \(seeds, draws, 3\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(labels: np.ndarray, predicted: np.ndarray, match: str) -> None:
    with pytest.raises(InputError, match=match):
        paired_bootstrap(labels, predicted, predicted)


def test_other_draws_of_the_labels_are_not_compared() -> None:
    with pytest.raises(InputError, match="of 2 and 3 draws of the labels, expected the same"):
        paired_bootstrap(np.zeros(3, int), np.zeros((1, 2, 3), int), np.zeros((1, 3, 3), int))
