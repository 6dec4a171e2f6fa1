"""Pairs of images, and any loader or loop: the samplers' functions with what they are functions of."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amimv import InputError, check_choice, first_line
from amimv.pipelines.groups import encode_groups
from amimv.pipelines.names import LABEL_SAMPLERS, PARTNERS, SAME_GROUP, SAMPLERS
from amimv.pipelines.samplers import (
    Groups,
    build_groups,
    draw_anchors,
    draw_group_partners,
    draw_partners,
    group_weights,
)

logger = logging.getLogger("amimv")


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
