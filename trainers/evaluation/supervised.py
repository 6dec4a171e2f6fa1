"""Training on the labels: the supervised reference from scratch, and fine-tuning."""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from amimv import InputError
from amimv.models.backbones import encode, feature_width
from amimv.pipelines import ImageStore, PairLoader, Recipe, View, ViewPolicy
from amimv.pipelines.recipes import HARD
from amimv.trainers.evaluation.features import Like, extract_features
from amimv.trainers.evaluation.metrics import balanced_accuracy
from amimv.trainers.schedules import warmup_cosine

logger = logging.getLogger("amimv")


def train_supervised(
    backbone: nn.Module,
    store: ImageStore,
    like: Like | None = None,
    *,
    augment: ViewPolicy | None = None,
    steps: int = 300,
    batch_size: int = 256,
    lr: float = 5e-3,
    seed: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Train a backbone and a new linear classifier on the labels: from scratch, or fine-tuning.

    Class-balanced batches (where every class has an image); AdamW with cosine decay, weight decay 1e-4.

    Args:
        backbone: where training starts, with its ``num_features``, as timm's models have them; it is changed.
        store: the labelled images.
        like: whose size, mean, std and value range the images are rendered by, see `extract_features`.
        augment: of the training images; None: the soft counterpart of MIMV's augmentation.
        steps: of the optimiser.
        batch_size: at most; all images, if they are fewer.
        lr: peak learning rate, of the backbone and the classifier.
        seed: of the classifier's weights, the batches and the augmentation.

    Returns:
        Backbone and classifier ``(features) -> (B, n_classes)`` logits, in evaluation mode.

    Raises:
        InputError: the store has no labels, or smaller images than the views.
    """
    store.known_labels("supervised training")
    torch.manual_seed(seed)
    classifier = nn.Linear(feature_width(backbone), store.n_classes).to(store.device)
    network = nn.Sequential(backbone, classifier).train()
    optimizer = create_optimizer_v2(network, opt="adamw", lr=lr, weight_decay=1e-4)
    loader = _loader(store, store if like is None else like, augment or HARD.soft(), batch_size, seed)
    for step, (view, labels) in enumerate(_forever(loader, steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(step, steps, steps // 20)
        logits = classifier(encode(backbone, view))
        if store.multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, labels.float())
        else:
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return backbone.eval(), classifier.eval()


def _loader(store: ImageStore, like: Like, augment: ViewPolicy, batch_size: int, seed: int) -> PairLoader:
    # The labelled images are normalised as all others will be, not by the statistics of the few that they are.
    store = replace(store, mean=like.mean, std=like.std, value_range=like.value_range)
    recipe = Recipe("supervised", ((View(0, replace(augment, size=like.size)),),))
    # A few labels of a multi-label set, or a set of one's own, may lack a class.
    sampler = "class-balanced" if min(store.class_counts()) > 0 else "uniform"
    return PairLoader(store, recipe, min(batch_size, len(store)), sampler, seed=seed)


def _forever(loader: PairLoader, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in range(-(-steps // loader.steps_per_epoch)):
        left = steps - epoch * loader.steps_per_epoch
        for _, pair in zip(range(left), loader.epoch(epoch), strict=False):
            assert pair.labels is not None
            yield pair.sides[0][0], pair.labels[0]


@torch.inference_mode()
def classify(network: tuple[nn.Module, nn.Module], store: ImageStore, like: Like | None = None) -> Tensor:
    """Class scores ``(N, C)`` in [0, 1] by a backbone and its classifier; ``like`` as for `extract_features`."""
    logits = network[1](extract_features(network[0], store, like))
    return logits.sigmoid() if store.multi_label else logits.softmax(dim=1)


def best_supervised(
    start: nn.Module,
    labelled: ImageStore,
    val: ImageStore,
    test: ImageStore,
    like: Like | None = None,
    *,
    lrs: Sequence[float] = (5e-3,),
    **how: Any,
) -> tuple[nn.Module, Tensor, Tensor]:
    """Train copies of ``start`` on the labels at every learning rate; the best on val is taken.

    Args:
        start: a backbone.
        labelled, val, test: images of one data set.
        like: whose size, mean, std and value range they are rendered by; None: those of ``labelled``.
        lrs: peak learning rates.
        how: further settings of `train_supervised`.

    Returns:
        Its backbone, and its class scores on val and on test.

    Raises:
        InputError: as `train_supervised`, and if training diverged at every rate.
    """
    like = labelled if like is None else like
    best: tuple[float, nn.Module, Tensor, Tensor] | None = None
    for lr in lrs:
        network = train_supervised(copy.deepcopy(start), labelled, like, lr=lr, **how)
        scores = classify(network, val, like)
        if not bool(scores.isfinite().all()):
            logger.warning("supervised training diverged at a learning rate of %g", lr)
            continue
        accuracy = float(balanced_accuracy(scores, val.known_labels("the choice of a learning rate")))
        if best is None or accuracy > best[0]:
            best = (accuracy, network[0], scores, classify(network, test, like))
    if best is None:
        rates = ", ".join(f"{lr:g}" for lr in lrs)
        raise InputError(
            f"supervised training diverged at every learning rate ({rates}): give a lower one (--supervised-lr)"
        )
    return best[1:]
