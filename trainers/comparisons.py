"""How sure a difference between two methods is, given that both were judged on the same test images."""

from dataclasses import dataclass

import numpy as np

from amimv import InputError


@dataclass(frozen=True)
class Interval:
    """A difference in balanced accuracy and its percentile bootstrap interval, in [-1, 1]."""

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
    """Balanced accuracy of a minus that of b, with an interval over the choice of test images.

    Test images are drawn again with replacement, within each class so that none vanishes; both methods are scored on
    the same draw (Efron and Tibshirani 1993, chapter 13). Several training seeds of a method count by their mean: the
    interval says nothing about other seeds.

    Args:
        labels: ``(N,)`` classes.
        predicted_a, predicted_b: ``(N,)`` predicted classes, or ``(S, N)`` of S seeds, not as many for both.
        level: of the interval, in (0, 1).
        resamples: how often the images are drawn.
        seed: of the draws.

    Raises:
        InputError: shapes that do not fit.
    """
    a, b = (np.atleast_2d(predicted) for predicted in (predicted_a, predicted_b))
    if labels.ndim != 1 or a.shape[1:] != labels.shape or b.shape[1:] != labels.shape:
        raise InputError(
            f"predictions {a.shape} and {b.shape} do not fit labels {labels.shape}: expected (S, N), (N,)"
        )
    # Per image: how much more often a is right than b, over their seeds.
    gain = (a == labels).mean(axis=0) - (b == labels).mean(axis=0)
    generator = np.random.default_rng(seed)
    total, drawn = 0.0, np.zeros(resamples)
    classes = np.unique(labels)
    for c in classes:
        own = gain[labels == c]
        total += own.mean()
        # Only how often each value of the gain is drawn matters, and there are few values.
        values, counts = np.unique(own, return_counts=True)
        drawn += generator.multinomial(len(own), counts / len(own), size=resamples) @ values / len(own)
    low, high = np.quantile(drawn / len(classes), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(total / len(classes)), float(low), float(high))
