"""Evaluation of frozen features beside their baselines: one row per features x probe x label fraction."""

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

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
    soften,
)
from amimv.trainers.data import describe_data
from amimv.trainers.metrics import compute_scores
from amimv.trainers.probes import knn_probe, linear_probe
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
    "n_train",
    "method",
    "recipe",
    "sampler",
    "features",
    "probe",
    "k",
    "label_fraction",
    "seed",
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "auc",
    "head",
    "medium",
    "tail",
    "revision",
]


@dataclass(frozen=True)
class Splits:
    train: ImageStore
    val: ImageStore
    test: ImageStore


@torch.inference_mode()
def extract_features(network: nn.Module | None, store: ImageStore, spec: BackboneSpec, chunk: int = 512) -> Tensor:
    """Features ``(N, D)`` of the normalised view of every image, ``float32``, on the device.

    Args:
        network: in evaluation mode during the call; None gives the normalised pixels themselves.
        spec: size, mean and std that the images are rendered by.
        chunk: images at a time.
    """
    params = ViewParams(spec.size, spec.mean, spec.std)
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


def train_supervised(settings: PretrainSettings, spec: BackboneSpec, store: ImageStore) -> tuple[nn.Module, nn.Module]:
    """The supervised reference: the same backbone trained on the labels, class-balanced (where every class has an
    image), softly augmented.

    AdamW at 5e-3 with cosine decay, weight decay 1e-4, ``supervised_steps`` steps.

    Returns:
        Backbone and classifier ``(features) -> (B, n_classes)`` logits.
    """
    backbone = build_random(spec, settings.seed, store.device)
    classifier = nn.Linear(feature_width(backbone), store.n_classes).to(store.device)
    network = nn.Sequential(backbone, classifier)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=5e-3, weight_decay=1e-4)
    # The labelled images are normalised as all others will be, not by the statistics of the few that they are.
    store = replace(store, mean=spec.mean, std=spec.std)
    recipe = Recipe("supervised", ((View(0, soften(settings.policy())),),))
    # A few labels of a multi-label set, or a set of one's own, may lack a class.
    sampler = "class-balanced" if min(store.class_counts()) > 0 else "uniform"
    loader = PairLoader(store, recipe, min(settings.batch_size, len(store)), sampler, seed=settings.seed)
    total = settings.supervised_steps
    for step, (view, labels) in enumerate(_forever(loader, total)):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * warmup_cosine(step, total, total // 20)
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
            yield pair.sides[0][0], pair.labels[0]


@torch.inference_mode()
def _classify(network: tuple[nn.Module, nn.Module], store: ImageStore, spec: BackboneSpec) -> Tensor:
    logits = network[1](extract_features(network[0], store, spec))
    return logits.sigmoid() if store.multi_label else logits.softmax(dim=1)


def evaluate_features(
    settings: PretrainSettings,
    splits: Splits,
    spec: BackboneSpec,
    pretrained: nn.Module,
    revision: str,
    run: str,
) -> list[dict[str, Any]]:
    """All rows of a run: choices on val, test once.

    Args:
        splits: training subset, val and test on one device.
        pretrained: the backbone to be judged, beside raw pixels, its own random start and a supervised twin.
        revision: of the code, for the rows.
        run: the run's name, for the rows.
    """
    stores = (splits.train, splits.val, splits.test)
    networks = {
        "raw pixels": None,
        "random": build_random(spec, settings.seed, splits.train.device),
        "pretrained": pretrained,
    }
    frozen = {name: [extract_features(network, store, spec) for store in stores] for name, network in networks.items()}
    rows = []
    for fraction in settings.label_fractions:
        chosen = label_fraction(splits.train.labels, fraction, settings.data_seed)
        labelled = splits.train if fraction == 1 else splits.train.subset(chosen)
        features = {name: (x[0][chosen], x[1], x[2]) for name, x in frozen.items()}
        results = [_majority(labelled, splits.test)]
        supervised = None
        if settings.supervised_steps:
            logger.info("training the supervised reference on %d labels", len(labelled))
            supervised = train_supervised(settings, spec, labelled)
            train, val, test = (extract_features(supervised[0], s, spec) for s in (labelled, splits.val, splits.test))
            features["supervised"] = (train, val, test)
        for name, (train, val, test) in features.items():
            y = (labelled.labels, splits.val.labels)
            scores, k = knn_probe(train, y[0], val, y[1], test, labelled.n_classes)
            results.append((name, "knn", k, scores))
            scores, _ = linear_probe(train, y[0], val, y[1], test, labelled.n_classes)
            results.append((name, "linear", "", scores))
        if supervised is not None:
            results.append(("supervised", "classifier", "", _classify(supervised, splits.test, spec)))
        rows += [_row(settings, splits.test, labelled, fraction, revision, run, *result) for result in results]
    return rows


def evaluate_run(settings: PretrainSettings, folder: Path, splits: Splits) -> None:
    """Judge the backbone that a run exported: ``results.csv`` in its folder, and the table on the console."""
    backbone, spec = load_backbone(folder / "backbone", splits.train.device)
    rows = evaluate_features(settings, splits, spec, backbone, revision(), folder.name)
    write_results(rows, folder / "results.csv")
    print_table(rows, f"{describe_run(settings, splits.train)}, test split, %")


def describe_run(settings: PretrainSettings, store: ImageStore) -> str:
    """A title for tables and curves."""
    return f"{describe_data(store)}: {settings.method} on {settings.recipe}, seed {settings.seed}"


def _majority(labelled: ImageStore, test: ImageStore) -> tuple[str, str, int | str, Tensor]:
    """Scores of always answering by the training frequencies, so that the largest class wins."""
    shares = torch.tensor(labelled.class_counts(), device=test.device) / len(labelled)
    return "majority", "", "", shares.expand(len(test), -1)


def _row(
    settings: PretrainSettings,
    test: ImageStore,
    labelled: ImageStore,
    fraction: float,
    revision: str,
    run: str,
    features: str,
    probe: str,
    k: int | str,
    scores: Tensor,
) -> dict[str, Any]:
    counts = labelled.class_counts()
    result = compute_scores(test.labels.cpu().numpy(), scores.cpu().numpy(), test.task, counts)
    if result.auc is None:
        logger.info("no AUC for %s %s: %s", features, probe, result.auc_note)
    own = features == "pretrained"
    row = {
        "run": run,
        "data": test.name,
        "profile": settings.profile,
        "rho": settings.rho,
        "realised_ratio": round(realised_ratio(counts), 4),
        "n_train": len(labelled),
        "method": settings.method if own else "",
        "recipe": settings.recipe if own else "",
        "sampler": settings.sampler if own else "",
        "features": features,
        "probe": probe,
        "k": k,
        "label_fraction": fraction,
        "seed": settings.seed,
        "revision": revision,
    }
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc", "head", "medium", "tail"):
        value = getattr(result, name)
        row[name] = "" if value is None else round(value, 6)
    return row


def write_results(rows: list[dict[str, Any]], path: Path) -> None:
    """``results.csv``, whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """The rows for people, in percent."""
    table = Table(title=title, title_justify="left")
    shown = ("balanced_accuracy", "accuracy", "macro_f1", "auc", "head", "medium", "tail")
    for name in ("features", "probe", "labels"):
        table.add_column(name, no_wrap=True)
    for name in shown:
        table.add_column(name.replace("_", " "), justify="right")
    order = ("majority", "raw pixels", "random", "pretrained", "supervised")
    names = {"random": "random initialisation", "majority": "majority class"}
    for row in sorted(rows, key=lambda r: (r["label_fraction"], order.index(r["features"]))):
        values = [f"{100 * row[name]:.1f}" if row[name] != "" else "-" for name in shown]
        label = f"{100 * row['label_fraction']:g} % ({row['n_train']})"
        probe = f"kNN, k = {row['k']}" if row["probe"] == "knn" else row["probe"]
        style = "bold" if row["features"] == "pretrained" else ""
        table.add_row(names.get(row["features"], row["features"]), probe, label, *values, style=style)
    Console(width=120).print(table)
