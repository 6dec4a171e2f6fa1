"""Pair loader: the same global batches however they are split, resumed, stored or rendered; every bad input."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from amimv import InputError
from amimv.pipelines import kornia_backend, operations
from amimv.pipelines import views as views_module
from amimv.pipelines.images import HostImages, ResidentImages
from amimv.pipelines.loader import PairBatch, PairLoader
from amimv.pipelines.names import SAMPLERS
from amimv.pipelines.params import ViewParams, draw_view_params
from amimv.pipelines.policy import ViewPolicy
from amimv.pipelines.recipes import HARD, RECIPES, Recipe, View, get_recipe
from amimv.pipelines.rng import Key, Stream
from amimv.pipelines.store import ImageStore
from amimv.pipelines.views import render
from amimv.tools.throughput.measure import held_memory

SIZE = 16
COUNTS = (24, 14, 9, 3)
CLUSTERS = torch.arange(sum(COUNTS)) % 7 // 3


def build_store(channels: int = 3, multi_label: bool = False, counts: tuple[int, ...] = COUNTS) -> ImageStore:
    """Noise, in classes of these sizes."""
    generator = torch.Generator().manual_seed(channels)
    n = sum(counts)
    images = torch.randint(0, 256, (n, SIZE, SIZE, channels), dtype=torch.uint8, generator=generator)
    labels = torch.repeat_interleave(torch.tensor(counts))[torch.randperm(n, generator=generator)]
    if multi_label:
        labels = (torch.rand(n, len(counts), generator=generator) < 0.3).long()
    names = tuple(f"class {c}" for c in range(len(counts)))
    return ImageStore.from_arrays(images, labels, name="noise", class_names=names)


def on_host(store: ImageStore) -> ImageStore:
    """The same images, not on the device."""
    return replace(store, images=HostImages(store.images.tensor, store.device))


def moved_to(store: ImageStore, device: torch.device) -> ImageStore:
    images = ResidentImages(store.images.tensor.to(device))
    return replace(store, images=images, labels=store.labels.to(device), device=device)


def build_loader(
    store: ImageStore | None = None, name: str = "mimv", batch_size: int = 12, **settings: Any
) -> PairLoader:
    loader = PairLoader(store or build_store(), get_recipe(name), batch_size, **settings)
    if len(loader.store) == len(CLUSTERS):
        loader.set_clusters(CLUSTERS)
    return loader


def flat(batch: PairBatch) -> list[Tensor]:
    """Everything a batch holds."""
    return [*(view for side in batch.sides for view in side), batch.indices, batch.labels]


def assert_equal(got: list[PairBatch], expected: list[PairBatch]) -> None:
    """To the last bit."""
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def joined(parts: list[PairBatch]) -> PairBatch:
    """Parts of a batch side by side."""
    sides = tuple(
        tuple(torch.cat(views) for views in zip(*(p.sides[s] for p in parts), strict=True))
        for s in range(len(parts[0].sides))
    )
    return PairBatch(sides, torch.cat([p.indices for p in parts], dim=1), torch.cat([p.labels for p in parts], dim=1))


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_shapes_and_dtypes(name: str, channels: int, multi_label: bool) -> None:
    store = build_store(channels, multi_label)
    loader = build_loader(store, name)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps_per_epoch == 4
    recipe = get_recipe(name)
    for batch in batches:
        assert [len(side) for side in batch.sides] == [len(side) for side in recipe.sides]
        for views, tensors in zip(recipe.sides, batch.sides, strict=True):
            for view, tensor in zip(views, tensors, strict=True):
                size = view.policy.size or SIZE
                assert tensor.shape == (12, channels, size, size)
                assert tensor.dtype == torch.float32
                assert tensor.is_contiguous()
                assert tensor.isfinite().all()
        assert batch.indices.shape == (recipe.slots, 12)
        assert batch.indices.dtype == batch.labels.dtype == torch.int64
        assert batch.labels.shape == (recipe.slots, 12, *store.labels.shape[1:])
        assert torch.equal(batch.labels, store.labels[batch.indices])


def test_views_in_bfloat16() -> None:
    exact, rounded = (next(build_loader(dtype=dtype).epoch(0)) for dtype in (torch.float32, torch.bfloat16))
    for side, rounded_side in zip(exact.sides, rounded.sides, strict=True):
        for view, rounded_view in zip(side, rounded_side, strict=True):
            assert torch.equal(view.bfloat16(), rounded_view)


@pytest.mark.parametrize("name", ["two-view", "amimv"])
def test_views_do_not_depend_on_the_callers_autocast(name: str) -> None:
    plain = next(build_loader(name=name).epoch(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = next(build_loader(name=name).epoch(0))
    assert_equal([inside], [plain])


def test_indices_of_an_epoch() -> None:
    loader = build_loader()
    indices = loader.sampler.epoch_indices(3)
    assert indices.shape == (2, 4, 12)
    assert len(indices[0].unique()) == 48  # a permutation without its remainder
    assert (indices[0] != indices[1]).all()
    assert torch.equal(torch.stack([batch.indices for batch in loader.epoch(3)], dim=1), indices)
    assert not torch.equal(indices, loader.sampler.epoch_indices(4))
    assert not torch.equal(indices, build_loader(seed=1).sampler.epoch_indices(3))


def test_sampler_and_partner_are_independent_settings() -> None:
    store = build_store(counts=(560, 30, 10))
    for slot, samplers in enumerate((("class-balanced", "uniform"), ("uniform", "class-balanced"))):
        labels = store.labels[PairLoader(store, get_recipe("mimv"), 600, *samplers).sampler.epoch_indices(0)[:, 0]]
        rare = [(labels[s] != 0).float().mean() for s in (slot, 1 - slot)]
        assert rare[0] == pytest.approx(2 / 3, abs=0.1)
        assert rare[1] < 0.15


def test_progressive_follows_the_epochs() -> None:
    store = build_store(counts=(900, 100))
    loader = PairLoader(store, get_recipe("two-view"), 1000, "progressive", epochs=5)
    share = [(store.labels[loader.sampler.epoch_indices(epoch)] == 1).float().mean().item() for epoch in range(5)]
    assert share == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=0.06)
    assert torch.equal(
        PairLoader(store, get_recipe("two-view"), 1000, "progressive", epochs=5).sampler.epoch_indices(4),
        PairLoader(store, get_recipe("two-view"), 1000, "class-balanced").sampler.epoch_indices(4),
    )


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_global_batches_do_not_depend_on_how_they_are_split(sampler: str, multi_label: bool) -> None:
    store = build_store(multi_label=multi_label)
    settings: dict[str, Any] = {"sampler": sampler, "partner": sampler, "seed": 4}
    whole = list(build_loader(store, "amimv-views", **settings).epoch(1))
    for world, micro in ((2, 1), (1, 2), (2, 3)):
        ranks = [
            list(
                build_loader(store, "amimv-views", rank=rank, world_size=world, micro_batches=micro, **settings).epoch(
                    1
                )
            )
            for rank in range(world)
        ]
        assert all(len(parts) == 4 * micro for parts in ranks)
        in_order = [parts[i] for i in range(4 * micro) for parts in ranks]
        step = world * micro
        assert_equal([joined(in_order[i : i + step]) for i in range(0, len(in_order), step)], whole)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("start", [1, 3])
def test_a_later_start_gives_the_tail(start: int, micro: int) -> None:
    settings: dict[str, Any] = {"sampler": "class-balanced", "partner": "square-root", "micro_batches": micro}
    whole = list(build_loader(**settings).epoch(2))
    assert_equal(list(build_loader(**settings).epoch(2, start_step=start)), whole[start * micro :])


@pytest.mark.parametrize("resident", [True, False])
def test_a_start_at_the_end_gives_nothing(resident: bool) -> None:
    assert list(build_loader(build_store() if resident else on_host(build_store())).epoch(0, start_step=4)) == []


def test_epochs_steps_and_views_draw_differently() -> None:
    recipe = Recipe("own", ((View(0, HARD), View(0, HARD, 1)), (View(0, HARD, 2),)))
    store = build_store()
    # All images alike: only the drawn numbers differ.
    same = replace(store, images=ResidentImages(store.images.tensor[:1].expand(len(store), -1, -1, -1).contiguous()))
    loader = PairLoader(same, recipe, 12)
    views = [view for e in range(2) for batch in loader.epoch(e) for side in batch.sides for view in side]
    rows = torch.cat(views).flatten(1)
    assert len(rows) == 2 * 4 * 3 * 12
    assert len(rows.unique(dim=0)) == len(rows)
    other = next(PairLoader(same, recipe, 12, seed=1).epoch(0))
    assert not (other.sides[0][0] == views[0]).flatten(1).all(1).any()


def test_state_counts_the_steps_handed_out() -> None:
    loader = build_loader(micro_batches=2)
    loader.load_state_dict({"epoch": 0, "step": 0, "clusters": None})
    seen = []
    for epoch in range(2):
        for _ in loader.epoch(epoch):
            state = loader.state_dict()
            seen.append((state["epoch"], state["step"]))
    expected = [(0, 0), (0, 1), (0, 1), (0, 2), (0, 2), (0, 3), (0, 3), (1, 0)]
    expected += [(1, 0), (1, 1), (1, 1), (1, 2), (1, 2), (1, 3), (1, 3), (2, 0)]
    assert seen == expected


def test_a_resumed_loader_goes_on_with_its_clusters() -> None:
    settings: dict[str, Any] = {"sampler": "cluster-balanced", "partner": "cluster-balanced"}
    first = PairLoader(build_store(), get_recipe("mimv"), 12, **settings)
    first.set_clusters(CLUSTERS)
    whole = list(first.epoch(5))
    running = first.epoch(5)
    for _ in range(2):
        next(running)
    state = first.state_dict()
    assert (state["epoch"], state["step"]) == (5, 2)
    resumed = PairLoader(build_store(), get_recipe("mimv"), 12, **settings)
    resumed.load_state_dict(state)
    after = resumed.state_dict()
    assert (after["epoch"], after["step"]) == (5, 2)
    assert torch.equal(after["clusters"], CLUSTERS)
    assert_equal(list(resumed.epoch(after["epoch"], after["step"])), whole[2:])


def test_each_pass_is_the_next_epoch() -> None:
    loader = build_loader(micro_batches=2)
    assert len(loader) == 8
    for epoch in range(3):
        assert_equal(list(loader), list(build_loader(micro_batches=2).epoch(epoch)))
    next(iter(loader))  # a pass that is left early is over, too
    assert_equal(list(loader), list(build_loader(micro_batches=2).epoch(4)))


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 3), (2, 1), (2, 4)])
def test_a_loaded_state_is_gone_on_from(epoch: int, step: int) -> None:
    first = build_loader(sampler="class-balanced")
    running = first.epoch(epoch)
    for _ in range(step):
        next(running)
    resumed = build_loader(sampler="class-balanced")
    resumed.load_state_dict({"epoch": epoch, "step": step, "clusters": None} if not step else first.state_dict())
    whole = build_loader(sampler="class-balanced")
    if step < len(whole):
        assert_equal(list(resumed), list(whole.epoch(epoch))[step:])
    assert_equal(list(resumed), list(whole.epoch(epoch + 1)))


def test_a_state_without_clusters() -> None:
    loader = PairLoader(build_store(), get_recipe("mimv"), 12, "cluster-balanced")
    resumed = PairLoader(build_store(), get_recipe("mimv"), 12, "cluster-balanced")
    resumed.load_state_dict(loader.state_dict())
    assert resumed.sampler.clusters is None
    assert torch.equal(resumed.sampler.epoch_indices(0), loader.sampler.epoch_indices(0))


def test_clusters_take_effect_with_the_next_epoch() -> None:
    clusters = (torch.arange(50) > 0).long()  # one image alone: half of the draws are that one
    loader = PairLoader(build_store(), get_recipe("mimv"), 10, "cluster-balanced", "cluster-balanced")
    uniform = PairLoader(build_store(), get_recipe("mimv"), 10)
    assert torch.equal(loader.sampler.epoch_indices(0), uniform.sampler.epoch_indices(0))
    running = loader.epoch(0)
    begun = [next(running)]
    loader.set_clusters(clusters)
    assert_equal(begun + list(running), list(uniform.epoch(0)))
    indices = torch.stack([batch.indices for batch in loader.epoch(1)])
    assert 10 < (indices[:, 0] == 0).sum() < 40
    assert not torch.equal(loader.sampler.epoch_indices(1), uniform.sampler.epoch_indices(1))


def test_a_store_that_is_not_resident_gives_the_same_batches() -> None:
    store = build_store()
    for micro in (1, 2):
        batches = list(build_loader(on_host(store), micro_batches=micro).epoch(0, start_step=1))
        assert_equal(batches, list(build_loader(store, micro_batches=micro).epoch(0, start_step=1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_normalised_view_is_the_image(channels: int) -> None:
    store = build_store(channels)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (store.mean, store.std))
    for batch in build_loader(store, "mimv").epoch(0):
        for slot, view in ((0, batch.sides[0][0]), (1, batch.sides[1][1])):
            pixels = store.images.tensor[batch.indices[slot]].permute(0, 3, 1, 2).double() / 255
            torch.testing.assert_close(view.double(), (pixels - mean) / std, rtol=0, atol=2e-6)


def test_a_view_used_twice_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return render(*args, **kwargs)

    monkeypatch.setattr(views_module, "render", counted)
    whole, hard = View(0, ViewPolicy(), label="N(x)"), View(1, HARD, label="A(y)")
    recipe = Recipe("own", ((whole, hard), (View(0, ViewPolicy(), label="again"), View(0, HARD)), (hard,)))
    batch = next(PairLoader(build_store(), recipe, 12).epoch(0))
    assert len(calls) == 3
    assert batch.sides[0][0] is batch.sides[1][0]
    assert batch.sides[0][1] is batch.sides[2][0]
    for name, views in (("two-view", 2), ("multi-crop", 8), ("mimv", 4), ("amimv-views", 5)):
        calls.clear()
        next(build_loader(name=name).epoch(0))
        assert len(calls) == views


@pytest.mark.parametrize("channels", [1, 3])
def test_dali_gives_the_same_batches(channels: int) -> None:
    pytest.importorskip("nvidia.dali.experimental.dynamic", reason="nvidia.dali is not installed")
    store = build_store(channels)
    for name in ("amimv-views", "multi-crop"):
        kornia = list(build_loader(store, name, backend="kornia").epoch(0))
        dali = list(build_loader(store, name, backend="dali").epoch(0))
        assert len(dali) == len(kornia)
        for a, b in zip(kornia, dali, strict=True):
            for x, y in zip(flat(a), flat(b), strict=True):
                assert x.dtype == y.dtype
                torch.testing.assert_close(x, y, rtol=0, atol=3e-3)


class NoWaiting(TorchDispatchMode):
    """Refuses the operations that make the host wait for a device: reading a value, and sizes that depend on one."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        assert not name.startswith(self.WAITING), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def refuse(name: str) -> Callable[..., None]:
    def raising(*_: Any, **__: Any) -> None:
        raise AssertionError(f"Tensor.{name} on the hot path")

    return raising


@pytest.mark.parametrize("name", RECIPES)
def test_no_step_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kornia_backend, *vars(operations).values()):
        if hasattr(module, "on_host"):
            monkeypatch.setattr(module, "on_host", lambda images: False)  # as on a GPU
    loader = build_loader(name=name, sampler="class-balanced", partner="effective-number", micro_batches=2)
    running: Iterator[PairBatch] = loader.epoch(0)
    next(running)
    with monkeypatch.context() as patch, NoWaiting():
        for method in ("item", "cpu", "numpy", "tolist", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, method, refuse(method))
        batches = list(running)
    assert len(batches) == 7


def bad_loader(**settings: Any) -> PairLoader:
    defaults: dict[str, Any] = {"store": build_store(), "recipe": get_recipe("mimv"), "batch_size": 10}
    return PairLoader(**{**defaults, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 51}, "batch size is 51 but the data set has 50 images: give a batch size from 1 to 50"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"world_size": 3}, "batch size 10 does not divide by 3 processes x 1 micro-batches"),
        ({"world_size": 2, "micro_batches": 2}, "batch size 10 does not divide by 2 processes x 2 micro-batches"),
        ({"sampler": "clas-balanced"}, "unknown sampler 'clas-balanced': did you mean class-balanced"),
        ({"partner": "unifrom"}, "unknown partner sampler 'unifrom': did you mean uniform"),
        ({"backend": "pil"}, "unknown backend 'pil': choose from kornia, dali"),
        ({"recipe": get_recipe("mimv", hard=replace(HARD, size=32))}, r"view N\(x\) of 32 pixels is larger than"),
        ({"recipe": get_recipe("multi-crop", local=replace(HARD, size=17))}, r"view L1\(x\) of 17 pixels is larger"),
        (
            {"store": build_store(counts=(2,)), "recipe": get_recipe("mimv", partners=2), "batch_size": 2},
            "a pair needs 3",
        ),
        ({"sampler": "effective-number", "beta": 1.0}, "beta is 1.0"),
    ],
)
def test_bad_settings_end_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        bad_loader(**settings).sampler.epoch_indices(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("which", ["sampler", "partner"])
@pytest.mark.parametrize("sampler", ["class-balanced", "square-root", "effective-number", "progressive"])
def test_a_class_without_image_needs_the_uniform_sampler(sampler: str, which: str) -> None:
    store = build_store(counts=(12, 0, 8))
    with pytest.raises(
        InputError, match=f"class 1 has no image, which the label-reading sampler {sampler} needs: use the uniform"
    ) as error:
        bad_loader(store=store, **{which: sampler})
    assert "\n" not in str(error.value)
    bad_loader(store=store, **{which: "cluster-balanced"})


@pytest.mark.parametrize("shape", [(49,), (51,), (50, 1), ()])
def test_clusters_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"cluster assignments have shape .*, expected \(50,\)") as error:
        build_loader().set_clusters(torch.zeros(shape, dtype=torch.int64))
    assert "\n" not in str(error.value)


def test_an_unknown_backend_of_render() -> None:
    batch = build_store().images.tensor[:2]
    with pytest.raises(InputError, match="unknown backend 'pil': choose from kornia, dali"):
        render(batch, ViewParams(None, (0.5,) * 3, (0.5,) * 3), backend="pil")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_pairs_on_cuda(sampler: str) -> None:
    store = build_store()
    device = torch.device("cuda", 0)
    on_cuda = moved_to(store, device)
    pinned = replace(on_cuda, images=HostImages(store.images.tensor.pin_memory(), device))
    expected = list(build_loader(store, sampler=sampler, partner=sampler).epoch(1))
    for moved in (on_cuda, pinned):
        got = list(build_loader(moved, sampler=sampler, partner=sampler).epoch(1))
        for a, b in zip(got, expected, strict=True):
            assert a.indices.is_cuda
            assert torch.equal(a.indices.cpu(), b.indices)
            assert torch.equal(a.labels.cpu(), b.labels)
            for view, other in zip(flat(a)[:-2], flat(b)[:-2], strict=True):
                torch.testing.assert_close(view.cpu(), other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("together", [1, 12, 30, 10**6])
@pytest.mark.parametrize(("micro", "rank", "world"), [(1, 0, 1), (2, 1, 3)])
def test_views_are_those_of_one_draw_per_step(
    together: int, micro: int, rank: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many steps are drawn together; by a loop over steps and micro-batches with the public functions."""
    monkeypatch.setattr(views_module, "DRAWN_TOGETHER", together)
    split: dict[str, Any] = {"micro_batches": micro, "rank": rank, "world_size": world}
    loader = build_loader(name="amimv-views", seed=5, **split)
    share = 12 // (micro * world)
    everything = build_loader(name="amimv-views", seed=5).sampler.epoch_indices(3)
    batches = iter(loader.epoch(3, 1))
    for step in range(1, loader.steps_per_epoch):
        for m in range(micro):
            place = (m * world + rank) * share
            positions = torch.arange(place, place + share)
            batch = next(batches)
            assert torch.equal(batch.indices, everything[:, step, place : place + share])
            for side, views in zip(batch.sides, loader.recipe.sides, strict=True):
                for got, view in zip(side, views, strict=True):
                    key = Key(5, Stream.VIEW + 16 * view.slot + view.draw, 3, step)
                    images = loader.store.gather(batch.indices[view.slot])
                    assert torch.equal(got, render(images, draw_view_params(view.policy, positions, key)))
    assert next(batches, None) is None


def test_an_abandoned_epoch_closes_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def stream(store: ImageStore, parts: Tensor) -> Iterator[Tensor]:
        try:
            yield from map(store.gather, parts.unbind(0))
        finally:
            closed.append(True)

    monkeypatch.setattr(ImageStore, "stream", stream)
    epoch = build_loader().epoch(0)
    next(epoch)
    assert not closed
    epoch.close()  # type: ignore[attr-defined]
    assert closed


def test_memory_is_flat_over_two_hundred_epochs() -> None:
    """After the first twenty, by what the process has resident."""
    loader = build_loader(build_store(counts=(300, 80, 20)), batch_size=128)

    def run_and_weigh(epochs: range) -> float:
        for epoch in epochs:
            for _ in loader.epoch(epoch):
                pass
        return held_memory(torch.device("cpu"))

    before = run_and_weigh(range(20))
    grown = run_and_weigh(range(20, 200)) - before
    batch = 4 * 128 * 3 * SIZE**2 * 4 / 2**20  # MiB: a batch kept every tenth epoch would be nine times the bound
    assert grown < 2 * batch


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_a_compiled_loader_gives_the_same_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To rounding; and a batch that is kept is not written over by the next one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = list(build_loader(name="amimv", compile=True).epoch(0))
    eager = list(build_loader(name="amimv").epoch(0))
    for a, b in zip(compiled, eager, strict=True):
        for x, y in zip(flat(a), flat(b), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


def test_dali_cannot_be_compiled() -> None:
    with pytest.raises(InputError, match="the dali backend cannot be compiled"):
        build_loader(backend="dali", compile=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_compiled_loader_on_cuda() -> None:
    """CUDA graphs: the same views as without, and a batch that is kept is not written over by the next one."""
    store = build_store()
    moved = moved_to(store, torch.device("cuda", 0))
    compiled = list(build_loader(moved, name="amimv", compile=True).epoch(0))
    eager = list(build_loader(moved, name="amimv").epoch(0))
    for a, b in zip(compiled, eager, strict=True):
        for x, y in zip(flat(a), flat(b), strict=True):
            torch.testing.assert_close(x, y, atol=1e-3, rtol=0)
