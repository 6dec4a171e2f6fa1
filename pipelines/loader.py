"""From an image store to batches of pairs: sampler -> partner -> draw view parameters -> render, on one device."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amimv import InputError, check_choice
from amimv.pipelines.heap import keep_freed_memory
from amimv.pipelines.params import ViewParams, draw_view_params
from amimv.pipelines.recipes import Recipe
from amimv.pipelines.rng import Key
from amimv.pipelines.samplers import (
    LABEL_SAMPLERS,
    SAMPLERS,
    Groups,
    build_groups,
    draw_anchors,
    draw_partners,
    group_weights,
)
from amimv.pipelines.stores import ImageStore

BACKENDS = ("kornia", "dali")
#: Samples whose view parameters are drawn together: a draw is some seventy small operations, however many it is for.
DRAWN_TOGETHER = 2**14

logger = logging.getLogger("amimv")


class PairBatch(NamedTuple):
    """One batch of pairs, on the device.

    Attributes:
        sides: per side its views, each ``(B, C, size, size)``, normalised; sides a and b, then local sides.
        indices: ``(slots, B)`` ``int64``, the images of each pair: row 0 the anchors, then partners.
        labels: ``(slots, B)`` ``int64``, or ``(slots, B, L)`` multi-hot.
    """

    sides: tuple[tuple[Tensor, ...], ...]
    indices: Tensor
    labels: Tensor


def render(images: Tensor, params: ViewParams, backend: str = "kornia", dtype: torch.dtype = torch.float32) -> Tensor:
    """Render one view: a pure function of images and parameters, the same in both backends.

    Args:
        images: ``(B, H, W, C)``, on any device: ``uint8``, or float with values in [0, 1].
        params: from `draw_view_params`; on the images' device for `kornia`, on the host for `dali`.
        backend: ``kornia`` or ``dali``.
        dtype: of the result.

    Returns:
        ``(B, C, size, size)``, normalised by the parameters' mean and std.

    Raises:
        InputError: for an unknown backend, or images of another type.
    """
    check_choice("backend", backend, BACKENDS)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise InputError(f"images are {images.dtype}, expected uint8, or float with values in [0, 1]")
    if backend == "kornia":
        from amimv.pipelines.kornia_backend import render_kornia

        return render_kornia(images, params, dtype)
    from amimv.pipelines.dali_backend import render_dali

    return render_dali(images, params, dtype)


def render_views(
    images: Sequence[Tensor], params: Sequence[ViewParams], backend: str = "kornia", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Render each batch of images by its parameters; see `render`."""
    return tuple(render(batch, drawn, backend, dtype) for batch, drawn in zip(images, params, strict=True))


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[Tensor, ...]]:
    """`render_views` compiled; on a GPU its kernels, fixed in shape, become one CUDA graph."""
    compiled = torch.compile(render_views, mode="reduce-overhead", dynamic=False)

    def render_and_copy(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        # The graph's own memory is written again by the next batch.
        return tuple(view.clone() for view in compiled(*args, **kwargs))

    return render_and_copy


class PairLoader:
    """Batches of pairs of a store, by a recipe: ``for pair in loader`` is one epoch, and each pass the next.

    Everything random is a function of (seed, epoch, step, place in the global batch): any number of processes sees
    the same global batches, and a resumed loader goes on with the batches that it would have given. On a CPU the first
    loader lets the process keep freed memory (`keep_freed_memory`).

    Args:
        store: the images; `ImageStore.device` is where batches are made.
        recipe: from `get_recipe`; it takes on the store's mean and std.
        batch_size: global: over all processes and micro-batches.
        sampler: how anchors are drawn, one of `SAMPLERS`. All but `uniform` and `cluster-balanced` read labels.
        partner: how partners are drawn, likewise.
        backend: ``kornia`` or ``dali``.
        seed: of everything drawn here.
        epochs: length of the training, which `progressive` needs.
        beta: of `effective-number`.
        rank, world_size: this process's slice of the global batch.
        micro_batches: each step is handed out in so many parts, for gradient accumulation.
        dtype: of the views.
        compile: render through ``torch.compile``, in CUDA graphs on a GPU; for the `kornia` backend.

    Raises:
        InputError: for an unknown name, a batch larger than the store or not divisible, a class without images under
            a label-reading sampler, or a store too small for the recipe.
    """

    def __init__(
        self,
        store: ImageStore,
        recipe: Recipe,
        batch_size: int,
        sampler: str = "uniform",
        partner: str = "uniform",
        backend: str = "kornia",
        seed: int = 0,
        *,
        epochs: int = 1,
        beta: float = 0.999,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("sampler", partner, SAMPLERS)
        check_choice("backend", backend, BACKENDS)
        if not 1 <= batch_size <= len(store):
            raise InputError(
                f"batch size is {batch_size} but the data set has {len(store)} images: "
                f"give a batch size from 1 to {len(store)}"
            )
        if batch_size % (world_size * micro_batches):
            raise InputError(
                f"batch size {batch_size} does not divide by {world_size} processes x {micro_batches} micro-batches"
            )
        if recipe.slots > len(store):
            raise InputError(f"a pair needs {recipe.slots} distinct images but the data set has {len(store)}")
        for view in recipe.views:
            if (view.policy.size or 0) > store.size:
                raise InputError(
                    f"view {view.label} of {view.policy.size} pixels is larger than the images of {store.size}: "
                    "give a smaller view size, or load the data at a larger size"
                )
        if store.device.type == "cpu":
            keep_freed_memory()
        self.store = store
        self.recipe = recipe.with_statistics(store.mean, store.std)
        self.batch_size = batch_size
        self.sampler, self.partner, self.backend = sampler, partner, backend
        self.seed, self.epochs, self.beta = seed, epochs, beta
        self.rank, self.world_size, self.micro_batches = rank, world_size, micro_batches
        if compile and backend != "kornia":
            raise InputError(f"the {backend} backend cannot be compiled: use backend 'kornia', or compile=False")
        self._render_views = partial(_compiled() if compile else render_views, backend=backend, dtype=dtype)
        self.steps_per_epoch = len(store) // batch_size
        self.clusters: Tensor | None = None
        self._position = self._next = (0, 0)
        self._everything = build_groups(torch.zeros(len(store), dtype=torch.int64, device=store.device), 1)
        self._by_label = self._label_groups() if {sampler, partner} & set(LABEL_SAMPLERS) else None
        self._by_cluster: Groups | None = None
        dropped = len(store) - self.steps_per_epoch * batch_size
        if dropped:
            logger.info("each epoch leaves out %d of %d images, a last incomplete batch", dropped, len(store))

    def _label_groups(self) -> Groups:
        logger.info("sampling reads labels (anchors %s, partners %s)", self.sampler, self.partner)
        groups = build_groups(self.store.labels, self.store.n_classes)
        if 0 in groups.sizes:
            empty = groups.sizes.index(0)
            raise InputError(
                f"class {empty} ({self.store.class_names[empty]}) of {self.store.name} has no image, which a "
                "label-reading sampler needs: use the uniform sampler or a subset that keeps every class"
            )
        return groups

    def set_clusters(self, assignments: Tensor) -> None:
        """Give `cluster-balanced` its clusters; until then it samples uniformly.

        Args:
            assignments: ``(N,)`` ``int64``, from 0; takes effect with the next epoch that is begun.
        """
        if assignments.shape != (len(self.store),):
            raise InputError(
                f"cluster assignments have shape {tuple(assignments.shape)}, expected ({len(self.store)},)"
            )
        self.clusters = assignments.to(self.store.device)
        self._by_cluster = build_groups(self.clusters, int(self.clusters.max()) + 1)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and step to go on from (of the batches handed out), and the clusters."""
        epoch, step = self._position
        return {"epoch": epoch, "step": step, "clusters": self.clusters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`: the next pass begins with the first batch that had not been handed out."""
        self._position = self._next = (state["epoch"], state["step"])
        if state["clusters"] is not None:
            self.set_clusters(state["clusters"])

    def _sampled(self, sampler: str, epoch: int) -> tuple[Groups, list[float]]:
        groups = self._everything
        if sampler in LABEL_SAMPLERS and self._by_label is not None:
            groups = self._by_label
        elif sampler == "cluster-balanced" and self._by_cluster is not None:
            groups = self._by_cluster
        progress = epoch / max(1, self.epochs - 1)
        return groups, group_weights(groups.sizes, sampler, beta=self.beta, progress=min(1.0, progress))

    def epoch_indices(self, epoch: int) -> Tensor:
        """The global batches of an epoch, ``(slots, steps, batch_size)`` ``int64``, on the device."""
        anchors = draw_anchors(
            *self._sampled(self.sampler, epoch), self.steps_per_epoch, self.batch_size, self.seed, epoch
        )
        partners = self.recipe.slots - 1
        if not partners:
            return anchors.unsqueeze(0)
        drawn = draw_partners(*self._sampled(self.partner, epoch), anchors, partners, self.seed, epoch)
        return torch.cat([anchors.unsqueeze(0), drawn])

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.steps_per_epoch * self.micro_batches

    def __iter__(self) -> Iterator[PairBatch]:
        """The next epoch: the one after that begun last, or the rest of the one that a loaded state stands in."""
        return self.epoch(*self._next)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[PairBatch]:
        """This process's batches of an epoch, from a step on; ``micro_batches`` of them make one step."""
        self._next = (epoch + 1, 0)
        micro = self.batch_size // (self.world_size * self.micro_batches)
        # (slots, steps, micro-batches, this rank's share): the ranks' shares of a micro-batch lie side by side.
        indices = self.epoch_indices(epoch).unflatten(2, (self.micro_batches, self.world_size, micro))
        shares = indices[:, start_step:, :, self.rank].flatten(1, 2)
        wanted = shares.transpose(0, 1).contiguous()  # (batches, slots, B)
        batches = zip(wanted, self.store.stream(wanted), self.draw_epoch(epoch, start_step), strict=True)
        for i, (asked, images, params) in enumerate(batches, 1):
            rendered = self._render_views([images[view.slot] for view in self.recipe.views], params)
            if i % self.micro_batches == 0:
                step = start_step + i // self.micro_batches
                self._position = (epoch, step) if step < self.steps_per_epoch else (epoch + 1, 0)
            views = dict(zip(self.recipe.views, rendered, strict=True))
            sides = tuple(tuple(views[view] for view in side) for side in self.recipe.sides)
            yield PairBatch(sides, asked, self.store.labels[asked])

    def draw_epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[ViewParams, ...]]:
        """The parameters of each distinct view, batch by batch."""
        # DALI takes a view's parameters on the host, where the generator gives the same numbers.
        device = torch.device("cpu") if self.backend == "dali" else self.store.device
        share = self.batch_size // (self.world_size * self.micro_batches)
        starts = (torch.arange(self.micro_batches, device=device) * self.world_size + self.rank) * share
        places = (starts[:, None] + torch.arange(share, device=device)).flatten()
        ahead = max(1, DRAWN_TOGETHER // len(places))
        for first in range(start_step, self.steps_per_epoch, ahead):
            steps = torch.arange(first, min(first + ahead, self.steps_per_epoch), device=device)
            positions, at = places.repeat(len(steps)), steps.repeat_interleave(len(places))
            drawn = []
            for view in self.recipe.views:
                key = Key(self.seed, view.stream, epoch, at)
                params = draw_view_params(view.policy, positions, key)
                drawn.append(params.split([share] * len(steps) * self.micro_batches))
            yield from zip(*drawn, strict=True)
