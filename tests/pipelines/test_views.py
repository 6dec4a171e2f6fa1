"""PairViews alone: every layout and type alike, partners from the batch, its step, ranks, autocast, compilation."""

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from amimv import InputError
from amimv.pipelines import ImageStore, PairLoader, PairViews, constants, get_recipe
from amimv.pipelines.views import Sides

MEAN, STD = (0.6, 0.5, 0.4), (0.2, 0.25, 0.3)
B = 8


def build_images(b: int = B, channels: int = 3, height: int = 20, width: int = 20, seed: int = 0) -> Tensor:
    """``(B, H, W, C)`` bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, height, width, channels), dtype=torch.uint8, generator=generator)


def build_views(recipe: str = "mimv", channels: int = 3, **settings: Any) -> PairViews:
    mean, std = (tuple(values[c % 3] for c in range(channels)) for values in (MEAN, STD))
    return PairViews(recipe, mean, std, **settings)


def flat(sides: Sides) -> list[Tensor]:
    return [view for side in sides for view in side]


def assert_same(got: Sides, expected: Sides, atol: float = 0.0) -> None:
    assert [len(side) for side in got] == [len(side) for side in expected]
    for a, b in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def differ(got: Sides, other: Sides, view: int = 1) -> bool:
    """Whether an augmented view differs in every image."""
    a, b = (flat(sides)[view].flatten(1) for sides in (got, other))
    return bool((a != b).any(dim=1).all())


def shown(whole: Tensor, images: Tensor) -> list[int]:
    """Which of ``images`` (bytes) each normalised, whole view is."""
    stored = (images / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    distances = (whole[:, None] - stored.permute(0, 3, 1, 2)[None]).abs().flatten(2).amax(2)
    assert (distances.amin(1) < 1e-4).all()
    return distances.argmin(1).tolist()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": lambda x: x.permute(0, 3, 1, 2),
    "contiguous channels first": lambda x: x.permute(0, 3, 1, 2).contiguous(),
    "uint16": lambda x: (x.int() * 257).to(torch.uint16),
    "float": lambda x: x / 255,
    "float64": lambda x: x.double() / 255,
    "float channels first": lambda x: (x / 255).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_types_give_the_same_sides(kind: str) -> None:
    images = build_images()
    expected = build_views()(images)
    assert [view.shape for view in flat(expected)] == [(B, 3, 20, 20)] * 4
    assert {view.dtype for view in flat(expected)} == {torch.float32}
    assert_same(build_views()(KINDS[kind](images)), expected, atol=2e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize(("height", "width", "size"), [(20, 20, None), (24, 36, 16), (30, 18, 12)])
def test_any_channels_and_shape(channels: int, height: int, width: int, size: int | None) -> None:
    images = build_images(channels=channels, height=height, width=width)
    last = build_views("amimv", channels, size=size)(images)
    assert_same(build_views("amimv", channels, size=size)(images.permute(0, 3, 1, 2)), last)
    assert {view.shape for view in flat(last)} == {(B, channels, size or 20, size or 20)}
    assert all(view.isfinite().all() for view in flat(last))


def test_where_both_axes_could_be_channels() -> None:
    images = build_images(height=3, width=3)
    first = build_views("A(x) | A(x)")(images)
    assert_same(build_views("A(x) | A(x)", channels_last=False)(images), first)
    assert_same(build_views("A(x) | A(x)", channels_last=True)(images.permute(0, 2, 3, 1)), first)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_a_declared_range_of_values(dtype: torch.dtype) -> None:
    """Twelve bits in sixteen; what lies outside is clamped."""
    values = build_images().to(torch.float32) * 20  # up to 5100
    views = build_views(value_range=(100, 4095))
    assert_same(views(values.to(dtype)), build_views()(((values - 100) / 3995).clamp(0, 1)), atol=2e-5)


@pytest.mark.parametrize("partners", [1, 2, 4])
@pytest.mark.parametrize("b", [5, 8, 33])
def test_partners_from_the_batch(b: int, partners: int) -> None:
    images = build_images(b)
    slots = "+".join(f"N(y{k})" for k in range(1, partners + 1))
    views = build_views(f"N(x) | {slots}")
    seen = []
    for _ in range(12):
        (anchors,), others = views(images)
        assert shown(anchors, images) == list(range(b))
        drawn = [shown(other, images) for other in others]
        assert all(len({i, *own}) == partners + 1 for i, own in enumerate(zip(*drawn, strict=True)))
        seen.append(drawn[0])
    assert len(set(map(tuple, seen))) > 5  # anew in each step
    if b == 8 and partners == 1:
        pairs = [build_views("N(x) | N(y)", seed=seed)(images)[1][0] for seed in range(200)]
        counts = torch.zeros(b, b).index_put_(
            (torch.arange(b).repeat(200), torch.tensor([shown(pair, images) for pair in pairs]).flatten()),
            torch.ones(()),
            accumulate=True,
        )
        assert counts.diagonal().sum() == 0
        assert counts[~torch.eye(b, dtype=torch.bool)].sub(200 / 7).abs().max() < 25


def test_given_partners() -> None:
    x, y = build_images(), build_images(seed=1)
    views = build_views()
    (whole_x, augmented_y), (augmented_x, whole_y) = views(x, y.permute(0, 3, 1, 2))
    assert shown(whole_x, x) == shown(whole_y, y) == list(range(B))
    assert not torch.equal(augmented_x, augmented_y)
    # A slot's views are functions of its own images.
    again = build_views()(x, x)
    assert torch.equal(again[0][0], whole_x)
    assert torch.equal(again[1][0], augmented_x)
    assert not torch.equal(again[0][1], augmented_y)


def test_the_step_counts_in_training_alone_and_is_saved() -> None:
    images, views = build_images(), build_views()
    outputs = [views(images) for _ in range(3)]
    assert views.step == 3
    assert differ(outputs[0], outputs[1])
    assert differ(outputs[1], outputs[2])
    state = deepcopy(nn.Sequential(views).state_dict())
    assert state == {"0.step": torch.tensor(3)}
    later = [views(images) for _ in range(2)]
    resumed = nn.Sequential(build_views())
    resumed.load_state_dict(state)
    for expected in later:
        assert_same(resumed(images), expected)
    views.eval()
    assert_same(views(images), views(images))
    assert views.step == 5


@pytest.mark.parametrize("make", [int, torch.tensor, lambda step: torch.full((B,), step)])
def test_the_step_as_an_argument(make: Callable[[int], Any]) -> None:
    images, views, counted = build_images(), build_views(), build_views()
    expected = [counted(images) for _ in range(3)]
    for step in (2, 0, 1):
        assert_same(views(images, step=make(step)), expected[step])
    assert views.step == 0


def test_ranks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    images = build_images(1).expand(B, -1, -1, -1)
    ranks = [build_views("A(x) | A'(x)", rank=rank)(images) for rank in (0, 1)]
    assert differ(*ranks, view=0)
    # Two ranks' places lie side by side in the global batch.
    whole = build_views("A(x) | A'(x)")(images.repeat(2, 1, 1, 1))
    assert_same(tuple((torch.cat([a[0], b[0]]),) for a, b in zip(*ranks, strict=True)), whole, atol=1e-6)
    assert_same(build_views("A(x) | A'(x)")(images), ranks[0])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert_same(build_views("A(x) | A'(x)")(images), ranks[1])
    assert_same(build_views("A(x) | A'(x)", rank=0)(images), ranks[0])


def test_seeds_differ() -> None:
    assert differ(build_views(seed=0)(build_images()), build_views(seed=1)(build_images()))


@pytest.mark.parametrize("recipe", ["amimv", "two-view", "amimv-strength"])
def test_autocast_changes_nothing(recipe: str) -> None:
    images = build_images()
    with torch.autocast("cpu", torch.bfloat16):
        inside = build_views(recipe)(images)
    assert_same(inside, build_views(recipe)(images))


def test_no_parameters_and_no_gradient() -> None:
    views = build_views()
    assert not list(views.parameters())
    images = (build_images() / 255).requires_grad_()
    assert not any(view.requires_grad for view in flat(views(images)))
    assert views.to(torch.float64).step.dtype == torch.int64


@pytest.mark.slow
def test_compiled_within_a_users_function() -> None:
    images, views = build_images(), build_views("A(x)+N(y) | N(x)+A(y)")

    @torch.compile(backend="eager", fullgraph=True)  # generating the code takes a minute
    def embed(batch: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.stack(side).mean(0) for side in views(batch))

    for step in range(2):
        expected = [torch.stack(side).mean(0) for side in build_views("A(x)+N(y) | N(x)+A(y)")(images, step=step)]
        for got, eager in zip(embed(images), expected, strict=True):
            torch.testing.assert_close(got, eager, rtol=0, atol=1e-4)
    assert views.step == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("recipe", ["amimv", "multi-crop", "A(x)+H(y2) | S(x)+N(y)"])
def test_stays_on_the_images_device(recipe: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is only pretended, which cannot be waited for."""
    monkeypatch.setattr(constants, "KEPT", {})
    with FakeTensorMode():
        images = torch.empty(B, 3, 28, 28, dtype=dtype, device="cuda:0")
        for views in (build_views(recipe, size=28), build_views(recipe, size=28).to("cuda:0")):
            assert {view.device for view in flat(views(images))} == {images.device}


@pytest.mark.slow
def test_a_compiled_graph_keeps_nothing_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In CUDA graphs its memory is written again."""
    monkeypatch.setattr(constants, "KEPT", {})
    torch.compile(build_views("A(x) | A'(x)"), backend="eager")(build_images())
    assert constants.KEPT == {}


@pytest.mark.parametrize("recipe", ["amimv", "multi-crop", "A(x)+H(y2) | S(x)+N(y)"])
def test_views_are_those_of_the_pair_loader(recipe: str) -> None:
    store = ImageStore.from_arrays(build_images(40, height=20, width=26))
    views = PairViews(recipe, store.mean, store.std, size=20, seed=7)
    for pair in PairLoader(store, recipe, B, seed=7).epoch(0):
        images = store.gather(pair.indices)
        assert_same(views(*images), pair.sides)
    assert views.step == 5


def test_statistics_of_a_recipe() -> None:
    bound = get_recipe("mimv", size=20).with_statistics(MEAN, STD)
    assert_same(PairViews(bound)(build_images()), build_views()(build_images()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "Q(x) | A(y)"}, "'Q' at character 1, expected one of N, A, H, S, L"),
        ({"recipe": "A(x)"}, "expected '|' and another side"),
        ({"recipe": "mimw"}, "unknown recipe 'mimw'"),
        ({"recipe": "N(x) | A(y2)"}, "leaves out an image"),
        ({"mean": None}, "mean and std"),
        ({"std": None}, "mean and std"),
        ({"std": (0.1, 0.2)}, "mean"),
        ({"std": (0.1, 0.2, 0.0)}, "std"),
        ({"backend": "torch"}, "unknown backend 'torch'"),
        ({"recipe": get_recipe(), "size": 12}, "size is given for a Recipe"),
        ({"backend": "dali", "compile": True}, "the dali backend cannot be compiled"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        PairViews(**{"mean": MEAN, "std": STD, **settings})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([build_images(channels=4)], "images are (8, 20, 20, 4)"),
        ([build_images()[0]], "images are (20, 20, 3), expected (B, C, H, W) or (B, H, W, C)"),
        ([build_images(1)], "a pair needs 2 distinct images, but the batch has 1"),
        ([build_images()] * 3, "recipe 'mimv' takes 2 batches of images, or one; got 3"),
        ([], "recipe 'mimv' takes 2 batches of images, or one; got 0"),
        ([build_images(), build_images(4)], "differ"),
        ([build_images(), build_images(height=24)], "differ"),
        ([build_images().int()], "images are torch.int32, expected uint8, uint16, or float"),
        ([build_images().tolist()], "images are a list, expected a tensor"),
    ],
)
def test_bad_batches(batches: list[Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        build_views()(*batches)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_importing_the_pipelines_loads_torch_and_numpy_alone() -> None:
    heavy = {"timm", "sklearn", "scipy", "pandas", "kornia", "nvidia", "medmnist", "torchvision", "accelerate"}
    heavy |= {"matplotlib", "datasets", "PIL", "pydicom", "tyro", "yaml", "lightly", "pytorch_lightning"}
    code = f"import sys, amimv.pipelines; print(*sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
