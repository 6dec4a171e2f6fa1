"""Stores of any image array: types, shapes, ranges of values, labels or none, groups; one line for each bad input."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines import BACKENDS, ImageStore, PairBatch, PairLoader, PairViews, get_recipe
from amimv.pipelines.images import HostImages, ResidentImages
from amimv.pipelines.names import LABEL_SAMPLERS, SAMPLERS
from amimv.pipelines.sources.labels import MULTI_LABEL
from amimv.pipelines.sources.pixels import channel_statistics

N, HEIGHT, WIDTH = 24, 12, 16
KINDS = {"uint8": 255, "uint16": 65535, "float32": 1.0, "float64": 1.0, "float16": 1.0}
LABELS = np.arange(N) % 3
STORED = {"uint8": torch.uint8, "uint16": torch.uint16}


def arrays(kind: str = "uint8", channels: int | None = 3, top: float | None = None, seed: int = 0) -> np.ndarray:
    """Noise ``(N, H, W, C)``, or ``(N, H, W)`` without channels, from 0 to ``top``, by default the type's largest."""
    shape = (N, HEIGHT, WIDTH) if channels is None else (N, HEIGHT, WIDTH, channels)
    noise = np.random.default_rng(seed).random(shape) ** 1.5
    top = KINDS[kind] if top is None else top
    return (noise * top).round().astype(kind) if kind in STORED else (noise * top).astype(kind)


def refused(message: str, make: Callable[[], object], longest: int = 200) -> None:
    """One short line that matches."""
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= longest


def needs(backend: str) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali.experimental.dynamic", reason="nvidia.dali is not installed")


def views_of(batch: PairBatch) -> list[Tensor]:
    return [view for side in batch.sides for view in side]


# Types and shapes


@pytest.mark.parametrize("of", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_and_number_of_channels(kind: str, channels: int | None, of: Callable[[Any], Any]) -> None:
    images = arrays(kind, channels)
    store = ImageStore.from_arrays(of(images), name="x")
    assert store.images.shape == (N, HEIGHT, WIDTH, channels or 1)
    assert store.images.dtype == STORED.get(kind, torch.float32)
    assert (len(store), store.size, store.channels) == (N, HEIGHT, channels or 1)
    assert store.aspect == pytest.approx(WIDTH / HEIGHT)
    everything = store.gather(torch.arange(N))
    assert everything.dtype == store.images.dtype
    expected = images.astype("float32") if kind not in STORED else images
    assert np.array_equal(everything.numpy(), expected.reshape(store.images.shape))
    assert (store.labels, store.groups, store.class_names, store.task, store.n_classes) == (None, None, (), "", 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:, ::-1],
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(a.dtype.newbyteorder(">")),
        lambda a: list(a),
        lambda a: np.lib.stride_tricks.as_strided(a, a.shape, a.strides, writeable=False),
    ],
    ids=["backwards", "Fortran", "big-endian", "list", "read only"],
)
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.filterwarnings("error")
def test_arrays_however_they_lie_in_memory(kind: str, change: Callable[[Any], Any]) -> None:
    images = arrays(kind)
    store = ImageStore.from_arrays(change(images))
    assert np.array_equal(store.gather(torch.arange(N)).numpy(), np.asarray(change(images)).astype(kind))


def test_a_mapped_file(tmp_path: Any) -> None:
    np.save(tmp_path / "x.npy", arrays("uint16"))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.array_equal(ImageStore.from_arrays(mapped).gather(torch.arange(3)).numpy(), mapped[:3])


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(("kind", "size"), [("uint8", 1), ("uint16", 2), ("float64", 4)])
def test_memory_of_a_value(kind: str, size: int, resident: bool) -> None:
    store = ImageStore.from_arrays(arrays(kind), resident=resident)
    for one in (store, store.subset(torch.arange(4))):
        assert isinstance(one.images, ResidentImages if resident else HostImages)
        assert one.images.tensor.untyped_storage().nbytes() == size * len(one) * HEIGHT * WIDTH * 3
        assert one.gather(torch.arange(2)).element_size() == size


# Ranges and statistics


def in_float64(images: np.ndarray, value_range: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std per channel of what the range becomes [0, 1] of."""
    low, high = value_range
    scaled = ((images.astype(np.float64) - low) / (high - low)).clip(0, 1)
    return scaled.mean((0, 1, 2)), scaled.std((0, 1, 2))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    ("kind", "top", "declared", "used"),
    [
        ("uint8", 255, None, (0, 255)),
        ("uint8", 255, (20, 180), (20, 180)),
        ("uint16", 65535, (0, 65535), (0, 65535)),
        ("uint16", 4095, (0, 4095), (0, 4095)),  # 12 bits in 16
        ("uint16", 4095, (1000, 1400), (1000, 1400)),  # a window of CT
        ("float32", 1.0, None, (0, 1)),
        ("float64", 3000.0, (-160, 240), (-160, 240)),
    ],
)
def test_statistics_of_every_type_against_float64(
    kind: str, top: float, declared: tuple[float, float] | None, used: tuple[float, float], channels: int
) -> None:
    images = arrays(kind, channels, top)
    store = ImageStore.from_arrays(images, value_range=declared)
    mean, std = in_float64(images.astype("float32") if kind not in STORED else images, used)
    assert store.value_range == declared
    assert store.mean == pytest.approx(mean, rel=1e-9)
    assert store.std == pytest.approx(std, rel=1e-9)
    part = store.subset(torch.tensor([5, 1, 1]))
    mean, std = in_float64(images[[5, 1, 1]], used)
    assert part.value_range == declared
    assert (part.mean, part.std) == (pytest.approx(mean, rel=1e-6), pytest.approx(std, rel=1e-6))


def test_the_range_of_sixteen_bits_is_found_and_stays_that_of_the_whole() -> None:
    images = arrays("uint16", top=3000) + np.uint16(50)
    images[3, 0, 0, 1] = 49
    store = ImageStore.from_arrays(images)
    assert store.value_range == (49, images.max())
    assert store.mean == pytest.approx(in_float64(images, store.value_range)[0])
    part = store.subset(torch.tensor([7]))
    assert part.value_range == store.value_range
    assert ImageStore.from_arrays(arrays("uint8")).value_range is None
    assert ImageStore.from_arrays(arrays("float32")).value_range is None


@pytest.mark.parametrize("ends", [[0, 4095], (np.uint16(0), np.int64(4095)), torch.tensor([0, 4095])])
def test_a_range_of_other_kinds_of_number(ends: Any) -> None:
    assert ImageStore.from_arrays(arrays("uint16"), value_range=ends).value_range == (0.0, 4095.0)


@pytest.mark.parametrize("value", [0, 300, 65535])
def test_sixteen_bits_of_one_value_divide(value: int) -> None:
    store = ImageStore.from_arrays(np.full((N, 12, 12), value, np.uint16))
    assert (store.mean, store.std) == ((0.0,), (1 / 255,))
    batch = next(iter(PairLoader(store, "mimv", 4)))
    assert all(view.isfinite().all() for view in views_of(batch))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_public_statistics_take_the_range_of_the_type(kind: str) -> None:
    images = arrays(kind)
    mean, std = channel_statistics(torch.from_numpy(images))
    expected = in_float64(images, (0, KINDS[kind]))
    assert (mean, std) == (pytest.approx(expected[0], rel=1e-9), pytest.approx(expected[1], rel=1e-9))


# Views


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value_range", [(0, 4095), (1000, 1400), None])
def test_views_of_sixteen_bits_are_those_of_the_same_floats(value_range: tuple[int, int] | None, backend: str) -> None:
    needs(backend)
    images = arrays("uint16", top=4095)
    low, high = value_range or (0, images.max())
    floats = ((images.astype(np.float32) - low) / (high - low)).clip(0, 1)
    wide = ImageStore.from_arrays(images, value_range=value_range)
    stores = (wide, ImageStore.from_arrays(floats))
    for a, b in zip(*(PairLoader(store, "amimv", 8, backend=backend) for store in stores), strict=True):
        for view, other in zip(views_of(a), views_of(b), strict=True):
            torch.testing.assert_close(view, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_a_window_clamps(kind: str, backend: str) -> None:
    needs(backend)
    images = arrays(kind, 1, top=200)
    window = (50, 120)
    store = ImageStore.from_arrays(images, value_range=window)
    batch = next(iter(PairLoader(store, "mimv", 8, backend=backend)))
    scaled = ((images.astype(np.float64) - 50) / 70).clip(0, 1)
    expected = torch.from_numpy((scaled - store.mean) / store.std)[batch.indices[0], :, 2:14].permute(0, 3, 1, 2)
    assert (scaled == 0).any()
    assert (scaled == 1).any()
    torch.testing.assert_close(batch.sides[0][0].double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_channels_is_augmented_alike_in_both_backends(channels: int, backend: str) -> None:
    needs(backend)
    store = ImageStore.from_arrays(arrays("uint16", channels, top=4095))
    for got, expected in zip(
        PairLoader(store, "amimv", 8, backend=backend), PairLoader(store, "amimv", 8), strict=True
    ):
        for view, other in zip(views_of(got), views_of(expected), strict=True):
            assert view.shape == (8, channels, HEIGHT, HEIGHT)
            torch.testing.assert_close(view, other, rtol=0, atol=3e-3)


@pytest.mark.parametrize("recipe", ["amimv", "multi-crop"])
@pytest.mark.parametrize("kind", KINDS)
def test_resident_and_host_images_give_the_same_batches(kind: str, recipe: str) -> None:
    stores = [ImageStore.from_arrays(arrays(kind), LABELS, resident=resident) for resident in (True, False)]
    for a, b in zip(*(PairLoader(store, recipe, 8, micro_batches=2) for store in stores), strict=True):
        assert torch.equal(a.indices, b.indices)
        assert a.labels is not None
        assert b.labels is not None
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(views_of(a), views_of(b), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_without_a_range_the_type_has_its_own(kind: str, backend: str) -> None:
    needs(backend)
    images = arrays(kind, 1)[:, :, 2:14]
    views = PairViews("N(x) | N(y)", (0.0,), (1.0,), backend=backend)
    ((view,), _) = views(*(torch.from_numpy(images),) * 2, step=0)
    expected = torch.from_numpy(images.astype(np.float64) / KINDS[kind]).permute(0, 3, 1, 2)
    torch.testing.assert_close(view.double(), expected, rtol=0, atol=1e-6)


def test_the_module_of_views_takes_what_a_store_gives() -> None:
    store = ImageStore.from_arrays(arrays("uint16", top=4095))
    views = PairViews("A(x) | A(y)", store.mean, store.std, value_range=store.value_range, seed=2)
    batch = store.gather(torch.arange(8))
    sides = [view for side in views(batch, batch.flip(0), step=3) for view in side]
    floats = ((batch.float() - store.value_range[0]) / np.subtract(*store.value_range[::-1])).clamp(0, 1)
    plain = PairViews("A(x) | A(y)", store.mean, store.std, seed=2)
    others = [view for side in plain(floats, floats.flip(0), step=3) for view in side]
    for view, other in zip(sides, others, strict=True):
        torch.testing.assert_close(view, other, rtol=0, atol=1e-5)


# Labels


def test_labels_of_classes() -> None:
    for labels in (LABELS, LABELS.tolist(), torch.from_numpy(LABELS), LABELS.astype(np.uint16)[:, None]):
        store = ImageStore.from_arrays(arrays(), labels)
        assert store.labels is not None
        assert store.labels.dtype == torch.int64
        assert store.labels.tolist() == LABELS.tolist()
        assert (store.n_classes, store.class_names, store.task) == (3, ("0", "1", "2"), "multi-class")
        assert store.class_counts() == [8, 8, 8]
        assert not store.multi_label
    assert ImageStore.from_arrays(arrays(), LABELS % 2).task == "binary-class"
    named = ImageStore.from_arrays(arrays(), LABELS, class_names=["a", "b", "c"], task="ordinal-regression")
    assert (named.class_names, named.task) == (("a", "b", "c"), "ordinal-regression")


@pytest.mark.parametrize("kind", [np.int64, np.uint8, bool])
def test_labels_of_several_columns(kind: type) -> None:
    hot = np.random.default_rng(0).integers(0, 2, (N, 4)).astype(kind)
    store = ImageStore.from_arrays(arrays(), hot)
    assert store.labels is not None
    assert (store.multi_label, store.n_classes, store.task) == (True, 4, MULTI_LABEL)
    assert np.array_equal(store.labels.numpy(), hot)
    assert store.class_counts() == hot.sum(0).tolist()
    part = store.subset(torch.tensor([3, 3, 1]))
    assert part.labels is not None
    assert np.array_equal(part.labels.numpy(), hot[[3, 3, 1]])
    batch = next(iter(PairLoader(store, "mimv", 8, sampler="class-balanced")))
    assert batch.labels is not None
    assert np.array_equal(batch.labels.numpy(), hot[batch.indices.numpy()])


def test_a_named_class_without_image_is_told(caplog: pytest.LogCaptureFixture) -> None:
    ImageStore.from_arrays(arrays(), LABELS, class_names=list("abcd"), name="x", split="val")
    assert [record.getMessage() for record in caplog.records] == ["x, val: no image of class d (1 of 4)"]


# No labels


@pytest.fixture
def unlabelled() -> ImageStore:
    return ImageStore.from_arrays(arrays(), name="scans")


@pytest.mark.parametrize("sampler", ["uniform", "cluster-balanced"])
def test_a_loader_needs_no_labels(unlabelled: ImageStore, sampler: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amimv")
    loader = PairLoader(unlabelled, "amimv", 8, sampler, sampler, seed=3)
    labelled = PairLoader(ImageStore.from_arrays(arrays(), LABELS), "amimv", 8, sampler, sampler, seed=3)
    for other in (loader, labelled):
        other.set_clusters(torch.arange(N) // 20)
    for batch, same in zip(loader, labelled, strict=True):
        assert batch.labels is None
        assert torch.equal(batch.indices, same.indices)
        assert all(torch.equal(x, y) for x, y in zip(views_of(batch), views_of(same), strict=True))
    assert not any("reads labels" in record.getMessage() for record in caplog.records)
    if sampler == "cluster-balanced":
        anchors = torch.cat([batch.indices[0] for epoch in range(20) for batch in loader.epoch(epoch)])
        assert 0.4 < (anchors >= 20).float().mean() < 0.6  # four of the images, half of the draws


def test_an_unlabelled_store_can_be_resumed(unlabelled: ImageStore) -> None:
    first = PairLoader(unlabelled, "two-view", 8)
    running = iter(first)
    next(running)
    resumed = PairLoader(unlabelled, "two-view", 8)
    resumed.load_state_dict(first.state_dict())
    for a, b in zip(running, resumed, strict=True):
        assert torch.equal(a.indices, b.indices)


def test_a_subset_without_labels(unlabelled: ImageStore) -> None:
    part = unlabelled.subset(torch.tensor([2, 5]))
    assert (part.labels, part.groups, part.class_counts(), part.n_classes) == (None, None, [], 0)
    assert (len(part), part.multi_label) == (2, False)


@pytest.mark.parametrize("which", ["sampler", "partner"])
@pytest.mark.parametrize("sampler", LABEL_SAMPLERS)
def test_samplers_that_read_labels_refuse(unlabelled: ImageStore, sampler: str, which: str) -> None:
    assert set(SAMPLERS) - set(LABEL_SAMPLERS) == {"uniform", "cluster-balanced"}
    refused(
        f"sampler {sampler} reads labels, and there are none: use uniform or cluster-balanced",
        lambda: PairLoader(unlabelled, "mimv", 8, **{which: sampler}),
    )


def test_what_needs_labels_says_so(unlabelled: ImageStore) -> None:
    refused(r"A table needs labels, and scans \(train\) has none", lambda: unlabelled.known_labels("A table"))
    known = ImageStore.from_arrays(arrays(), LABELS)
    assert known.known_labels("A table") is known.labels


# Groups


def same(groups: Tensor) -> list[list[bool]]:
    """Which images share one."""
    flags: list[list[bool]] = (groups[:, None] == groups).tolist()
    return flags


@pytest.mark.parametrize("of", [list, np.asarray, torch.tensor])
def test_groups_come_along(of: Callable[[Any], Any]) -> None:
    numbers = [7 * (i // 3) for i in range(N)]
    store = ImageStore.from_arrays(arrays(), groups=of(numbers))
    assert store.groups is not None
    assert (store.groups.dtype, store.groups.shape) == (torch.int64, (N,))
    assert same(store.groups) == same(torch.tensor(numbers))
    chosen = torch.tensor([0, 2, 3, 3, 23])
    part = store.subset(chosen)
    assert part.groups is not None
    assert torch.equal(part.groups, store.groups[chosen])


def test_partners_of_one_group_without_labels() -> None:
    groups = torch.tensor([0] * 5 + [1] * 4 + [2] * 14 + [3])
    loader = PairLoader(ImageStore.from_arrays(arrays(), groups=groups), "A(x) | A(y)", 8, partner="same-group")
    for batch in (*loader, *loader):
        anchors, partners = batch.indices
        assert torch.equal(groups[anchors], groups[partners])
        assert torch.equal(anchors == partners, groups[anchors] == 3)  # alone in its group
        assert batch.labels is None
    plain = ImageStore.from_arrays(arrays())
    refused("same-group needs groups", lambda: PairLoader(plain, "A(x) | A(y)", 8, partner="same-group"))


# What can be wrong


def with_value(value: float) -> np.ndarray:
    images = arrays("float32")
    images[5, 3, 2, 1] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (with_value(np.nan), "x: images hold NaN or infinity, expected numbers"),
        (with_value(np.inf), "x: images hold NaN or infinity"),
        (
            with_value(-0.01),
            r"float images reach from -0.01 to .*, expected \[0, 1\]: scale them, or give value_range=",
        ),
        (arrays().astype(np.float32), r"reach from 0 to 255, expected \[0, 1\]: scale them, or give value_range"),
        (arrays().astype(np.int16), "x is int16, expected uint8, uint16 or float: convert it, with its range in mind"),
        (arrays().astype(np.int64), "x is int64, expected uint8, uint16 or float"),
        (arrays().astype(np.uint32), "x is uint32, expected"),
        (arrays() > 100, "x is bool, expected"),
        (arrays().astype(object), "x is Python objects, expected uint8, uint16 or float"),
        (np.full((3, 8, 8), "a"), "x is text, expected"),
        (None, "x is Python objects, expected"),
        ([arrays()[0], arrays()[0, :5]], "x is several lengths or shapes, expected"),
        (arrays()[:0], "x is empty: expected at least one image"),
        (arrays("float32")[:0], "x is empty"),
        (arrays()[:, :0], r"shape \(24, 0, 16, 3\): expected at least one pixel and channel"),
        (arrays()[..., :0], "expected at least one pixel and channel"),
        (arrays()[:, 0, 0], r"shape \(24, 3\), expected \(N, H, W\) or \(N, H, W, C\)"),
        (arrays()[None], r"shape \(1, 24, 12, 16, 3\), expected"),
        (arrays().transpose(0, 3, 1, 2), r"shape \(24, 3, 12, 16\), expected channels last: \(N, H, W, C\)"),
        (arrays(channels=5).transpose(0, 3, 1, 2), r"shape \(24, 5, 12, 16\), expected channels last"),
        (np.zeros((2, 3, 28, 28), np.uint8), "expected channels last"),
        (np.zeros((2, 1, 224, 224), np.uint8), "expected channels last"),
        (np.zeros((2, 13, 32, 32), np.uint8), "expected channels last"),
    ],
)
def test_images_that_are_refused(images: Any, message: str) -> None:
    refused(message, lambda: ImageStore.from_arrays(images, name="x"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:-1], "x: 23 labels for 24 images: expected as many"),
        (LABELS / 1.0, r"labels are \(24,\) torch.float64, expected integers \(N,\) or multi-hot \(N, L\)"),
        (list("abc") * 8, "labels are text, expected integers"),
        ([None, 1] * 12, "labels are Python objects, expected integers"),
        ([[0, 1], [1]] * 12, "labels are several lengths or shapes, expected integers"),
        (np.zeros((N, 2, 2), int), r"labels are \(24, 2, 2\) torch.int64, expected"),
        (np.zeros((N, 0), int), r"labels are \(24, 0\) torch.int64, expected"),
        (LABELS - 1, r"labels reach from -1 to 1, expected 0\.\.1"),
        (np.full((N, 3), 2), r"labels reach from 2 to 2, expected 0\.\.1"),
    ],
)
def test_labels_that_are_refused(labels: Any, message: str) -> None:
    refused(message, lambda: ImageStore.from_arrays(arrays(), labels, name="x"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": LABELS, "class_names": ["a", "b"]}, r"reach from 0 to 2, expected 0\.\.1 \(2 classes\)"),
        ({"labels": np.eye(N, 3, dtype=int), "class_names": ["a"]}, "1 class names for labels of 3 columns"),
        ({"labels": LABELS, "task": "multiclass"}, r"unknown task 'multiclass': did you mean multi-class"),
        ({"labels": LABELS, "task": "binary-class"}, "task 'binary-class' needs 2 classes, x has 3"),
        ({"labels": LABELS, "task": MULTI_LABEL}, "does not fit the labels of x, which are one class per image"),
        ({"labels": np.eye(N, 3, dtype=int), "task": "multi-class"}, "labels of x, which are multi-hot"),
        ({"task": "multi-class"}, "x: task 'multi-class' is given, but there are no labels"),
        ({"groups": [1, 2]}, "x: 2 groups for 24 images: expected one for each"),
        (
            {"value_range": (4095, 0)},
            r"value_range is \(4095, 0\), expected two numbers \(low, high\) with low < high",
        ),
        ({"value_range": (7, 7)}, "with low < high"),
        ({"value_range": (0, float("nan"))}, "value_range is .*, expected two numbers"),
        ({"value_range": (0, float("inf"))}, "value_range is .*, expected two numbers"),
        ({"value_range": 255}, "value_range is 255, expected two numbers"),
        ({"value_range": (0, 1, 2)}, "value_range is .*, expected two numbers"),
        ({"value_range": "ab"}, "value_range is ab, expected two numbers"),
        ({"device": "gpu"}, "unknown device 'gpu', expected cpu, cuda"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    refused(message, lambda: ImageStore.from_arrays(arrays(), name="x", **settings))


def test_views_larger_than_the_shorter_side_are_refused() -> None:
    store = ImageStore.from_arrays(arrays())
    refused("13 pixels is larger than the images of 12", lambda: PairLoader(store, get_recipe("mimv", size=13), 8))
    assert next(iter(PairLoader(store, get_recipe("mimv", size=12), 8))).sides[0][0].shape[-1] == 12
