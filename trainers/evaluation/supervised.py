"""Training on the labels: the supervised reference from scratch, and fine-tuning."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from amimv import InputError
from amimv.models.backbones import encode, feature_width
from amimv.models.supervised_losses import cross_entropy_loss
from amimv.pipelines import ImageStore, PairLoader, Recipe, View, ViewPolicy
from amimv.pipelines.recipes import HARD
from amimv.pipelines.rng import library_seed
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
    loss: Callable[..., Tensor] = cross_entropy_loss,
    sampler: str = "class-balanced",
    mixup: float = 0.0,
    smoothing: float = 0.0,
) -> tuple[nn.Module, nn.Module]:
    """Train a backbone and a new linear classifier on the labels: from scratch, or fine-tuning.

    Args:
        backbone: where training starts, with its ``num_features``, as timm's models have them; it is changed.
        store: the labelled images.
        like: whose size, mean, std and value range the images are rendered by, see `extract_features`.
        augment: of the training images; None: the soft counterpart of MIMV's augmentation.
        steps, batch_size: of AdamW with cosine decay and weight decay 1e-4; a batch is at most all images.
        lr: peak learning rate, of the backbone and the classifier.
        seed: of the classifier's weights, the batches, the augmentation and mixup.
        loss: of `amimv.models.supervised_losses`; of multi-label sets always binary cross-entropies.
        sampler: of the images, as for `PairLoader`; uniform where a class has none.
        mixup, smoothing: alpha of mixup (Zhang et al. 2018), and the share of a class's target that all have; 0: none.

    Returns:
        Backbone and classifier ``(features) -> (B, n_classes)`` logits, in evaluation mode.

    Raises:
        InputError: the store has no labels, or smaller images than the views.
    """
    store.known_labels("supervised training")
    torch.manual_seed(seed)
    classifier = nn.Linear(feature_width(backbone), store.n_classes).to(store.device)
    optimizer = create_optimizer_v2(nn.Sequential(backbone, classifier).train(), opt="adamw", lr=lr, weight_decay=1e-4)
    loader = _loader(store, like or store, augment or HARD.soft(), batch_size, seed, sampler)
    objective, shares = _objective(store, loss, smoothing), np.random.default_rng(library_seed(seed))
    for step, (view, labels) in enumerate(_forever(loader, steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(step, steps, steps // 20)
        mixed, targets = _mixed(view, labels, mixup, shares)
        logits = classifier(encode(backbone, mixed))
        optimizer.zero_grad()
        torch.stack([share * objective(logits, one) for share, one in targets]).sum().backward()
        optimizer.step()
    return backbone.eval(), classifier.eval()


def _objective(store: ImageStore, loss: Callable[..., Tensor], smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Of logits and labels, the mean loss."""
    if store.multi_label:
        return lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels.float())
    return partial(loss, counts=store.class_counts(), smoothing=smoothing)


def _mixed(
    view: Tensor, labels: Tensor, alpha: float, generator: np.random.Generator
) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    """A batch mixed with itself in another order, and of which shares its targets are."""
    if not alpha:
        return view, [(1.0, labels)]
    share, order = float(generator.beta(alpha, alpha)), torch.from_numpy(generator.permutation(len(view)))
    order = order.to(view.device)
    return share * view + (1 - share) * view[order], [(share, labels), (1 - share, labels[order])]


def _loader(
    store: ImageStore, like: Like, augment: ViewPolicy, batch_size: int, seed: int, sampler: str
) -> PairLoader:
    # The labelled images are normalised as all others will be, not by the statistics of the few that they are.
    store = replace(store, mean=like.mean, std=like.std, value_range=like.value_range)
    recipe = Recipe("supervised", ((View(0, replace(augment, size=like.size)),),))
    # A few labels of a multi-label set, or a set of one's own, may lack a class.
    sampler = sampler if min(store.class_counts()) > 0 else "uniform"
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
    choices: Mapping[str, Sequence[Any]] | None = None,
    **how: Any,
) -> tuple[nn.Module, Tensor, Tensor]:
    """Train copies of ``start`` on the labels at every learning rate and choice; the best on val is taken.

    Args:
        start: a backbone.
        labelled, val, test: images of one data set.
        like: whose size, mean, std and value range they are rendered by; None: those of ``labelled``.
        lrs: peak learning rates.
        choices: values to try of other settings of `train_supervised`, by name; all combinations are.
        how: further settings of `train_supervised`.

    Returns:
        Its backbone, and its class scores on val and on test.

    Raises:
        InputError: as `train_supervised`, and if training diverged at every rate.
    """
    like = labelled if like is None else like
    best: tuple[float, nn.Module, Tensor, Tensor] | None = None
    choices = choices or {}
    for lr, *values in itertools.product(lrs, *choices.values()):
        chosen = how | dict(zip(choices, values, strict=True))
        network = train_supervised(copy.deepcopy(start), labelled, like, lr=lr, **chosen)
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
