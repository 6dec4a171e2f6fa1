"""Samplers: a whole epoch's indices at once, on the device, as a pure function of (groups, weights, seed, epoch).

Every sampler is the same three steps: draw a group for each place in the epoch, number the draws within each group,
and walk that group's random permutation, so that a small class is gone through before an image repeats. Uniform
sampling is the case of a single group.

Samplers that read labels: `class-balanced`, `square-root`, `effective-number`, `progressive`. `uniform` and
`cluster-balanced` do not. Partners are drawn by the same samplers, or from the anchor's group (`same-group`).
`PairSampler` in `amimv.pipelines.pair_sampler` makes an object of these functions, for any loop or `DataLoader`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from amimv import InputError, check_choice
from amimv.pipelines.names import SAMPLERS
from amimv.pipelines.rng import Key, Stream, hashes, integers, uniforms64


@dataclass(frozen=True)
class Groups:
    """Images by group, the members of a group next to each other.

    Attributes:
        members: ``(M,)`` ``int64`` image indices, sorted by group. M is the number of images, or more where an image
            is in several groups (multi-label sets).
        group: ``(M,)`` ``int64``, the group of each member.
        starts, counts: ``(G,)`` ``int64``, where each group begins in ``members`` and how many it has.
        sizes: ``counts`` on the host.
        partition: whether every image is in one group only.
    """

    members: Tensor
    group: Tensor
    starts: Tensor
    counts: Tensor
    sizes: tuple[int, ...]
    partition: bool = True


def build_groups(assignments: Tensor, n_groups: int) -> Groups:
    """Group images by class or cluster. Waits for the device, so call it between epochs.

    Args:
        assignments: ``(N,)`` ``int64`` in ``[0, n_groups)``, or ``(N, n_groups)`` multi-hot labels: then an image is
            in the group of each of its labels, and the images without any label are one more group.
        n_groups: number of classes or clusters; groups may be empty.
    """
    if assignments.ndim == 2:
        unlabelled = assignments.sum(dim=1, keepdim=True) == 0
        assignments = torch.cat([assignments != 0, unlabelled], dim=1)
        group, members = assignments.T.nonzero(as_tuple=True)
        n_groups += int(unlabelled.any())
    else:
        members = assignments.argsort(stable=True)
        group = assignments[members]
    boundaries = torch.searchsorted(group, torch.arange(n_groups + 1, device=group.device))
    starts, counts = boundaries[:-1], boundaries.diff()
    return Groups(members, group, starts, counts, tuple(counts.tolist()), len(members) == len(assignments))


def group_weights(sizes: tuple[int, ...], sampler: str, *, beta: float = 0.999, progress: float = 0.0) -> list[float]:
    """Probability of drawing each group; they sum to 1 and an empty group has 0.

    Args:
        sizes: images per group.
        sampler: one of `SAMPLERS`.
        beta: of `effective-number`: group c weighs n_c / E_c with E_c = (1 - beta^n_c) / (1 - beta), since each of its
            images weighs 1 / E_c (Cui et al. 2019, "Class-balanced loss based on effective number of samples").
        progress: of `progressive`: share of the epochs gone, in [0, 1]; from instance- to class-balanced linearly
            (Kang et al. 2020, "Decoupling representation and classifier", section 4.1).
    """
    total = sum(sizes)
    filled = sum(size > 0 for size in sizes)
    instance = [size / total for size in sizes]
    balanced = [(size > 0) / filled for size in sizes]
    if sampler == "uniform":
        return instance
    if sampler in ("class-balanced", "cluster-balanced"):
        return balanced
    if sampler == "progressive":
        return [(1 - progress) * i + progress * b for i, b in zip(instance, balanced, strict=True)]
    if sampler == "square-root":
        weights = [size**0.5 for size in sizes]
    elif sampler == "effective-number":
        if not 0 <= beta < 1:
            raise InputError(f"beta is {beta}, expected a number in [0, 1)")
        weights = [size * (1 - beta) / (1 - beta**size) if size else 0.0 for size in sizes]
    else:
        check_choice("sampler", sampler, SAMPLERS)
    return [weight / sum(weights) for weight in weights]


def _cumulative(weights: list[float], device: torch.device) -> Tensor:
    """Upper ends of the groups in [0, 1], ``(G,)`` ``float64``; the last group with any weight ends at 1."""
    ends = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    last = max(i for i, weight in enumerate(weights) if weight > 0)
    ends[last:] = 1.0
    return ends.to(device)


def _shuffle(groups: Groups, key: Key) -> Tensor:
    """``groups.members`` with each group in random order, ``(M,)``."""
    places = torch.arange(len(groups.members), device=groups.members.device)
    shuffled = hashes(key, places, 1).squeeze(1).argsort(stable=True)
    return groups.members[shuffled[groups.group[shuffled].argsort(stable=True)]]


def draw_anchors(groups: Groups, weights: list[float], steps: int, batch_size: int, seed: int, epoch: int) -> Tensor:
    """The anchors of one epoch, ``(steps, batch_size)`` ``int64``, on the device of ``groups``.

    Within the epoch each group is walked in one random order, from the start again when it is used up.
    """
    device = groups.members.device
    key = Key(seed, Stream.ANCHOR, epoch)
    draws = torch.arange(steps * batch_size, device=device)
    if len(groups.sizes) == 1:  # the same as below, without drawing and sorting
        return _shuffle(groups, key)[draws % groups.counts].view(steps, batch_size)
    drawn = torch.searchsorted(
        _cumulative(weights, device), uniforms64(key._replace(step=1), draws, 1)[:, 0], right=True
    )
    by_group = drawn.argsort(stable=True)
    first = torch.searchsorted(drawn[by_group], torch.arange(len(groups.sizes), device=device))
    number = torch.empty_like(draws)
    number[by_group] = draws - first[drawn[by_group]]
    place = groups.starts[drawn] + number % groups.counts[drawn]
    return _shuffle(groups, key)[place].view(steps, batch_size)


def draw_partners(
    groups: Groups, weights: list[float], anchors: Tensor, partners: int, seed: int, epoch: int
) -> Tensor:
    """Partners of an epoch's anchors, ``(partners, steps, batch_size)`` ``int64``.

    A partner's group is drawn by ``weights`` and its image uniformly within the group. Where that is the anchor or an
    earlier partner, the next image of the group's random order is taken, and when the group is used up those of the
    next group: so a partner never equals its anchor, and the partners of an anchor are distinct.

    Args:
        anchors: ``(steps, batch_size)`` from `draw_anchors`; the groups must hold more than ``partners`` images.
    """
    device = anchors.device
    key = Key(seed, Stream.PARTNER, epoch)
    members = _shuffle(groups, key)
    ends = _cumulative(weights, device)
    places = torch.arange(anchors.numel(), device=device).view_as(anchors)
    # Each taken image stands once in a partition, else at most once in every group.
    repeats = 1 if groups.partition else len(groups.sizes)
    taken = [anchors]
    for partner in range(partners):
        slot_key = key._replace(step=1 + 2 * partner)
        drawn = torch.searchsorted(ends, uniforms64(slot_key, places, 1)[..., 0], right=True)
        start, count = groups.starts[drawn], groups.counts[drawn]
        offset = integers(slot_key._replace(step=2 + 2 * partner), places, 1, count.unsqueeze(-1))[..., 0]
        skipped = torch.zeros_like(drawn)
        for _ in range(len(taken) * repeats + 1):
            inside = start + (offset + skipped) % count
            place = torch.where(skipped < count, inside, (start + skipped) % len(members))
            chosen = members[place]
            clash = torch.stack([chosen == other for other in taken]).any(dim=0)
            skipped = skipped + clash
        taken.append(chosen)
    return torch.stack(taken[1:])


def draw_group_partners(groups: Groups, anchors: Tensor, partners: int, seed: int, epoch: int) -> Tensor:
    """Partners from the anchors' own groups, ``(partners, steps, batch_size)`` ``int64``; no label is read.

    The others of the group are walked from a random one on, so partners are distinct as long as the group has enough;
    an anchor that is alone in its group is its own partner.

    Args:
        groups: a partition of the images.
        anchors: ``(steps, batch_size)``.
    """
    key = Key(seed, Stream.PARTNER, epoch)
    members = _shuffle(groups, key)
    place = torch.empty_like(members)
    place[members] = torch.arange(len(members), device=members.device)
    group = torch.empty_like(members)
    group[groups.members] = groups.group
    start, count = (of_group[group[anchors]] for of_group in (groups.starts, groups.counts))
    others = (count - 1).clamp(min=1)
    places = torch.arange(anchors.numel(), device=anchors.device).view_as(anchors)
    first = integers(key._replace(step=1), places, 1, others.unsqueeze(-1))[..., 0]
    steps = 1 + (first + torch.arange(partners, device=anchors.device)[:, None, None]) % others
    return members[start + (place[anchors] - start + steps) % count]
