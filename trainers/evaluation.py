"""Evaluation of frozen features beside their baselines: one row per features x probe x label fraction."""

import copy
import csv
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import PCA
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from amimv import InputError
from amimv.files import replacing
from amimv.models.backbones import BackboneSpec, build_backbone, encode, feature_width, load_backbone
from amimv.pipelines import (
    ImageStore,
    PairLoader,
    Recipe,
    View,
    ViewParams,
    label_fraction,
    realised_ratio,
    render,
)
from amimv.trainers.checks import one_image
from amimv.trainers.data import HeldOut, backbone_spec, describe_data
from amimv.trainers.metrics import compute_scores
from amimv.trainers.probes import balanced_accuracy, knn_probe, linear_probe
from amimv.trainers.run_folder import revision
from amimv.trainers.schedules import warmup_cosine
from amimv.trainers.settings import PretrainSettings

logger = logging.getLogger("amimv")

COLUMNS = [
    "run",
    "data",
    "profile",
    "rho",
    "realised_ratio",
    "total",
    "n_train",
    "method",
    "recipe",
    "sampler",
    "partner",
    "features",
    "probe",
    "k",
    "label_fraction",
    "seed",
    "steps",
    "val_balanced_accuracy",
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "auc",
    "head",
    "medium",
    "tail",
    "revision",
]


#: What needs the labels, for messages.
EVALUATION = "an evaluation"
#: Of the features in a table.
ORDER = ("majority", "raw pixels", "random", "pretrained", "supervised")


@dataclass(frozen=True)
class Splits:
    train: ImageStore
    val: ImageStore
    test: ImageStore

    @classmethod
    def of(cls, train: ImageStore, held_out: HeldOut) -> "Splits":
        """From what a run loaded, which evaluates.

        Where the training images have no labels, one half of the validation images stands for them.

        Raises:
            InputError: if there are no labels for a table.
        """
        if held_out.no_table:
            raise InputError(held_out.no_table)
        assert held_out.val is not None
        assert held_out.test is not None
        if train.labels is not None:
            return cls(train, held_out.val, held_out.test)
        val = held_out.val
        logger.warning("without labels of training images, the probes learn from half of the val images")
        learnt = label_fraction(val.known_labels(EVALUATION), 0.5)
        rest = torch.ones(len(val), dtype=torch.bool, device=val.device).index_fill(0, learnt, False)
        return cls(val.subset(learnt), val.subset(rest.nonzero().squeeze(1)), held_out.test)


@torch.inference_mode()
def extract_features(network: nn.Module | None, store: ImageStore, spec: BackboneSpec, chunk: int = 512) -> Tensor:
    """Features ``(N, D)`` of the normalised view of every image, ``float32``, on the device.

    Args:
        network: in evaluation mode during the call; None gives the normalised pixels themselves.
        spec: size, mean and std that the images are rendered by.
        chunk: images at a time.
    """
    params = ViewParams(spec.size, spec.mean, spec.std, spec.value_range)
    parts = []
    was_training = network is not None and network.training
    if network is not None:
        network.eval()
    indices = torch.arange(len(store), device=store.device)
    whole = len(store) // chunk * chunk
    rest = [indices[None, whole:]] if whole < len(store) else []
    for images in chain.from_iterable(map(store.stream, [indices[:whole].view(-1, chunk), *rest])):
        view = render(images, params)
        parts.append(view.flatten(1) if network is None else encode(network, view).float())
    if network is not None:
        network.train(was_training)
    return torch.cat(parts)


def build_random(spec: BackboneSpec, seed: int, device: torch.device | str) -> nn.Module:
    """The backbone as a run with this seed starts from."""
    torch.manual_seed(seed)
    return build_backbone(spec).to(device)


@dataclass(frozen=True)
class Judged:
    """What one probe on some features said.

    Attributes:
        features: majority, raw pixels, random, pretrained or supervised.
        probe: knn, linear, classifier (from scratch), fine-tuned, or empty for the majority class.
        k: neighbours of kNN, else empty.
        val, test: class scores ``(N, C)`` in [0, 1]; every choice was made on those of val.
    """

    features: str
    probe: str
    k: int | str
    val: Tensor
    test: Tensor


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


def judge(
    settings: PretrainSettings, splits: Splits, spec: BackboneSpec, pretrained: nn.Module | None
) -> Iterator[tuple[float, ImageStore, Judged]]:
    """Every probe on every kind of features: choices on val, test once.

    Args:
        settings: of the run; ``baselines``, ``finetune``, ``supervised_steps`` and ``label_fractions`` say what to do.
        splits: training subset, val and test on one device.
        spec: of the backbone.
        pretrained: the backbone to be judged; None leaves its rows out.

    Yields:
        Label fraction, the labelled images, what came out.
    """
    stores = (splits.train, splits.val, splits.test)
    random = build_random(spec, settings.seed, splits.train.device)
    networks: dict[str, nn.Module | None] = {}
    if settings.baselines != "no":
        networks = {"raw pixels": None, "random": random}
    if pretrained is not None:
        networks["pretrained"] = pretrained
    frozen = {name: [extract_features(network, store, spec) for store in stores] for name, network in networks.items()}
    for fraction in settings.label_fractions:
        chosen = label_fraction(splits.train.known_labels(EVALUATION), fraction, settings.data_seed)
        labelled = splits.train if fraction == 1 else splits.train.subset(chosen)
        for name, (train, val, test) in frozen.items():
            for judged in _probe(name, labelled, splits, (train[chosen], val, test)):
                yield fraction, labelled, judged
        if settings.baselines != "no":
            yield fraction, labelled, _majority(labelled, splits)
        if settings.baselines != "no" and settings.supervised_steps:
            logger.info("training the supervised reference on %d labels", len(labelled))
            backbone, *scores = best_supervised(settings, spec, labelled, splits, random)
            features = [extract_features(backbone, store, spec) for store in (labelled, splits.val, splits.test)]
            for judged in _probe("supervised", labelled, splits, features):
                yield fraction, labelled, judged
            yield fraction, labelled, Judged("supervised", "classifier", "", *scores)
        if pretrained is not None and settings.finetune and settings.supervised_steps:
            logger.info("fine-tuning on %d labels", len(labelled))
            _, *scores = best_supervised(settings, spec, labelled, splits, pretrained)
            yield fraction, labelled, Judged("pretrained", "fine-tuned", "", *scores)


def _probe(name: str, labelled: ImageStore, splits: Splits, features: Sequence[Tensor]) -> tuple[Judged, Judged]:
    """kNN and linear probe; one search scores val, by which k or penalty is chosen, and test."""
    train, val, test = features
    args = (
        train,
        labelled.known_labels(EVALUATION),
        val,
        splits.val.known_labels(EVALUATION),
        torch.cat([val, test]),
        labelled.n_classes,
    )
    parts = [len(val), len(test)]
    knn, k = knn_probe(*args)
    linear, _ = linear_probe(*args)
    return Judged(name, "knn", k, *knn.split(parts)), Judged(name, "linear", "", *linear.split(parts))


def evaluate_features(
    settings: PretrainSettings,
    splits: Splits,
    spec: BackboneSpec,
    pretrained: nn.Module | None,
    revision: str,
    run: str,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rows of a run, and what each predicts for every test image.

    Args:
        settings, splits, spec, pretrained: as for `judge`.
        revision: of the code, for the rows.
        run: the run's name, for the rows.

    Returns:
        Rows for ``results.csv``; arrays for ``predictions.npz``: ``labels``, ``row_000`` ... (the class predicted for
        each test image by that row; multi-label zeros and ones), ``train_counts``, ``class_names`` and, with a
        pretrained backbone, ``projection``: its features' first two principal components, ``(N, 2)``.
    """
    rows, arrays = (
        [],
        {
            "labels": splits.test.known_labels(EVALUATION).cpu().numpy(),
            "train_counts": np.array(splits.train.class_counts()),
            "class_names": np.array(splits.test.class_names),
        },
    )
    order = {name: i for i, name in enumerate(ORDER)}
    judged = sorted(judge(settings, splits, spec, pretrained), key=lambda j: (j[0], order[j[2].features]))
    for i, (fraction, labelled, one) in enumerate(judged):
        rows.append(_row(settings, splits, labelled, fraction, revision, run, one))
        predicted = one.test > 0.5 if splits.test.multi_label else one.test.argmax(dim=1)
        arrays[f"row_{i:03d}"] = predicted.to(torch.int16).cpu().numpy()
    if pretrained is not None:
        features = extract_features(pretrained, splits.test, spec).cpu().numpy()
        arrays["projection"] = PCA(2, random_state=0).fit_transform(features).astype(np.float32)
    return rows, arrays


def evaluate_run(settings: PretrainSettings, folder: Path, splits: Splits) -> float:
    """Judge the backbone that a run exported: ``results.csv`` and ``predictions.npz`` in its folder, and the table on
    the console. Without pre-training (``baselines`` is "only") the baselines alone.

    Returns:
        Seconds that it took.
    """
    started = time.perf_counter()
    if settings.baselines == "only":
        backbone, spec = None, backbone_spec(settings, splits.train)
    else:
        backbone, spec = load_backbone(folder / "backbone", splits.train.device)
    rows, arrays = evaluate_features(settings, splits, spec, backbone, revision(), folder.name)
    with replacing(folder / "predictions.npz", "wb") as file:
        np.savez_compressed(file, **arrays)
    write_results(rows, folder / "results.csv")  # the last to be written: it says that the run is done
    print_table(rows, f"{describe_run(settings, splits.train)}, {splits.train.task}, test split, %")
    return time.perf_counter() - started


def describe_run(settings: PretrainSettings, store: ImageStore) -> str:
    """A title for tables and curves."""
    return f"{describe_data(store)}: {settings.method} on {settings.recipe}, seed {settings.seed}"


def _majority(labelled: ImageStore, splits: Splits) -> Judged:
    """Always answering by the training frequencies, so that the largest class wins."""
    shares = torch.tensor(labelled.class_counts(), device=splits.test.device) / len(labelled)
    return Judged("majority", "", "", *(shares.expand(len(store), -1) for store in (splits.val, splits.test)))


def _row(
    settings: PretrainSettings,
    splits: Splits,
    labelled: ImageStore,
    fraction: float,
    revision: str,
    run: str,
    judged: Judged,
) -> dict[str, Any]:
    s, counts, test = settings, labelled.class_counts(), splits.test
    # Which classes are head and tail is decided by the training images: among a few labels all may be as many.
    thirds_by = splits.train.class_counts()
    result = compute_scores(
        test.known_labels(EVALUATION).cpu().numpy(), judged.test.cpu().numpy(), test.task, thirds_by
    )
    if result.auc is None:
        logger.info("no AUC for %s %s: %s", judged.features, judged.probe, result.auc_note)
    own = judged.features == "pretrained"
    row = {
        "run": run,
        "data": test.name,
        # Of given indices, what they are: no ratio was asked for.
        "profile": "indices" if s.indices else s.profile,
        "rho": "" if s.indices else s.rho,
        "realised_ratio": round(realised_ratio(counts), 4),
        "total": len(splits.train) if s.indices else s.total,
        "n_train": len(labelled),
        "method": s.method if own else "",
        "recipe": s.recipe if own else "",
        "sampler": s.sampler if own else "",
        "partner": s.partner if own and not one_image(s) else "",
        "features": judged.features,
        "probe": judged.probe,
        "k": judged.k,
        "label_fraction": fraction,
        "seed": s.seed,
        "steps": s.steps or "",
        "val_balanced_accuracy": round(float(balanced_accuracy(judged.val, splits.val.known_labels(EVALUATION))), 6),
        "revision": revision,
    }
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc", "head", "medium", "tail"):
        value = getattr(result, name)
        row[name] = "" if value is None else round(value, 6)
    return row


def write_results(rows: list[dict[str, Any]], path: Path) -> None:
    """``results.csv``, whole or not at all."""
    with replacing(path, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """The rows for people, in percent."""
    table = Table(title=title, title_justify="left")
    shown = ("balanced_accuracy", "accuracy", "macro_f1", "auc", "head", "medium", "tail")
    for name in ("features", "probe", "labels"):
        table.add_column(name, no_wrap=True)
    for name in shown:
        table.add_column(name.replace("_", " "), justify="right")
    names = {"random": "random initialisation", "majority": "majority class"}
    for row in rows:
        values = [f"{100 * row[name]:.1f}" if row[name] != "" else "-" for name in shown]
        label = f"{100 * row['label_fraction']:g} % ({row['n_train']})"
        probe = f"kNN, k = {row['k']}" if row["probe"] == "knn" else row["probe"]
        style = "bold" if row["features"] == "pretrained" else ""
        table.add_row(names.get(row["features"], row["features"]), probe, label, *values, style=style)
    Console(width=120).print(table)
