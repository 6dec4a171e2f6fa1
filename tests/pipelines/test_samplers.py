"""Samplers: distributions against closed forms and plain loops, walks without early repeats, distinct partners."""

from itertools import pairwise, permutations

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from amimv import InputError, check_choice
from amimv.pipelines import samplers
from amimv.pipelines.names import LABEL_SAMPLERS, SAMPLERS
from amimv.pipelines.rng import Key
from amimv.pipelines.samplers import Groups, build_groups, draw_anchors, draw_partners, group_weights

SIZES = (60, 30, 12, 5, 1)
#: The numbers are fixed, so a test that passes once passes always.
ALPHA = 1e-4


def build_labels(sizes: tuple[int, ...] = SIZES) -> Tensor:
    """Labels of classes of these sizes, mixed up."""
    labels = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def build_case(
    sampler: str, sizes: tuple[int, ...] = SIZES, progress: float = 0.3
) -> tuple[Tensor, Groups, list[float]]:
    """Labels, and the groups and weights that a sampler uses for them."""
    labels = build_labels(sizes)
    grouped = torch.zeros_like(labels) if sampler == "uniform" else labels
    groups = build_groups(grouped, 1 if sampler == "uniform" else len(sizes))
    return labels, groups, group_weights(groups.sizes, sampler, beta=0.9, progress=progress)


def plain_weights(sizes: tuple[int, ...], sampler: str, beta: float, progress: float) -> list[float]:
    """The probability of each class, as a sum over a weight for each image."""
    n_images = sum(sizes)
    n_filled = len([size for size in sizes if size])
    totals = []
    for size in sizes:
        total = 0.0
        for _ in range(size):
            if sampler == "uniform":
                total += 1 / n_images
            elif sampler in ("class-balanced", "cluster-balanced"):
                total += 1 / (n_filled * size)
            elif sampler == "square-root":
                total += 1 / size**0.5
            elif sampler == "effective-number":
                effective = sum(beta**i for i in range(size))
                total += 1 / effective
            elif sampler == "progressive":
                total += (1 - progress) / n_images + progress / (n_filled * size)
        totals.append(total)
    return [total / sum(totals) for total in totals]


def p_value(counts: Tensor, weights: Tensor | list[float]) -> float:
    """Of Pearson's chi-square test of counts against probabilities."""
    expected = torch.as_tensor(weights, dtype=torch.float64) * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return float(chi2.sf(statistic, len(counts) - 1))


@pytest.mark.parametrize("sizes", [SIZES, (7, 7, 7), (1, 2, 400), (3, 0, 9, 0)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_weights_equal_a_plain_loop(sampler: str, sizes: tuple[int, ...]) -> None:
    for beta, progress in ((0.9, 0.0), (0.999, 0.25), (0.5, 1.0)):
        weights = group_weights(sizes, sampler, beta=beta, progress=progress)
        assert weights == pytest.approx(plain_weights(sizes, sampler, beta, progress), abs=1e-12)
        assert sum(weights) == pytest.approx(1, abs=1e-12)


def test_effective_number_lies_between_instance_and_class_balanced() -> None:
    instance, balanced = group_weights(SIZES, "uniform"), group_weights(SIZES, "class-balanced")
    assert group_weights(SIZES, "effective-number", beta=0.0) == pytest.approx(instance)
    # n (1 - beta) stays below 1e-4 here: the effective number is the number, and each class weighs the same.
    assert group_weights(SIZES, "effective-number", beta=1 - 1e-6) == pytest.approx(balanced, rel=1e-4)
    largest = [group_weights(SIZES, "effective-number", beta=beta)[0] for beta in (0.0, 0.5, 0.9, 0.99, 0.999)]
    assert all(a > b for a, b in pairwise(largest))


def test_progressive_goes_from_instance_to_class_balanced() -> None:
    assert group_weights(SIZES, "progressive", progress=0.0) == group_weights(SIZES, "uniform")
    assert group_weights(SIZES, "progressive", progress=1.0) == group_weights(SIZES, "class-balanced")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_classes_come_in_the_closed_form_shares(sampler: str) -> None:
    labels, groups, weights = build_case(sampler)
    drawn = torch.cat([draw_anchors(groups, weights, 100, 30, seed=1, epoch=epoch) for epoch in range(4)])
    counts = torch.bincount(labels[drawn.flatten()], minlength=len(SIZES))
    expected = plain_weights(SIZES, sampler, 0.9, 0.3)
    if sampler == "uniform":  # walks a permutation: nearly no variance
        per_image = torch.bincount(drawn.flatten(), minlength=len(labels))
        assert per_image.max() - per_image.min() <= 4
    else:
        assert p_value(counts, expected) > ALPHA
        other = plain_weights(SIZES, "uniform", 0.9, 0.3)
        assert p_value(counts, other) < 1e-12


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "uniform"])
def test_the_shares_hold_at_every_place_of_the_epoch(sampler: str) -> None:
    labels, groups, weights = build_case(sampler)
    drawn = torch.stack([draw_anchors(groups, weights, 2, 30, seed=2, epoch=epoch) for epoch in range(50)])
    for part in (drawn[:, 0], drawn[:, 1], drawn[:, :, :15], drawn[:, :, 15:]):
        assert p_value(torch.bincount(labels[part.flatten()], minlength=len(SIZES)), weights) > ALPHA


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_class_is_gone_through_before_it_repeats(sampler: str) -> None:
    labels, groups, weights = build_case(sampler)
    for epoch in range(3):
        drawn = draw_anchors(groups, weights, 7, 40, seed=0, epoch=epoch).flatten()
        grouped = torch.zeros_like(labels) if sampler == "uniform" else labels
        for c in range(int(grouped.max()) + 1):
            members = (grouped == c).nonzero().flatten()
            walk = drawn[grouped[drawn] == c]
            counts = torch.bincount(walk, minlength=len(labels))[members]
            assert counts.max() - counts.min() <= 1
            rounds = walk.split(len(members))
            assert all(len(r.unique()) == len(r) for r in rounds)
            assert all(torch.equal(a, b) for a, b in pairwise(rounds) if len(a) == len(b))


def test_uniform_is_a_permutation() -> None:
    labels, groups, weights = build_case("uniform")
    assert draw_anchors(groups, weights, 1, len(labels), 0, 0).sort().values[0].tolist() == list(range(len(labels)))
    part = draw_anchors(groups, weights, 10, 10, 0, 0)
    assert part.shape == (10, 10)
    assert part.dtype == torch.int64
    assert len(part.unique()) == 100


def test_every_image_of_a_class_leads_its_walk_as_often() -> None:
    labels = build_labels((6, 6))
    groups = build_groups(labels, 2)
    leaders = [draw_anchors(groups, [0.5, 0.5], 1, 1, seed=0, epoch=epoch).item() for epoch in range(1200)]
    # Whichever class comes first: the order of a class does not depend on when it is drawn.
    assert p_value(torch.bincount(torch.tensor(leaders), minlength=12), [1 / 12] * 12) > ALPHA


def multi_hot_rows() -> Tensor:
    """Rows with several labels, one and none."""
    generator = torch.Generator().manual_seed(3)
    rows = (torch.rand(80, 4, generator=generator) < torch.tensor([0.5, 0.3, 0.1, 0.05])).long()
    rows[0] = 1
    rows[1] = 0
    return rows


def test_multi_hot_groups_equal_a_plain_loop() -> None:
    rows = multi_hot_rows()
    groups = build_groups(rows, 4)
    expected = [[i for i, row in enumerate(rows.tolist()) if row[c]] for c in range(4)]
    expected.append([i for i, row in enumerate(rows.tolist()) if not any(row)])
    assert [g.tolist() for g in groups.members.split(list(groups.sizes))] == expected
    assert groups.group.tolist() == [c for c, members in enumerate(expected) for _ in members]
    assert groups.counts.tolist() == list(groups.sizes) == [len(members) for members in expected]
    assert groups.starts.tolist() == [sum(groups.sizes[:c]) for c in range(5)]
    assert not groups.partition
    assert build_groups(rows[rows.sum(1) > 0], 4).sizes == groups.sizes[:4]  # no group where none is unlabelled


def test_single_label_groups_equal_a_plain_loop() -> None:
    labels = build_labels((4, 0, 3, 1))
    groups = build_groups(labels, 5)
    assert groups.sizes == (4, 0, 3, 1, 0)
    members = [g.tolist() for g in groups.members.split(list(groups.sizes))]
    assert members == [[i for i, c in enumerate(labels.tolist()) if c == k] for k in range(5)]
    assert groups.partition


def test_multi_hot_sets_balance_by_label() -> None:
    rows = multi_hot_rows()
    groups = build_groups(rows, 4)
    weights = group_weights(groups.sizes, "class-balanced")
    drawn = torch.cat([draw_anchors(groups, weights, 40, 50, 0, epoch).flatten() for epoch in range(3)])
    share = torch.zeros(len(rows), dtype=torch.float64)
    for size, members in zip(groups.sizes, groups.members.split(list(groups.sizes)), strict=True):
        share[members] += 1 / (5 * size)
    expected = share * len(drawn)
    # A walk varies less than independent draws do, so this bound is wide.
    assert ((torch.bincount(drawn, minlength=len(rows)) - expected).abs() < 5 * expected.sqrt()).all()


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "uniform"])
def test_an_empty_group_is_never_drawn(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = build_labels((0, 5, 0, 3, 0, 0))
    groups = build_groups(labels, 6)
    weights = group_weights(groups.sizes, sampler)
    assert [weight > 0 for weight in weights] == [False, True, False, True, False, False]
    assert labels[draw_anchors(groups, weights, 20, 50, 0, 0)].unique().tolist() == [1, 3]
    anchors = torch.arange(8).repeat(50, 1)
    assert labels[draw_partners(groups, weights, anchors, 2, 0, 0)].unique().tolist() == [1, 3]
    edges = torch.tensor([0.0, weights[1], 1 - 2.0**-53], dtype=torch.float64)

    def at_the_edges(key: Key, positions: Tensor, n: int) -> Tensor:
        return edges[positions % 3].unsqueeze(-1)

    monkeypatch.setattr(samplers, "uniforms64", at_the_edges)
    assert labels[draw_anchors(groups, weights, 1, 3, 0, 0)].tolist() == [[1, 3, 3]]
    assert labels[draw_partners(groups, weights, torch.tensor([[0, 1, 2]]), 1, 0, 0)].tolist() == [[[1, 3, 3]]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_draw_is_a_function_of_seed_and_epoch(sampler: str) -> None:
    _, groups, weights = build_case(sampler)
    anchors = draw_anchors(groups, weights, 5, 20, 1, 2)
    partners = draw_partners(groups, weights, anchors, 2, 1, 2)
    torch.manual_seed(123)
    assert torch.equal(anchors, draw_anchors(groups, weights, 5, 20, 1, 2))
    assert torch.equal(partners, draw_partners(groups, weights, anchors, 2, 1, 2))
    assert torch.equal(anchors.view(10, 10), draw_anchors(groups, weights, 10, 10, 1, 2))
    assert torch.equal(partners[:1], draw_partners(groups, weights, anchors, 1, 1, 2))
    for seed, epoch in ((1, 3), (2, 2)):
        assert (anchors != draw_anchors(groups, weights, 5, 20, seed, epoch)).float().mean() > 0.3
        assert (partners != draw_partners(groups, weights, anchors, 2, seed, epoch)).float().mean() > 0.3


def assert_valid_partners(anchors: Tensor, partners: Tensor) -> None:
    taken = torch.cat([anchors.unsqueeze(0), partners]).flatten(1).sort(dim=0).values
    assert (taken.diff(dim=0) > 0).all()


@pytest.mark.parametrize("partners", [1, 2, 5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_partners_are_distinct_and_never_the_anchor(sampler: str, partners: int) -> None:
    _, groups, weights = build_case(sampler)
    for epoch in range(3):
        anchors = torch.arange(sum(SIZES)).repeat(6, 1)
        drawn = draw_partners(groups, weights, anchors, partners, 0, epoch)
        assert drawn.shape == (partners, *anchors.shape)
        assert drawn.dtype == torch.int64
        assert drawn.min() >= 0
        assert drawn.max() < sum(SIZES)
        assert_valid_partners(anchors, drawn)


@pytest.mark.parametrize("sizes", [(1, 1), (2,), (1, 4), (4, 1), (1, 1, 1, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_as_many_partners_as_there_are_others(sampler: str, sizes: tuple[int, ...]) -> None:
    _, groups, weights = build_case(sampler, sizes)
    n = sum(sizes)
    for epoch in range(5):
        anchors = torch.arange(n).repeat(20, 1)
        for partners in range(1, n):
            assert_valid_partners(anchors, draw_partners(groups, weights, anchors, partners, 0, epoch))


@pytest.mark.parametrize("sampler", LABEL_SAMPLERS)
def test_multi_hot_partners_are_distinct(sampler: str) -> None:
    everything = torch.ones(4, 3, dtype=torch.int64)  # each image is in every group
    mixed = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1]])
    for rows in (everything, mixed, multi_hot_rows()[:12]):
        groups = build_groups(rows, rows.shape[1])
        weights = group_weights(groups.sizes, sampler)
        anchors = torch.arange(len(rows)).repeat(30, 1)
        for partners in {1, 2, len(rows) - 1}:
            assert_valid_partners(anchors, draw_partners(groups, weights, anchors, partners, 0, 1))


def test_uniform_partners_are_uniform_over_the_others() -> None:
    n, epochs = 5, 1500
    groups = build_groups(torch.zeros(n, dtype=torch.int64), 1)
    drawn = torch.stack([draw_partners(groups, [1.0], torch.arange(n)[None], 2, 0, e)[:, 0] for e in range(epochs)])
    for anchor in range(n):
        others = [i for i in range(n) if i != anchor]
        for partner in range(2):
            counts = torch.bincount(drawn[:, partner, anchor], minlength=n)[others]
            assert counts.sum() == epochs
            assert p_value(counts, [1 / 4] * 4) > ALPHA
        pairs = drawn[:, 0, anchor] * n + drawn[:, 1, anchor]
        counts = torch.bincount(pairs, minlength=n * n)[[a * n + b for a, b in permutations(others, 2)]]
        assert p_value(counts, [1 / 12] * 12) > ALPHA


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "uniform"])
def test_partners_come_in_the_closed_form_shares(sampler: str) -> None:
    labels, groups, weights = build_case(sampler)
    anchors = torch.full((100, 40), int((labels == 0).nonzero()[0]))
    drawn = draw_partners(groups, weights, anchors, 1, 0, 0)[0]
    assert p_value(torch.bincount(labels[drawn.flatten()], minlength=5), weights) > ALPHA
    assert (
        p_value(torch.bincount(drawn[labels[drawn] == 1], minlength=len(labels))[labels == 1], [1 / 30] * 30) > ALPHA
    )


@pytest.mark.parametrize("sampler", ["uniform", "class-balanced"])
def test_partners_of_one_epoch_are_independent_of_each_other(sampler: str) -> None:
    _, groups, weights = build_case(sampler, (20, 20))
    first, second = draw_partners(groups, weights, torch.zeros(80, 50, dtype=torch.int64), 2, 0, 0).flatten(1)
    # 39 * 38 = 1482 ordered pairs, of which 4000 draws meet about 1380.
    assert 1300 < len((first * 40 + second).unique()) < 1450


def test_a_class_of_one_falls_through_to_the_next() -> None:
    sizes = (8, 1, 6, 1)
    labels, groups, weights = build_case("class-balanced", sizes)
    for alone, expected in ((1, [0.25, 0.5, 0.25]), (3, [0.5, 0.25, 0.25])):
        anchors = torch.full((100, 20), int((labels == alone).nonzero()[0]))
        drawn = draw_partners(groups, weights, anchors, 1, 0, 0)
        counts = torch.bincount(labels[drawn.flatten()], minlength=4)
        assert counts[alone] == 0
        assert p_value(counts[[c for c in range(4) if c != alone]], [expected[0], *expected[1:]]) > ALPHA


@pytest.mark.parametrize(("name", "near"), [("clas-balanced", "class-balanced"), ("squareroot", "square-root")])
def test_an_unknown_sampler_names_the_near_misses(name: str, near: str) -> None:
    for check in (lambda: check_choice("sampler", name, SAMPLERS), lambda: group_weights(SIZES, name)):
        with pytest.raises(InputError, match=f"unknown sampler '{name}': did you mean {near}") as error:
            check()
        assert "\n" not in str(error.value)
        assert all(sampler in str(error.value) for sampler in SAMPLERS)


@pytest.mark.parametrize("beta", [1.0, -0.1, 2.0])
def test_beta_out_of_range_is_an_error(beta: float) -> None:
    with pytest.raises(InputError, match=r"beta is .*expected a number in \[0, 1\)"):
        group_weights(SIZES, "effective-number", beta=beta)


@pytest.mark.gpu
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_indices_on_cuda(sampler: str) -> None:
    _, groups, weights = build_case(sampler)
    on_cuda = Groups(
        groups.members.cuda(), groups.group.cuda(), groups.starts.cuda(), groups.counts.cuda(), groups.sizes
    )
    anchors = draw_anchors(groups, weights, 9, 11, 1, 2)
    assert torch.equal(draw_anchors(on_cuda, weights, 9, 11, 1, 2).cpu(), anchors)
    partners = draw_partners(on_cuda, weights, anchors.cuda(), 3, 1, 2)
    assert torch.equal(partners.cpu(), draw_partners(groups, weights, anchors, 3, 1, 2))
