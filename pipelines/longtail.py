"""Long-tailed subsets and label fractions of a training split, as sorted indices that can be saved.

The chosen images of a class are the first ``n`` of a fixed random order of that class, so for one seed the
subsets for different ratios, totals or fractions are nested class by class. Nothing here is on the hot path:
counts are read on the host once.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amimv import InputError, check_choice, first_line
from amimv.files import replacing
from amimv.pipelines.groups import check_groups
from amimv.pipelines.names import PROFILES
from amimv.pipelines.rng import Key, Stream, hashes

#: Exponent of the Pareto law, as in ImageNet-LT (Liu et al., CVPR 2019).
PARETO_ALPHA = 6.0


def profile_weights(n_classes: int, rho: float, profile: str, counts: Sequence[int] | None = None) -> list[float]:
    """Relative class sizes, largest first: the largest is 1 and the smallest 1/rho (with one class: just 1).

    - ``exp``: ``rho ** (-c / (C - 1))`` (Cui et al., CVPR 2019).
    - ``step``: 1 for the first ``C // 2`` classes, ``1 / rho`` for the rest (Buda et al., 2018).
    - ``pareto``: the quantiles at ``(c + 0.5) / C`` of a Pareto law with alpha 6 (Liu et al., CVPR 2019),
      mapped linearly onto [1 / rho, 1].
    - ``natural``: the class sizes ``counts`` themselves; ``rho`` is not used.

    Args:
        n_classes: C, at least 1.
        rho: imbalance ratio, largest over smallest class, at least 1.
        profile: one of ``PROFILES``.
        counts: images per class, in any order; only read by ``natural``.

    Raises:
        InputError: for an unknown profile, rho < 1, or ``natural`` without counts.
    """
    check_choice("profile", profile, PROFILES)
    if not 1 <= rho < math.inf:
        raise InputError(f"rho is {rho}, expected a finite ratio (largest over smallest class) of at least 1")
    if profile == "natural":
        if counts is None:
            raise InputError("profile 'natural' needs the counts of the classes")
        return [n / max(counts) for n in sorted(counts, reverse=True)]
    if n_classes == 1:
        return [1.0]
    if profile == "exp":
        return [rho ** (-c / (n_classes - 1)) for c in range(n_classes)]
    if profile == "step":
        return [1.0 if c < n_classes // 2 else 1 / rho for c in range(n_classes)]
    quantiles = [(1 - (c + 0.5) / n_classes) ** (-1 / PARETO_ALPHA) for c in reversed(range(n_classes))]
    span = quantiles[0] - quantiles[-1]
    return [1 / rho + (1 - 1 / rho) * (q - quantiles[-1]) / span for q in quantiles]


def long_tail(
    labels: Tensor,
    rho: float = 100,
    profile: str = "exp",
    seed: int = 0,
    total: int | None = None,
    n_classes: int | None = None,
) -> Tensor:
    """Choose a long-tailed subset.

    The profile's classes are the data set's, ordered by their own frequency (of equal ones the lower index
    first).

    ``total=None`` gives the c-th class ``n_max * weight`` images, rounded down as the published CIFAR-LT
    splits are, capped at what it has and at least one; ``n_max`` is the size of the largest class. So rho = 1
    is the natural set, and where a class has less than the profile asks for, the realised ratio is not rho:
    record it.

    ``total=N`` scales the profile to exactly N images (largest remainders; a class whose share is below one
    gets one).

    Args:
        labels: ``(N,)`` ``int64``; multi-hot ``(N, L)`` for the profile ``natural`` only, which then draws
            images without regard to labels.
        rho: imbalance ratio, at least 1; not used by ``natural``.
        profile: one of ``PROFILES``.
        seed: which images of a class.
        total: number of images, from the number of classes to ``largest_total``; None: as many as there are.
        n_classes: number of classes, by default the largest label + 1.

    Returns:
        ``(M,)`` sorted ``int64`` indices on the device of ``labels``.

    Raises:
        InputError: for a bad ratio, profile or total, a class without an image, or one that cannot supply its
            share.
    """
    if labels.ndim == 2:
        if profile != "natural":
            profile_weights(1, rho, profile)  # an unknown name or ratio is named first
            raise InputError(f"profile {profile!r} is not defined for multi-label data: use 'natural'")
        if total is not None and total > len(labels):
            raise InputError(f"total is {total}, but there are {len(labels)} images: use at most that")
        labels, n_classes = labels.new_zeros(len(labels)), 1
    wanted = _class_sizes(_checked_counts(labels, n_classes), rho, profile, total)
    return _first_of_each(labels, wanted, Key(seed, Stream.LONG_TAIL))


def _class_sizes(counts: Sequence[int], rho: float, profile: str, total: int | None) -> list[int]:
    """Images of each class in a long tail, of the ``counts`` that there are; see `long_tail`."""
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    have = [counts[c] for c in order]
    weights = profile_weights(len(have), rho, profile, have)
    if total is None:
        # The margin keeps products that are whole but for a rounding error.
        wanted = [min(n, max(1, math.floor(have[0] * w + 1e-6))) for n, w in zip(have, weights, strict=True)]
    else:
        wanted = _scaled(total, weights, have, order, f"profile {profile!r} and rho {rho:g}")
    by_label = [0] * len(counts)
    for label, n in zip(order, wanted, strict=True):
        by_label[label] = n
    return by_label


def largest_total(labels: Tensor, rhos: Sequence[float], profile: str = "exp", n_classes: int | None = None) -> int:
    """The largest ``total`` that ``long_tail`` can supply at every one of ``rhos``, so that only imbalance
    varies.

    Args:
        labels: ``(N,)`` ``int64``.
        rhos: the ratios of a study, each at least 1.
        profile: one of ``PROFILES``.
        n_classes: number of classes, by default the largest label + 1.

    Raises:
        InputError: as ``long_tail``, or if there is no ratio.
    """
    if not len(rhos):
        raise InputError("largest_total needs at least one ratio")
    if labels.ndim == 2:
        raise InputError("largest_total is not defined for multi-label data")
    have = sorted(_checked_counts(labels, n_classes), reverse=True)
    return _largest_feasible(have, [profile_weights(len(have), rho, profile, have) for rho in rhos])


def label_fraction(labels: Tensor, fraction: float, seed: int = 0, groups: Tensor | None = None) -> Tensor:
    """Choose the images whose labels are given away: of each class ``max(1, round(fraction * n))``.

    A class without an image stays without one. Multi-hot labels are not stratified: ``ceil(fraction * N)``
    images.

    With ``groups`` these are kept whole, and the counts are at least those: the groups are gone through in one random
    order, and each class takes those that hold its images until it has enough. A group of several classes is taken
    by whichever reaches it, with all its images.

    Args:
        labels: ``(N,)`` ``int64`` or multi-hot ``(N, L)``.
        fraction: in (0, 1].
        seed: which images; for one seed a smaller fraction is a subset of a larger one, with and without groups.
        groups: ``(N,)`` integers, of patients or lesions.

    Returns:
        ``(M,)`` sorted ``int64`` indices on the device of ``labels``.

    Raises:
        InputError: for a fraction outside (0, 1], or labels or groups of another shape.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction is {fraction}, expected a number in (0, 1], such as 0.01 for 1 %")
    key = Key(seed, Stream.LABEL_FRACTION)
    wanted, _ = zip(*_given_away(labels, fraction), strict=True)
    labels = labels.new_zeros(len(labels)) if labels.ndim == 2 else labels
    if groups is None:
        return _first_of_each(labels, wanted, key)
    check_groups(groups, len(labels))
    groups = groups.to(labels.device)
    # A group's images have one hash and so stand together in the order: those chosen bring the rest of their group.
    chosen = _first_of_each(labels, wanted, key, groups)
    return torch.isin(groups, groups[chosen]).nonzero()[:, 0]


def distinct_draws(labels: Tensor, fraction: float) -> int:
    """How many sets of images `label_fraction` can choose, without groups, by its seed: 1 where it takes all.

    Args:
        labels, fraction: as for `label_fraction`.
    """
    return math.prod(math.comb(n, wanted) for wanted, n in _given_away(labels, fraction))


def _given_away(labels: Tensor, fraction: float) -> list[tuple[int, int]]:
    """(wanted, there are) of the images of each class; multi-hot labels count as one class."""
    if labels.ndim == 2:
        return [(math.ceil(fraction * len(labels) - 1e-9), len(labels))]  # 0.07 * 100 is 7.000000000000001
    return [(min(n, max(1, round(fraction * n))), n) for n in _class_counts(labels, None)]


def realised_ratio(counts: Sequence[int]) -> float:
    """Images in the largest class over images in the smallest; infinite if a class has none."""
    if not len(counts):
        raise InputError("realised_ratio needs the count of at least one class")
    return max(counts) / min(counts) if min(counts) else math.inf


def save_indices(path: str | Path, indices: Tensor) -> None:
    """Write ``(M,)`` indices as a NumPy file (``int64``, no pickle): others can train on the same subset."""
    with replacing(Path(path), "wb") as file:  # np.save would add a suffix to a name
        np.save(file, indices.cpu().numpy().astype(np.int64), allow_pickle=False)


def load_indices(path: str | Path, n: int) -> Tensor:
    """Read what ``save_indices`` wrote: ``(M,)`` ``int64`` on the CPU.

    Args:
        path: the file.
        n: images of the data set that the indices point into.

    Raises:
        InputError: if the file is missing or no array of distinct integers in ``[0, n)``.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"indices cannot be read from {path}: {first_line(error)}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise InputError(f"{path} holds no indices: expected one array of integers, of shape (M,), M at least 1")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= n:
        raise InputError(f"{path}: indices reach from {low} to {high}, but the data set has {n} images")
    if len(np.unique(array)) < len(array):
        raise InputError(f"{path} holds an index twice: expected distinct ones")
    return torch.from_numpy(array.astype(np.int64))


def _class_counts(labels: Tensor, n_classes: int | None) -> list[int]:
    if labels.ndim != 1 or labels.dtype != torch.int64 or not len(labels):
        got = f"{tuple(labels.shape)} {labels.dtype}"
        raise InputError(f"labels are {got}, expected at least one, of shape (N,) and type int64")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (n_classes is not None and high >= n_classes):
        top = "" if n_classes is None else n_classes - 1
        raise InputError(f"labels out of range: expected 0..{top}, found {low}..{high}")
    return torch.bincount(labels, minlength=n_classes or 0).tolist()


def _checked_counts(labels: Tensor, n_classes: int | None) -> list[int]:
    counts = _class_counts(labels, n_classes)
    empty = [c for c, n in enumerate(counts) if n == 0]
    if empty:
        names = ", ".join(map(str, empty))
        raise InputError(f"no image of class {names}: a long tail needs every class 0..{len(counts) - 1}")
    return counts


def _first_of_each(labels: Tensor, wanted: Sequence[int], key: Key, groups: Tensor | None = None) -> Tensor:
    """Sorted indices of the first ``wanted[c]`` images of each class c in a random order, of images or of groups."""
    positions = torch.arange(len(labels), device=labels.device)
    shuffled = hashes(key, positions if groups is None else groups.long(), 1).squeeze(-1).argsort(stable=True)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(labels, minlength=len(wanted))
    starts = sizes.cumsum(0) - sizes
    group = labels[grouped]
    rank = positions - starts[group]
    quota = torch.tensor(wanted, device=labels.device)
    return grouped[rank < quota[group]].sort().values


def _scaled(total: int, weights: Sequence[float], have: Sequence[int], order: Sequence[int], what: str) -> list[int]:
    """``_apportion``, refused where a class (label ``order[c]``, of ``have[c]`` images) cannot supply its share."""
    wanted = _apportion(total, weights)
    for label, n, supply in zip(order, wanted, have, strict=True):
        if n > supply:
            best = _largest_feasible(have, [weights])
            raise InputError(
                f"total {total} with {what} needs {n} images of class {label}, which has {supply}: "
                f"use a total of at most {best}"
            )
    return wanted


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to descending weights that sum to ``total``, each at least 1 (largest
    remainders).

    Classes whose share is below one get one; the others divide the rest.
    """
    if total < len(weights):
        raise InputError(f"total is {total}, expected at least one image for each of the {len(weights)} classes")
    shared = len(weights)  # the first so many divide what the others leave
    while True:
        scale = (total - len(weights) + shared) / sum(weights[:shared])
        above = sum(scale * w >= 1 for w in weights[:shared])
        if above == shared or shared == 1:
            break
        shared = max(above, 1)
    # The margin keeps shares that are whole but for a rounding error.
    parts = [math.floor(scale * w + 1e-9) for w in weights[:shared]]
    by_remainder = sorted(range(shared), key=lambda c: parts[c] - scale * weights[c])
    for c in by_remainder[: total - len(weights) + shared - sum(parts)]:
        parts[c] += 1
    return parts + [1] * (len(weights) - shared)


def _largest_feasible(have: Sequence[int], profiles: Sequence[Sequence[float]]) -> int:
    """The largest total that every profile can take from ``have`` (descending, none empty).

    With largest remainders a class's share can fall as the total grows (the Alabama paradox), so bisection
    could miss it: this walks down from a bound. A share of ``s`` gives at least ``floor(s)`` images, hence
    ``total < (have + 1) * sum(weights) / weight + C`` for every class.
    """
    bound = sum(have)
    for weights in profiles:
        for n, w in zip(have, weights, strict=True):
            bound = min(bound, math.floor((n + 1) * sum(weights) / w) + len(have))
    for total in range(bound, len(have), -1):
        if all(n <= m for ws in profiles for n, m in zip(_apportion(total, ws), have, strict=True)):
            return total
    return len(have)
