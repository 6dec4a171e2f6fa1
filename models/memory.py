"""A first-in, first-out memory of embeddings, on the device."""

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """The newest embeddings of all processes, in buffers that are checkpointed with the method.

    It starts filled with random directions, as published (MoCo, He et al. 2020), drawn from torch's generator: seed it
    alike on every process.

    Args:
        size: how many embeddings. A queue longer than the data set holds the same image several times.
        width: of an embedding.
    """

    rows: Tensor
    position: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", nn.functional.normalize(torch.randn(size, width), dim=1))
        # A tensor, so that no step waits for the device.
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Overwrite the oldest with ``(B, width)`` embeddings, normalised.

        Args:
            rows: of all processes (`amimv.models.distributed.gather_rows`), so that every process has the same queue.
        """
        size = len(self.rows)
        new = nn.functional.normalize(rows.detach().to(self.rows.dtype), dim=1)[-size:]
        places = (self.position + torch.arange(len(new), device=new.device)) % size
        self.rows.index_copy_(0, places, new)
        self.position.copy_((self.position + len(new)) % size)
