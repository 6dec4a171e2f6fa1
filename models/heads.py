"""Projection and prediction heads."""

import itertools

from torch import nn


def build_mlp(widths: tuple[int, ...], *, norm: bool = True, last_norm: bool = True) -> nn.Sequential:
    """Linear layers of the given widths, the first of them the input's, with ReLU between them.

    Args:
        widths: at least input and output.
        norm: BatchNorm after every layer but the last.
        last_norm: BatchNorm after the last layer.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        is_last = i == len(widths) - 2
        normed = last_norm if is_last else norm
        layers.append(nn.Linear(inputs, outputs, bias=not normed))
        if normed:
            layers.append(nn.BatchNorm1d(outputs))
        if not is_last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
