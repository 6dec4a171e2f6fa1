"""Heads layer by layer, and the moving-average teacher against a plain loop."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from amimv.models.heads import build_mlp
from amimv.models.teacher import copy_teacher, update_teacher


def kinds(head: nn.Sequential) -> str:
    """One letter a layer, a lower-case l for a linear one without bias."""
    letters = {nn.BatchNorm1d: "B", nn.ReLU: "R"}
    return "".join(
        ("l" if layer.bias is None else "L") if isinstance(layer, nn.Linear) else letters[type(layer)]
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
