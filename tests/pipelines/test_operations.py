"""What holds for every operation, whatever it does: its lane, its settings, its draw, and that it can be left out."""

import math
import sys
from dataclasses import Field, fields, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from amimv import InputError
from amimv.pipelines import Key, ViewPolicy, build_policy, draw_view_params, kornia_backend, render
from amimv.pipelines.operations import (
    OPERATIONS,
    PIXELS,
    Colour,
    ColourChange,
    Flip,
    Geometry,
    Operation,
    Pixels,
    Source,
)
from amimv.pipelines.policy import operation_settings
from amimv.pipelines.rng import uniforms

KEY = Key(seed=3, stream=1000, epoch=2, step=5)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
EXAMPLES = [(kind, name) for kind in OPERATIONS for name in kind.examples]
FIELDS = [(kind, field) for kind in OPERATIONS for field in fields(kind)]
#: First uniform and how many: published, so to say, as a seed's numbers are.
LANES = {
    "Crop": (0, 4),
    "Flip": (4, 2),
    "Rotation": (6, 1),
    "Jitter": (7, 5),
    "Grey": (12, 1),
    "Blur": (13, 2),
    "Solarise": (15, 1),
    "Translation": (16, 2),
    "Shear": (18, 2),
    "Gamma": (20, 2),
    "Noise": (22, 3),
    "Erasing": (25, 5),
    "Sharpness": (30, 2),
    "Equalise": (32, 1),
    "Elastic": (33, 33),
}
MANY = 20_000


def by_name(value: Any) -> str | None:
    if isinstance(value, Field):
        return value.name
    return value.__name__ if isinstance(value, type) else None


def everything() -> dict[str, Any]:
    """The settings of all examples."""
    return {name: value for kind, example in EXAMPLES for name, value in kind.examples[example].items()}


def policy_of(operation: Operation, size: int | None = None) -> ViewPolicy:
    return ViewPolicy(size, MEAN, STD, (operation,))


def pictures(batch: int, size: int = 28) -> Tensor:
    """Smooth ones, ``(B, size, size, 3)`` ``uint8``: the further a pixel moves the more it changes."""
    coarse = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(size))
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    return (255 * smooth).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def change(operation: Operation, batch: int = 64) -> float:
    """By how much it changes the view's pixels, in the mean."""
    images = pictures(batch)
    views = [
        render(images, draw_view_params(policy, torch.arange(batch), KEY))
        for policy in (policy_of(operation), policy_of(operation).normalised())
    ]
    return (views[0] - views[1]).abs().mean().item()


def draw(operation: Any, u: Tensor) -> list[Tensor]:
    """What it draws from ``(B, uniforms)`` numbers, as ``(B, K)``."""
    found = operation.draw(u.unbind(1), Source(MEAN))
    parts = found if isinstance(found, ColourChange) else (found,)
    return [torch.view_as_real(part) if part.is_complex() else part.flatten(1) if part.ndim > 1 else part[:, None]
            for part in parts if part is not None]  # fmt: skip


# --- lanes and settings ---------------------------------------------------------------------------


def test_lanes_do_not_overlap_and_never_move() -> None:
    assert {kind.__name__: (kind.lane, kind.uniforms) for kind in OPERATIONS} == LANES
    taken = [number for lane, count in LANES.values() for number in range(lane, lane + count)]
    assert len(taken) == len(set(taken))
    assert all({"lane", "uniforms", "examples"} <= vars(kind).keys() for kind in OPERATIONS)


def test_no_two_operations_share_a_name() -> None:
    names = [field.name for _, field in FIELDS]
    assert len(names) == len(set(names)) == len(operation_settings())
    examples = [name for _, name in EXAMPLES]
    assert len(examples) == len(set(examples))
    keys = [kind.key() for kind in OPERATIONS]
    assert len(keys) == len(set(keys))


def test_operations_are_in_their_stages_order() -> None:
    stages = [0 if issubclass(kind, Geometry) else 2 if issubclass(kind, Pixels) else 1 for kind in OPERATIONS]
    assert stages == sorted(stages)
    assert tuple(kind for kind in OPERATIONS if issubclass(kind, Pixels)) == PIXELS
    given = [kind(**next(iter(kind.examples.values()))) for kind in OPERATIONS]
    assert ViewPolicy(operations=tuple(given[::-1])).operations == tuple(given)


@pytest.mark.parametrize("kind", OPERATIONS, ids=by_name)
def test_the_defaults_change_nothing(kind: type[Operation]) -> None:
    assert not kind().active
    assert policy_of(kind()).operations == ()
    assert all(field.metadata["help"] for field in fields(kind))


@pytest.mark.parametrize(("kind", "name"), EXAMPLES, ids=by_name)
def test_every_example_changes_a_picture(kind: type[Operation], name: str) -> None:
    operation = kind(**kind.examples[name])
    assert operation.active
    assert change(operation, 16) > 0.01
    policy = policy_of(operation)
    assert policy == build_policy(kind.examples[name], None, MEAN, STD)
    assert build_policy(policy.settings(), None, MEAN, STD) == policy == policy.changed()


@pytest.mark.parametrize(("kind", "name"), EXAMPLES, ids=by_name)
def test_a_soft_counterpart_is_weaker(kind: type[Operation], name: str) -> None:
    operation = kind(**kind.examples[name])
    soft = operation.soft()
    kept = () if soft is None else (soft,)
    assert policy_of(operation).soft().operations == kept
    if kind is Flip:  # which has no strength
        assert soft == operation
    elif soft is not None:
        assert change(soft) < 0.95 * change(operation)


def wrong_values(field: "Field[Any]") -> list[Any]:
    """Outside the range, at an end that is not in it, not a number, and of another shape."""
    low, high, above = (field.metadata[name] for name in ("low", "high", "above"))
    wrong = [
        math.nan,
        math.inf,
        -math.inf,
        low - 0.5,
        *([low] if above else []),
        *([high + 0.5] if high < math.inf else []),
    ]
    if not isinstance(field.default, tuple):
        return [*wrong, (field.default, field.default), "1", None]
    first, last = field.default
    pairs = [pair for value in wrong for pair in ((value, last), (first, value))]
    return [*pairs, (last + 0.25, last), first, (first,), (first, last, last), (str(first), last)]


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=by_name)
def test_wrong_settings_end_in_one_line(kind: type[Operation], field: "Field[Any]") -> None:
    for value in wrong_values(field):
        for make in (lambda value: kind(**{field.name: value}), lambda value: build_policy({field.name: value})):
            with pytest.raises(InputError, match=field.name) as error:
                make(value)
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 200


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=by_name)
def test_the_ends_of_a_range_are_in_it(kind: type[Operation], field: "Field[Any]") -> None:
    low, high, above = (field.metadata[name] for name in ("low", "high", "above"))
    ends = ([] if above else [low]) + ([high] if high < math.inf else [])
    for end in ends:
        value = (end, end) if isinstance(field.default, tuple) else end
        if field.name != "crop_max":  # which is not below crop_min
            assert getattr(kind(**{field.name: value}), field.name) == value


def test_unknown_settings_and_operations_given_twice() -> None:
    with pytest.raises(InputError, match="unknown setting of an operation 'hflp': did you mean hflip") as error:
        build_policy({"hflp": 0.5})
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="operation Flip is given 2 times, expected at most once"):
        ViewPolicy(operations=(Flip(0.5), Flip(0.1)))


# --- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_rank_draws_its_slice_of_everything(channels: int) -> None:
    policy = build_policy(everything(), 28, MEAN[:channels], STD[:channels])
    assert {type(operation) for operation in policy.operations} == set(OPERATIONS)
    positions = torch.arange(48)
    whole = draw_view_params(policy, positions, KEY)
    assert whole.drawn().keys() == {"affine", "colour", *(kind.key() for kind in PIXELS)}
    for start in range(0, 48, 16):
        part = draw_view_params(policy, positions[start : start + 16], KEY)
        for name, value in whole.drawn().items():
            assert torch.equal(part.drawn()[name], value[start : start + 16]), name


def drawn(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def squared(value: Tensor | None) -> Tensor:
    """``(B, 2, 3)`` as ``(B, 3, 3)``."""
    affine = drawn(value)
    return torch.cat([affine, affine.new_tensor([0.0, 0.0, 1.0]).expand(len(affine), 1, 3)], dim=1).double()


def test_numbers_are_an_operations_own_whatever_else_is_drawn() -> None:
    positions = torch.arange(64)
    policy = build_policy(everything(), 28, MEAN, STD)
    whole = draw_view_params(policy, positions, KEY)
    matrix = torch.eye(3, dtype=torch.float64).expand(64, 3, 3)
    for operation in policy.operations:
        own = uniforms(KEY, positions, operation.lane + operation.uniforms)[:, operation.lane :].unbind(1)
        alone = draw_view_params(policy_of(operation, 28), positions, KEY)
        if isinstance(operation, Pixels):
            assert torch.equal(operation.draw(own, Source(MEAN)), whole.pixels[operation.key()])
            assert torch.equal(alone.pixels[operation.key()], whole.pixels[operation.key()])
        elif isinstance(operation, Geometry):
            assert torch.equal(drawn(alone.affine), operation.draw(own, Source(MEAN)))
            matrix = matrix @ squared(alone.affine)
        elif isinstance(operation, Colour):
            gain, offset, chroma = (
                getattr(operation.draw(own, Source(MEAN)), n) for n in ("gain", "offset", "chroma")
            )
            found = drawn(alone.colour).sum(2) - (0 if offset is None else offset)
            assert chroma is not None  # which leaves grey as it is, so that the rows' sums are the gain
            torch.testing.assert_close(found, (torch.ones(64) if gain is None else gain)[:, None].expand(64, 3))
        fewer = replace(policy, operations=tuple(other for other in policy.operations if other is not operation))
        without = draw_view_params(fewer, positions, KEY)
        assert without.pixels.keys() == whole.pixels.keys() - {operation.key()}
        assert all(torch.equal(value, whole.pixels[name]) for name, value in without.pixels.items())
    torch.testing.assert_close(squared(whole.affine), matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), EXAMPLES, ids=by_name)
def test_it_is_drawn_as_often_as_asked(kind: type[Operation], name: str) -> None:
    probability = next((field.name for field in fields(kind) if field.name.endswith("_p")), None)
    probability = name if kind is Flip else probability
    if probability is None:
        pytest.skip("always drawn")
    numbers = uniforms(KEY, torch.arange(MANY), kind.lane + kind.uniforms)[:, kind.lane :]
    for p in (0.3, 0.9):
        operation = kind(**{**kind.examples[name], probability: p})
        never = kind(**{**kind.examples[name], probability: 0.0})
        pairs = zip(draw(operation, numbers), draw(never, numbers), strict=True)
        drawn = torch.stack([(a != b).any(1) for a, b in pairs]).any(0)
        assert abs(drawn.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / MANY)


# --- pixels ---------------------------------------------------------------------------------------


def module_of(kind: type[Operation]) -> ModuleType:
    return sys.modules[kind.__module__]


def sometimes(kind: type[Pixels], batch: int) -> tuple[Tensor, Tensor]:
    """What half of a batch draws, and which samples do."""
    settings = dict(next(iter(kind.examples.values())))
    settings.update({name: 0.5 for name in settings if name.endswith("_p")})
    u = uniforms(KEY, torch.arange(batch), kind.uniforms)
    return kind(**settings).draw(u.unbind(1), Source(MEAN)), u[:, 0] < 0.5


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("kind", PIXELS, ids=by_name)
def test_the_host_and_a_device_give_the_same_pixels(
    kind: type[Pixels], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(12, size).permute(0, 3, 1, 2).float() / 255
    drawn, chosen = sometimes(kind, 12)
    assert 0 < chosen.sum() < 12
    views = []
    for host in (True, False):
        monkeypatch.setattr(module_of(kind), "on_host", lambda images, host=host: host, raising=False)
        views.append(kind.apply(images.clone(), drawn))
        torch.testing.assert_close(views[-1][~chosen], images[~chosen], rtol=0, atol=2e-6)
        changed = (views[-1] - images).abs().amax((1, 2, 3)) > 0.01
        assert changed[chosen].double().mean() > 0.5  # some of them weakly
        assert views[-1].min() >= 0
        assert views[-1].max() <= 1 + 1e-6
    torch.testing.assert_close(views[0], views[1], rtol=0, atol=1e-5)
    for share in (chosen, ~chosen):  # all of a batch, and none
        part = kind.apply(images[share].clone(), drawn[share])
        torch.testing.assert_close(part, views[1][share], rtol=0, atol=1e-5)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a value, and sizes that depend on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
        assert not str(func).removeprefix("aten.").startswith(waiting), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", OPERATIONS, ids=by_name)
def test_no_operation_waits_for_a_device(kind: type[Operation], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kornia_backend, module_of(kind)):
        monkeypatch.setattr(module, "on_host", lambda images: False, raising=False)  # as on a GPU
    policy = policy_of(kind(**next(iter(kind.examples.values()))), 28)
    images, positions = pictures(4), torch.arange(4)
    render(images, draw_view_params(policy, positions, KEY))  # constants are made once
    with NoWaiting():
        render(images, draw_view_params(policy, positions, KEY))


@pytest.mark.parametrize("kind", [kind for kind in PIXELS if not kind.has_dali_form()], ids=by_name)
def test_without_a_dali_form_one_line_says_so(kind: type[Pixels]) -> None:
    policy = policy_of(kind(**next(iter(kind.examples.values()))))
    images = pictures(2)
    with pytest.raises(InputError, match=rf"operation {kind.__name__} has no DALI form: use the kornia backend$"):
        render(images, draw_view_params(policy, torch.arange(2), KEY), "dali")
