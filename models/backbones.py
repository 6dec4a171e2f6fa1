"""Backbones: any timm model by name, with a stem that suits the image size, and a small default for CPUs."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import is_model_in_modules
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from amimv import InputError, did_you_mean

#: timm's modules of ViTs that can be told to take images of any size, by resampling their position embedding.
PLAIN_VITS = ("vision_transformer", "deit", "eva")

#: Name of the default: a ResNet of 0.31 M parameters that two CPU cores train in minutes.
SMALL = "small"


@dataclass(frozen=True)
class BackboneSpec:
    """All it takes to build a backbone again.

    Attributes:
        name: ``small`` or a timm model name.
        channels: of the images, 1 or 3.
        size: of the images it is built for, in pixels.
        mean, std: the channel statistics it was trained with, in units of [0, 1].
    """

    name: str = SMALL
    channels: int = 3
    size: int = 28
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


def build_backbone(spec: BackboneSpec) -> nn.Module:
    """A network from ``(B, channels, H, W)`` to pooled features ``(B, num_features)``; ``num_features`` is set.

    timm's stems are made for 224 pixels and shrink by 32; here a convolutional network keeps 4 times (up to 64
    pixels) or twice (up to 128) that resolution, as far as its max-pooling and first convolution allow, and a ViT
    gets a patch that gives 7 to 14 tokens a side.

    Raises:
        InputError: unknown name, or a network that cannot take images of this size.
    """
    if spec.name == SMALL:
        small = ResNet(
            BasicBlock,
            (1, 1, 1, 1),
            0,
            spec.channels,
            stem_type="deep",
            stem_width=8,
            channels=(16, 32, 64, 128),
        )
        small.maxpool = nn.Identity()
        return small.to(memory_format=torch.channels_last)
    if not timm.is_model(spec.name):
        near = did_you_mean(spec.name, [SMALL, *timm.list_models()], cutoff=0.5)
        hint = f"{near} " if near else ""
        raise InputError(f"unknown backbone '{spec.name}': {hint}give '{SMALL}' or a model of timm.list_models()")
    try:
        network = timm.create_model(spec.name, **timm_arguments(spec))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # not every network takes a patch size
        raise InputError(_cannot_take(spec, error)) from error
    if "img_size" not in timm_arguments(spec):
        _widen_stem(network, spec)
    _check_features(network, spec)
    return network.to(memory_format=torch.channels_last)


def patch_size(size: int) -> int:
    """Pixels of a ViT's patch for images of this size: at least 7 tokens a side, as far as that goes."""
    return max(p for p in (2, 4, 8, 16) if p == 2 or size // p >= 7)


def timm_arguments(spec: BackboneSpec) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` for this spec."""
    arguments: dict[str, Any] = {"num_classes": 0, "in_chans": spec.channels}
    if timm.get_pretrained_cfg_value(spec.name, "fixed_input_size"):
        arguments |= {"img_size": spec.size, "patch_size": patch_size(spec.size)}
        if is_model_in_modules(spec.name, PLAIN_VITS):  # local crops are smaller
            arguments["dynamic_img_size"] = True
    return arguments


def stem_is_changed(spec: BackboneSpec) -> bool:
    """Whether the network differs from what timm builds by name and arguments."""
    return spec.name == SMALL or ("img_size" not in timm_arguments(spec) and spec.size <= 128)


def _widen_stem(network: nn.Module, spec: BackboneSpec) -> None:
    """Take strides out of the stem in place: the max-pooling first, then the first convolution's."""
    drop = 4 if spec.size <= 64 else 2 if spec.size <= 128 else 1
    if drop > 1 and isinstance(getattr(network, "maxpool", None), nn.MaxPool2d):
        network.maxpool = nn.Identity()
        drop //= 2
    if drop == 1:
        return
    path = timm.get_pretrained_cfg_value(spec.name, "first_conv")
    first = network.get_submodule(path) if isinstance(path, str) else None
    if not isinstance(first, nn.Conv2d):
        raise InputError(
            f"backbone '{spec.name}' has no stem that could be widened for {spec.size} pixels: "
            "choose a ResNet, ConvNeXt, EfficientNet or ViT, or images above 128 pixels"
        )
    stride = max(1, first.stride[0] // drop)
    # A kernel of 3 with padding 1 keeps the size at stride 1.
    stem = nn.Conv2d(spec.channels, first.out_channels, 3, stride, 1, bias=first.bias is not None)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, stem)


def _cannot_take(spec: BackboneSpec, error: Exception) -> str:
    return f"backbone '{spec.name}' cannot take images of {spec.size} pixels ({str(error).splitlines()[0]})"


def check_sizes(network: nn.Module, spec: BackboneSpec, sizes: Iterable[int]) -> None:
    """Raise an `InputError` for the first of the view sizes, in pixels, that the network cannot take."""
    for size in dict.fromkeys(sizes):
        _features(network, replace(spec, size=size))


def _features(network: nn.Module, spec: BackboneSpec) -> Tensor:
    was_training = network.training
    try:
        with torch.no_grad():
            features: Tensor = network.eval()(torch.zeros(2, spec.channels, spec.size, spec.size))
    except (RuntimeError, AssertionError) as error:
        raise InputError(_cannot_take(spec, error)) from error
    network.train(was_training)
    return features


def _check_features(network: nn.Module, spec: BackboneSpec) -> None:
    features = _features(network, spec)
    if features.ndim != 2:
        raise InputError(f"backbone '{spec.name}' gives features of shape {tuple(features.shape)}, expected (B, D)")
    # timm's own number leaves out a layer that some networks (MobileNetV3) have behind the pooling.
    width: Any = features.shape[1]
    network.num_features = width


def feature_width(network: nn.Module) -> int:
    """Width of the features that the backbone gives."""
    width = network.num_features
    if not isinstance(width, int):
        raise TypeError(f"num_features is a {type(width).__name__}, expected int")
    return width


def encode(network: nn.Module, views: Tensor) -> Tensor:
    """Features ``(B, num_features)`` of one view ``(B, C, H, W)``; channels-last, which CPUs and GPUs run faster."""
    features: Tensor = network(views.contiguous(memory_format=torch.channels_last))
    return features


def save_backbone(network: nn.Module, spec: BackboneSpec, folder: Path) -> None:
    """Export to ``folder``: ``model.safetensors`` and ``backbone.json``, read again by `load_backbone`.

    Where timm's own arguments express the network (a ViT, or a stem that was left alone), ``config.json`` is written
    too, and ``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the same features. Where they do not,
    there is no such file, since timm would load the weights cleanly into another network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "backbone.json").write_text(json.dumps(asdict(spec), indent=2) + "\n")
    if not stem_is_changed(spec):
        config = {
            "architecture": spec.name,
            "num_classes": 0,
            "num_features": network.num_features,
            "model_args": {k: v for k, v in timm_arguments(spec).items() if k != "num_classes"},
            "pretrained_cfg": {
                "input_size": [spec.channels, spec.size, spec.size],
                "mean": spec.mean,
                "std": spec.std,
                "num_classes": 0,
            },
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_backbone(folder: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, BackboneSpec]:
    """The exported network in evaluation mode, and its spec (with the mean and std its inputs are normalised by).

    Raises:
        InputError: if the folder holds no export.
    """
    folder = Path(folder)
    if not (folder / "backbone.json").is_file() or not (folder / "model.safetensors").is_file():
        raise InputError(f"no exported backbone in {folder}: expected backbone.json and model.safetensors")
    fields: dict[str, Any] = json.loads((folder / "backbone.json").read_text())
    spec = BackboneSpec(**fields | {"mean": tuple(fields["mean"]), "std": tuple(fields["std"])})
    network = build_backbone(spec)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.to(device).eval(), spec
