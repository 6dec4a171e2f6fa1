"""Views: a batch of images to the sides of a loss, as a module for any training loop; and `render`, beneath it."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amimv import InputError, check_choice
from amimv.pipelines.images import select_images
from amimv.pipelines.names import BACKENDS
from amimv.pipelines.params import ViewParams, draw_view_params
from amimv.pipelines.recipes import Recipe, get_recipe
from amimv.pipelines.rng import Key, Stream, permutation

#: Samples whose view parameters are drawn together: a draw is some seventy small operations, however many it is for.
DRAWN_TOGETHER = 2**14

Sides = tuple[tuple[Tensor, ...], ...]


def render(images: Tensor, params: ViewParams, backend: str = "kornia", dtype: torch.dtype = torch.float32) -> Tensor:
    """Render one view: a pure function of images and parameters, the same in both backends.

    Args:
        images: ``(B, H, W, C)``, on any device: ``uint8``, ``uint16``, or float with values in [0, 1].
        params: from `draw_view_params`; on the images' device for `kornia`, on the host for `dali`.
        backend: ``kornia`` or ``dali``.
        dtype: of the result.

    Returns:
        ``(B, C, size, size)``, normalised by the parameters' mean and std.

    Raises:
        InputError: for an unknown backend, images of another type, or an operation that the backend has not.
    """
    check_choice("backend", backend, BACKENDS)
    if images.dtype not in (torch.uint8, torch.uint16) and not images.is_floating_point():
        raise InputError(f"images are {images.dtype}, expected uint8, uint16, or float with values in [0, 1]")
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


class PairViews(nn.Module):
    """The views of a batch of pairs: ``a, b = views(images)``, each side a tuple of views ``(B, C, size, size)``.

    Every view is a function of (seed, step, place in the batch): the step is a buffer that counts the calls in
    training mode and is saved with the module's state, or an argument. On the device of the images, without waiting
    for it, whatever autocast says; it has no parameters, and no gradient flows to the images.

    Args:
        recipe: a name (``amimv``), a text (``N(x)+A(y) | A(x)+N(y)``) or a `Recipe`; see `get_recipe`.
        mean, std: of the data set, per channel, in units of [0, 1]; may be left out where the recipe has them.
        size: height and width of the views, in pixels; None keeps those of the images, or of a `Recipe`.
        seed: of everything drawn here.
        rank: whose places in the global batch these are; None asks torch.distributed, so that ranks differ.
        channels_last: whether images are ``(B, H, W, C)``; None tells by which of the two axes has as many entries
            as ``mean``, ``(B, C, H, W)`` where both have.
        value_range: what becomes 0 and 1; None: that of the images' type, (0, 255), (0, 65535) or, of floats, (0, 1).
        backend: ``kornia`` or ``dali``, which is given the step as an argument.
        dtype: of the views.
        compile: render through ``torch.compile``, in CUDA graphs on a GPU; for the `kornia` backend.

    Raises:
        InputError: for a recipe that cannot be read, or without mean and std.
    """

    step: Tensor

    def __init__(
        self,
        recipe: str | Recipe = "amimv",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | None = None,
        *,
        seed: int = 0,
        rank: int | None = None,
        channels_last: bool | None = None,
        value_range: tuple[float, float] | None = None,
        backend: str = "kornia",
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        if size is not None and not isinstance(recipe, str):
            raise InputError("size is given for a Recipe, whose policies have theirs: leave it out")
        bound = get_recipe(recipe, size=size) if isinstance(recipe, str) else recipe
        if compile and backend != "kornia":
            raise InputError(f"the {backend} backend cannot be compiled: use backend 'kornia', or compile=False")
        if mean is not None and std is not None:
            if len(mean) != len(std) or not all(0 < value < math.inf for value in std):
                raise InputError(f"mean is {mean} and std {std}, expected one of each per channel, std above 0")
            bound = bound.with_statistics(tuple(mean), tuple(std), value_range)
        self.channels = len(bound.views[0].policy.statistics[0])
        self.recipe, self.seed, self.rank = bound, seed, rank
        self.channels_last, self.backend = channels_last, backend
        self._render_views = partial(_compiled() if compile else render_views, backend=backend, dtype=dtype)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"{self.recipe.name!r}, channels={self.channels}, seed={self.seed}, backend={self.backend!r}"

    @torch.no_grad()
    def forward(self, *images: Tensor, step: Tensor | int | None = None) -> Sides:
        """Render the sides.

        Args:
            images: one batch for each slot of the recipe, or one batch for all: then partners are taken from the
                batch, anew in each step, no image its own partner and the partners of one distinct.
                ``(B, C, H, W)`` or ``(B, H, W, C)``, ``uint8``, ``uint16`` or float, of the range that becomes [0, 1].
            step: instead of the module's own count.

        Raises:
            InputError: images of another number, shape or type, or too few for partners in the batch.
        """
        at = self.step if step is None else step
        slots = self._slots([self._channels_behind(batch) for batch in images], at)
        sides = self.sides(slots, self.draw(slots[0], at))
        if step is None and self.training:
            self.step += 1
        return sides

    def _channels_behind(self, images: Tensor) -> Tensor:
        """As ``(B, H, W, C)``, without a copy."""
        if not isinstance(images, Tensor):
            raise InputError(f"images are a {type(images).__name__}, expected a tensor")
        last = self.channels_last
        if images.ndim == 4 and last is None:
            last = images.shape[1] != self.channels
        if images.ndim != 4 or images.shape[3 if last else 1] != self.channels:
            raise InputError(
                f"images are {tuple(images.shape)}, expected (B, C, H, W) or (B, H, W, C) with the {self.channels} "
                "channels of mean and std"
            )
        return images if last else images.permute(0, 2, 3, 1)

    def _slots(self, images: list[Tensor], step: Tensor | int) -> list[Tensor]:
        """One batch for each slot."""
        wanted, given = self.recipe.slots, len(images)
        if len(shapes := {batch.shape for batch in images}) > 1:
            raise InputError(f"the batches of images differ: {', '.join(str(tuple(shape)) for shape in shapes)}")
        if given == wanted:
            return images
        if given != 1:
            raise InputError(f"recipe '{self.recipe.name}' takes {wanted} batches of images, or one; got {given}")
        size = len(images[0])
        if size < wanted:
            raise InputError(f"a pair needs {wanted} distinct images, but the batch has {size}")
        order = permutation(Key(self.seed, Stream.PARTNER, 0, step), size, images[0].device)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(size, device=order.device))
        partners = [select_images(images[0], order[(place + k) % size]) for k in range(1, wanted)]
        return [images[0], *partners]

    def draw(self, images: Tensor, step: Tensor | int) -> tuple[ViewParams, ...]:
        """The parameters of each distinct view of a batch, ``(B, H, W, C)``, of one step."""
        device = torch.device("cpu") if self.backend == "dali" else images.device
        rank = self.rank
        if rank is None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        places = torch.arange(len(images), device=device) + rank * len(images)
        aspect = images.shape[2] / images.shape[1]
        keys = (Key(self.seed, view.stream, 0, step) for view in self.recipe.views)
        drawn = zip(self.recipe.views, keys, strict=True)
        return tuple(draw_view_params(view.policy, places, key, aspect) for view, key in drawn)

    def sides(self, slots: Sequence[Tensor], params: Sequence[ViewParams]) -> Sides:
        """The sides from one batch of images ``(B, H, W, C)`` for each slot and the parameters of each view."""
        rendered = self._render_views([slots[view.slot] for view in self.recipe.views], params)
        views = dict(zip(self.recipe.views, rendered, strict=True))
        return tuple(tuple(views[view] for view in side) for side in self.recipe.sides)


def draw_steps(
    recipe: Recipe, places: Tensor, steps: range, seed: int, epoch: int, aspect: float = 1.0
) -> Iterator[tuple[ViewParams, ...]]:
    """The parameters of each distinct view, batch by batch, drawn for many steps at once.

    Args:
        recipe: with the data set's statistics.
        places: ``(M, B)`` ``int64``, the places in the global batch of each of the M batches of a step.
        steps: which steps of the epoch.
        seed, epoch: of the numbers.
        aspect: width / height of the images.

    Yields:
        M times for every step, the parameters of B samples for each of ``recipe.views``.
    """
    ahead = max(1, DRAWN_TOGETHER // places.numel())
    for first in steps[::ahead]:
        at = torch.arange(first, min(first + ahead, steps.stop), device=places.device)
        positions, by_sample = places.flatten().repeat(len(at)), at.repeat_interleave(places.numel())
        drawn = []
        for view in recipe.views:
            params = draw_view_params(view.policy, positions, Key(seed, view.stream, epoch, by_sample), aspect)
            drawn.append(params.split([places.shape[1]] * len(at) * len(places)))
        yield from zip(*drawn, strict=True)
