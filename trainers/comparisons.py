"""Is one method better than another? A bootstrap over test images, draws of the labels and training seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from amimv import InputError

#: What the difference of two methods depends on by chance.
IMAGES, DRAWS, SEEDS = SOURCES = ("images", "draws", "seeds")


@dataclass(frozen=True)
class Interval:
    """A difference in balanced accuracy and its interval, in [-1, 1].

    Attributes:
        errors: the standard error that each source leaves the difference with; none of a source of one level, about
            which nothing is known.
    """

    difference: float
    low: float
    high: float
    errors: dict[str, float]


def paired_bootstrap(
    labels: np.ndarray,
    predicted_a: np.ndarray,
    predicted_b: np.ndarray,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    sources: Sequence[str] = SOURCES,
) -> Interval:
    """Balanced accuracy of ``a`` minus that of ``b`` on the same test images, with a bootstrap interval over the three
    sources of chance, each resampled by itself and their deviations added (a first-order form of the bootstrap of
    crossed random effects, Owen and Eckles 2012, https://doi.org/10.1214/12-AOAS547).

    - *images*: drawn with replacement within each class, so that no class vanishes from a resample; both methods are
      scored on the same draw (paired; Efron and Tibshirani 1993, chapter 13).
    - *draws* of the labels: the methods learnt from the same ones, so they are paired, too.
    - *seeds* of training: of each method for itself, since the runs of two methods share no more than a number.

    Of ``n`` draws or seeds ``n - 1`` are drawn, which makes the variance of their mean unbiased (Rao and Wu 1988); and
    as few levels have shorter tails than what they stand for, the interval is expanded from the normal's quantile to
    that of Student's t (Hesterberg 2015), with Satterthwaite's (1946) degrees of freedom. Chance that belongs to an
    image, draw and seed at once is counted in each: the interval is rather too wide than too narrow. One seed, or one
    draw, says nothing of its source: then the interval does not hold it.

    Args:
        labels: ``(N,)`` integers, the true classes.
        predicted_a, predicted_b: predicted classes, ``(N,)``, ``(S, N)`` for ``S`` training seeds (which may be
            another number for each) or ``(S, D, N)`` for ``D`` draws of the labels, the same of both.
        level: of the interval, in (0, 1).
        resamples: how many.
        seed: of the resampling; the same one gives the same interval.
        sources: which of the three the interval holds.

    Raises:
        InputError: shapes that do not fit, multi-label labels among them, or no images.
    """
    a, b = _correct(labels, predicted_a), _correct(labels, predicted_b)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"predictions are of {a.shape[1]} and {b.shape[1]} draws of the labels, expected the same")
    generator = np.random.default_rng(seed)
    difference, images = _resample_images(labels, a.mean((0, 1)) - b.mean((0, 1)), resamples, generator)
    of_a, of_b = _balanced(labels, a), _balanced(labels, b)
    parts = [(IMAGES, images)] + [(SEEDS, _resample_levels(one.mean(1), resamples, generator)) for one in (of_a, of_b)]
    parts += [(DRAWS, _resample_levels(of_a.mean(0) - of_b.mean(0), resamples, generator))]
    held = [(name, part) for name, part in parts if name in sources and part.freedom]
    tails = np.array([1 - level, 1 + level]) / 2
    reach = np.quantile(sum(part.deviations for _, part in held), tails) * _expansion([p for _, p in held], tails[1])
    errors = {source: math.hypot(*(part.error for one, part in held if one == source)) for source, _ in held}
    low, high = difference + reach
    return Interval(difference, float(low), float(high), errors)


class _Part(NamedTuple):
    """What one source does to a mean: resampled deviations ``(R,)``, standard error, its degrees of freedom."""

    deviations: np.ndarray
    error: float
    freedom: float


def _expansion(parts: Sequence[_Part], quantile: float) -> float:
    """Student's t over the normal's quantile, for the degrees of freedom of the sum of these parts."""
    variances = np.array([part.error for part in parts]) ** 2
    narrow = float((variances**2 / [part.freedom for part in parts]).sum())
    freedom = variances.sum() ** 2 / narrow if narrow else math.inf
    return float(stats.t.ppf(quantile, freedom) / stats.norm.ppf(quantile))


def _resample_images(
    labels: np.ndarray, gain: np.ndarray, resamples: int, generator: np.random.Generator
) -> tuple[float, _Part]:
    """The mean over classes of the gain ``(N,)``, and what the images do to it.

    A mean over images within classes needs only how often each distinct gain was drawn: a multinomial, at a cost that
    does not grow with the images. (`scipy.stats.bootstrap` with a sample per class and ``paired=False`` draws the
    same, image by image.)
    """
    classes = np.unique(labels)
    mean, drawn, variance = 0.0, np.zeros(resamples), 0.0
    for c in classes:
        values, counts = np.unique(gain[labels == c], return_counts=True)
        n = counts.sum()
        mean += counts @ values / n / len(classes)
        drawn += generator.multinomial(n, counts / n, size=resamples) @ values / n / len(classes)
        variance += gain[labels == c].var() / n / len(classes) ** 2
    return float(mean), _Part(drawn - mean, math.sqrt(variance), math.inf)


def _resample_levels(means: np.ndarray, resamples: int, generator: np.random.Generator) -> _Part:
    """What a source of which there are these few levels ``(n,)`` does to their mean."""
    n = len(means)
    if n == 1:
        return _Part(np.zeros(resamples), 0.0, 0)
    drawn = means[generator.integers(0, n, (resamples, n - 1))].mean(axis=1) - means.mean()
    return _Part(drawn, math.sqrt(means.var(ddof=1) / n), n - 1)


def _balanced(labels: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Balanced accuracy ``(S, D)``."""
    return np.mean([correct[..., labels == c].mean(axis=-1) for c in np.unique(labels)], axis=0)


def _correct(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """``(S, D, N)``, which seed and draw is right about which image."""
    if labels.ndim != 1 or not len(labels):
        raise InputError(f"labels have shape {labels.shape}, expected (N,) with one class an image")
    if not 1 <= predicted.ndim <= 3 or predicted.shape[-1:] != labels.shape or not predicted.size:
        raise InputError(
            f"predictions have shape {predicted.shape}, expected {labels.shape}, (seeds, {len(labels)}) or "
            f"(seeds, draws, {len(labels)})"
        )
    right = predicted == labels
    return right if right.ndim == 3 else np.atleast_2d(right)[:, None]
