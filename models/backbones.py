"""Backbones: timm models by name, with a stem that suits the image size, and a small default for CPUs."""

import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save
from timm.layers import PatchEmbed
from timm.models import is_model_in_modules
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from amimv import InputError, did_you_mean, first_line, shown, told, user_path
from amimv.files import replacing

#: timm's modules of ViTs that can be told to take images of any size, by resampling their position embedding.
PLAIN_VITS = ("vision_transformer", "vision_transformer_hybrid", "vitamin", "deit", "eva")

#: Name of the default: a ResNet of 0.21 M parameters that two CPU cores train in minutes.
SMALL = "small"
#: The default of before, of 0.31 M parameters: what its exports and published studies call `small`.
SMALL_V1 = "small-v1"
#: Beginning of a name at the hub, as timm writes it.
HUB = "hf-hub:"
#: What an exported backbone is read from.
EXPORT = ("backbone.json", "model.safetensors")


@dataclass(frozen=True)
class BackboneSpec:
    """All it takes to build a backbone again.

    Attributes:
        name: ``small``, ``small-v1`` or a timm model name.
        channels: of the images, 1 or 3.
        size: of the images it is built for, in pixels.
        mean, std: the channel statistics it was trained with, in units of [0, 1].
        value_range: the stored values that become 0 and 1; None: (0, 255), and floats as they are.
    """

    name: str = SMALL
    channels: int = 3
    size: int = 28
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    value_range: tuple[float, float] | None = None


def build_backbone(spec: BackboneSpec) -> nn.Module:
    """A network from ``(B, channels, H, W)`` to pooled features ``(B, num_features)``; ``num_features`` is set.

    timm's stems are made for 224 pixels and shrink by 32; here a convolutional network keeps 4 times (up to 64
    pixels) or twice (up to 128) that resolution, as far as its max-pooling and first convolution allow, and a ViT
    gets a patch that gives 7 to 14 tokens a side. Other networks that timm builds for one image size are built for
    this one, with their own patches. docs/backbones.md has an example of every timm module.

    Raises:
        InputError: unknown name, or a network that cannot take images of this size.
    """
    if spec.name in OWN:
        return OWN[spec.name](spec.channels).to(memory_format=torch.channels_last)
    _check_name(spec.name)
    network = _build_timm(spec)
    # Contiguous weights here, since one layer in channels-last hands its layout on to the next.
    safe: Any = not any(map(_overruns_in_channels_last, network.modules()))
    network.channels_last_on_cpu = safe
    return network.to(memory_format=torch.channels_last) if safe else network


def _small(channels: int) -> nn.Module:
    """Maps of 14, 14, 7 and 4 a side from 28 pixels, the last of 128 channels: how it was chosen is told in
    docs/backbones.md."""
    small = _narrow_resnet(channels, (16, 32, 128))
    small.conv1 = nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(small.conv1.weight, mode="fan_out", nonlinearity="relu")
    small.layer4 = nn.Identity()
    return small


def _small_v1(channels: int) -> nn.Module:
    return _narrow_resnet(channels, (16, 32, 64, 128))


def _narrow_resnet(channels: int, widths: tuple[int, ...]) -> ResNet:
    """A stage of one block for each width, behind three convolutions without max-pooling."""
    blocks = (1,) * len(widths)
    network = ResNet(BasicBlock, blocks, 0, channels, stem_type="deep", stem_width=8, channels=widths)
    network.maxpool = nn.Identity()
    return network


#: Networks that are not timm's by a name, from the images' channels.
OWN = {SMALL: _small, SMALL_V1: _small_v1}


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        hint = did_you_mean(name.strip(), [*OWN, *timm.list_models()], "{} ", cutoff=0.5)
        raise InputError(f"unknown backbone {shown(name)}: {hint}give '{SMALL}' or a model of timm.list_models()")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(
            f"unknown backbone {shown(name)} ({first_line(error)}): leave out what follows the dot"
        ) from error


def _build_timm(spec: BackboneSpec) -> nn.Module:
    """With the first of the arguments that suit it, which are kept as ``timm_arguments``."""
    failed: Exception = ValueError()
    for arguments in _choices(spec):
        try:
            network: Any = timm.create_model(spec.name, **arguments)
            if not _is_fixed(spec.name):
                _widen_stem(network, spec)
            if "img_size" in arguments and "patch_size" not in arguments:
                _check_patches(network, spec.size)
            features = _features(network, spec)
        except InputError:
            raise
        except Exception as error:  # of any kind: the code is not ours
            failed = error
            continue
        network.num_features = _width_of(features, spec.name)
        network.timm_arguments = arguments
        return network
    raise InputError(_cannot_take(spec, failed)) from failed


def patch_size(size: int) -> int:
    """Pixels of a ViT's patch for images of this size: at least 7 tokens a side, as far as that goes."""
    return max(p for p in (2, 4, 8, 16) if p == 2 or size // p >= 7)


def _is_fixed(name: str) -> bool:
    """Whether timm builds the network for one image size."""
    return bool(timm.get_pretrained_cfg_value(name, "fixed_input_size"))


def _choices(spec: BackboneSpec) -> list[dict[str, Any]]:
    """Arguments for ``timm.create_model``, those that suit the image size best first."""
    arguments: dict[str, Any] = {"num_classes": 0, "in_chans": spec.channels}
    if not _is_fixed(spec.name):
        return [arguments]
    # Local crops are smaller.
    any_size = {"dynamic_img_size": True} if is_model_in_modules(spec.name, PLAIN_VITS) else {}
    patched = {"img_size": spec.size, "patch_size": patch_size(spec.size)}
    # Networks of several stages have no patch to choose; the size is a pair, as timm itself gives it.
    return [arguments | size | any_size for size in (patched, {"img_size": (spec.size, spec.size)})]


def _check_patches(network: nn.Module, size: int) -> None:
    """Raise a `ValueError` where patches as large as the network has them would leave a margin of the image unseen."""
    patch = next((m.patch_size[0] for m in network.modules() if isinstance(m, PatchEmbed)), 1)
    if size % patch:
        raise ValueError(f"its patches of {patch} pixels do not tile them")


def stem_is_changed(spec: BackboneSpec) -> bool:
    """Whether the network differs from what timm builds by name and arguments."""
    return spec.name in OWN or (not _is_fixed(spec.name) and spec.size <= 128)


def _widen_stem(network: nn.Module, spec: BackboneSpec) -> None:
    """Take strides out of the stem in place: the max-pooling first, then the first convolution's."""
    drop = 4 if spec.size <= 64 else 2 if spec.size <= 128 else 1
    if drop > 1 and isinstance(getattr(network, "maxpool", None), nn.MaxPool2d):
        network.maxpool = nn.Identity()
        drop //= 2
    if drop == 1:
        return
    paths = timm.get_pretrained_cfg_value(spec.name, "first_conv")
    paths = [paths] if isinstance(paths, str) else paths  # several run side by side, and their outputs are added
    if not paths or not all(isinstance(network.get_submodule(path), nn.Conv2d) for path in paths):
        raise InputError(
            f"backbone '{spec.name}' has no stem that could be widened for {spec.size} pixels: "
            "choose a ResNet, ConvNeXt, EfficientNet or ViT, or images above 128 pixels"
        )
    for path in paths:
        first: Any = network.get_submodule(path)
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, _widened(first, drop))


def _widened(first: nn.Conv2d, drop: int) -> nn.Conv2d:
    """A new convolution with a stride less by this factor."""
    stride = max(1, first.stride[0] // drop)
    # A kernel of 3 with padding 1 keeps the size at stride 1, and so does one of 1 without.
    kernel = 1 if first.kernel_size == (1, 1) else 3
    stem = nn.Conv2d(first.in_channels, first.out_channels, kernel, stride, kernel // 2, bias=first.bias is not None)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem


def _cannot_take(spec: BackboneSpec, error: Exception) -> str:
    reason = textwrap.shorten(first_line(error), 100, placeholder="...")
    return f"backbone '{spec.name}' cannot take images of {spec.size} pixels ({reason}): see docs/backbones.md"


def check_sizes(network: nn.Module, spec: BackboneSpec, sizes: Iterable[int]) -> None:
    """Raise an `InputError` for the first of the view sizes, in pixels, that the network cannot take."""
    for view in (replace(spec, size=size) for size in dict.fromkeys(sizes)):
        try:
            _features(network, view)
        except Exception as error:  # of any kind: the code is not ours
            raise InputError(_cannot_take(view, error)) from error


def _features(network: nn.Module, spec: BackboneSpec) -> Any:
    """What two black images give, in evaluation mode."""
    was_training = network.training
    try:
        with torch.no_grad():
            return network.eval()(torch.zeros(2, spec.channels, spec.size, spec.size))
    finally:
        network.train(was_training)


def _width_of(features: Any, name: str) -> int:
    """timm's own number leaves out a layer that some networks (MobileNetV3) have behind the pooling."""
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"type {type(features).__name__}"
        raise InputError(f"backbone '{name}' gives features of {shape}, expected (B, D): choose another")
    return features.shape[1]


def _overruns_in_channels_last(module: nn.Module) -> bool:
    """Whether its backward, in channels-last on a CPU, writes past oneDNN's buffer: the process dies.

    It takes a 1x1 convolution with a stride, and fewer input channels than an AVX-512 register holds.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.groups == 1
        and module.in_channels < 16
    )


def feature_width(network: nn.Module) -> int:
    """Width of the features that the backbone gives."""
    width = network.num_features
    if not isinstance(width, int):
        raise TypeError(f"num_features is a {type(width).__name__}, expected int")
    return width


def encode(network: nn.Module, views: Tensor) -> Tensor:
    """Features ``(B, num_features)`` of one view ``(B, C, H, W)``; channels-last, which CPUs and GPUs run faster.

    On a CPU, the few networks that it would crash there take contiguous views.
    """
    channels_last = views.device.type != "cpu" or getattr(network, "channels_last_on_cpu", True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features: Tensor = network(views.contiguous(memory_format=layout))
    return features


def save_backbone(network: nn.Module, spec: BackboneSpec, folder: Path) -> None:
    """Export to ``folder``: ``model.safetensors``, ``backbone.json`` and timm's ``config.json``; see `load_backbone`.

    Where timm's own arguments express the network (a ViT, or a stem that was left alone),
    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the same features. Where they do not, timm would
    load the weights cleanly into another network: there the architecture is called by a name that it refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    contents = {"model.safetensors": save(state), "backbone.json": _json_bytes(asdict(spec))}
    contents["config.json"] = _json_bytes(_timm_config(network, spec))
    for name, content in contents.items():
        with replacing(folder / name, "wb") as file:
            file.write(content)


def _timm_config(network: Any, spec: BackboneSpec) -> dict[str, Any]:
    """What timm's hub keeps beside weights."""
    config = {
        "architecture": spec.name,
        "num_classes": 0,
        "num_features": network.num_features,
        "pretrained_cfg": {
            "input_size": [spec.channels, spec.size, spec.size],
            "mean": spec.mean,
            "std": spec.std,
            "num_classes": 0,
        },
    }
    if note := timm_note(spec):
        return config | {"architecture": f"amimv_{spec.name}", "note": note}
    return config | {"model_args": {k: v for k, v in network.timm_arguments.items() if k != "num_classes"}}


def timm_note(spec: BackboneSpec) -> str:
    """Why timm alone cannot build the network, in one line; empty if it can."""
    if not stem_is_changed(spec):
        return ""
    why = "it is no network of timm's" if spec.name in OWN else f"its stem was changed for {spec.size} pixels"
    return f"timm alone cannot build this network ({why}): load it with amimv.models.load_backbone"


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def name_by_weights(name: str, state: Iterable[str]) -> str:
    """What the network is called now that an export of these tensors calls so: ``small`` was another one before."""
    return SMALL_V1 if name == SMALL and any(key.startswith("layer4.") for key in state) else name


def find_export(source: Path | str) -> Path:
    """The folder of an exported backbone.

    Args:
        source: the folder, or ``hf-hub:NAME`` (or ``NAME@REVISION``), which is downloaded once.

    Raises:
        InputError: there is none, or the hub is out of reach.
    """
    given = str(source)
    folder, reason = user_path(given.removeprefix("local-dir:")), ""
    if given.startswith(HUB):
        name, _, revision = given.removeprefix(HUB).partition("@")
        try:
            files = [hf_hub_download(name, file, revision=revision or None) for file in EXPORT]
            folder = Path(files[0]).parent
        except Exception as error:  # of any kind: the code and the network are not ours
            reason = f" ({told(error)})"
    if reason or not all((folder / file).is_file() for file in EXPORT):
        raise InputError(f"no exported backbone in {given}{reason}: expected {' and '.join(EXPORT)}")
    return folder


def load_backbone(folder: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, BackboneSpec]:
    """The exported network in evaluation mode, and its spec (with the mean and std its inputs are normalised by).

    Args:
        folder: of an export, or ``hf-hub:NAME`` of one that was published.
        device: for the network.

    Raises:
        InputError: there is no export, or the hub is out of reach.
    """
    path = find_export(folder)
    fields: dict[str, Any] = json.loads((path / "backbone.json").read_text())
    # JSON has lists for tuples.
    known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    spec, state = BackboneSpec(**known), load_file(path / "model.safetensors")
    spec = replace(spec, name=name_by_weights(spec.name, state))
    network = build_backbone(spec)
    network.load_state_dict(state)
    return network.to(device).eval(), spec
