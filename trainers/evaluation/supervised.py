"""Training on the labels: the supervised reference from scratch, and fine-tuning."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from amimv import InputError
from amimv.models.backbones import BackboneSpec, encode, feature_width
from amimv.pipelines import ImageStore, PairLoader, Recipe, View
from amimv.trainers.data import EVALUATION, Splits
from amimv.trainers.evaluation.features import extract_features
from amimv.trainers.evaluation.probes import balanced_accuracy
from amimv.trainers.schedules import warmup_cosine
from amimv.trainers.settings import PretrainSettings

logger = logging.getLogger("amimv")


def train_supervised(
    settings: PretrainSettings, spec: BackboneSpec, store: ImageStore, backbone: nn.Module, lr: float = 5e-3
) -> tuple[nn.Module, nn.Module]:
    """Train a backbone and a new linear classifier on the labels: from scratch, or fine-tuning.

    Class-balanced batches (where every class has an image), softly augmented; AdamW with cosine decay, weight decay
    1e-4, ``supervised_steps`` steps.

    Args:
        settings: of the run.
        spec: size, mean and std that the images are rendered by.
        store: the labelled images.
        backbone: where training starts; it is changed.
        lr: peak learning rate, of the backbone and the classifier.

    Returns:
        Backbone and classifier ``(features) -> (B, n_classes)`` logits, in evaluation mode.
    """
    torch.manual_seed(settings.seed)
    classifier = nn.Linear(feature_width(backbone), store.n_classes).to(store.device)
    network = nn.Sequential(backbone, classifier).train()
    optimizer = create_optimizer_v2(network, opt="adamw", lr=lr, weight_decay=1e-4)
    # The labelled images are normalised as all others will be, not by the statistics of the few that they are.
    store = replace(store, mean=spec.mean, std=spec.std, value_range=spec.value_range)
    recipe = Recipe("supervised", ((View(0, settings.policy().soft()),),))
    # A few labels of a multi-label set, or a set of one's own, may lack a class.
    sampler = "class-balanced" if min(store.class_counts()) > 0 else "uniform"
    loader = PairLoader(store, recipe, min(settings.batch_size, len(store)), sampler, seed=settings.seed)
    total = settings.supervised_steps
    for step, (view, labels) in enumerate(_forever(loader, total)):
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(step, total, total // 20)
        logits = classifier(encode(backbone, view))
        if store.multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, labels.float())
        else:
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return backbone.eval(), classifier.eval()


def _forever(loader: PairLoader, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in range(-(-steps // loader.steps_per_epoch)):
        left = steps - epoch * loader.steps_per_epoch
        for _, pair in zip(range(left), loader.epoch(epoch), strict=False):
            assert pair.labels is not None
            yield pair.sides[0][0], pair.labels[0]


@torch.inference_mode()
def _classify(network: tuple[nn.Module, nn.Module], store: ImageStore, spec: BackboneSpec) -> Tensor:
    logits = network[1](extract_features(network[0], store, spec))
    return logits.sigmoid() if store.multi_label else logits.softmax(dim=1)


def best_supervised(
    settings: PretrainSettings, spec: BackboneSpec, labelled: ImageStore, splits: Splits, start: nn.Module
) -> tuple[nn.Module, Tensor, Tensor]:
    """Train copies of ``start`` on the labels at every rate of ``supervised_lr``; the best on val is taken.

    Returns:
        Its backbone, and its class scores on val and on test.

    Raises:
        InputError: if training diverged at every rate.
    """
    best: tuple[float, nn.Module, Tensor, Tensor] | None = None
    for lr in settings.supervised_lr:
        network = train_supervised(settings, spec, labelled, copy.deepcopy(start), lr)
        val = _classify(network, splits.val, spec)
        if not bool(val.isfinite().all()):
            logger.warning("supervised training diverged at a learning rate of %g", lr)
            continue
        accuracy = float(balanced_accuracy(val, splits.val.known_labels(EVALUATION)))
        if best is None or accuracy > best[0]:
            best = (accuracy, network[0], val, _classify(network, splits.test, spec))
    if best is None:
        rates = ", ".join(f"{lr:g}" for lr in settings.supervised_lr)
        raise InputError(
            f"supervised training diverged at every learning rate ({rates}): give a lower --supervised-lr"
        )
    return best[1:]
