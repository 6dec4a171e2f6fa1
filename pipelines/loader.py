"""The pair loader: a sampler, a store and views, composed; batches of pairs, made on the device."""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.heap import keep_freed_memory
from amimv.pipelines.pair_sampler import PairSampler
from amimv.pipelines.params import ViewParams
from amimv.pipelines.recipes import Recipe, get_recipe
from amimv.pipelines.store import ImageStore
from amimv.pipelines.views import PairViews, Sides, draw_steps

logger = logging.getLogger("amimv")


class PairBatch(NamedTuple):
    """One batch of pairs, on the device.

    Attributes:
        sides: per side its views, each ``(B, C, size, size)``, normalised; sides a and b, then local sides.
        indices: ``(slots, B)`` ``int64``, the images of each pair: row 0 the anchors, then partners.
        labels: ``(slots, B)`` ``int64``, or ``(slots, B, L)`` multi-hot; None of a store without any.
    """

    sides: Sides
    indices: Tensor
    labels: Tensor | None


class PairLoader:
    """Batches of pairs of a store, by a recipe: ``for pair in loader`` is one epoch, and each pass the next.

    Everything random is a function of (seed, epoch, step, place in the global batch): any number of processes sees
    the same global batches, and a resumed loader goes on with the batches that it would have given. On a CPU the first
    loader lets the process keep freed memory (`keep_freed_memory`).

    Args:
        store: the images; `ImageStore.device` is where batches are made.
        recipe: a name, a text or a `Recipe` (see `get_recipe`); it takes on the store's mean, std and range.
        batch_size: global: over all processes and micro-batches.
        sampler, partner, seed: as of `PairSampler`, as are all settings that are not named here.
        backend: ``kornia`` or ``dali``.
        dtype: of the views.
        compile: render through ``torch.compile``, in CUDA graphs on a GPU; for the `kornia` backend.

    Raises:
        InputError: as `PairSampler` and `get_recipe`, or for views larger than the images.
    """

    def __init__(
        self,
        store: ImageStore,
        recipe: str | Recipe,
        batch_size: int,
        sampler: str = "uniform",
        partner: str = "uniform",
        backend: str = "kornia",
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        **settings: Any,
    ) -> None:
        self.store = store
        chosen = get_recipe(recipe, size=store.size) if isinstance(recipe, str) else recipe
        for view in chosen.views:
            if (view.policy.size or 0) > store.size:
                raise InputError(
                    f"view {view.label} of {view.policy.size} pixels is larger than the images of {store.size}: "
                    "give a smaller view size, or load the data at a larger size"
                )
        self.recipe = chosen.with_statistics(store.mean, store.std, store.value_range)
        self.views = PairViews(self.recipe, backend=backend, dtype=dtype, compile=compile)
        self.sampler = PairSampler(
            len(store) if store.labels is None else store.labels,
            batch_size,
            sampler,
            partner,
            self.recipe.slots,
            store.groups,
            seed,
            n_classes=store.n_classes,
            device=store.device,
            **settings,
        )
        if store.device.type == "cpu":
            keep_freed_memory()
        if dropped := len(store) - self.sampler.steps_per_epoch * batch_size:
            logger.info("each epoch leaves out %d of %d images, a last incomplete batch", dropped, len(store))
        self.set_clusters, self.set_epoch = self.sampler.set_clusters, self.sampler.set_epoch
        self.state_dict, self.load_state_dict = self.sampler.state_dict, self.sampler.load_state_dict

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[PairBatch]:
        """The next epoch: the one after that begun last, or the rest of the one that a loaded state stands in."""
        return self.epoch(*self.sampler.next_pass)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[PairBatch]:
        """This process's batches of an epoch, from a step on; ``micro_batches`` of them make one step."""
        wanted = self.sampler.shares(epoch, start_step)
        # Images are read ahead of the batches that are handed out, so that these are counted on their own.
        handed_out = self.sampler.epoch(epoch, start_step, wanted)
        batches = zip(self.store.stream(wanted), self.draw_epoch(epoch, start_step), handed_out, strict=True)
        for images, params, asked in batches:
            labels = None if self.store.labels is None else self.store.labels[asked]
            yield PairBatch(self.views.sides(images.unbind(0), params), asked, labels)

    def draw_epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[ViewParams, ...]]:
        """The parameters of each distinct view, batch by batch."""
        # DALI takes a view's parameters on the host, where the generator gives the same numbers.
        device = torch.device("cpu") if self.views.backend == "dali" else self.store.device
        steps, places = range(start_step, self.steps_per_epoch), self.sampler.places(device)
        return draw_steps(self.recipe, places, steps, self.sampler.seed, epoch, self.store.aspect)
