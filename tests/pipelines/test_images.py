"""What holds images: on the device, in host memory or in files, all do the same, and hold the same pixels."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from amimv.pipelines import ImageStore, PairLoader
from amimv.pipelines.images import HostImages, Images, ResidentImages, place_images
from amimv.pipelines.sources.encoded import EncodedImages

CPU = torch.device("cpu")
N, SIZE = 20, 12
BUILD = Callable[[Tensor, Path], Images]


def resident(images: Tensor, folder: Path) -> Images:
    return ResidentImages(images)


def host(images: Tensor, folder: Path) -> Images:
    return HostImages(images, CPU)


def encoded(images: Tensor, folder: Path) -> Images:
    """PNG files, which keep every bit."""
    pytest.importorskip("nvidia.dali.experimental.dynamic", reason="nvidia.dali is not installed")
    if (images.dtype, images.shape[3]) not in ((torch.uint8, 1), (torch.uint8, 3), (torch.uint16, 1)):
        pytest.skip("files are read as grey of 8 or 16 bits, or as RGB of 8")
    paths = [str(folder / f"{i:02}.png") for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.squeeze(2).numpy()).save(path)
    return EncodedImages(tuple(paths), images.shape[1], images.shape[3], CPU, images.dtype)


HOLDERS = pytest.mark.parametrize("build", [resident, host, encoded])
KINDS = pytest.mark.parametrize(
    ("kind", "channels"), [("uint8", 3), ("uint8", 1), ("uint8", 5), ("uint16", 1), ("uint16", 3), ("float32", 2)]
)
INDICES = (torch.tensor([[3, 3, 0], [19, 7, 1]]), torch.tensor(5), torch.empty(2, 0, dtype=torch.int64))


def noise(kind: str, channels: int) -> Tensor:
    rng = np.random.default_rng(channels)
    shape = (N, SIZE, SIZE, channels)
    if kind == "float32":
        return torch.from_numpy(rng.random(shape, dtype=np.float32))
    return torch.from_numpy(rng.integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True))


def equal(a: Tensor, b: Tensor) -> bool:
    """torch compares no ``uint16`` everywhere."""
    return a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy())


@HOLDERS
@KINDS
def test_what_is_held_is_given_back(build: BUILD, kind: str, channels: int, tmp_path: Path) -> None:
    images = noise(kind, channels)
    held = build(images, tmp_path)
    assert (held.shape, held.dtype) == (tuple(images.shape), images.dtype)
    assert held.decoded is not isinstance(held, EncodedImages)
    for indices in INDICES:
        got = held.gather(indices)
        assert (got.shape, got.device) == ((*indices.shape, SIZE, SIZE, channels), CPU)
        assert equal(got, torch.from_numpy(images.numpy()[indices.numpy()]))
    got = held.gather(torch.arange(N))
    got.view(torch.uint8).zero_()  # a copy
    assert equal(held.gather(torch.arange(N)), images)


@HOLDERS
@KINDS
def test_the_stream_is_gather_part_by_part(build: BUILD, kind: str, channels: int, tmp_path: Path) -> None:
    held = build(noise(kind, channels), tmp_path)
    parts = torch.randint(0, N, (7, 2, 3), generator=torch.Generator().manual_seed(0))
    given = held.stream(parts)
    assert isinstance(given, Iterator)
    batches = list(given)
    assert len(batches) == 7
    uneven = [parts[0], parts[1, 0, :1], parts[2, 1]]
    for batch, part in zip(held.stream(uneven), uneven, strict=True):
        assert equal(batch, held.gather(part))
    assert all(equal(batch, held.gather(part)) for batch, part in zip(batches, parts, strict=True))
    assert list(held.stream(parts[:0])) == []
    first, second = held.stream(parts), held.stream(parts.flip(0))  # two at once
    for a, b, i in zip(first, second, range(7), strict=True):
        assert equal(a, batches[i])
        assert equal(b, batches[6 - i])


@HOLDERS
@KINDS
def test_a_subset_is_held_likewise(build: BUILD, kind: str, channels: int, tmp_path: Path) -> None:
    images = noise(kind, channels)
    held = build(images, tmp_path)
    chosen = torch.tensor([19, 3, 8, 3])
    part = held.subset(chosen)
    assert type(part) is type(held)
    assert (part.shape, part.dtype) == ((4, SIZE, SIZE, channels), images.dtype)
    assert equal(part.gather(torch.arange(4)), held.gather(chosen))
    assert equal(part.subset(torch.tensor([1])).gather(torch.tensor([0])), held.gather(torch.tensor([3])))
    assert held.shape == images.shape
    assert len(held.paths) == (N if isinstance(held, EncodedImages) else 0)
    assert list(part.paths) == [held.paths[i] for i in (19, 3, 8, 3) if held.paths]


@HOLDERS
@KINDS
def test_a_store_knows_the_same_of_them(build: BUILD, kind: str, channels: int, tmp_path: Path) -> None:
    images = noise(kind, channels)
    labels = torch.arange(N) % 2
    expected = ImageStore.from_arrays(images, labels)
    store = ImageStore.build(
        build(images, tmp_path), labels, name="x", device=CPU, class_names=("a", "b"), task="binary-class"
    )
    assert (store.mean, store.std, store.value_range) == (expected.mean, expected.std, expected.value_range)
    chosen = torch.tensor([2, 4, 5])
    part, other = store.subset(chosen), expected.subset(chosen)
    assert (part.mean, part.std, part.class_counts()) == (other.mean, other.std, other.class_counts())


@HOLDERS
@KINDS
def test_pairs_are_the_same_to_the_last_bit(build: BUILD, kind: str, channels: int, tmp_path: Path) -> None:
    images = noise(kind, channels)
    store = ImageStore.from_arrays(images)
    held = replace(store, images=build(images, tmp_path))
    whole = [batch for _, batch in zip(range(4), PairLoader(store, "amimv", 8), strict=False)]
    for start in (0, 1):
        got = list(PairLoader(held, "amimv", 8).epoch(0, start))
        for a, b in zip(got, whole[start:], strict=True):
            assert torch.equal(a.indices, b.indices)
            for side, same in zip(a.sides, b.sides, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(side, same, strict=True))


@pytest.mark.parametrize("wanted", [True, False, None])
def test_where_images_are_placed(wanted: bool | None) -> None:
    images = noise("uint16", 2)
    placed = place_images(images, CPU, wanted, "x")
    assert isinstance(placed, HostImages if wanted is False else ResidentImages)
    assert placed.tensor.data_ptr() == images.data_ptr()  # no copy


@KINDS
def test_indices_may_lie_elsewhere(kind: str, channels: int) -> None:
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        held = ResidentImages(torch.empty(N, SIZE, SIZE, channels, dtype=getattr(torch, kind), device=device))
        indices = torch.arange(6).view(2, 3)
        for asked in (indices, indices.to(device)):
            assert held.gather(asked).device == device
            assert [batch.device for batch in held.stream(asked)] == [device] * 2
            assert held.subset(asked[0]).tensor.device == device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@KINDS
def test_on_cuda(kind: str, channels: int, tmp_path: Path) -> None:
    images, device = noise(kind, channels), torch.device("cuda", 0)
    parts = torch.randint(0, N, (7, 2, 3), generator=torch.Generator().manual_seed(0))
    for wanted in (True, False):
        held = place_images(images, device, wanted, "x")
        for asked in (parts, parts.to(device)):
            for batch, part in zip(held.stream(asked), parts, strict=True):
                assert batch.device == device
                assert equal(batch.cpu(), torch.from_numpy(images.numpy()[part.numpy()]))
        part = held.subset(parts[0, 0].to(device))
        assert equal(part.gather(torch.arange(3)).cpu(), torch.from_numpy(images.numpy()[parts[0, 0].numpy()]))
