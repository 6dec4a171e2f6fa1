"""The moving-average teacher: a copy that follows the online network and gets no gradient."""

import copy

import torch
from torch import nn


def copy_teacher(network: nn.Module) -> nn.Module:
    """A copy in the same mode whose parameters need no gradient."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: nn.Module, network: nn.Module, momentum: float) -> None:
    """``teacher = momentum * teacher + (1 - momentum) * network``, parameters only.

    BatchNorm's running statistics are the teacher's own, from its own forward passes.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(network.parameters()), 1 - momentum)
