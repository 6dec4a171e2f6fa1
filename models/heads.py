"""Projection and prediction heads, and prototypes."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build_mlp(
    widths: tuple[int, ...],
    *,
    norm: bool = True,
    last_norm: bool = True,
    last_affine: bool = True,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear layers of the given widths, the first of them the input's, with an activation between them.

    Args:
        widths: at least input and output.
        norm: BatchNorm after every layer but the last.
        last_norm: BatchNorm after the last layer.
        last_affine: that last one has a weight and a bias.
        activation: between the layers.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        is_last = i == len(widths) - 2
        normed = last_norm if is_last else norm
        layers.append(nn.Linear(inputs, outputs, bias=not normed))
        if normed:
            layers.append(nn.BatchNorm1d(outputs, affine=last_affine or not is_last))
        if not is_last:
            layers.append(activation())
    return nn.Sequential(*layers)


class Prototypes(nn.Module):
    """Cosine similarity to learned prototypes: embeddings ``(B, D)`` to scores ``(B, count)`` in [-1, 1].

    The forward pass normalises the weights, so that only their directions learn: DINO's last layer with a fixed norm
    (Caron et al. 2021), and SwAV's prototypes (Caron et al. 2020), which are put back onto the sphere each step.
    """

    gate: Tensor

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width) / width**0.5)
        # A tensor, so that compiled networks and CUDA graphs see the change.
        self.register_buffer("gate", torch.ones(()), persistent=False)

    def freeze(self, frozen: bool) -> None:
        """Whether the prototypes get a zero gradient; they stay in the graph, as `DistributedDataParallel` wants."""
        self.gate.fill_(0.0 if frozen else 1.0)

    def forward(self, z: Tensor) -> Tensor:
        fixed = self.weight.detach()
        weight = fixed + self.gate * (self.weight - fixed)
        # Scores are divided by temperatures of a few hundredths: autocast's 2 or 3 digits would not do.
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(F.normalize(z.to(weight.dtype), dim=1), F.normalize(weight, dim=1))
