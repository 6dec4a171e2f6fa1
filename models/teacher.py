"""The moving-average teacher: a copy that follows the online network and gets no gradient."""

import copy
import math

import torch
from torch import nn


def copy_teacher(network: nn.Module) -> nn.Module:
    """A copy in the same mode whose parameters need no gradient."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: nn.Module, network: nn.Module, momentum: float) -> None:
    """``teacher = momentum * teacher + (1 - momentum) * network``, parameters only.

    BatchNorm's running statistics are the teacher's own, from its own forward passes.

    Args:
        teacher: every parameter of it has a namesake in ``network``, which may have more (a predictor).
    """
    names, parameters = zip(*teacher.named_parameters(), strict=True)
    online = dict(network.named_parameters())
    torch._foreach_lerp_(list(parameters), [online[name] for name in names], 1 - momentum)


def cosine_momentum(step: int, total_steps: int, start: float) -> float:
    """Momentum of the teacher at a step (from 0): from ``start`` by a cosine to 1 (Grill et al. 2020, section 3)."""
    return 1 - (1 - start) * (math.cos(math.pi * step / total_steps) + 1) / 2
