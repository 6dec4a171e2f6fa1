"""Long tails and label fractions against closed forms, plain loops, SciPy and published counts."""

import math
import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from amimv import InputError
from amimv.pipelines.longtail import (
    label_fraction,
    largest_total,
    load_indices,
    long_tail,
    profile_weights,
    realised_ratio,
    save_indices,
)
from amimv.pipelines.names import PROFILES

#: Class sizes of HAM10000's training split: unsorted, 58.7 : 1.
HAM = (228, 359, 769, 80, 779, 4693, 99)
SHAPED = ("exp", "step", "pareto")


def labels_of(counts: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Labels with these class counts, in a random order."""
    values = [c for c, n in enumerate(counts) for _ in range(n)]
    random.Random(seed).shuffle(values)
    return torch.tensor(values)


def counts_of(labels: torch.Tensor, indices: torch.Tensor) -> list[int]:
    found = Counter(labels[indices].tolist())
    return [found[c] for c in range(int(labels.max()) + 1)]


@pytest.mark.parametrize("profile", SHAPED)
@pytest.mark.parametrize("n_classes", [2, 3, 7, 14])
@pytest.mark.parametrize("rho", [1, 2.5, 10, 100])
def test_weights_fall_from_one_to_one_over_rho(profile: str, n_classes: int, rho: float) -> None:
    weights = profile_weights(n_classes, rho, profile)
    assert len(weights) == n_classes
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == pytest.approx(1)
    assert weights[-1] == pytest.approx(1 / rho)


def test_exp_is_geometric() -> None:
    weights = profile_weights(6, 50, "exp")
    steps = [b / a for a, b in pairwise(weights)]
    assert steps == pytest.approx([50 ** (-1 / 5)] * 5)


@pytest.mark.parametrize("n_classes", [4, 5])
def test_step_halves(n_classes: int) -> None:
    many = n_classes // 2
    assert profile_weights(n_classes, 20, "step") == [1.0] * many + [0.05] * (n_classes - many)


def test_pareto_is_a_linear_map_of_scipys_quantiles() -> None:
    quantiles = stats.pareto(6).ppf((np.arange(9) + 0.5) / 9)[::-1]
    slope, offset, r, *_ = stats.linregress(quantiles, profile_weights(9, 100, "pareto"))
    assert slope > 0
    assert r == pytest.approx(1, abs=1e-12)
    assert slope * quantiles[[0, -1]] + offset == pytest.approx([1, 0.01])


def test_natural_weights_are_the_counts() -> None:
    assert profile_weights(3, 100, "natural", [10, 40, 20]) == [1.0, 0.5, 0.25]
    with pytest.raises(InputError, match="needs the counts"):
        profile_weights(3, 100, "natural")


def test_exp_gives_the_published_cifar10_lt_counts() -> None:
    # Cao et al., NeurIPS 2019 (LDAM), imbalance 100: the counts used throughout the literature.
    labels = torch.arange(10).repeat(5000)
    published = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert counts_of(labels, long_tail(labels, rho=100)) == published


def wanted_by_loop(counts: tuple[int, ...], rho: float, profile: str) -> list[int]:
    """``total=None`` written out: rank the classes, ask the profile, cap, and keep one."""
    order = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    wanted = [0] * len(counts)
    for rank, c in enumerate(order):
        share = profile_weights(len(counts), rho, profile)[rank]
        wanted[c] = max(1, min(counts[c], math.floor(max(counts) * share + 1e-6)))
    return wanted


@pytest.mark.parametrize("profile", SHAPED)
@pytest.mark.parametrize("rho", [1, 10, 100, 1000, 1e5])
@pytest.mark.parametrize("counts", [HAM, (5, 5, 5, 5), (147, 399), (12,), (3, 90, 3, 90, 1)])
def test_capped_counts_equal_a_plain_loop(profile: str, rho: float, counts: tuple[int, ...]) -> None:
    labels = labels_of(counts)
    assert counts_of(labels, long_tail(labels, rho, profile)) == wanted_by_loop(counts, rho, profile)


def test_a_tie_goes_to_the_lower_class() -> None:
    labels = labels_of((20, 40, 40, 20))
    assert counts_of(labels, long_tail(labels, rho=8)) == [10, 40, 20, 5]


@pytest.mark.parametrize("profile", SHAPED)
def test_rho_one_is_the_natural_set(profile: str) -> None:
    labels = labels_of(HAM)
    assert torch.equal(long_tail(labels, 1, profile), torch.arange(len(labels)))
    assert torch.equal(long_tail(labels, 50, "natural"), torch.arange(len(labels)))


@pytest.mark.parametrize("total", [None, 500])
@pytest.mark.parametrize("profile", PROFILES)
def test_indices_are_sorted_distinct_and_repeatable(profile: str, total: int | None) -> None:
    labels = labels_of(HAM)
    first = long_tail(labels, 300, profile, seed=3, total=total)
    assert first.dtype == torch.int64
    assert first.tolist() == sorted(set(first.tolist()))
    assert torch.equal(first, long_tail(labels, 300, profile, seed=3, total=total))
    if total or profile != "natural":
        assert not torch.equal(first, long_tail(labels, 300, profile, seed=4, total=total))


@pytest.mark.parametrize("profile", SHAPED)
def test_subsets_are_nested_class_by_class(profile: str) -> None:
    labels = labels_of(HAM)
    subsets = [long_tail(labels, rho, profile) for rho in (1, 10, 100, 1000)]
    subsets += [long_tail(labels, rho, profile, total=500) for rho in (10, 100)]
    for c in range(len(HAM)):
        chosen = sorted((set(s[labels[s] == c].tolist()) for s in subsets), key=len)
        for small, large in pairwise(chosen):
            assert small <= large


def test_images_of_a_class_are_drawn_evenly() -> None:
    # 4 of 20 images, 400 seeds: every image 80 times but for chance.
    labels = labels_of((40, 20))
    hits = np.zeros(60)
    for seed in range(400):
        hits[long_tail(labels, rho=10, seed=seed).numpy()] += 1
    small = hits[labels.numpy() == 1]
    assert small.sum() == 400 * 4
    assert stats.chisquare(small).pvalue > 1e-3


def apportion_by_loop(total: int, weights: list[float]) -> list[int]:
    """Largest remainders in exact fractions, the classes below one set aside one round at a time."""
    shares = [Fraction(w) for w in weights]
    alone: set[int] = set()
    while True:
        rest = [c for c in range(len(shares)) if c not in alone]
        quota = {c: (total - len(alone)) * shares[c] / sum(shares[d] for d in rest) for c in rest}
        below = {c for c in rest if quota[c] < 1}
        if not below:
            break
        alone |= below
    counts = [1 if c in alone else math.floor(quota[c]) for c in range(len(shares))]
    for c in sorted(rest, key=lambda c: (-(quota[c] - math.floor(quota[c])), c))[: total - sum(counts)]:
        counts[c] += 1
    return counts


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("rho", [1.7, 10, 90, 3000])
def test_totals_are_exact_and_apportioned(profile: str, rho: float) -> None:
    counts = (400, 390, 380, 370, 360)
    labels = labels_of(counts)
    for total in (5, 6, 7, 11, 50, 123, 400):
        chosen = long_tail(labels, rho, profile, total=total)
        assert len(chosen) == total
        weights = profile_weights(5, rho, profile, counts)
        assert counts_of(labels, chosen) == apportion_by_loop(total, weights)


@pytest.mark.parametrize("profile", SHAPED)
@pytest.mark.parametrize("rhos", [(1,), (1, 10, 100), (7, 300)])
@pytest.mark.parametrize("counts", [(9, 21, 60, 14), (31, 3), (5, 5, 5, 5, 5), (50, 1, 50, 2, 40)])
def test_largest_total_is_the_largest(profile: str, rhos: tuple[float, ...], counts: tuple[int, ...]) -> None:
    have = sorted(counts, reverse=True)

    def feasible(total: int) -> bool:
        plans = [apportion_by_loop(total, profile_weights(len(have), rho, profile)) for rho in rhos]
        return all(n <= m for plan in plans for n, m in zip(plan, have, strict=True))

    labels = labels_of(counts)
    best = largest_total(labels, rhos, profile)
    assert best == max(total for total in range(len(counts), sum(counts) + 1) if feasible(total))
    for rho in rhos:
        assert len(long_tail(labels, rho, profile, total=best)) == best


def test_largest_total_of_the_natural_profile_is_everything() -> None:
    labels = labels_of(HAM)
    assert largest_total(labels, [1, 10, 100], "natural") == sum(HAM)
    assert len(long_tail(labels, profile="natural", total=sum(HAM))) == sum(HAM)


def test_a_total_that_a_class_cannot_supply_is_refused_with_the_best_one() -> None:
    labels = labels_of((30, 100))
    # rho 2 on 120 images is 80 + 40, but class 0 has 30; 91 is 61 + 30.
    with pytest.raises(InputError, match=r"40 images of class 0, which has 30: .* at most 91$"):
        long_tail(labels, rho=2, total=120)
    assert largest_total(labels, [2]) == 91
    assert len(long_tail(labels, rho=2, total=91)) == 91
    with pytest.raises(InputError, match="31 images of class 0, which has 30"):
        long_tail(labels, rho=2, total=92)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0.5}, "rho is 0.5"),
        ({"rho": math.nan}, "rho is nan"),
        ({"rho": math.inf}, "rho is inf"),
        ({"profile": "pareta"}, r"unknown profile 'pareta': did you mean pareto or natural\? choose from exp"),
        ({"total": 2}, "total is 2, expected at least one image for each of the 3 classes"),
        ({"n_classes": 4}, r"no image of class 3: a long tail needs every class 0\.\.3"),
        ({"n_classes": 2}, r"labels out of range: expected 0\.\.1, found 0\.\.2"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        long_tail(labels_of((9, 8, 7)), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])])
def test_bad_labels_are_refused(labels: torch.Tensor) -> None:
    for call in (long_tail, lambda x: largest_total(x, [10])):
        with pytest.raises(InputError, match=r"no image of class 1|out of range|expected at least one"):
            call(labels)
    with pytest.raises(InputError, match="at least one ratio"):
        largest_total(torch.tensor([0, 1]), [])


def test_multi_label_knows_only_the_natural_profile() -> None:
    labels = (torch.arange(50)[:, None] % torch.tensor([2, 3, 5]) == 0).long()
    assert torch.equal(long_tail(labels, profile="natural"), torch.arange(50))
    some = long_tail(labels, profile="natural", total=20)
    assert len(set(some.tolist())) == 20
    with pytest.raises(InputError, match="total is 51, but there are 50 images"):
        long_tail(labels, profile="natural", total=51)
    with pytest.raises(InputError, match="'exp' is not defined for multi-label"):
        long_tail(labels)
    with pytest.raises(InputError, match="unknown profile"):
        long_tail(labels, profile="nature")
    with pytest.raises(InputError, match="multi-label"):
        largest_total(labels, [10])


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.37, 1.0])
def test_label_fraction_is_stratified(fraction: float) -> None:
    labels = labels_of(HAM)
    chosen = label_fraction(labels, fraction)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert counts_of(labels, chosen) == [max(1, round(fraction * n)) for n in HAM]


def test_label_fractions_are_nested_seeded_and_apart_from_the_long_tail() -> None:
    labels = labels_of(HAM)
    chosen = [set(label_fraction(labels, f, seed=1).tolist()) for f in (0.01, 0.1, 0.5, 1)]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]
    assert chosen[1] != set(label_fraction(labels, 0.1, seed=2).tolist())
    # Else the labels would be given to the very images that the long tail keeps.
    pair = torch.arange(2).repeat(50)
    assert not torch.equal(label_fraction(pair, 0.1), long_tail(pair, 1, total=10))


def test_label_fraction_of_multi_label_data_rounds_up() -> None:
    labels = torch.ones(100, 3, dtype=torch.int64)
    sizes = [len(label_fraction(labels, f)) for f in (0.001, 0.07, 0.071, 1)]
    assert sizes == [1, 7, 8, 100]
    small, large = (set(label_fraction(labels, f).tolist()) for f in (0.1, 0.3))
    assert small < large


def test_label_fraction_leaves_an_empty_class_empty() -> None:
    assert label_fraction(torch.tensor([0, 2, 2, 0]), 1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, math.nan])
def test_bad_fraction(fraction: float) -> None:
    with pytest.raises(InputError, match=r"expected a number in \(0, 1\]"):
        label_fraction(torch.tensor([0, 1]), fraction)


def test_realised_ratio() -> None:
    assert realised_ratio([50, 200, 20]) == 10
    assert realised_ratio([3, 0]) == math.inf
    with pytest.raises(InputError):
        realised_ratio([])


def test_indices_survive_saving(tmp_path: Path) -> None:
    path = tmp_path / "train.indices"
    indices = long_tail(labels_of(HAM), 100)
    save_indices(path, indices)
    assert torch.equal(load_indices(path, sum(HAM)), indices)
    with pytest.raises(InputError, match="but the data set has 100 images"):
        load_indices(path, 100)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1, 2, 2]), "twice"),
        (np.array([-1, 2]), "from -1 to 2"),
        (np.array([1.0, 2.0]), "holds no indices"),
        (np.array([[1, 2]]), "holds no indices"),
        (np.array([], dtype=np.int64), "holds no indices"),
        (np.array([1, None]), "cannot be read"),
    ],
)
def test_bad_index_files(tmp_path: Path, array: np.ndarray, message: str) -> None:
    path = tmp_path / "indices.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(InputError, match=message) as caught:
        load_indices(path, 10)
    assert "\n" not in str(caught.value)


def test_missing_or_foreign_index_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_indices(tmp_path / "none.npy", 10)
    (tmp_path / "text.npy").write_text("0 1 2")
    with pytest.raises(InputError, match="cannot be read"):
        load_indices(tmp_path / "text.npy", 10)
    np.savez(tmp_path / "several.npz", a=np.arange(3))
    with pytest.raises(InputError, match="holds no indices"):
        load_indices(tmp_path / "several.npz", 10)
