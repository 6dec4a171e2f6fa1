"""Samplers: a whole epoch's indices at once, on the device, as a pure function of (groups, weights, seed, epoch).

Every sampler is the same three steps: draw a group for each place in the epoch, number the draws within each group,
and walk that group's random permutation, so that a small class is gone through before an image repeats. Uniform
sampling is the case of a single group.

Samplers that read labels: `class-balanced`, `square-root`, `effective-number`, `progressive`. `uniform` and
`cluster-balanced` do not. Partners are drawn by the same samplers, or from the anchor's group (`same-group`).
`PairSampler` makes an object of these functions, for any loop or `DataLoader`.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amimv import InputError, check_choice, first_line
from amimv.pipelines.groups import encode_groups
from amimv.pipelines.rng import Key, Stream, hashes, integers, uniforms64

logger = logging.getLogger("amimv")

SAMPLERS = ("uniform", "class-balanced", "square-root", "effective-number", "progressive", "cluster-balanced")
LABEL_SAMPLERS = ("class-balanced", "square-root", "effective-number", "progressive")
#: Another image of the anchor's group (patient, lesion, slide), as in MICLe (Azizi et al., arXiv 2101.05224).
SAME_GROUP = "same-group"
PARTNERS = (*SAMPLERS, SAME_GROUP)


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


class PairSampler:
    """Which images make up the pairs: as ``batch_sampler`` of a `DataLoader`, or as index tensors for one's own loop.

    Iterating gives an epoch, and each pass the next: lists of indices, the anchors, then their first partners, ...::

        sampler = PairSampler(labels, 256, sampler="class-balanced", seed=0)
        for images, _ in DataLoader(dataset, batch_sampler=sampler):
            anchors, partners = sampler.unflatten(images)          # (256, ...) each

    `epoch` gives the same as ``(slots, B)`` tensors on the device of the labels. Everything is a function of (seed,
    epoch); there is no state but where the next pass begins. A last, incomplete batch is left out.

    Under Accelerate, prepare the `DataLoader` and leave ``rank`` alone: it hands out whole batches in turn, and what
    does not go round is left out (``split_batches`` is refused; before Accelerate 1.14 set ``even_batches=False``).
    Elsewhere give ``rank`` and ``world_size`` (under Lightning ``rank=trainer.global_rank,
    world_size=trainer.world_size`` and ``Trainer(use_distributed_sampler=False)``): then ``batch_size`` is that of all
    processes together, and each gets its share of every batch.

    Args:
        labels: ``(N,)`` or ``(N, 1)`` integers from 0, ``(N, L)`` multi-hot, or just the number of images where no
            label is read.
        batch_size: pairs, over all processes and micro-batches.
        sampler: how anchors are drawn, one of ``SAMPLERS``. All but `uniform` and `cluster-balanced` read labels.
        partner: how partners are drawn, one of ``PARTNERS``.
        slots: images per pair, the anchor included.
        groups: ``(N,)`` integers, for `same-group`: images with the same number are of one patient, lesion or slide.
        seed: of everything drawn here.
        n_classes: number of classes or labels; by default as many as the labels show.
        epochs: length of the training, which `progressive` needs.
        beta: of `effective-number`.
        rank, world_size: this process's share of each batch.
        micro_batches: each batch is handed out in so many parts, for gradient accumulation.
        device: where indices are made; by default where the labels are.

    Raises:
        InputError: for an unknown name, a batch larger than the data set or not divisible, labels or groups that are
            missing or do not fit, a class without images under a label-reading sampler.
    """

    #: As of torch's `BatchSampler`; Accelerate reads it. There is no ``batch_size``, so that what would split a list
    #: (anchors here, partners there) or make the sampler anew without its settings refuses to.
    drop_last = True

    def __init__(
        self,
        labels: Tensor | np.ndarray | Sequence[int] | int,
        batch_size: int,
        sampler: str = "uniform",
        partner: str = "uniform",
        slots: int = 2,
        groups: Tensor | np.ndarray | Sequence[int] | None = None,
        seed: int = 0,
        *,
        n_classes: int | None = None,
        epochs: int = 1,
        beta: float = 0.999,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("partner sampler", partner, PARTNERS)
        known = None if isinstance(labels, int | np.integer) else _label_tensor(labels, device)
        self.images = int(labels) if isinstance(labels, int | np.integer) else len(labels)
        self.device = torch.device(device or "cpu") if known is None else known.device
        _check_sizes(self.images, batch_size, slots, rank, world_size, micro_batches)
        self.sampler, self.partner, self.slots = sampler, partner, slots
        self.seed, self.epochs, self.beta = seed, epochs, beta
        self.rank, self.world_size, self.micro_batches = rank, world_size, micro_batches
        self.pairs = batch_size
        self.steps_per_epoch = self.images // batch_size
        self.clusters: Tensor | None = None
        self._position = self.next_pass = (0, 0)  # epoch and step
        self._everything = build_groups(torch.zeros(self.images, dtype=torch.int64, device=self.device), 1)
        reads_labels = {sampler, partner if slots > 1 else sampler} & set(LABEL_SAMPLERS)
        self._by_label = _label_groups(known, n_classes, sampler, partner) if reads_labels else None
        self._by_cluster: Groups | None = None
        self._by_group = self._own_groups(groups) if partner == SAME_GROUP and slots > 1 else None

    def _own_groups(self, groups: Tensor | np.ndarray | Sequence[int] | None) -> Groups:
        if groups is None:
            raise InputError(f"partner {SAME_GROUP} needs groups (of patients, lesions, ...), and there are none")
        numbers = encode_groups(groups).to(self.device)
        if numbers.shape != (self.images,) or numbers.is_floating_point():
            got = f"{tuple(numbers.shape)} {numbers.dtype}"
            raise InputError(f"groups are {got}, expected one integer for each of the {self.images} images")
        _, dense = numbers.unique(return_inverse=True)
        return build_groups(dense, int(dense.max()) + 1)

    def set_clusters(self, assignments: Tensor) -> None:
        """Give `cluster-balanced` its clusters; until then it samples uniformly.

        Args:
            assignments: ``(N,)`` ``int64``, from 0; takes effect with the next epoch that is begun.
        """
        if assignments.shape != (self.images,):
            raise InputError(f"cluster assignments have shape {tuple(assignments.shape)}, expected ({self.images},)")
        self.clusters = assignments.to(self.device)
        self._by_cluster = build_groups(self.clusters, int(self.clusters.max()) + 1)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch: from its start, or from where a loaded state stands in it."""
        self._position = self.next_pass = (epoch, self.next_pass[1] if epoch == self.next_pass[0] else 0)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and step to go on from (of the batches handed out), and the clusters.

        Workers of a `DataLoader`, and Accelerate, ask for batches ahead: where they do, put in the steps that were
        used, as in ``sampler.state_dict() | {"epoch": epoch, "step": used}``.
        """
        epoch, step = self._position
        return {"epoch": epoch, "step": step, "clusters": self.clusters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`: the next pass begins with the first batch that had not been handed out."""
        self._position = self.next_pass = (state["epoch"], state["step"])
        if state["clusters"] is not None:
            self.set_clusters(state["clusters"])

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.steps_per_epoch * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        """The next epoch, or the rest of the one that a loaded state stands in, as lists of indices."""
        for batch in self.epoch(*self.next_pass):
            yield batch.flatten().tolist()

    def unflatten(self, batch: Tensor) -> Tensor:
        """``(slots * B, ...)``, collated from a list of indices, as ``(slots, B, ...)``."""
        return batch.unflatten(0, (self.slots, -1))

    def epoch(self, epoch: int, start_step: int = 0, shares: Tensor | None = None) -> Iterator[Tensor]:
        """This process's batches of an epoch, from a step on, ``(slots, B)`` ``int64`` each; ``micro_batches`` of them
        make one step. ``shares``, if they are there already, are not drawn again."""
        self._position, self.next_pass = (epoch, start_step), (epoch + 1, 0)
        for i, batch in enumerate(self.shares(epoch, start_step) if shares is None else shares, 1):
            if i % self.micro_batches == 0:
                step = start_step + i // self.micro_batches
                self._position = (epoch, step) if step < self.steps_per_epoch else (epoch + 1, 0)
            yield batch

    def shares(self, epoch: int, start_step: int = 0) -> Tensor:
        """All of `epoch` at once, ``(batches, slots, B)`` ``int64``; nothing is counted as handed out."""
        share = self.pairs // (self.world_size * self.micro_batches)
        # (slots, steps, micro-batches, this rank's share): the ranks' shares of a micro-batch lie side by side.
        indices = self.epoch_indices(epoch).unflatten(2, (self.micro_batches, self.world_size, share))
        return indices[:, start_step:, :, self.rank].flatten(1, 2).transpose(0, 1).contiguous()

    def places(self, device: torch.device) -> Tensor:
        """The places in the global batch of this process's pairs of one step, ``(micro_batches, B)`` ``int64``."""
        share = self.pairs // (self.world_size * self.micro_batches)
        starts = (torch.arange(self.micro_batches, device=device) * self.world_size + self.rank) * share
        return starts[:, None] + torch.arange(share, device=device)

    def epoch_indices(self, epoch: int) -> Tensor:
        """The global batches of an epoch, ``(slots, steps, batch_size)`` ``int64``, on the device."""
        anchors = draw_anchors(*self._sampled(self.sampler, epoch), self.steps_per_epoch, self.pairs, self.seed, epoch)
        partners = self.slots - 1
        if not partners:
            return anchors.unsqueeze(0)
        if self._by_group is not None:
            drawn = draw_group_partners(self._by_group, anchors, partners, self.seed, epoch)
        else:
            drawn = draw_partners(*self._sampled(self.partner, epoch), anchors, partners, self.seed, epoch)
        return torch.cat([anchors.unsqueeze(0), drawn])

    def _sampled(self, sampler: str, epoch: int) -> tuple[Groups, list[float]]:
        groups = self._everything
        if sampler in LABEL_SAMPLERS and self._by_label is not None:
            groups = self._by_label
        elif sampler == "cluster-balanced" and self._by_cluster is not None:
            groups = self._by_cluster
        progress = epoch / max(1, self.epochs - 1)
        return groups, group_weights(groups.sizes, sampler, beta=self.beta, progress=min(1.0, progress))


def _label_tensor(labels: Tensor | np.ndarray | Sequence[int], device: torch.device | str | None) -> Tensor:
    """``(N,)`` or ``(N, L)``."""
    try:
        known = torch.as_tensor(labels, device=device)
    except (TypeError, ValueError) as error:
        raise InputError(f"labels are no numbers ({first_line(error)}): expected integers from 0") from error
    if not known.ndim:
        raise InputError("labels are a single value: expected one for each image, or the number of images as an int")
    return known


def _check_sizes(images: int, batch_size: int, slots: int, rank: int, world_size: int, micro_batches: int) -> None:
    if slots < 1:
        raise InputError(f"slots is {slots}, expected at least 1: the anchor")
    if not 0 <= rank < world_size:
        raise InputError(f"rank is {rank}, expected 0 to {world_size - 1} for a world size of {world_size}")
    if not 1 <= batch_size <= images:
        raise InputError(
            f"batch size is {batch_size} but the data set has {images} images: give a batch size from 1 to {images}"
        )
    if batch_size % (world_size * micro_batches):
        raise InputError(
            f"batch size {batch_size} does not divide by {world_size} processes x {micro_batches} micro-batches"
        )
    if slots > images:
        raise InputError(f"a pair needs {slots} distinct images but the data set has {images}")


def _label_groups(labels: Tensor | None, n_classes: int | None, sampler: str, partner: str) -> Groups:
    """The images by class; says in the log that labels are read."""
    name = sampler if sampler in LABEL_SAMPLERS else partner
    if labels is None:
        raise InputError(f"sampler {name} reads labels, and there are none: use uniform or cluster-balanced")
    if labels.is_floating_point() or labels.ndim not in (1, 2):
        raise InputError(
            f"labels are {tuple(labels.shape)} {labels.dtype}, expected integers (N,) or multi-hot (N, L)"
        )
    if labels.shape[1:] == (1,) and n_classes is None:
        labels = labels[:, 0]  # a column of classes, as MedMNIST has it
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (labels.ndim == 2 and high > 1):
        expected = "integers from 0" if labels.ndim == 1 else "0 or 1 in each column"
        raise InputError(f"labels reach from {low} to {high}, expected {expected}")
    logger.info("sampling reads labels (anchors %s, partners %s)", sampler, partner)
    if n_classes is None:
        n_classes = labels.shape[1] if labels.ndim == 2 else high + 1
    elif labels.ndim == 1 and high >= n_classes:
        raise InputError(f"labels reach to {high}, expected 0 to {n_classes - 1} for {n_classes} classes")
    groups = build_groups(labels.long(), n_classes)
    if 0 in groups.sizes:
        raise InputError(
            f"class {groups.sizes.index(0)} has no image, which the label-reading sampler {name} needs: "
            "use the uniform sampler or a subset that keeps every class"
        )
    return groups
