"""A step on a GPU, without one: on fake CUDA tensors everything stays on one device, and the host asks it nothing.

PyTorch's fake tensors have a device and a shape but no values: they refuse what mixes devices, what reads a value and
what has a size that values decide. A copy to the host, which they would allow, is refused here. Backward passes need
a driver and are not in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from amimv.models.backbones import BackboneSpec, build_backbone
from amimv.models.methods import METHODS
from amimv.pipelines import constants
from amimv.pipelines.images import ResidentImages
from amimv.pipelines.loader import PairLoader
from amimv.pipelines.names import PARTNERS, SAMPLERS
from amimv.pipelines.operations import OPERATIONS, Operation
from amimv.pipelines.pair_sampler import PairSampler
from amimv.pipelines.params import draw_view_params
from amimv.pipelines.policy import build_policy
from amimv.pipelines.recipes import RECIPES
from amimv.pipelines.rng import Key
from amimv.pipelines.store import ImageStore
from amimv.pipelines.views import render

GPU = torch.device("cuda:0")
N, B, SIZE = 48, 8, 32
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
SMALL = {"projector_hidden": 16, "projector_out": 16, "predictor_hidden": 16, "prototypes": 12, "queue": 24}


class StaysThere(TorchDispatchMode):
    """Refuses copies from the device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [value for value in args if isinstance(value, Tensor)]
        if isinstance(result, Tensor) and result.device.type == "cpu":
            assert all(value.device.type == "cpu" for value in given), f"{func} copies to the host"
        return result


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """In which no constants are kept: fakes are of one mode, and not to be met by other tests."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), StaysThere():
        patch.setattr(constants, "KEPT", {})
        yield


def moved(value: Any) -> Any:
    """With a fake on the pretended GPU in place of each tensor."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=GPU)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name)) for field in fields(value)})
    return value


def build_store() -> ImageStore:
    images = torch.randint(0, 256, (N, SIZE, SIZE, 3), dtype=torch.uint8)
    return ImageStore.from_arrays(images, torch.arange(N) % 3, torch.arange(N) // 4, name="random")


def move_sampler(sampler: PairSampler) -> None:
    """What it holds goes to the pretended GPU; grouping the images, once for a run, may wait."""
    for name, value in vars(sampler).items():
        setattr(sampler, name, GPU if name == "device" else moved(value))


def move_module(module: nn.Module) -> None:
    """`Module.to` cannot do it with fakes."""
    for part in module.modules():
        part._parameters.update(
            {name: nn.Parameter(moved(p), p.requires_grad) for name, p in part._parameters.items() if p is not None}
        )
        part._buffers.update({name: moved(buffer) for name, buffer in part._buffers.items()})


def build_loader(recipe: str) -> PairLoader:
    """Made on the host."""
    loader = PairLoader(build_store(), recipe, B)
    loader.set_clusters(torch.arange(N) % 5)
    return loader


def move_loader(loader: PairLoader) -> PairLoader:
    move_sampler(loader.sampler)
    store = loader.store
    on_gpu = ResidentImages(torch.empty(N, SIZE, SIZE, 3, dtype=torch.uint8, device=GPU))
    loader.store = replace(store, images=on_gpu, labels=moved(store.labels), groups=moved(store.groups), device=GPU)
    return loader


def devices(pair: Any) -> set[torch.device]:
    return {tensor.device for tensor in (*(view for side in pair.sides for view in side), pair.indices, pair.labels)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe: str) -> None:
    loader = build_loader(recipe)
    with pretended_gpu():
        batches = move_loader(loader).epoch(1)
        for pair in (next(batches), next(batches)):
            assert devices(pair) == {GPU}


@pytest.mark.parametrize("multi_label", [False, True], ids=["classes", "multi-label"])
@pytest.mark.parametrize("name", PARTNERS)
def test_samplers(name: str, multi_label: bool) -> None:
    labels = torch.nn.functional.one_hot(torch.arange(N) % 3) if multi_label else torch.arange(N) % 3
    anchors = name if name in SAMPLERS else "uniform"
    sampler = PairSampler(labels, B, anchors, name, 3, torch.arange(N) // 4, epochs=4)
    sampler.set_clusters(torch.arange(N) % 5)
    with pretended_gpu():
        move_sampler(sampler)
        assert {batch.device for batch in sampler.epoch(2)} == {GPU}


@pytest.mark.parametrize("kind", OPERATIONS, ids=lambda kind: kind.__name__)
def test_operations(kind: type[Operation]) -> None:
    for name, settings in kind.examples.items():
        for channels in (1, 3):
            policy = replace(build_policy(settings), mean=(0.5,) * channels, std=(0.2,) * channels)
            with pretended_gpu():
                step = torch.zeros((), dtype=torch.int64, device=GPU)
                images = torch.empty(B, SIZE, SIZE, channels, dtype=torch.uint8, device=GPU)
                drawn = draw_view_params(policy, torch.arange(B, device=GPU), Key(0, 0, 0, step))
                assert render(images, drawn).device == GPU, name


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str) -> None:
    kind = METHODS[method]
    names = {field.name for field in fields(kind.settings)}
    settings = kind.settings(**{key: value for key, value in SMALL.items() if key in names})
    network = build_backbone(BackboneSpec("test_resnet", 3, SIZE, **STATISTICS))
    built = kind.build(network, settings)
    with pretended_gpu():
        move_module(built)
        view, ids = torch.empty(B, 3, SIZE, SIZE, device=GPU), torch.empty(B, dtype=torch.int64, device=GPU)
        # Two sides, sides of several views, and local sides: what recipes differ in for a method.
        for step, sides in enumerate([[[view]] * 2, [[view] * 2, [view] * 3], [[view]] * 3]):
            built.begin_step(step, 10)
            loss, embeddings = built.loss(built.online, sides, ids)
            assert {loss.device, embeddings.device} == {GPU}


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(2),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
    ],
)
def test_what_waits_is_found(waits: Any) -> None:
    with pretended_gpu():
        x = torch.empty(2, device=GPU)
        with pytest.raises(Exception, match=r"copies to the host|data-dependent|dynamic|devices|aten"):
            waits(x)
