"""Initial weights of a backbone: from timm and its hub, from a run, or from files as other libraries write them.

Every file is read as one flat mapping from dotted names to tensors, however deep its state dict is nested. What stands
before the names of the network's own tensors (``module.base_encoder.``, ``teacher.backbone.``,
``classy_state_dict.base_model.model.trunk._feature_blocks.``) is found by trying, and the rest of the file, such as
heads, queues and an optimiser's state, is left alone.
"""

import argparse
import hashlib
import json
import pickle
import re
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn.functional import interpolate

from amimv import InputError, first_line, shown, told, user_path
from amimv.models.backbones import HUB, OWN, BackboneSpec, find_export, name_by_weights

#: Beginnings of what timm itself looks for: on its hub, and in a folder with a config.json.
TIMM_SOURCES = (HUB, "local-dir:")
#: Weights in a folder: of an exported backbone, of a run, and of a download from a hub.
IN_FOLDER = ("model.safetensors", "backbone/model.safetensors", "pytorch_model.bin")
#: Share of the tensors, of the network and of the file's part for it, that has to fit. Below it is another network.
FITTING = 0.9
#: Of several networks in a file the averaged one comes first where it is what its method gives (DINO, timm's EMA), and
#: last where it only serves the training (MoCo, BYOL).
FIRST, LAST = {"teacher", "ema"}, {"momentum", "target", "student"}

State = dict[str, Tensor]


@dataclass(frozen=True)
class Loaded:
    """What a network took from a source.

    Attributes:
        source: as the user gave it.
        prefix: what stood before the names in it.
        loaded: how many of the network's tensors were taken, the adapted ones among them.
        missing: names of those that were not: they keep their random values.
        unexpected: names below the prefix that the network does not have, such as a head.
        adapted: what was changed to fit, in words.
        digest: of the tensors found there, before any was adapted.
    """

    source: str
    prefix: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    digest: str = ""

    def __str__(self) -> str:
        where = f" below '{self.prefix}'" if self.prefix else ""
        return (
            f"initial weights from {self.source}{where}: {self.loaded} of {self.loaded + len(self.missing)} tensors; "
            f"adapted: {_listed(self.adapted)}; missing: {_listed(self.missing)}; "
            f"left out: {_listed(self.unexpected)}"
        )


def _listed(names: tuple[str, ...], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def load_initial(network: nn.Module, spec: BackboneSpec, source: str) -> Loaded:
    """Give a backbone its initial weights, in place; no random number is drawn.

    As timm does it, the first convolution is adapted to the number of channels, and position embeddings and the
    kernels of patches to the image size; so is the kernel of a stem that was narrowed for small images.

    Args:
        network: built by `build_backbone` from ``spec``.
        spec: of the network.
        source: ``timm`` (its pretrained weights of that name), ``hf-hub:NAME`` or ``local-dir:FOLDER`` as timm takes
            them, a folder (an exported backbone, a run), or a file: safetensors, or what ``torch.save`` wrote.

    Raises:
        InputError: there are no such weights, they cannot be read safely, or they are of another network.
    """
    given = read_weights(source, spec.name)
    own = network.state_dict()
    prefix, state = _find_network(given, own)
    digest = _digest(state)
    state, adapted = _adapt(state, network, spec)
    fitting = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    _check_fit(fitting, state, own, spec, source)
    if bad := next((name for name, tensor in fitting.items() if not bool(tensor.isfinite().all())), ""):
        raise InputError(f"{source}: {bad} has values that are not finite: give weights of a training that went well")
    network.load_state_dict(fitting, strict=False)
    missing = tuple(name for name in _counted(own) if name not in fitting)
    unexpected = tuple(name for name in state if name not in own)
    return Loaded(source, prefix, len(_counted(own)) - len(missing), missing, unexpected, adapted, digest)


def _digest(state: State) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def read_weights(source: str, name: str) -> State:
    """All tensors of a source by their dotted names, on the CPU.

    Args:
        source: as for `load_initial`.
        name: of the backbone, for ``timm``.

    Raises:
        InputError: the source cannot be reached or read, or holds no tensors.
    """
    if source.startswith(TIMM_SOURCES):
        with suppress(InputError):  # an export of ours, also of a network that timm alone cannot build
            source = str(find_export(source))
    if source == "timm" or source.startswith(TIMM_SOURCES):
        return dict(from_timm(name if source == "timm" else source).state_dict())
    path = user_path(source)
    if path.is_dir():
        path = next((path / one for one in IN_FOLDER if (path / one).is_file()), path / IN_FOLDER[0])
    if not path.is_file():
        raise InputError(
            f"no initial weights at {path}: give random, timm, hf-hub:NAME, local-dir:FOLDER, a folder "
            "with model.safetensors, or a file"
        )
    tensors = dict(_flatten(_read_file(path)))
    if not tensors:
        raise InputError(f"{path} holds no tensors: expected a state dict of a network")
    return tensors


def from_timm(name: str) -> nn.Module:
    """timm's network of that name with its pretrained weights, as timm builds it for its own image size."""
    if name in OWN:
        raise InputError(f"backbone '{name}' has no weights at timm: give --backbone with a model of timm, or a file")
    try:
        with torch.random.fork_rng(devices=()):  # what it draws for the layers that are overwritten
            network: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of any kind: the code and the network are not ours
        raise InputError(
            f"no pretrained weights of {name} ({told(error)}): they come from timm's hub or its "
            "cache; without a network give a file"
        ) from error
    return network


def _read_file(path: Path) -> Any:
    """What the file holds: tensors in mappings. No code in it is run."""
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: expected weights in safetensors, or as torch.save writes them")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Arguments of a command, which DINO and timm save beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds {_objects_in(path)}, and loading those could run code: save the state dict alone with "
            "torch.save, where the file comes from"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read as weights ({shown(first_line(error), 100)}): is it whole?"
        ) from error


def _objects_in(path: Path) -> str:
    """What kinds of objects a pickled file holds, for a message."""
    try:
        kinds = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it is no file of torch's
        kinds = []
    return f"objects ({', '.join(sorted(kinds)[:3])})" if kinds else "objects beside tensors, or is no file of torch's"


def _flatten(content: Any, above: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        return [(above[:-1], content)]
    if not isinstance(content, Mapping):
        return []
    return [pair for name, one in content.items() for pair in _flatten(one, f"{above}{name}.")]


def _find_network(given: State, own: Mapping[str, Tensor]) -> tuple[str, State]:
    """The prefix below which most tensors are the network's by name and shape, and all that is there."""
    found = {prefix: _below(prefix, given, own) for prefix in _prefixes(given, own)}
    numbers = (name[: match.start()] for name in given for match in re.finditer(r"(?<![^.])\d+\.", name))
    for prefix in dict.fromkeys(numbers):
        found.setdefault(prefix, _named(_below(prefix, given, own), own))

    def preference(prefix: str) -> tuple[int, int]:
        state = found[prefix]
        fitting = sum(name in own and tensor.shape == own[name].shape for name, tensor in state.items())
        words = set(re.split(r"[._]", prefix))
        return fitting, bool(words & FIRST) - bool(words & LAST)

    best = max(found, key=preference, default="")  # the first in the file of those alike
    return best, found.get(best, given)


def _prefixes(given: State, own: Mapping[str, Tensor]) -> list[str]:
    """What stands before names of the network's in the file, the most frequent ones first."""
    before: Counter[str] = Counter()
    for name in (_usual(name, own) for name in given):
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        before.update(name[:start] for start in starts if name[start:] in own)
    return [prefix for prefix, _ in before.most_common(20)]


def _below(prefix: str, given: State, own: Mapping[str, Tensor]) -> State:
    return {_usual(name[len(prefix) :], own): tensor for name, tensor in given.items() if name.startswith(prefix)}


def _usual(name: str, own: Mapping[str, Tensor]) -> str:
    """Lightly's own ResNets call a shortcut what timm and torchvision call downsample."""
    if ".shortcut." not in name or any(".shortcut." in one for one in own):
        return name
    return name.replace(".shortcut.", ".downsample.")


def _named(numbered: State, own: Mapping[str, Tensor]) -> State:
    """Children of an `nn.Sequential`, as Lightly takes a network apart, by the network's names in the same order."""
    numbers = sorted({int(first) for name in numbered if (first := name.split(".")[0]).isdigit()})
    names = dict(zip(map(str, numbers), dict.fromkeys(name.split(".")[0] for name in own), strict=False))
    parts = ((*name.partition("."), tensor) for name, tensor in numbered.items())
    return {names.get(first, first) + dot + rest: tensor for first, dot, rest, tensor in parts}


def _adapt(state: State, network: nn.Module, spec: BackboneSpec) -> tuple[State, tuple[str, ...]]:
    """The tensors in the shapes that the network has them in, as far as there is a way, and what was done."""
    own = network.state_dict()
    try:  # timm has one of these beside each of its networks, for weights of other sizes and origins
        resized = sys.modules[type(network).__module__].checkpoint_filter_fn(dict(state), network)
    except Exception:  # there is none, or it was not made for such weights
        resized = state
    said = [_changed(name, state[name], tensor) for name, tensor in resized.items() if name in state]
    resized = dict(resized)
    for name in _first_convolutions(network):
        if name not in resized or resized[name].ndim != 4 or resized[name].shape == own[name].shape:
            continue
        before = resized[name]
        base = before.shape[1] * spec.channels // own[name].shape[1]
        after = adapt_input_conv(spec.channels, before, base) if base else before
        if after.shape[2:] != own[name].shape[2:]:
            after = _resize_kernel(after, own[name].shape[2:])
        resized[name] = after
        said.append(_changed(name, before, after))
    return resized, tuple(filter(None, said))


def _resize_kernel(kernel: Tensor, size: torch.Size) -> Tensor:
    """``(O, I, h, w)`` to another height and width.

    A smaller kernel gives for an image what the large one gives for the image enlarged. That is the transpose of the
    enlargement; the pseudoinverse, by which timm shrinks the kernels of patches, agrees less with it (on skin pictures
    of 28 pixels and 64 wave-like kernels of 7: correlation 0.987 against 0.996, gain 1.15 against 1.01).
    """
    if size[0] > kernel.shape[2]:
        return resample_patch_embed(kernel, list(size))
    points = torch.eye(size.numel()).view(-1, 1, *size)
    enlarged = interpolate(points, kernel.shape[2:], mode="bicubic").flatten(1)
    return (kernel.float().flatten(2) @ enlarged.T).view(*kernel.shape[:2], *size)


def _changed(name: str, before: Tensor, after: Tensor) -> str:
    if before.shape == after.shape:
        return ""
    return f"{name} from {'x'.join(map(str, before.shape))} to {'x'.join(map(str, after.shape))}"


def _first_convolutions(network: nn.Module) -> list[str]:
    """Names of the weights that see the image's channels; timm knows several side by side."""
    names = getattr(network, "pretrained_cfg", {}).get("first_conv")
    if names is None:
        names = next((name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)), ())
    return [f"{name}.weight" for name in ([names] if isinstance(names, str) else names)]


def _counted(state: Mapping[str, Tensor]) -> list[str]:
    """All but the counters of BatchNorm, which older files lack and evaluation does not use."""
    return [name for name in state if not name.endswith("num_batches_tracked")]


def _check_fit(fitting: State, state: State, own: Mapping[str, Tensor], spec: BackboneSpec, source: str) -> None:
    """Raise an `InputError` where the weights are of another network, were it one with more layers."""
    modules = {name.split(".")[0] for name in own}
    strange = [name for name in _counted(state) if name not in own and name.split(".")[0] in modules]
    wanted, found = len(_counted(own)), len(_counted(fitting))
    if found >= FITTING * (wanted + len(strange)):
        return
    more = f", and {len(strange)} more are of layers that it does not have" if found and strange else ""
    hint = name_by_weights(_architecture(source), state)
    raise InputError(
        f"{source} holds weights of another network: {found} of the {wanted} tensors of backbone '{spec.name}' match "
        f"by name and shape{more}: give {f'--backbone {hint}' if hint and hint != spec.name else 'others'}"
    )


def _architecture(source: str) -> str:
    """The name of the network that a folder says it holds; empty if it says none."""
    folder = user_path(source.removeprefix("local-dir:"))
    for path in (folder / "backbone.json", folder / "backbone/backbone.json", folder / "config.json"):
        try:
            content = json.loads(path.read_text())
            return str(content.get("name") or content.get("architecture") or "")
        except (OSError, ValueError, AttributeError):
            continue
    return ""
