"""Methods on every recipe, against losses taken by hand of embeddings summed by hand."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amimv.models.backbones import BackboneSpec, build_backbone
from amimv.models.losses import mimv_loss, nt_xent
from amimv.models.methods import METHODS
from amimv.models.methods.encoder import embed_sides
from amimv.models.methods.mimv import Mimv, MimvSettings
from amimv.models.methods.simclr import Simclr, SimclrSettings
from amimv.pipelines.loader import PairBatch, PairLoader
from amimv.pipelines.recipes import ALIASES, RECIPES, get_recipe
from amimv.pipelines.stores import ImageStore

BATCH = 8
#: Views of all sides, and how many of them the MIMV online network and its target see.
FORWARDS = {
    "two-view": (2, 1, 1),
    "multi-crop": (8, 7, 1),
    "mimv": (4, 2, 2),
    "amimv-roles": (4, 2, 2),
    "amimv-strength": (4, 2, 2),
    "amimv-views": (5, 2, 3),
}


def build_store() -> ImageStore:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 16, 16, 3), generator=generator, dtype=torch.uint8)
    labels = torch.arange(24) % 3
    half = (0.5, 0.5, 0.5)
    cpu = torch.device("cpu")
    return ImageStore(images, labels, "random", "train", ("a", "b", "c"), "multi-class", cpu, half, half)


def one_batch(recipe: str, **settings: Any) -> PairBatch:
    return next(PairLoader(build_store(), get_recipe(recipe, **settings), BATCH).epoch(0))


def build_method(name: str, **settings: Any) -> Any:
    """On a thin ResNet; `mimv` with its target somewhere else than its online network."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSpec("test_resnet", size=16))
    if name == "simclr":
        return Simclr(backbone, SimclrSettings(**{"projector_hidden": 32, "projector_out": 16, **settings}))
    method = Mimv(backbone, MimvSettings(**settings))
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return method


def embed_by_hand(encoder: Any, side: tuple[Tensor, ...]) -> Tensor:
    total = torch.zeros(())
    for view in side:
        total = total + encoder.projector(encoder.backbone(view))
    return total


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def loss_by_hand(method: Any, pair: PairBatch, ids: Tensor | None) -> Tensor:
    a, b, *local = pair.sides
    s = method.settings
    if isinstance(method, Simclr):
        za, zb = embed_by_hand(method.online, a), embed_by_hand(method.online, b)
        losses = [nt_xent(za, zb, temperature=s.temperature, ids=ids)]
        for side in local:
            z = embed_by_hand(method.online, side)
            losses += [nt_xent(z, za, temperature=s.temperature, ids=ids)]
            losses += [nt_xent(z, zb, temperature=s.temperature, ids=ids)]
        return sum(losses) / len(losses)
    with torch.no_grad():
        target = embed_by_hand(method.teacher, b)
    bounds = {"high": s.high, "low": s.low, "near_zero": s.near_zero}
    losses = [
        mimv_loss(
            embed_by_hand(method.online, side),
            target,
            temperature=s.temperature,
            self_term=s.self_term,
            ids=ids,
            **bounds,
        )
        for side in (a, *local)
    ]
    return sum(losses) / len(losses)


def assert_by_hand(method: Any, pair: PairBatch, ids: Tensor | None = None) -> Tensor:
    """Loss, gradients and running statistics are those of the loss by hand on a twin."""
    twin = copy.deepcopy(method)
    loss, embeddings = method.loss(method.online, pair.sides, ids)
    assert loss.shape == ()
    loss.backward()
    expected = loss_by_hand(twin, pair, ids)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    slopes = gradients(twin)
    assert slopes.keys() == gradients(method).keys()
    for name, gradient in gradients(method).items():
        scale = float(slopes[name].abs().max())
        torch.testing.assert_close(gradient, slopes[name], rtol=1e-4, atol=1e-5 * scale + 1e-8, msg=name)
    for (name, tensor), other in zip(method.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(tensor, other, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(embeddings, embed_by_hand(twin.online, pair.sides[0]), rtol=1e-4, atol=1e-5)
    return loss.detach()


def test_the_table_covers_every_recipe_and_method() -> None:
    assert set(FORWARDS) == set(RECIPES)
    assert set(METHODS) == {"mimv", "simclr"}
    for name, (build, settings) in METHODS.items():
        backbone = build_backbone(BackboneSpec("test_resnet", size=16))
        assert type(build(backbone, settings())) is type(build_method(name))


@pytest.mark.parametrize("recipe", [*RECIPES, *ALIASES])
@pytest.mark.parametrize("name", ["mimv", "simclr"])
def test_loss_and_gradients_are_those_by_hand(name: str, recipe: str) -> None:
    assert_by_hand(build_method(name), one_batch(recipe))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"high": 0.3},
        {"high": None},
        {"low": 0.0},
        {"near_zero": None},
        {"near_zero": 0.4},
        {"self_term": "published", "high": None, "temperature": 2.0},
    ],
)
def test_mimv_passes_its_settings_on(settings: dict[str, Any]) -> None:
    pair = one_batch("mimv")
    assert assert_by_hand(build_method("mimv", **settings), pair).isfinite()


def test_every_setting_of_mimv_changes_its_loss() -> None:
    pair = one_batch("mimv")
    losses = {}
    for change in (
        {},
        {"temperature": 0.7},
        {"high": 0.3},
        {"low": 0.3},
        {"near_zero": 0.5},
        {"self_term": "published"},
    ):
        method = build_method("mimv", **{"high": None, "low": None, "near_zero": None, **change})
        if change.get("self_term"):  # the two differ by rounding where no bound is on
            method.settings = replace(method.settings, high=0.9)
        losses[str(change)] = method.loss(method.online, pair.sides, None)[0].item()
    assert len(set(losses.values())) == len(losses), losses


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_simclr_passes_its_temperature_on(temperature: float) -> None:
    assert_by_hand(build_method("simclr", temperature=temperature), one_batch("two-view"))


@pytest.mark.parametrize("recipe", ["mimv", "multi-crop"])
@pytest.mark.parametrize("name", ["mimv", "simclr"])
def test_ids_reach_the_loss(name: str, recipe: str) -> None:
    pair = one_batch(recipe)
    ids = torch.tensor([0, 1, 2, 0, 0, 1, 3, 4])
    with_ids = assert_by_hand(build_method(name, **({"near_zero": None} if name == "mimv" else {})), pair, ids)
    without = assert_by_hand(build_method(name, **({"near_zero": None} if name == "mimv" else {})), pair)
    assert with_ids != without


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["mimv", "simclr"])
def test_one_forward_pass_per_view(name: str, recipe: str) -> None:
    method, pair = build_method(name), one_batch(recipe)
    calls = {"online": 0, "teacher": 0}

    def count(who: str) -> Any:
        def hook(*_: Any) -> None:
            calls[who] += 1

        return hook

    method.online.backbone.register_forward_hook(count("online"))
    if name == "mimv":
        method.teacher.backbone.register_forward_hook(count("teacher"))
    method.loss(method.online, pair.sides, None)
    views, online, target = FORWARDS[recipe]
    assert calls == ({"online": online, "teacher": target} if name == "mimv" else {"online": views, "teacher": 0})


def test_the_online_network_is_called_once_with_all_views() -> None:
    """As DistributedDataParallel wants it, through the callable that is given."""
    for name in METHODS:
        method, pair = build_method(name), one_batch("multi-crop")
        seen: list[int] = []

        def online(views: list[Tensor], method: Any = method, seen: list[int] = seen) -> list[Tensor]:
            seen.append(len(views))
            return method.online(views)

        method.loss(online, pair.sides, None)
        assert seen == [7 if name == "mimv" else 8]


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_reach_the_whole_online_network_and_not_the_teacher(recipe: str) -> None:
    method, pair = build_method("mimv"), one_batch(recipe)
    method.begin_step(0, 10)
    method.loss(method.online, pair.sides, None)[0].backward()
    for name, parameter in method.online.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert any(bool(p.grad.any()) for p in method.online.backbone.parameters())
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


def test_the_teacher_moves_in_begin_step_only_and_by_a_tenth() -> None:
    method, pair = build_method("mimv"), one_batch("mimv")
    optimizer = torch.optim.SGD(method.online.parameters(), lr=0.1)
    for step in range(3):
        before = {name: p.clone() for name, p in method.teacher.named_parameters()}
        online = {name: p.detach().clone() for name, p in method.online.named_parameters()}
        method.begin_step(step, 3)
        moved = {name: p.clone() for name, p in method.teacher.named_parameters()}
        for name, p in moved.items():
            torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * online[name])
        assert any(not torch.equal(p, before[name]) for name, p in moved.items())
        method.loss(method.online, pair.sides, None)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, p in method.teacher.named_parameters():
            assert torch.equal(p, moved[name])


def test_the_momentum_is_a_setting() -> None:
    method = build_method("mimv", momentum=0.25)
    before = [p.clone() for p in method.teacher.parameters()]
    method.begin_step(5, 10)
    for old, new, online in zip(before, method.teacher.parameters(), method.online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.25 * old + 0.75 * online.detach())


def test_a_new_teacher_equals_the_online_network() -> None:
    method = Mimv(build_backbone(BackboneSpec("test_resnet", size=16)), MimvSettings())
    for (name, tensor), other in zip(
        method.online.state_dict().items(), method.teacher.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize(
    ("settings", "widths"),
    [({}, [96, 96, 96, 24]), ({"projector_hidden": 40, "projector_out": 10}, [96, 40, 40, 10])],
)
def test_mimv_projects_by_three_normed_layers_to_a_quarter(settings: dict[str, int], widths: list[int]) -> None:
    projector = build_method("mimv", **settings).online.projector
    assert [type(layer).__name__ for layer in projector] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + [
        "Linear",
        "BatchNorm1d",
    ]
    linear = projector[0::3]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == widths


def test_simclr_projects_by_two_plain_layers() -> None:
    method = Simclr(build_backbone(BackboneSpec("test_resnet", size=16)), SimclrSettings())
    assert [type(layer).__name__ for layer in method.online.projector] == ["Linear", "ReLU", "Linear"]
    assert [p.shape[0] for p in method.online.projector.parameters() if p.ndim == 2] == [2048, 256]


@pytest.mark.parametrize("name", ["mimv", "simclr"])
def test_local_sides_are_used(name: str) -> None:
    pair = one_batch("multi-crop", local_crops=2)
    assert [view.shape[-1] for side in pair.sides for view in side] == [16, 16, 12, 12]
    full = assert_by_hand(build_method(name), pair)
    without = build_method(name)
    assert full != without.loss(without.online, pair.sides[:2], None)[0]


def test_sides_are_summed_in_order() -> None:
    def views() -> Iterator[Tensor]:
        return (torch.full((2, 1), 10.0**i) for i in range(6))

    v = list(views())
    summed = embed_sides(lambda given: [2 * view for view in given], [(v[0], v[1]), (v[2],), (v[3], v[4], v[5])])
    assert [float(z[0]) for z in summed] == [22, 200, 222000]
