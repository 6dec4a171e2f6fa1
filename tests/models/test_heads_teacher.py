"""Heads layer by layer, and the moving-average teacher against a plain loop."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from amimv.models.heads import Prototypes, build_mlp
from amimv.models.teacher import copy_teacher, cosine_momentum, update_teacher


def kinds(head: nn.Sequential) -> str:
    """One letter a layer, in lower case for a linear one or a norm without bias."""
    letters = {nn.Linear: "l", nn.BatchNorm1d: "b", nn.ReLU: "R", nn.GELU: "G"}
    return "".join(
        letters[type(layer)] if getattr(layer, "bias", None) is None else letters[type(layer)].upper()
        for layer in head
    )


@pytest.mark.parametrize(
    ("widths", "norm", "last_norm", "expected"),
    [
        ((512, 512, 512, 128), True, True, "lBRlBRlB"),  # MIMV's projector
        ((64, 2048, 256), False, False, "LRL"),  # SimCLR's
        ((256, 4096, 256), True, False, "lBRL"),
        ((8, 6, 4), False, True, "LRlB"),
        ((8, 4), True, True, "lB"),
        ((8, 4), True, False, "L"),
    ],
)
def test_layers_of_a_head(widths: tuple[int, ...], norm: bool, last_norm: bool, expected: str) -> None:
    head = build_mlp(widths, norm=norm, last_norm=last_norm)
    assert kinds(head) == expected
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(itertools.pairwise(widths))
    normed = [i for i, kind in enumerate(expected) if kind == "B"]
    assert [head[i].num_features for i in normed] == [head[i - 1].out_features for i in normed]
    assert head(torch.ones(3, widths[0])).shape == (3, widths[-1])


def test_a_head_normalises_by_default() -> None:
    assert kinds(build_mlp((4, 4, 4))) == "lBRlB"


@pytest.mark.parametrize(
    ("widths", "last_norm", "expected"),
    [((8, 6, 5, 4), True, "lBRlBRlb"), ((8, 6, 4), True, "lBRlb"), ((8, 4), True, "lb"), ((8, 6, 4), False, "lBRL")],
)
def test_the_last_norm_may_have_no_weight_and_bias(widths: tuple[int, ...], last_norm: bool, expected: str) -> None:
    head = build_mlp(widths, last_norm=last_norm, last_affine=False)
    assert kinds(head) == expected
    if last_norm:
        assert head[-1].weight is None
        out = head(torch.randn(64, 8))
        torch.testing.assert_close(out.mean(dim=0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.std(dim=0, correction=0), torch.ones(4), atol=1e-2, rtol=0)


def test_the_activation_is_a_choice() -> None:
    assert kinds(build_mlp((8, 6, 6, 4), norm=False, last_norm=False, activation=nn.GELU)) == "LGLGL"
    assert kinds(build_mlp((8, 6, 4), activation=nn.GELU)) == "lBGlB"


def cosines_by_hand(z: Tensor, weight: Tensor) -> list[list[float]]:
    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    return [[cosine(row, prototype) for prototype in weight.double().tolist()] for row in z.double().tolist()]


def test_scores_are_cosine_similarities_to_the_prototypes() -> None:
    torch.manual_seed(0)
    head, z = Prototypes(6, 9), 3 * torch.randn(4, 6)
    expected = torch.tensor(cosines_by_hand(z, head.weight.detach()))
    torch.testing.assert_close(head(z), expected, rtol=1e-5, atol=1e-6)
    assert head(head.weight).abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.weight.mul_(torch.linspace(0.1, 7, 9)[:, None])
    torch.testing.assert_close(head(100 * z), expected, rtol=1e-5, atol=1e-6)


def test_frozen_prototypes_give_the_same_scores_and_get_a_zero_gradient() -> None:
    torch.manual_seed(0)
    head, z = Prototypes(6, 9), torch.randn(4, 6, requires_grad=True)
    found: dict[str, Tensor] = {}
    for frozen in (False, True, False):
        head.freeze(frozen)
        scores = head(z)
        weight, rows = torch.autograd.grad(scores.square().sum(), [head.weight, z])
        assert bool(weight.any()) is not frozen
        found.setdefault("scores", scores.detach())
        found.setdefault("rows", rows)
        assert torch.equal(scores, found["scores"])
        assert torch.equal(rows, found["rows"])


def test_the_gradient_of_prototypes_is_that_of_cosine_similarities() -> None:
    torch.manual_seed(0)
    head, z = Prototypes(5, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    head(z).pow(3).sum().backward()
    weight = head.weight.detach().clone().requires_grad_()
    ((z / z.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).T).pow(3).sum().backward()
    torch.testing.assert_close(head.weight.grad, weight.grad)


def test_a_checkpoint_of_prototypes_holds_their_weight_only() -> None:
    assert set(Prototypes(5, 3).state_dict()) == {"weight"}


def build_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def changed(network: nn.Module, by: float) -> nn.Module:
    """The network with every parameter and running statistic moved."""
    with torch.no_grad():
        for tensor in [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]:
            tensor += by * torch.linspace(1, 2, tensor.numel()).view(tensor.shape)
    return network


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def test_the_copy_is_equal_independent_and_without_gradient() -> None:
    network = build_network()
    teacher = copy_teacher(network)
    before = state(teacher)
    for name, tensor in state(network).items():
        assert torch.equal(tensor, before[name])
    changed(network, 1.0)
    for name, tensor in state(teacher).items():
        assert torch.equal(tensor, before[name])
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in network.parameters())
    images = torch.ones(2, 3, 4, 4)
    assert not teacher(images).requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_the_copy_is_in_the_same_mode(training: bool) -> None:
    teacher = copy_teacher(build_network().train(training))
    assert all(module.training == training for module in teacher.modules())


@pytest.mark.parametrize("momentum", [0.9, 0.0, 1.0, 0.996])
def test_the_teacher_moves_as_in_a_loop_and_its_buffers_do_not(momentum: float) -> None:
    network = build_network()
    teacher = changed(copy_teacher(network), -0.7)
    expected = {name: p.detach().flatten().tolist() for name, p in teacher.named_parameters()}
    buffers = {name: b.clone() for name, b in teacher.named_buffers()}
    for step in range(3):
        changed(network, 0.3 * (step + 1))
        online = copy.deepcopy(network)
        update_teacher(teacher, network, momentum)
        for name, p in network.named_parameters():
            expected[name] = [
                momentum * old + (1 - momentum) * float(new)
                for old, new in zip(expected[name], p.detach().flatten(), strict=True)
            ]
        for name, tensor in state(online).items():
            assert torch.equal(tensor, state(network)[name])
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p.flatten(), torch.tensor(expected[name]), rtol=1e-5, atol=1e-6)
    for name, b in teacher.named_buffers():
        assert torch.equal(b, buffers[name])


def test_the_teachers_statistics_come_from_its_own_forward_passes() -> None:
    network = build_network()
    teacher = copy_teacher(network)
    with torch.no_grad():
        teacher(torch.full((2, 3, 4, 4), 5.0))
    assert teacher.get_buffer("1.num_batches_tracked") == 1
    assert network.get_buffer("1.num_batches_tracked") == 0
    assert not torch.equal(teacher.get_buffer("1.running_mean"), network.get_buffer("1.running_mean"))


def test_updating_leaves_no_graph() -> None:
    network = build_network()
    teacher = copy_teacher(network)
    update_teacher(teacher, network, 0.5)
    assert all(p.grad_fn is None and not p.requires_grad for p in teacher.parameters())


def test_the_network_may_have_more_than_its_teacher() -> None:
    """As a predictor, whatever its place among the parameters."""
    parts = {"backbone": nn.Linear(3, 4), "head": nn.Linear(4, 2), "projector": nn.Linear(4, 4)}
    network = nn.ModuleDict(parts)
    teacher = changed(copy_teacher(nn.ModuleDict({k: parts[k] for k in ("projector", "backbone")})), 1.0)
    before = state(teacher)
    update_teacher(teacher, network, 0.75)
    for name, tensor in teacher.named_parameters():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * network.get_parameter(name).detach())


def test_the_momentum_goes_to_one_by_a_cosine() -> None:
    momenta = [cosine_momentum(step, 200, 0.99) for step in range(201)]
    assert momenta[0] == pytest.approx(0.99)
    assert momenta[50] == pytest.approx(1 - 0.01 * (1 + math.sqrt(0.5)) / 2)
    assert momenta[100] == pytest.approx(0.995)
    assert momenta[200] == pytest.approx(1.0)
    assert all(a < b for a, b in itertools.pairwise(momenta))
    assert cosine_momentum(7, 10, 1.0) == 1.0
