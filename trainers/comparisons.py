"""Is one method better than another on these test images? A paired bootstrap interval."""

from dataclasses import dataclass

import numpy as np

from amimv import InputError


@dataclass(frozen=True)
class Interval:
    """A difference in balanced accuracy and its interval, in [-1, 1]."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    labels: np.ndarray,
    predicted_a: np.ndarray,
    predicted_b: np.ndarray,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Balanced accuracy of ``a`` minus that of ``b`` on the same test images, with a percentile bootstrap interval
    (Efron and Tibshirani 1993, chapter 13).

    Test images are drawn with replacement within each class (stratified), so that no class vanishes from a resample;
    both methods are scored on the same draw (paired). The interval is about other test images of the same classes: it
    does not hold the spread over training seeds, of which only the mean is compared.

    The balanced accuracy is a mean over images within classes, so a resample needs only how often each distinct
    difference between the two methods was drawn: a multinomial, at a cost that does not grow with the images.
    (`scipy.stats.bootstrap` with a sample per class and ``paired=False`` draws the same, image by image.)

    Args:
        labels: ``(N,)`` integers, the true classes.
        predicted_a, predicted_b: predicted classes, ``(N,)``, or ``(S, N)`` for ``S`` training seeds (which may be
            another number for each): then the difference is that of the means over seeds.
        level: of the interval, in (0, 1).
        resamples: how many.
        seed: of the resampling; the same one gives the same interval.

    Raises:
        InputError: shapes that do not fit, multi-label labels among them, or no images.
    """
    if labels.ndim != 1 or not len(labels):
        raise InputError(f"labels have shape {labels.shape}, expected (N,) with one class an image")
    gain = _mean_correct(labels, predicted_a) - _mean_correct(labels, predicted_b)
    generator = np.random.default_rng(seed)
    classes = np.unique(labels)
    difference, drawn = 0.0, np.zeros(resamples)
    for c in classes:
        values, counts = np.unique(gain[labels == c], return_counts=True)
        n = counts.sum()
        difference += counts @ values / n / len(classes)
        drawn += generator.multinomial(n, counts / n, size=resamples) @ values / n / len(classes)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference), float(low), float(high))


def _mean_correct(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """``(N,)`` share of the seeds that are right about each image."""
    if predicted.ndim not in (1, 2) or predicted.shape[-1:] != labels.shape or not predicted.size:
        raise InputError(
            f"predictions have shape {predicted.shape}, expected {labels.shape} or (seeds, {len(labels)})"
        )
    return (np.atleast_2d(predicted) == labels).mean(axis=0)
