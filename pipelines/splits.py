"""Splits of data that come without: stratified, and with groups kept whole."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.groups import check_groups
from amimv.pipelines.rng import Key, Stream, hashes


def split_indices(
    labels: Tensor | None,
    shares: Sequence[float] = (0.7, 0.1, 0.2),
    groups: Tensor | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> tuple[Tensor, ...]:
    """Split images into about these shares, of all and of each class; each class is in every split, no group in two.

    The groups (of an image each where there are none) are gone through once, those of the rarest classes (by groups)
    first, of these the largest (up to a factor of two), else in a random order that depends on their numbers and the
    seed only. Each goes where it adds least to the sum over classes of ``have ** 2 / wanted``, which is smallest when
    all splits are filled alike, but the last groups of a class go to the splits that still lack it.

    Args:
        labels: ``(N,)`` integers from 0, multi-hot ``(N, L)``, or None: then only the numbers of images count.
        shares: of train, val and test, or of as many splits as there are; positive, their sum 1.
        groups: ``(N,)`` integers, the same for images of one patient, lesion or slide; None without (and with labels).
        seed: which of the possible splits.
        class_names: of the classes (or labels), each of which must then have images; by default those that occur.

    Returns:
        ``(M,)`` sorted ``int64`` indices for each split, on the device of ``groups``, else of ``labels``.

    Raises:
        InputError: for bad shares, groups or labels, or a class that is not in every split: it has fewer groups (or
            images) than there are splits, or (rarely) the walk finds no way because classes share their groups.
    """
    groups, unit = (groups, "group(s) of images") if groups is not None else (_each_apart(labels), "image(s)")
    check_groups(groups)
    wanted = np.array(shares, dtype=np.float64)
    if len(wanted) < 2 or not (wanted > 0).all() or abs(wanted.sum() - 1) > 1e-6:
        raise InputError(f"shares are {tuple(shares)}, expected two or more positive numbers whose sum is 1")
    if len(groups) < len(wanted):
        raise InputError(f"there are {len(groups)} images for {len(wanted)} splits: make fewer splits")
    numbers, member = np.unique(groups.cpu().numpy(), return_inverse=True)
    columns = _columns(labels, len(groups), None if class_names is None else len(class_names))
    counts = _counts_by_group(member, len(numbers), columns)
    names = range(counts.shape[1] - 1) if class_names is None else class_names
    told = [*(f"class {name}" for name in names), "the data set"]
    in_groups = (counts > 0).sum(0)
    for what, have in zip(told, in_groups.tolist(), strict=True):
        if have < len(wanted) and (have or class_names is not None or labels is None):
            expected = f"each of the {len(wanted)} splits needs one"
            raise InputError(f"{what} has {have} {unit}, but {expected}: add some, or leave it out")
    random = hashes(Key(seed, Stream.GROUP_SPLIT), torch.from_numpy(numbers).long(), 1)[:, 0].numpy()
    rarest = np.where(counts > 0, in_groups, len(numbers)).min(1)
    doublings = np.frexp(counts[:, -1])[1]
    placed = torch.from_numpy(_place(counts, np.lexsort((random, -doublings, rarest)), wanted, told)[member])
    return tuple((placed == split).nonzero()[:, 0].to(groups.device) for split in range(len(wanted)))


def split_by_group(
    groups: Tensor, labels: Tensor | None = None, shares: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
) -> tuple[Tensor, ...]:
    """`split_indices` for images of which the groups are known, the labels perhaps not: no group is in two splits."""
    return split_indices(labels, shares, groups, seed)


def _each_apart(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise InputError("there are neither labels nor groups to split by: give one of them")
    return torch.arange(len(labels), device=labels.device)


def _columns(labels: Tensor | None, n: int, n_classes: int | None) -> np.ndarray:
    """``(N, C + 1)`` memberships of images in classes; the last column is all images."""
    everything = np.ones((n, 1), dtype=np.int64)
    if labels is None:
        return everything
    if labels.ndim not in (1, 2) or len(labels) != n or labels.is_floating_point():
        got = f"{tuple(labels.shape)} {labels.dtype}"
        raise InputError(f"labels are {got}, expected integers (N,) or multi-hot (N, L) for {n} images")
    known = labels.cpu().numpy()
    top = int(known.max()) if known.ndim == 1 else known.shape[1] - 1
    limit = "" if n_classes is None else n_classes - 1
    if known.min() < 0 or (n_classes is not None and (top >= n_classes or (known.ndim == 2 and top != limit))):
        raise InputError(f"labels out of range: expected 0..{limit}, found {min(int(known.min()), 0)}..{top}")
    n_classes = top + 1 if n_classes is None else n_classes
    hot = known != 0 if known.ndim == 2 else known[:, None] == np.arange(n_classes)
    return np.hstack([hot, everything])


def _counts_by_group(member: np.ndarray, n_groups: int, columns: np.ndarray) -> np.ndarray:
    """``(G, C + 1)`` images of each group in each class, and in all."""
    counts = [np.bincount(member, weights=column, minlength=n_groups) for column in columns.T]
    return np.stack(counts, 1).astype(np.int64)


def _place(counts: np.ndarray, order: np.ndarray, shares: np.ndarray, told: Sequence[str]) -> np.ndarray:
    """The split of each group, ``(G,)``: the greedy walk of `split_indices`."""
    target = shares[:, None] * counts.sum(0)
    have = np.zeros(target.shape, dtype=np.int64)
    left = (counts > 0).sum(0)  # groups of each class that are not placed
    placed = np.empty(len(counts), dtype=np.int64)
    for group in order:
        columns = counts[group].nonzero()[0]
        adds = counts[group, columns]
        here = have[:, columns]
        cost = (adds * (2 * here + adds) / target[:, columns]).sum(1)
        lacks = here == 0
        urgent = left[columns] <= lacks.sum(0)
        if urgent.any():
            helped = (lacks & urgent).sum(1)
            cost[helped < helped.max()] = np.inf
        placed[group] = split = int(cost.round(9).argmin())  # rounded, so that a tie is one on every machine
        have[split, columns] += adds
        left[columns] -= 1
    lacking = (have == 0).any(0) & (counts > 0).any(0)
    if lacking.any():
        what = told[int(lacking.argmax())]
        raise InputError(
            f"{what} has too few groups for every split that it does not share with other classes: "
            "try another seed, or fewer splits"
        )
    return placed
