"""One loss of the global batch on every process.

Losses that look across the batch take embeddings gathered from all processes (`gather_rows`); losses that are a mean
over rows take each process's own and are averaged (`average_loss`). Either way every process has the loss of the
global batch, and the gradients that `DistributedDataParallel` averages are that loss's.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _padded(rows: Tensor, length: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])]).contiguous()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # Collectives want the same shape on every process.
        own = _padded(local, max(sizes))
        parts = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(parts, own)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Every process has its own loss of the gathered batch; each row's gradient is the sum over all of them. It is
        # summed in a copy: autograd may hand the same tensor to others.
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.split(ctx.sizes)[dist.get_rank()], None


def gather_rows(local: Tensor, sizes: list[int] | None = None) -> Tensor:
    """``(B, ...)`` of each process as ``(sum of B, ...)``, in the order of ranks.

    Differentiable: when every process computes the same loss from the gathered rows and `DistributedDataParallel`
    averages the parameters' gradients, those are the gradients of that loss, with no factor of the number of
    processes. With one process it returns its argument.

    Args:
        local: this process's rows.
        sizes: B of each process, where they differ; None: the same everywhere, as `PairLoader` hands them out.
    """
    processes = _world_size()
    if processes == 1:
        return local
    gathered: Tensor = _Gather.apply(local, sizes or [len(local)] * processes)
    return gathered


def average(local: Tensor) -> Tensor:
    """The mean over all processes, without gradient; with one process its argument, detached."""
    total = local.detach().clone()
    if _world_size() > 1:
        dist.all_reduce(total)
    return total / _world_size()


def average_loss(local: Tensor) -> Tensor:
    """The mean of all processes' losses, with the gradient of this one's: for losses that are a mean over rows.

    `DistributedDataParallel` then averages the gradients, as many rows on each process given.
    """
    if _world_size() == 1:
        return local
    return local + (average(local) - local.detach())
