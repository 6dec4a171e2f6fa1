"""What a run trains, put together from its settings: recipe, loader, networks and optimiser, on its device."""

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from torch import nn

from amimv import InputError, check_choice, first_line
from amimv.models.backbones import BackboneSpec, build_backbone, check_sizes, patch_size
from amimv.models.methods import METHODS
from amimv.models.methods.base import Encoder, Method
from amimv.models.weights import Loaded
from amimv.pipelines import ImageStore, PairLoader, Recipe, get_recipe
from amimv.pipelines.recipes import LOCAL_AREA
from amimv.trainers.data import HeldOut, Subset, backbone_spec, load_held_out, load_training_subset
from amimv.trainers.initial import initialise
from amimv.trainers.launch import main_first
from amimv.trainers.optimizers import optimizers
from amimv.trainers.settings import PretrainSettings

logger = logging.getLogger("amimv")


@dataclass
class Training:
    """What is trained, on what, and how far it is.

    Attributes:
        settings: of the run.
        accelerator: of this process.
        subset, held_out: the training images, and those of val and test where rank 0 will need them.
        spec: of the backbone.
        loader: this process's share of the pairs.
        method: the networks and their loss; ``method.online`` is what learns.
        online: that, wrapped where there are several processes.
        optimizer: of its parameters.
        total_steps: optimiser steps of the whole run; 0 until they are known, of one that is given minutes.
        initial: what the backbone took; None where it stayed random, or a checkpoint takes its place.
        step: optimiser steps that are done.
    """

    settings: PretrainSettings
    accelerator: Accelerator
    subset: Subset
    held_out: HeldOut
    spec: BackboneSpec
    loader: PairLoader
    method: Method[Any]
    online: nn.Module
    optimizer: torch.optim.Optimizer
    total_steps: int
    initial: Loaded | None = None
    step: int = 0

    @property
    def store(self) -> ImageStore:
        return self.subset.store


def make_recipe(settings: PretrainSettings, size: int = 28) -> Recipe:
    """The recipe that the settings describe, for images of this size in pixels."""
    hard = settings.policy()
    size = settings.view_size or size
    patch = patch_size(size)
    # Three sevenths of the size, as 96 is of DINO's 224, and whole patches of a ViT.
    local_size = settings.local_size or patch * round(size * 3 / 7 / patch)
    local = replace(hard, size=local_size).changed(crop_min=LOCAL_AREA[0], crop_max=settings.local_crop_max)
    return get_recipe(
        settings.recipe,
        hard=hard,
        second=settings.second_policy(),
        online=settings.online,
        partners=settings.partners,
        local=local,
        local_crops=settings.local_crops,
    )


def make_optimizer(settings: PretrainSettings, network: Encoder) -> torch.optim.Optimizer:
    """timm's optimiser of that name; biases and norms are neither decayed nor, by LARS, adapted."""
    s = settings
    check_choice("optimizer", s.optimizer, optimizers())
    try:
        optimizer = create_optimizer_v2(
            network,
            opt=s.optimizer,
            lr=s.lr * (s.batch_size / s.lr_batch if s.lr_batch else 1.0),
            weight_decay=s.weight_decay,
            momentum=s.optimizer_momentum,
            **({"trust_coeff": s.trust_coefficient} if optimizers()[s.optimizer].lars else {}),
        )
    except (AssertionError, ImportError, ValueError) as error:  # some need a GPU or a package
        raise InputError(f"optimizer {s.optimizer} cannot be used here: {first_line(error)}") from error
    if getattr(s, "fixed_predictor_lr", False) and network.head is not None:
        predictor = set(network.head.parameters())
        for group in list(optimizer.param_groups):
            apart = [p for p in group["params"] if p in predictor]
            group["params"] = [p for p in group["params"] if p not in predictor]
            optimizer.add_param_group({**group, "params": apart, "fixed_lr": True})
    return optimizer


def cap_queue(settings: PretrainSettings, images: int) -> PretrainSettings:
    """Settings whose queue, if the method has one, is no longer than the data set: it would hold images twice."""
    queue = getattr(settings, "queue", 0)
    if queue <= images:
        return settings
    logger.info("the queue of %d embeddings is capped at the data set's %d images", queue, images)
    capped: dict[str, Any] = {"queue": images}
    return replace(settings, **capped)


def build_loader(settings: PretrainSettings, store: ImageStore, accelerator: Accelerator) -> PairLoader:
    """The process's share of the pairs."""
    s = settings
    loader = PairLoader(
        store,
        make_recipe(s, store.size),
        s.batch_size,
        s.sampler,
        s.partner,
        s.backend,
        s.seed,
        beta=s.beta,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        micro_batches=s.accumulation,
        # On a CPU compiled views are slower; DALI's operators are compiled already.
        compile=s.compile and accelerator.device.type == "cuda" and s.backend == "kornia",
    )
    return loader


def set_length(loader: PairLoader, settings: PretrainSettings) -> int:
    """Tell the loader how many epochs there will be.

    Returns:
        Optimiser steps of the whole run; 0 where so far only its minutes are known.
    """
    s = settings
    steps = s.steps or (s.epochs or 0) * loader.steps_per_epoch
    loader.sampler.epochs = epochs = math.ceil(steps / loader.steps_per_epoch)
    if "cluster-balanced" in (s.sampler, s.partner) and 0 < epochs <= s.cluster_every:
        logger.warning(
            "cluster-balanced draws uniformly in all %d epochs: the first clusters come after %d (--cluster-every)",
            epochs,
            s.cluster_every,
        )
    return steps


def build_training(settings: PretrainSettings, accelerator: Accelerator, initial: bool = True) -> Training:
    """Store, loader, networks and optimiser, on the process's device.

    Args:
        settings: of the run.
        accelerator: of this process.
        initial: load initial weights, where the settings name some: not if a checkpoint takes their place.
    """
    s, device = settings, accelerator.device

    def load() -> tuple[Subset, HeldOut]:
        subset = load_training_subset(s, device)
        return subset, load_held_out(s, subset.store, s.evaluate) if accelerator.is_main_process else HeldOut()

    subset, held_out = main_first(accelerator, load)  # which downloads what is missing
    loader = build_loader(s, subset.store, accelerator)
    spec = backbone_spec(s, subset.store)
    torch.manual_seed(s.seed)
    backbone = build_backbone(spec)
    check_sizes(backbone, spec, [view.policy.size or spec.size for view in loader.recipe.views])
    # Before the method copies the backbone for its teacher.
    loaded = main_first(accelerator, lambda: initialise(backbone, spec, s) if initial else None)
    method = METHODS[s.method].build(backbone, cap_queue(s, len(subset.store))).to(device)
    if s.sync_bn:
        method = convert_sync_batchnorm(method)  # timm's, which keeps the activation inside its norms
    optimizer = make_optimizer(s, method.online)
    if s.compile:
        for network in method.children():
            network.compile()
    online, optimizer = accelerator.prepare(method.online, optimizer)
    total_steps = set_length(loader, s)
    return Training(s, accelerator, subset, held_out, spec, loader, method, online, optimizer, total_steps, loaded)
