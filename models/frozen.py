"""Frozen networks of timm, to stand beside what a run has trained: each sees images as it was trained to see them."""

from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from amimv import InputError
from amimv.models.backbones import BackboneSpec
from amimv.models.weights import from_timm


class Frozen(nn.Module):
    """A network behind its own normalisation: views ``(B, C, S, S)`` in [0, 1] to features ``(B, D)``.

    Grey views are repeated to its channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, views: Tensor) -> Tensor:
        features: Tensor = self.network((views - self.mean) / self.std)
        return features


def load_frozen(name: str, like: BackboneSpec, device: torch.device | str = "cpu") -> tuple[nn.Module, BackboneSpec]:
    """timm's network with its pretrained weights, in evaluation mode, and how images are rendered for it.

    Size, mean and std are those of its ``pretrained_cfg``. Images are resized to that size whole, without a crop.

    Args:
        name: of a model of timm, ``hf-hub:NAME`` or ``local-dir:FOLDER``.
        like: channels and value range of the images.

    Raises:
        InputError: there are no such weights, or the network is for images of other channels or gives no features.
    """
    network = from_timm(name)
    wanted: dict[str, Any] = resolve_model_data_config(network)
    channels, size, _ = wanted["input_size"]
    if like.channels not in (1, channels):
        raise InputError(
            f"frozen {name} takes images of {channels} channels, these have {like.channels}: leave it out"
        )
    # timm gives statistics of three channels to whatever says none.
    mean, std = (tuple(wanted[key])[:channels] for key in ("mean", "std"))
    frozen = Frozen(network, mean, std).eval()
    spec = BackboneSpec(name, like.channels, size, (0.0,) * like.channels, (1.0,) * like.channels, like.value_range)
    with torch.no_grad():
        features = frozen(torch.zeros(2, spec.channels, size, size))
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise InputError(f"frozen {name} gives no features (B, D): choose another model of timm")
    return frozen.to(device), spec
