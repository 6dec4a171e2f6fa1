"""The weights that a run starts from: loaded once, recorded, and the same in its evaluation."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amimv import InputError
from amimv.models.backbones import BackboneSpec, build_backbone
from amimv.models.frozen import load_frozen
from amimv.models.weights import Loaded, load_initial
from amimv.trainers.conditions import RANDOM
from amimv.trainers.evaluation.features import build_random
from amimv.trainers.settings import PretrainSettings


def initialise(network: nn.Module, spec: BackboneSpec, settings: PretrainSettings) -> Loaded | None:
    """Give a new backbone the weights that ``init`` names, in place; None where they stay random.

    Raises:
        InputError: they are not there, cannot be read safely, or are of another network.
    """
    return None if settings.init == RANDOM else load_initial(network, spec, settings.init)


def describe_initial(loaded: Loaded | None, folder: Path, again: bool) -> dict[str, Any] | None:
    """For ``environment.json``: what was loaded, now or when the run in ``folder``, which goes on ``again``, began.

    Raises:
        InputError: other weights were loaded then.
    """
    earlier = _recorded(folder) if again else None
    if loaded is None:
        return earlier
    if earlier and earlier.get("digest") != loaded.digest:
        raise InputError(
            f"the weights of {loaded.source} are not those that {folder} began with: bring them back, or train anew "
            "under another name"
        )
    return asdict(loaded)


def _recorded(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] | None = json.loads((folder / "environment.json").read_text()).get("init")
    except (OSError, ValueError):
        return None
    return found


def baselines_start_from_it(settings: PretrainSettings) -> bool:
    """Whether the baselines start from given weights, too."""
    return settings.init_baselines and settings.init != RANDOM and settings.baselines != "no"


def build_start(settings: PretrainSettings, spec: BackboneSpec) -> nn.Module:
    """The network that baselines start from, on the CPU: that of the run's seed, where asked with initial weights."""
    network = build_random(spec, settings.seed, "cpu")
    if baselines_start_from_it(settings):
        initialise(network, spec, settings)
    return network


def check_start(settings: PretrainSettings, spec: BackboneSpec, folder: Path, again: bool) -> dict[str, Any] | None:
    """`describe_initial` of what the baselines start from; None where that is random. No random number is drawn."""
    if not baselines_start_from_it(settings):
        return None
    with torch.random.fork_rng(devices=()):
        loaded = initialise(build_backbone(spec), spec, settings)
    return describe_initial(loaded, folder, again)


def check_baselines(settings: PretrainSettings, spec: BackboneSpec, folder: Path, again: bool) -> None:
    """Look before the training for what its evaluation will need: frozen models, and the weights that it began with.

    Raises:
        InputError: they are not there, or not what they were.
    """
    if settings.baselines != "no":
        for name in settings.frozen:
            load_frozen(name, spec)
    check_start(settings, spec, folder, again)
