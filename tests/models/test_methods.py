"""Methods on every recipe, against losses taken by hand of embeddings summed by hand."""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from timm.optim import Lars
from torch import Tensor, nn

from amimv import InputError
from amimv.models.backbones import BackboneSpec, build_backbone
from amimv.models.losses import (
    barlow_twins_loss,
    byol_loss,
    dino_loss,
    info_nce,
    mimv_loss,
    nnclr_loss,
    nt_xent,
    ressl_loss,
    simsiam_loss,
    swav_loss,
    vicreg_loss,
)
from amimv.models.methods import METHODS
from amimv.models.methods.base import Embeddings, Encoder
from amimv.models.methods.mimv import Mimv, MimvSettings
from amimv.models.methods.simclr import Simclr, SimclrSettings
from amimv.pipelines.loader import PairBatch, PairLoader
from amimv.pipelines.recipes import ALIASES, RECIPES, get_recipe
from amimv.pipelines.store import ImageStore

BATCH = 8
#: Of whatever a method's settings have.
SMALL = {"projector_hidden": 32, "projector_out": 16, "predictor_hidden": 24, "prototypes": 12, "queue": 20}
#: Views of all sides, and how many of them are on side b and on local sides.
VIEWS = {
    "two-view": (2, 1, 0),
    "multi-crop": (8, 1, 6),
    "mimv": (4, 2, 0),
    "amimv-roles": (4, 2, 0),
    "amimv-strength": (4, 2, 0),
    "amimv-views": (5, 3, 0),
}
#: The online network sees sides a and local, the teacher side b.
ONE_WAY = {"mimv", "ressl"}
#: The momentum of the others' teachers goes to 1.
CONSTANT_MOMENTUM = {"mimv"}
#: Losses in which other rows are negatives.
WITH_IDS = ("mimv", "moco-v3", "nnclr", "sdclr", "simclr", "simclr-ts")
WITH_PROTOTYPES = ("dino", "swav")
#: The schedule's position in most tests: no warm-up is left, prototypes learn and queues are used.
STEP, STEPS = 50, 100


def build_store() -> ImageStore:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 16, 16, 3), generator=generator, dtype=torch.uint8)
    labels = torch.arange(24) % 3
    half = (0.5, 0.5, 0.5)
    return replace(ImageStore.from_arrays(images, labels, name="random", class_names="abc"), mean=half, std=half)


@functools.cache
def one_batch(recipe: str, **settings: Any) -> PairBatch:
    return next(PairLoader(build_store(), get_recipe(recipe, **settings), BATCH).epoch(0))


def small_settings(name: str, **changes: Any) -> Any:
    kind = METHODS[name].settings
    names = {field.name for field in fields(kind)}
    return kind(**{key: value for key, value in SMALL.items() if key in names} | changes)


def new_method(name: str, backbone: str = "test_resnet", **changes: Any) -> Any:
    torch.manual_seed(0)
    return METHODS[name].build(build_backbone(BackboneSpec(backbone, size=16)), small_settings(name, **changes))


def build_method(name: str, **changes: Any) -> Any:
    """On a thin ResNet, with its teacher somewhere else than its online network, and a centre that is not 0."""
    method = new_method(name, **changes)
    with torch.no_grad():
        for parameter in method.teacher.parameters() if hasattr(method, "teacher") else ():
            parameter += 0.05 * torch.randn(parameter.shape)
        if name == "dino":
            method.centre += 0.1 * torch.randn(method.centre.shape)
    return method


def embed_by_hand(encoder: Any, side: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(())
    for view in side:
        total = total + encoder.projector(encoder.backbone(view))
    return total


def embed_all_by_hand(encoder: Any, sides: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [embed_by_hand(encoder, side) for side in sides]


def scores_by_hand(encoder: Any, z: Tensor, frozen: bool = False) -> Tensor:
    weight = encoder.head.weight
    if frozen:
        weight = weight.detach() + 0 * weight
    return (z / z.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).T


def push_by_hand(queue: Any, rows: Tensor) -> None:
    position = int(queue.position)
    with torch.no_grad():
        for row in rows:
            queue.rows[position] = row / row.norm()
            position = (position + 1) % len(queue.rows)
    queue.position.fill_(position)


def ways(sides: int) -> list[tuple[int, int]]:
    """Which side predicts which: a and b each other, local sides both."""
    return [(0, 1), (1, 0)] + [(local, target) for local in range(2, sides) for target in (0, 1)]


def pairs(sides: int) -> list[tuple[int, int]]:
    return [(0, 1)] + [(local, target) for local in range(2, sides) for target in (0, 1)]


def mean(losses: Sequence[Tensor]) -> Tensor:
    return sum(losses[1:], start=losses[0]) / len(losses)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def barlow_twins_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    s, z = method.settings, embed_all_by_hand(method.online, sides)
    return mean([barlow_twins_loss(z[i], z[j], redundancy=s.redundancy, scale=s.loss_scale) for i, j in pairs(len(z))])


def byol_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    p = [method.online.head(z) for z in embed_all_by_hand(method.online, sides)]
    targets = [z.detach() for z in embed_all_by_hand(method.teacher, sides[:2])]
    if len(sides) == 2:
        return byol_loss(p[0], targets[1]) + byol_loss(p[1], targets[0])
    return 2 * mean([byol_loss(p[i], targets[j]) for i, j in ways(len(p))])


def dino_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    frozen = step < 0.001 * STEPS
    student = [scores_by_hand(method.online, z, frozen) for z in embed_all_by_hand(method.online, sides)]
    teacher = [scores_by_hand(method.teacher, z).detach() for z in embed_all_by_hand(method.teacher, sides[:2])]
    sharp = 0.04 + 0.03 * min(1, step / 5)  # the warm-up takes a twentieth of 100 steps
    losses = [
        dino_loss(
            student[i], teacher[j], centre=method.centre.clone(), student_temperature=0.1, teacher_temperature=sharp
        )
        for i, j in ways(len(student))
    ]
    method.centre = 0.9 * method.centre + 0.1 * torch.cat(teacher).mean(dim=0)
    return mean(losses)


def embed_as_one_batch_by_hand(encoder: Any, side: Sequence[Tensor]) -> Tensor:
    z = encoder.projector(encoder.backbone(torch.cat(list(side))))
    return z.reshape(len(side), len(side[0]), -1).sum(dim=0)


def mimv_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    a, b, *local = sides
    s = method.settings
    embed = embed_as_one_batch_by_hand if s.shared_norm else embed_by_hand
    with torch.no_grad():
        target = embed(method.teacher, b)
    bounds = {"high": s.high, "low": s.low, "near_zero": s.near_zero}
    losses = [
        mimv_loss(
            embed(method.online, side),
            target,
            temperature=s.temperature,
            self_term=s.self_term,
            spare_positives=s.spare_positives,
            average=s.average,
            ids=ids,
            **bounds,
        )
        for side in (a, *local)
    ]
    return mean(losses)


def moco_v3_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    t = method.settings.temperature
    queries = [method.online.head(z) for z in embed_all_by_hand(method.online, sides)]
    keys = [z.detach() for z in embed_all_by_hand(method.teacher, sides[:2])]
    losses = {(i, j): info_nce(queries[i], keys[j], temperature=t, ids=ids) for i, j in ways(len(sides))}
    if len(sides) == 2:
        return 2 * t * (losses[0, 1] + losses[1, 0])
    return 2 * 2 * t * mean(list(losses.values()))


def nnclr_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    z = embed_all_by_hand(method.online, sides)
    p = [method.online.head(side) for side in z]
    queue, t = method.queue.rows.clone(), method.settings.temperature
    losses = [nnclr_loss(z[j], p[i], queue=queue, temperature=t, ids=ids) for i, j in ways(len(p))]
    push_by_hand(method.queue, z[0])
    return mean(losses)


def ressl_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    a, b, *local = sides
    students = embed_all_by_hand(method.online, [a, *local])
    teacher = embed_by_hand(method.teacher, b).detach()
    s, queue = method.settings, method.queue.rows.clone()
    temperatures = {"student_temperature": s.student_temperature, "teacher_temperature": s.teacher_temperature}
    losses = [ressl_loss(student, teacher, queue=queue, **temperatures) for student in students]
    push_by_hand(method.queue, teacher)
    return mean(losses)


def sdclr_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    online, whole = method.online, {}
    za = embed_by_hand(online, sides[0])
    for name, mask in zip(online.prunable, online.masks.buffers(), strict=True):
        layer = online.twin.get_submodule(name.removesuffix(".weight"))
        whole[layer] = layer._parameters.pop("weight")
        layer.weight = whole[layer] * mask
    others = embed_all_by_hand(online.twin, sides[1:])
    for layer, weight in whole.items():
        del layer.weight
        layer._parameters["weight"] = weight
    return mean([nt_xent(za, z, temperature=method.settings.temperature, ids=ids) for z in others])


def simclr_ts_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    """Five periods from 1.0 to 0.1 and back; before the first step it is the lowest."""
    if method.temperature == 0.1:
        return simclr_by_hand(method, sides, ids, step)
    return simclr_by_hand(method, sides, ids, step, 0.1 + 0.45 * (1 + math.cos(2 * math.pi * step / (STEPS / 5))))


def simclr_by_hand(method: Any, sides: Any, ids: Any, step: int, temperature: float | None = None) -> Tensor:
    a, b, *local = sides
    t = temperature or method.settings.temperature
    za, zb = embed_by_hand(method.online, a), embed_by_hand(method.online, b)
    losses = [nt_xent(za, zb, temperature=t, ids=ids)]
    for side in local:
        z = embed_by_hand(method.online, side)
        losses += [nt_xent(z, za, temperature=t, ids=ids)]
        losses += [nt_xent(z, zb, temperature=t, ids=ids)]
    return mean(losses)


def simsiam_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    z = embed_all_by_hand(method.online, sides)
    p = [method.online.head(side) for side in z]
    return mean([simsiam_loss(p[i], z[j].detach()) for i, j in ways(len(p))])


def swav_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    frozen, uses_queue = step < 0.002 * STEPS, step >= 0.05 * STEPS
    z = embed_all_by_hand(method.online, sides)
    scores = [scores_by_hand(method.online, side, frozen) for side in z]
    queues = (method.queue_a, method.queue_b)
    earlier = [scores_by_hand(method.online, queue.rows).detach() if uses_queue else None for queue in queues]
    s = method.settings
    how = {"temperature": s.temperature, "epsilon": s.epsilon, "iterations": s.iterations}
    losses = [swav_loss(scores[i], scores[j].detach(), queued=earlier[j], **how) for i, j in ways(len(z))]
    push_by_hand(method.queue_a, z[0])
    push_by_hand(method.queue_b, z[1])
    return mean(losses)


def vicreg_by_hand(method: Any, sides: Any, ids: Any, step: int) -> Tensor:
    s, z = method.settings, embed_all_by_hand(method.online, sides)
    weights = {"invariance": s.invariance, "variance": s.variance, "covariance": s.covariance}
    return mean([vicreg_loss(z[i], z[j], **weights) for i, j in pairs(len(z))])


#: Each method's loss of (method, sides, ids, step), which also does what the method does after its loss.
BY_HAND: dict[str, Callable[[Any, Any, Any, int], Tensor]] = {
    "barlow-twins": barlow_twins_by_hand,
    "byol": byol_by_hand,
    "dino": dino_by_hand,
    "mimv": mimv_by_hand,
    "moco-v3": moco_v3_by_hand,
    "nnclr": nnclr_by_hand,
    "ressl": ressl_by_hand,
    "sdclr": sdclr_by_hand,
    "simclr": simclr_by_hand,
    "simclr-ts": simclr_ts_by_hand,
    "simsiam": simsiam_by_hand,
    "swav": swav_by_hand,
    "vicreg": vicreg_by_hand,
}


def assert_by_hand(
    name: str, method: Any, pair: PairBatch, ids: Tensor | None = None, step: int | None = None
) -> Tensor:
    """Loss, gradients, running statistics, queues and centre are those of the loss by hand on a twin."""
    if step is not None:
        method.begin_step(step, STEPS)
    twin = copy.deepcopy(method)
    loss, embeddings = method.loss(method.online, pair.sides, ids)
    assert loss.shape == ()
    loss.backward()
    expected = BY_HAND[name](twin, pair.sides, ids, STEP if step is None else step)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    slopes = gradients(twin)
    assert slopes.keys() == gradients(method).keys()
    largest = max(float(slope.abs().max()) for slope in slopes.values())
    for key, gradient in gradients(method).items():
        scale = float(slopes[key].abs().max())
        # The last floor is for what has no gradient but by rounding, such as a bias before a norm.
        torch.testing.assert_close(
            gradient, slopes[key], rtol=1e-4, atol=1e-5 * scale + 1e-6 * largest + 1e-8, msg=key
        )
    for (key, tensor), other in zip(method.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(tensor, other, msg=key)
    shared_norm = getattr(method.settings, "shared_norm", False)
    embed = embed_as_one_batch_by_hand if shared_norm else embed_by_hand
    with torch.no_grad():
        torch.testing.assert_close(embeddings, embed(twin.online, pair.sides[0]), rtol=1e-4, atol=1e-5)
    return loss.detach()


def test_the_tables_cover_every_recipe_and_method() -> None:
    assert set(VIEWS) == set(RECIPES)
    assert set(BY_HAND) == set(METHODS), "a new method needs its loss by hand here"


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *((name, recipe) for name in ("mimv", "simclr") for recipe in (*RECIPES, *ALIASES)),
        *(
            (name, recipe)
            for name in sorted(BY_HAND.keys() - {"mimv", "simclr"})
            for recipe in ("multi-crop", "amimv-views")
        ),
    ],
)
def test_loss_and_gradients_are_those_by_hand(name: str, recipe: str) -> None:
    assert_by_hand(name, build_method(name), one_batch(recipe), step=STEP)


@pytest.mark.parametrize("name", BY_HAND)
def test_several_steps_are_those_by_hand(name: str) -> None:
    """From the first: frozen prototypes, a queue that is filled but not used, one that goes round."""
    method, pair = build_method(name), one_batch("two-view")
    for step in (0, 1, 6, 60):
        method.zero_grad(set_to_none=True)
        assert_by_hand(name, method, pair, step=step)


@pytest.mark.parametrize(
    ("backbone", "recipe"),
    [*(("test_resnet", recipe) for recipe in RECIPES), ("test_vit", "two-view"), ("test_vit", "amimv-views")],
)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_what_is_trained_and_not_the_teacher(name: str, backbone: str, recipe: str) -> None:
    method, pair = new_method(name, backbone), one_batch(recipe)
    method.begin_step(STEP, STEPS)
    loss, embeddings = method.loss(method.online, pair.sides, None)
    assert loss.shape == ()
    assert loss.isfinite()
    assert embeddings.shape == (BATCH, 16)
    assert embeddings.isfinite().all()
    loss.backward()
    for key, parameter in method.online.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, key
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    for part in (method.online.backbone, method.online.projector, method.online.head):
        assert part is None or any(bool(p.grad.any()) for p in part.parameters() if p.grad is not None)
    trained = {id(p) for p in method.online.parameters()}
    assert all(p.grad is None and not p.requires_grad for p in method.parameters() if id(p) not in trained)


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
        {"spare_positives": True, "near_zero": 0.5},
        {"average": "logs"},
        {"shared_norm": True},
    ],
)
def test_mimv_passes_its_settings_on(settings: dict[str, Any]) -> None:
    pair = one_batch("mimv")
    assert assert_by_hand("mimv", build_method("mimv", **settings), pair).isfinite()


def test_every_setting_of_mimv_changes_its_loss() -> None:
    pair = one_batch("mimv")
    losses = {}
    for change in (
        {},
        {"temperature": 0.7},
        {"high": 0.3},
        {"low": 0.3},
        {"near_zero": 0.5},
        {"near_zero": 0.5, "spare_positives": True},
        {"average": "logs"},
        {"shared_norm": True},
        {"self_term": "published"},
    ):
        method = build_method("mimv", **{"high": None, "low": None, "near_zero": None, **change})
        if change.get("self_term"):  # the two differ by rounding where no bound is on
            method.settings = replace(method.settings, high=0.9)
        losses[str(change)] = method.loss(method.online, pair.sides, None)[0].item()
    assert len(set(losses.values())) == len(losses), losses


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_simclr_passes_its_temperature_on(temperature: float) -> None:
    assert_by_hand("simclr", build_method("simclr", temperature=temperature), one_batch("two-view"))


@pytest.mark.parametrize("recipe", ["mimv", "multi-crop"])
@pytest.mark.parametrize("name", WITH_IDS)
def test_ids_reach_the_loss(name: str, recipe: str) -> None:
    pair = one_batch(recipe)
    ids = torch.tensor([0, 1, 2, 0, 0, 1, 3, 4])
    changes = {"near_zero": None} if name == "mimv" else {}
    with_ids = assert_by_hand(name, build_method(name, **changes), pair, ids)
    without = assert_by_hand(name, build_method(name, **changes), pair)
    assert with_ids != without


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", METHODS)
def test_one_forward_pass_per_view(name: str, recipe: str) -> None:
    method, pair = build_method(name), one_batch(recipe)
    has_teacher = hasattr(method, "teacher")
    calls = {"online": 0, "teacher": 0}

    def count(who: str) -> Any:
        def hook(*_: Any) -> None:
            calls[who] += 1

        return hook

    method.online.backbone.register_forward_hook(count("online"))
    if hasattr(method.online, "twin"):
        method.online.twin.backbone.register_forward_hook(count("online"))
    if has_teacher:
        method.teacher.backbone.register_forward_hook(count("teacher"))
    method.loss(method.online, pair.sides, None)
    views, side_b, local = VIEWS[recipe]
    if name in ONE_WAY:
        assert calls == {"online": views - side_b, "teacher": side_b}
    else:
        assert calls == {"online": views, "teacher": views - local if has_teacher else 0}


@pytest.mark.parametrize("name", METHODS)
def test_the_online_network_is_called_once_with_all_sides(name: str) -> None:
    """As DistributedDataParallel wants it, through the callable that is given."""
    method, pair = build_method(name), one_batch("multi-crop")
    seen: list[int] = []

    def online(sides: Sequence[Sequence[Tensor]]) -> Embeddings:
        seen.append(len(sides))
        return method.online(sides)

    method.loss(online, pair.sides, None)
    assert seen == [7 if name in ONE_WAY else 8]


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


WITH_TEACHER = [name for name in METHODS if hasattr(new_method(name), "teacher")]


def test_these_have_a_teacher() -> None:
    assert {"byol", "dino", "mimv", "moco-v3", "ressl"} <= set(WITH_TEACHER)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_new_teacher_equals_the_online_network(name: str, backbone: str) -> None:
    method = new_method(name, backbone)
    teacher, online = method.teacher.state_dict(), method.online.state_dict()
    for key, tensor in teacher.items():
        assert torch.equal(tensor, online[key]), key
    # A predictor is the online network's alone.
    assert all(key.startswith("head.") for key in online.keys() - teacher.keys())
    shared = {t.data_ptr() for t in method.teacher.parameters()} & {t.data_ptr() for t in method.online.parameters()}
    assert not shared


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_moves_in_begin_step_only_and_by_its_momentum(name: str) -> None:
    method, pair = build_method(name, momentum=0.8), one_batch("two-view")
    optimizer = torch.optim.SGD(method.online.parameters(), lr=0.1)
    for step in range(4):
        before = {key: p.clone() for key, p in method.teacher.named_parameters()}
        online = {key: p.detach().clone() for key, p in method.online.named_parameters()}
        method.begin_step(step, 4)
        momentum = 0.8 if name in CONSTANT_MOMENTUM else 1 - 0.2 * (math.cos(math.pi * step / 4) + 1) / 2
        moved = {key: p.clone() for key, p in method.teacher.named_parameters()}
        for key, p in moved.items():
            torch.testing.assert_close(p, momentum * before[key] + (1 - momentum) * online[key])
        assert any(not torch.equal(p, before[key]) for key, p in moved.items())
        method.loss(method.online, pair.sides, None)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        for key, p in method.teacher.named_parameters():
            assert torch.equal(p, moved[key])


def directions(weight: Tensor) -> Tensor:
    return nn.functional.normalize(weight.detach().clone(), dim=1)


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: Lars(p, lr=0.5, momentum=0.9, weight_decay=0.1),
    ],
    ids=["adamw", "sgd", "lars"],
)
@pytest.mark.parametrize("name", WITH_PROTOTYPES)
def test_prototypes_turn_only_when_they_are_no_longer_frozen(name: str, build: Any) -> None:
    method, pair = new_method(name, freeze_prototypes=0.5), one_batch("two-view")
    optimizer = build(method.online.parameters())
    for step in range(6):
        before = directions(method.online.head.weight)
        other = [p.detach().clone() for p in method.online.backbone.parameters()]
        method.begin_step(step, 6)
        method.loss(method.online, pair.sides, None)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        turned = (directions(method.online.head.weight) - before).abs().max()
        assert turned < 1e-6 if step < 3 else turned > 1e-5, step
        assert any(not torch.equal(p, q) for p, q in zip(method.online.backbone.parameters(), other, strict=True))


@pytest.mark.parametrize("freeze", [True, False])
def test_moco_v3_leaves_a_vits_patch_embedding_as_it_is(freeze: bool) -> None:
    method = new_method("moco-v3", "test_vit", freeze_patch_embedding=freeze)
    pair = one_batch("two-view")
    first = {key: p.detach().clone() for key, p in method.online.named_parameters()}
    optimizer = torch.optim.AdamW(method.online.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        method.begin_step(step, 3)
        method.loss(method.online, pair.sides, None)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    method.begin_step(0, 3)
    for key, p in method.online.named_parameters():
        kept = freeze and key.startswith("backbone.patch_embed.")
        assert torch.equal(p, first[key]) is kept, key
        if kept:
            assert torch.equal(p, method.teacher.get_parameter(key)), key
    assert any(key.startswith("backbone.patch_embed.") for key in first)


def test_moco_v3_trains_all_of_a_resnet() -> None:
    assert all(p.requires_grad for p in new_method("moco-v3").online.parameters())


#: By default: projector and its widths, head and its widths. A letter a layer: linear, BatchNorm, ReLU, GELU, in
#: lower case without a bias; an integer: that many prototypes.
HEADS: dict[tuple[str, str], tuple[str, list[int], str | int | None, list[int]]] = {
    ("barlow-twins", "test_resnet"): ("lBRlBRL", [2048, 2048, 2048], None, []),
    ("byol", "test_resnet"): ("lBRL", [4096, 256], "lBRL", [4096, 256]),
    ("dino", "test_resnet"): ("LGLGL", [2048, 2048, 256], 4096, []),
    ("mimv", "test_resnet"): ("lBRlBRlB", [96, 96, 24], None, []),
    ("moco-v3", "test_resnet"): ("lBRlb", [4096, 256], "lBRL", [4096, 256]),
    ("moco-v3", "test_vit"): ("lBRlBRlb", [4096, 4096, 256], "lBRlb", [4096, 256]),
    ("nnclr", "test_resnet"): ("lBRlBRlB", [2048, 2048, 256], "lBRL", [4096, 256]),
    ("ressl", "test_resnet"): ("LRL", [4096, 256], None, []),
    ("sdclr", "test_resnet"): ("lBRlBRlB", [512, 512, 128], None, []),
    ("simclr", "test_resnet"): ("LRL", [2048, 256], None, []),
    ("simclr-ts", "test_resnet"): ("LRL", [512, 128], None, []),
    ("simsiam", "test_resnet"): ("lBRlBRlb", [2048, 2048, 2048], "lBRL", [512, 2048]),
    ("swav", "test_resnet"): ("lBRL", [2048, 128], 3000, []),
    ("vicreg", "test_resnet"): ("lBRlBRL", [2048, 2048, 2048], None, []),
}


def layers(head: Any) -> tuple[str, list[int]]:
    letters = {nn.Linear: "l", nn.BatchNorm1d: "b", nn.ReLU: "R", nn.GELU: "G"}
    kinds = [
        letters[type(layer)] if getattr(layer, "bias", None) is None else letters[type(layer)].upper()
        for layer in head
    ]
    return "".join(kinds), [layer.out_features for layer in head if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize(("name", "backbone"), HEADS)
def test_heads_are_the_published_ones(name: str, backbone: str) -> None:
    network = build_backbone(BackboneSpec(backbone, size=16))
    with torch.device("meta"):
        method = METHODS[name].build(network, METHODS[name].settings())
    kinds, widths, head, head_widths = HEADS[name, backbone]
    assert layers(method.online.projector) == (kinds, widths)
    assert method.online.projector[0].in_features == network.num_features
    if isinstance(head, int):
        assert method.online.head.weight.shape == (head, widths[-1])
    elif head is None:
        assert method.online.head is None
    else:
        assert layers(method.online.head) == (head, head_widths)
        assert method.online.head[0].in_features == widths[-1]


@pytest.mark.parametrize(("name", "length"), [("nnclr", 65536), ("ressl", 65536), ("swav", 3840)])
def test_queues_have_their_published_length(name: str, length: int) -> None:
    assert METHODS[name].settings().queue == length


@pytest.mark.parametrize("name", METHODS)
def test_a_method_goes_on_from_its_state(name: str) -> None:
    """The teacher, queue and centre are in it."""
    pair = one_batch("two-view")
    method = build_method(name)
    method.begin_step(0, STEPS)
    method.loss(method.online, pair.sides, None)
    other = new_method(name)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.fill_(0.5) if tensor.is_floating_point() else tensor.fill_(0)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    losses = []
    for each in (method, other):
        each.begin_step(STEP, STEPS)
        losses.append(each.loss(each.online, pair.sides, None)[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("settings", "widths"),
    [({}, [96, 96, 96, 24]), ({"projector_hidden": 40, "projector_out": 10}, [96, 40, 40, 10])],
)
def test_mimv_projects_by_three_normed_layers_to_a_quarter(settings: dict[str, Any], widths: list[int]) -> None:
    method = Mimv(build_backbone(BackboneSpec("test_resnet", size=16)), MimvSettings(**settings))
    projector: Any = method.online.projector
    assert [type(layer).__name__ for layer in projector] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + [
        "Linear",
        "BatchNorm1d",
    ]
    linear = projector[0::3]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == widths


def test_simclr_projects_by_two_plain_layers() -> None:
    method = Simclr(build_backbone(BackboneSpec("test_resnet", size=16)), SimclrSettings())
    projector: Any = method.online.projector
    assert [type(layer).__name__ for layer in projector] == ["Linear", "ReLU", "Linear"]
    assert [p.shape[0] for p in projector.parameters() if p.ndim == 2] == [2048, 256]


@pytest.mark.parametrize("name", METHODS)
def test_local_sides_are_used(name: str) -> None:
    pair = one_batch("multi-crop", local_crops=2)
    assert [view.shape[-1] for side in pair.sides for view in side] == [16, 16, 12, 12]
    losses = []
    for sides in (pair.sides, pair.sides[:3], pair.sides[:2]):
        method = build_method(name)
        losses.append(method.loss(method.online, sides, None)[0].item())
    assert len(set(losses)) == 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shared_norm_is_one_pass_per_side(recipe: str) -> None:
    """Loss, gradients and running statistics of both networks are those of sides concatenated by hand."""
    method, pair = build_method("mimv", shared_norm=True), one_batch(recipe)
    assert method.online.shared_norm
    assert method.teacher.shared_norm
    rows: dict[str, list[int]] = {"online": [], "teacher": []}
    for who, seen in rows.items():
        encoder = getattr(method, who)
        encoder.backbone.register_forward_hook(lambda _, given, __, seen=seen: seen.append(len(given[0])))
    method.loss(method.online, pair.sides, None)
    side_a, side_b, *local = (len(side) * BATCH for side in pair.sides)
    assert rows == {"online": [side_a, *local], "teacher": [side_b]}
    assert_by_hand("mimv", build_method("mimv", shared_norm=True), pair, step=STEP)


def two_encoders(norm: bool) -> tuple[Encoder, Encoder]:
    """Of the same weights, one with a pass per view and one with a shared batch."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU(), nn.Flatten()]
    separate = Encoder(nn.Sequential(*layers), nn.Linear(216, 5))
    twin = copy.deepcopy(separate)
    return separate, Encoder(twin.backbone, twin.projector, shared_norm=True)


def unlike_views() -> list[Tensor]:
    """Brightness and contrast differ from view to view, and so do their statistics."""
    views = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return [views[0], 3 * views[1] + 2, 0.2 * views[2] - 1]


def test_a_shared_norm_differs_from_separate_passes_by_its_statistics() -> None:
    (separate, shared), views = two_encoders(norm=True), unlike_views()
    apart, together = (encoder([views]).z[0] for encoder in (separate, shared))
    assert (apart - together).abs().max() > 0.1
    # A side of one view has nothing to share.
    torch.testing.assert_close(separate([views[:1]]).z[0], shared([views[:1]]).z[0], rtol=0, atol=0)
    assert int(separate.backbone.get_buffer("1.num_batches_tracked")) == 4
    assert int(shared.backbone.get_buffer("1.num_batches_tracked")) == 2


@pytest.mark.parametrize(("norm", "training"), [(False, True), (False, False), (True, False)])
def test_a_shared_norm_changes_nothing_without_batch_statistics(norm: bool, training: bool) -> None:
    (separate, shared), views = two_encoders(norm), unlike_views()
    for encoder in (separate, shared):
        encoder.train(training)
        encoder([views, views[:1]]).z[0].square().sum().backward()
    torch.testing.assert_close(shared([views, views[:2]]).z, separate([views, views[:2]]).z)
    for mine, other in zip(shared.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_a_shared_norm_refuses_views_of_several_sizes() -> None:
    (separate, shared) = (Encoder(nn.AdaptiveAvgPool2d(1), nn.Flatten(), shared_norm=on) for on in (False, True))
    large, small = torch.ones(2, 3, 8, 8), torch.ones(2, 3, 6, 6)
    assert separate([[large, small]]).z[0].shape == (2, 3)
    assert [tuple(z.shape) for z in shared([[large, large], [small]]).z] == [(2, 3), (2, 3)]
    with pytest.raises(InputError, match=r"shared_norm.*\(2, 3, 6, 6\) and \(2, 3, 8, 8\), expected one"):
        shared([[large, small]])


@pytest.mark.parametrize("has_head", [False, True])
def test_views_are_summed_in_order(has_head: bool) -> None:
    v = [torch.full((2, 1), 10.0**i) for i in range(6)]

    class Double(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            return 2 * given

    class Plus(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            return given + 1

    views = [view[..., None, None] for view in v]  # images
    encoder = Encoder(Double(), nn.Flatten(), Plus() if has_head else None)
    z, p = encoder([(views[0], views[1]), (views[2],), (views[3], views[4], views[5])])
    assert [float(side[0]) for side in z] == [22, 200, 222000]
    assert [float(side[0]) for side in p] == ([23, 201, 222001] if has_head else [22, 200, 222000])


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_sdclrs_twin_lacks_the_smallest_weights_and_has_norms_of_its_own(backbone: str) -> None:
    online = new_method("sdclr", backbone).online
    online.prune(0.7)
    weights = [online.get_parameter(name).detach() for name in online.prunable]
    kept = torch.cat([mask.flatten() for mask in online.masks.buffers()]).bool()
    sizes = torch.cat([weight.abs().flatten() for weight in weights])
    assert sizes[kept].min() > sizes[~kept].max()
    assert float(kept.float().mean()) == pytest.approx(0.3, abs=1e-3)
    # All convolutions and linear layers, nothing of the norms, positions or the projector.
    kinds = (nn.Conv2d, nn.Linear)
    assert len(weights) == sum(isinstance(module, kinds) for module in online.backbone.modules())
    for name, p in online.twin.named_parameters():
        owner = type(online.twin.get_submodule(name.rpartition(".")[0])).__name__
        assert (p is not online.get_parameter(name)) is ("Norm" in owner), name


def test_sdclr_prunes_anew_every_so_often() -> None:
    method = new_method("sdclr", prune_every=0.2, pruned=0.5)
    changed = []
    for step in range(10):
        before = [mask.clone() for mask in method.online.masks.buffers()]
        with torch.no_grad():
            for name in method.online.prunable:
                weight = method.online.get_parameter(name)
                weight.copy_(torch.randn_like(weight))
        method.begin_step(step, 10)
        after = list(method.online.masks.buffers())
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    assert changed == [True, False] * 5
