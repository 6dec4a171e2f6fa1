"""Gathering a batch from all processes, with gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every process has its own loss of the gathered batch; each row's gradient is the sum over all of them. It is
        # summed in a copy: autograd may hand the same tensor to others.
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(local: Tensor) -> Tensor:
    """``(B, ...)`` of each process as ``(processes * B, ...)``, in the order of ranks; the same B everywhere.

    Differentiable: when every process computes the same loss from the gathered rows and `DistributedDataParallel`
    averages the parameters' gradients, those are the gradients of that loss, with no factor of the number of
    processes. With one process it returns its argument.
    """
    if _world_size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local)
    return gathered
