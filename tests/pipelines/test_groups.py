"""Groups against plain loops over dicts and lists, by properties of random inputs, and on real patients."""

import csv
import itertools
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines import label_fraction, leaked, split_by_group, split_indices
from amimv.pipelines.groups import read_groups
from amimv.pipelines.rng import Key, Stream, hashes

#: The sets with groups of their own, and (val, test) images that share one with training, counted by hand with a set.
REAL = {"ham10000": (348, 693), "chestxray3": (0, 0), "rbc12": (0, 0)}


# Leaks and splits


@pytest.mark.parametrize("seed", range(5))
def test_leaked_equals_a_set(seed: int) -> None:
    draw = random.Random(seed)
    train, test = ([draw.randrange(60) for _ in range(n)] for n in (50, 80))
    assert leaked(torch.tensor(train), torch.tensor(test)).tolist() == [group in set(train) for group in test]
    assert leaked(torch.tensor(train), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    with pytest.raises(InputError, match="groups are"):
        leaked(torch.zeros(3), torch.tensor(test))


def random_sets(seed: int, patients: int = 300) -> tuple[Tensor, Tensor]:
    """Groups of 1 to 6 images, most of one class, classes 20 : 1."""
    draw = random.Random(seed)
    groups, labels = [], []
    for patient in draw.sample(range(-(10**12), 10**12), patients):
        own = draw.choices(range(4), weights=(20, 6, 3, 1))[0]
        for _ in range(draw.randint(1, 6)):
            groups.append(patient)
            labels.append(own if draw.random() < 0.9 else draw.randrange(4))
    order = draw.sample(range(len(groups)), len(groups))
    return torch.tensor(groups)[order], torch.tensor(labels)[order]


def split_by_loop(groups: list[int], labels: list[list[int]], shares: tuple[float, ...], seed: int) -> list[int]:
    """The walk written out with dicts: the classes of each image are a list, in which -1 stands for any image."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for group, classes in zip(groups, labels, strict=True):
        counts[group].update([*classes, -1])
    totals = sum(counts.values(), Counter())
    left = Counter(c for own in counts.values() for c in own)
    in_groups = dict(left)
    hashed = {group: int(hashes(Key(seed, Stream.GROUP_SPLIT), torch.tensor([group]), 1)) for group in counts}
    order = sorted(
        counts,
        key=lambda g: (min(in_groups[c] for c in counts[g]), -counts[g][-1].bit_length(), hashed[g]),
    )
    have: list[Counter[int]] = [Counter() for _ in shares]
    chosen = {}
    for group in order:
        own = counts[group]
        urgent = [c for c in own if left[c] <= sum(not split[c] for split in have)]
        helped = [sum(not split[c] for c in urgent) for split in have]
        allowed = [s for s in range(len(shares)) if helped[s] == max(helped)]
        costs = {s: sum(n * (2 * have[s][c] + n) / (shares[s] * totals[c]) for c, n in own.items()) for s in allowed}
        chosen[group] = min(allowed, key=lambda s: round(costs[s], 9))
        have[chosen[group]] += own
        left.subtract(list(own))
    return [chosen[group] for group in groups]


def placed(splits: tuple[Tensor, ...], n: int) -> list[int]:
    """The split of each image; fails where an image has none or two, or a split is not sorted."""
    found = [-1] * n
    for number, indices in enumerate(splits):
        assert indices.dtype == torch.int64
        assert indices.tolist() == sorted(indices.tolist())
        for i in indices.tolist():
            assert found[i] == -1
            found[i] = number
    assert -1 not in found
    return found


@pytest.mark.parametrize("shares", [(0.7, 0.1, 0.2), (0.5, 0.5), (0.4, 0.3, 0.2, 0.1)])
@pytest.mark.parametrize("seed", range(4))
def test_splits_equal_a_plain_walk(seed: int, shares: tuple[float, ...]) -> None:
    groups, labels = random_sets(seed, patients=120)
    n = len(groups)
    hot = torch.stack([labels == 0, labels % 2 == 1], 1).long()  # some images carry no label
    for given, classes in (
        (labels, [[c] for c in labels.tolist()]),
        (hot, [[c for c, has in enumerate(row) if has] for row in hot.tolist()]),
        (None, [[]] * n),
    ):
        found = placed(split_indices(given, shares, groups, seed), n)
        assert found == split_by_loop(groups.tolist(), classes, shares, seed)
        assert placed(split_by_group(groups, given, shares, seed), n) == found


@pytest.mark.parametrize("seed", range(6))
def test_splits_are_whole_seeded_stratified_and_blind_to_order(seed: int) -> None:
    groups, labels = random_sets(seed)
    splits = split_indices(labels, groups=groups, seed=seed)
    found = placed(splits, len(groups))
    for one, other in itertools.permutations(splits, 2):
        assert not leaked(groups[one], groups[other]).any()
    for split, share in zip(splits, (0.7, 0.1, 0.2), strict=True):
        assert len(split) / len(groups) == pytest.approx(share, abs=0.01)
        per_class = torch.bincount(labels[split], minlength=4) / torch.bincount(labels)
        assert per_class.tolist() == pytest.approx([share] * 4, abs=0.05)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    moved = placed(split_indices(labels[order], groups=groups[order], seed=seed), len(groups))
    assert moved == [found[i] for i in order.tolist()]
    assert placed(split_indices(labels, groups=groups, seed=seed + 1), len(groups)) != found


def test_every_class_is_in_every_split_where_that_can_be() -> None:
    # Small enough to try every way: what is refused has none, but for a few whose classes share their groups.
    draw = random.Random(0)
    refused = 0
    for trial in range(200):
        n_groups, n_classes, n_splits = draw.randint(2, 6), draw.randint(1, 3), draw.choice([2, 3])
        groups = [draw.randrange(n_groups) for _ in range(draw.randint(n_groups, 14))]
        labels = [draw.randrange(n_classes) for _ in groups]
        own = {g: {c for group, c in zip(groups, labels, strict=True) if group == g} for g in set(groups)}

        def covers(way: tuple[int, ...], own: dict = own, labels: list = labels, n_splits: int = n_splits) -> bool:
            seen: list[set[int]] = [set() for _ in range(n_splits)]
            for classes, split in zip(own.values(), way, strict=True):
                seen[split] |= classes
            return all(classes == set(labels) for classes in seen)

        possible = any(map(covers, itertools.product(range(n_splits), repeat=len(own))))
        try:
            shares = (0.5, 0.5) if n_splits == 2 else (0.7, 0.1, 0.2)
            splits = split_indices(torch.tensor(labels), shares, torch.tensor(groups), seed=trial)
        except InputError:
            refused += possible
        else:
            assert all({labels[i] for i in split.tolist()} == set(labels) for split in splits)
            assert possible
    assert refused <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": (0.7, 0.2)}, r"shares are \(0\.7, 0\.2\), expected two or more positive numbers whose sum is 1"),
        ({"shares": (1.0,)}, "expected two or more"),
        ({"shares": (1.0, 0.0)}, "expected two or more"),
        ({"shares": (float("nan"), 0.5)}, "expected two or more"),
        (
            {"groups": torch.tensor([1, 1, 1, 2, 2, 2])},
            r"class 0 has 2 group\(s\) of images, but each of the 3 splits needs one: add some",
        ),
        ({"groups": torch.tensor([1, 1, 1, 2, 2, 2]), "labels": None}, r"the data set has 2 group\(s\)"),
        ({"class_names": ["a", "b", "mel"]}, r"class mel has 0 group\(s\)"),
        ({"groups": None, "labels": torch.tensor([0, 0, 0, 1, 0, 0])}, r"class 1 has 1 image\(s\), but each of the 3"),
        ({"groups": None, "labels": None}, "neither labels nor groups"),
        ({"class_names": ["a"]}, r"labels out of range: expected 0\.\.0, found 0\.\.1"),
        ({"labels": torch.tensor([-1, 0, 0, 0, 0, 0])}, r"labels out of range: .* found -1\.\.0"),
        (
            {"labels": torch.ones(6, 2, dtype=torch.int64), "class_names": ["a", "b", "c"]},
            r"expected 0\.\.2, found 0\.\.1",
        ),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels are .5,. .* for 6 images"),
        ({"labels": torch.zeros(6)}, r"labels are \(6,\) torch.float32"),
        ({"groups": torch.zeros(6)}, r"groups are \(6,\) torch.float32, expected one integer for each image"),
        ({"groups": torch.zeros(0, dtype=torch.int64)}, "there are 0 images for 3 splits"),
    ],
)
def test_splits_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        split_indices(**{"groups": torch.arange(6), "labels": torch.tensor([0, 1] * 3), **settings})
    assert "\n" not in str(caught.value)


def test_a_class_number_without_images_is_left_out_unless_it_is_asked_for() -> None:
    assert [len(s) for s in split_indices(torch.tensor([0, 2] * 5), (0.6, 0.2, 0.2))] == [6, 2, 2]


# Label fractions


def fraction_by_loop(labels: list[int], groups: list[int], fraction: float, seed: int) -> list[int]:
    hashed = {g: int(hashes(Key(seed, Stream.LABEL_FRACTION), torch.tensor([g]), 1)) for g in set(groups)}
    taken: set[int] = set()
    for c in set(labels):
        wanted, have = max(1, round(fraction * labels.count(c))), 0
        for group in sorted(hashed, key=hashed.__getitem__):
            own = sum(label == c and g == group for label, g in zip(labels, groups, strict=True))
            if own and have < wanted:
                taken.add(group)
                have += own
    return [i for i, group in enumerate(groups) if group in taken]


@pytest.mark.parametrize("seed", range(3))
def test_fractions_of_groups_equal_a_plain_walk_and_are_nested(seed: int) -> None:
    groups, labels = random_sets(seed, patients=80)
    before: set[int] = set()
    for fraction in (0.001, 0.03, 0.1, 0.5, 1):
        chosen = label_fraction(labels, fraction, seed, groups)
        assert chosen.tolist() == fraction_by_loop(labels.tolist(), groups.tolist(), fraction, seed)
        rest = ~torch.isin(torch.arange(len(groups)), chosen)
        assert not leaked(groups[chosen], groups[rest]).any()
        at_least = [max(1, round(fraction * n)) for n in torch.bincount(labels).tolist()]
        assert (torch.bincount(labels[chosen], minlength=4) >= torch.tensor(at_least)).all()
        assert before <= set(chosen.tolist())
        before = set(chosen.tolist())
    assert len(before) == len(groups)
    assert not torch.equal(label_fraction(labels, 0.1, seed, groups), label_fraction(labels, 0.1, seed + 9, groups))


def test_fractions_without_groups_are_as_ever_and_those_of_single_images_the_same() -> None:
    labels = [c for c, n in enumerate((228, 359, 769, 80, 779, 4693, 99)) for _ in range(n)]
    random.Random(0).shuffle(labels)
    expected = [865, 1528, 2880, 2906, 2914, 3067, 3521, 3929, 4214, 4265, 4709, 5131, 5697, 6309, 6819, 6901, 7006]
    alone = torch.arange(len(labels))
    for groups in (None, alone):
        assert label_fraction(torch.tensor(labels), 0.002, 3, groups).tolist() == expected
    hot = torch.ones(50, 2, dtype=torch.int64)
    for groups in (None, alone[:50]):
        assert label_fraction(hot, 0.1, 3, groups).tolist() == [16, 27, 36, 40, 48]
    assert len(label_fraction(hot, 0.1, 3, alone[:50] // 10)) == 10
    with pytest.raises(InputError, match=r"groups are \(3,\) .* one integer for each of the 50 images"):
        label_fraction(hot, 0.1, 3, alone[:3])


# Real patients, lesions and smears


@pytest.fixture(params=REAL)
def real(request: pytest.FixtureRequest, real_data: Path) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """Its name, and the groups and labels of each split."""
    file = real_data / f"{request.param}_28_index.csv"
    if not file.is_file():
        pytest.skip(f"real groups not found: no {file.name} in {real_data} (set AMIMV_DATA)")
    labels: dict[str, list[int]] = defaultdict(list)
    with file.open() as lines:
        for row in csv.DictReader(lines):
            labels[row["split"]].append(int(row["label"]))
    groups = {split: read_groups(file, None, split, len(labels[split])) for split in ("train", "val", "test")}
    return request.param, groups, {split: torch.tensor(labels[split]) for split in groups}


def test_real_splits_leak_what_is_known(real: tuple) -> None:
    name, groups, _ = real
    assert tuple(int(leaked(groups["train"], groups[split]).sum()) for split in ("val", "test")) == REAL[name]


def test_real_sets_split_anew_without_leaks_in_the_asked_shares(real: tuple) -> None:
    name, by_split, labels_by_split = real
    groups, labels = torch.cat(list(by_split.values())), torch.cat(list(labels_by_split.values()))
    # Of the smears, 175 of up to 213 cells, some kinds of cells are on a dozen only.
    tolerance, per_class = (0.01, 0.1) if name == "rbc12" else (0.001, 0.01)
    for seed in range(2):
        splits = split_indices(labels, groups=groups, seed=seed)
        placed(splits, len(groups))
        for split, share in zip(splits, (0.7, 0.1, 0.2), strict=True):
            assert len(split) / len(groups) == pytest.approx(share, abs=tolerance)
            found = torch.bincount(labels[split], minlength=int(labels.max()) + 1) / torch.bincount(labels)
            assert found.tolist() == pytest.approx([share] * len(found), abs=per_class)
        for one, other in itertools.combinations(splits, 2):
            assert not leaked(groups[one], groups[other]).any()
