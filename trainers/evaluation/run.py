"""Evaluation of a run: its frozen features beside their baselines, one row per features x probe x draw of labels."""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from amimv.files import replacing
from amimv.models import supervised_losses
from amimv.models.backbones import BackboneSpec, load_backbone
from amimv.models.frozen import load_frozen
from amimv.pipelines import ImageStore, ViewPolicy
from amimv.trainers.conditions import one_image
from amimv.trainers.data import Splits, backbone_spec, describe_data, describe_run
from amimv.trainers.evaluation.features import extract_features
from amimv.trainers.evaluation.results import (
    EVALUATION,
    FROZEN,
    INITIAL,
    ORDER,
    SUPERVISED_INITIAL,
    Judged,
    judge_features,
    kind_of,
    majority,
    print_table,
    rank_of_embeddings,
    result_row,
    write_results,
)
from amimv.trainers.evaluation.supervised import best_supervised
from amimv.trainers.evaluation.without_labels import judge_without_labels
from amimv.trainers.initial import baselines_start_from_it, build_start, check_start
from amimv.trainers.label_draws import Draw, draw_labels
from amimv.trainers.run_folder import revision
from amimv.trainers.settings import PretrainSettings

logger = logging.getLogger("amimv")


def judge(
    settings: PretrainSettings,
    splits: Splits,
    spec: BackboneSpec,
    pretrained: nn.Module | None,
    own: BackboneSpec | None = None,
    projector: nn.Module | None = None,
) -> Iterator[tuple[Draw, Judged]]:
    """Every probe on every kind of features: choices on val, test once.

    Args:
        settings: of the run; those of the evaluation say what to do.
        splits: training subset, val and test on one device.
        spec: of the backbone.
        pretrained: the backbone to be judged; None leaves its rows out.
        own: what the baselines are built and images rendered for them by; None: ``spec``.
        projector: that the backbone was trained with, where it is at hand.

    Yields:
        The labelled images, what came out.
    """
    s, own, held_out = settings, spec if own is None else own, (splits.val, splits.test)
    start = build_start(s, own).to(splits.train.device)
    frozen, unlabelled = {}, {}
    for name, network, like in _networks(s, (start, own), (pretrained, spec)):
        frozen[name] = [_features(network, store, like) for store in (splits.train, *held_out)]
        train = frozen[name][0] if splits.unlabelled is None else _features(network, splits.unlabelled, like)
        views = _features(network, splits.val, like, s.policy())
        behind = projector if name == "pretrained" else None
        unlabelled[name] = judge_without_labels(train, frozen[name][1], views, s.seed, behind)
    for draw, chosen in draw_labels(s, splits.train):
        stores = (draw.labelled, *held_out)
        for name, (train, val, test) in frozen.items():
            for judged in judge_features(name, (train[chosen], val, test), *stores):
                yield draw, replace(judged, without_labels=unlabelled[name])
        if s.baselines != "no":
            yield draw, majority(*stores)
        for judged in _trained(s, stores, (start, own), (pretrained, spec)):
            yield draw, judged


def _networks(
    settings: PretrainSettings,
    scratch: tuple[nn.Module, BackboneSpec],
    pretrained: tuple[nn.Module | None, BackboneSpec],
) -> Iterator[tuple[str, nn.Module | None, BackboneSpec]]:
    """Whose features are judged, one after the other: name, network, and what images are rendered for it by."""
    start, own = scratch
    if settings.baselines != "no":
        yield "raw pixels", None, own
        yield INITIAL if baselines_start_from_it(settings) else "random", start, own
        for name in settings.frozen:
            yield f"{FROZEN} {name}", *load_frozen(name, own, next(start.parameters()).device)
    if pretrained[0] is not None:
        yield "pretrained", *pretrained


def _features(
    network: nn.Module | None, store: ImageStore, like: BackboneSpec, augment: ViewPolicy | None = None
) -> Tensor:
    """Of fewer images at a time where a frozen model wants them larger than a data set is."""
    chunk = max(1, min(512, 512 * 64**2 // like.size**2))
    return extract_features(network, store, like, chunk, augment=augment)


def _trained(
    settings: PretrainSettings,
    stores: tuple[ImageStore, ImageStore, ImageStore],
    scratch: tuple[nn.Module, BackboneSpec],
    pretrained: tuple[nn.Module | None, BackboneSpec],
) -> Iterator[Judged]:
    """What is trained on the labels: the supervised reference, and the fine-tuned backbone."""
    s, training = settings, supervised_settings(settings)
    (start, own), (backbone, spec) = scratch, pretrained
    if s.baselines != "no" and s.supervised_steps:
        logger.info("training the supervised reference on %d labels", len(stores[0]))
        name = SUPERVISED_INITIAL if baselines_start_from_it(s) else "supervised"
        network, *scores = best_supervised(start, *stores, own, **training)
        yield from judge_features(name, [extract_features(network, one, own) for one in stores], *stores)
        yield Judged(name, "classifier", "", *scores)
    if backbone is not None and s.finetune and s.supervised_steps:
        logger.info("fine-tuning on %d labels", len(stores[0]))
        _, *scores = best_supervised(backbone, *stores, spec, **training)
        yield Judged("pretrained", "fine-tuned", "", *scores)


def supervised_settings(settings: PretrainSettings) -> dict[str, Any]:
    """What a run's settings say of `best_supervised`."""
    s = settings
    return {
        "lrs": s.supervised_lr,
        "augment": s.policy().soft(),
        "steps": s.supervised_steps,
        "batch_size": s.batch_size,
        "seed": s.seed,
        "loss": getattr(supervised_losses, f"{s.supervised_loss.replace('-', '_')}_loss"),
        "sampler": s.supervised_sampler,
        "choices": {
            "steps": (s.supervised_steps, *s.supervised_more_steps),
            "mixup": s.supervised_mixup,
            "smoothing": s.supervised_smoothing,
        },
    }


def evaluate_features(
    settings: PretrainSettings,
    splits: Splits,
    spec: BackboneSpec,
    pretrained: nn.Module | None,
    revision: str,
    run: str,
    own: BackboneSpec | None = None,
    projector: nn.Module | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rows of a run, and what each predicts for every test image.

    Args:
        settings, splits, spec, pretrained, own, projector: as for `judge`.
        revision: of the code, for the rows.
        run: the run's name, for the rows.

    Returns:
        Rows for ``results.csv``; arrays for ``predictions.npz``: ``labels``, ``row_000`` ... (the class predicted for
        each test image by that row; multi-label zeros and ones), ``train_counts``, ``class_names`` and, with a
        pretrained backbone, ``projection``: its features' first two principal components, ``(N, 2)``.
    """
    # Which classes are head and tail is decided by the training images: among a few labels all may be as many.
    rows, thirds_by, unleaked = [], splits.train.class_counts(), splits.unleaked()
    arrays = {
        "labels": splits.test.known_labels(EVALUATION).cpu().numpy(),
        "train_counts": np.array(thirds_by),
        "class_names": np.array(splits.test.class_names),
    }
    found = judge(settings, splits, spec, pretrained, own, projector)
    judged = sorted(found, key=lambda j: (j[0].fraction, ORDER.index(kind_of(j[1].features))))
    for i, (draw, one) in enumerate(judged):
        result = result_row(one, draw.labelled, splits.val, splits.test, draw.fraction, thirds_by, unleaked)
        own_columns = _columns(settings, splits.train, one.features, revision, run)
        rows.append(own_columns | result | {"label_seed": "" if draw.seed is None else draw.seed})
        predicted = one.test > 0.5 if splits.test.multi_label else one.test.argmax(dim=1)
        arrays[f"row_{i:03d}"] = predicted.to(torch.int16).cpu().numpy()
    if pretrained is not None:
        features = extract_features(pretrained, splits.test, spec).cpu().numpy()
        arrays["projection"] = PCA(2, random_state=0).fit_transform(features).astype(np.float32)
    return rows, arrays


def evaluate_run(
    settings: PretrainSettings, folder: Path, splits: Splits, projector: nn.Module | None = None
) -> float:
    """Judge the backbone that a run exported: ``results.csv`` and ``predictions.npz`` in its folder, and the table on
    the console. Without pre-training (``baselines`` is "only") the baselines alone. ``projector`` is as for
    `judge`; without it, since no run exports it, what the folder's ``results.csv`` has of it stays.

    Returns:
        Seconds that it took.
    """
    started = time.perf_counter()
    if settings.baselines == "only":
        backbone, spec = None, backbone_spec(settings, splits.train)
    else:
        backbone, spec = load_backbone(folder / "backbone", splits.train.device)
    check_start(settings, spec, folder, again=True)
    rows, arrays = evaluate_features(settings, splits, spec, backbone, revision(), folder.name, projector=projector)
    own = [row for row in rows if row["features"] == "pretrained" and row["rankme"] != ""]
    if own and projector is None:
        known = rank_of_embeddings(folder / "results.csv", own[0]["rankme"])  # the same in every row of theirs
        for row in own:
            row["rankme_embeddings"] = "" if known is None else known
    _write(rows, arrays, folder)
    print_table(rows, f"{describe_run(settings, splits.train)}, {splits.train.task}, test split, %")
    return time.perf_counter() - started


def evaluate_without_labels(
    settings: PretrainSettings, images: ImageStore, backbone: nn.Module, spec: BackboneSpec, projector: nn.Module
) -> dict[str, float]:
    """`judge_without_labels` where there is no table, since nothing has labels: every second training image stands
    for those of val. Says them in the log, too.
    """
    fitted, held_out = (images.subset(torch.arange(i, len(images), 2, device=images.device)) for i in (0, 1))
    train, val = (_features(backbone, store, spec) for store in (fitted, held_out))
    views = _features(backbone, held_out, spec, settings.policy())
    found = judge_without_labels(train, val, views, settings.seed, projector)
    logger.info("scores without labels: %s", ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return found


def evaluate_elsewhere(
    settings: PretrainSettings,
    splits: Splits,
    backbone: nn.Module,
    spec: BackboneSpec,
    folder: Path,
    run: str,
    pretrained_on: str,
) -> None:
    """Judge a backbone on data that it was not trained on, beside the baselines that a run on these data has:
    ``results.csv``, with a column ``pretrained_on`` more, and ``predictions.npz`` in ``folder``; the table on the
    console.

    Args:
        settings: of the run, with those of these data.
        splits: of these data.
        backbone, spec: what is judged, and what images are rendered for it by.
        folder: for the files; it exists.
        run: the run's name.
        pretrained_on: the name of the run's own data.
    """
    train = splits.train
    own = backbone_spec(settings, train)
    own = replace(own, size=min(spec.size, train.size))
    rows, arrays = evaluate_features(settings, splits, spec, backbone, revision(), run, own)
    _write([row | {"pretrained_on": pretrained_on} for row in rows], arrays, folder)
    title = f"{describe_data(train)}: features of {run}, pre-trained on {pretrained_on}, {train.task}, test split, %"
    print_table(rows, title)


def _write(rows: list[dict[str, Any]], arrays: dict[str, Any], folder: Path) -> None:
    with replacing(folder / "predictions.npz", "wb") as file:
        np.savez_compressed(file, **arrays)
    write_results(rows, folder / "results.csv")  # the last to be written: it says that the run is done


def _columns(settings: PretrainSettings, train: ImageStore, features: str, revision: str, run: str) -> dict[str, Any]:
    """The columns of a row that the run knows."""
    s, own = settings, features == "pretrained"
    return {
        "run": run,
        # Of given indices, what they are: no ratio was asked for.
        "profile": "indices" if s.indices else s.profile,
        "rho": "" if s.indices else s.rho,
        "total": len(train) if s.indices else s.total or 0,
        "method": s.method if own else "",
        "recipe": s.recipe if own else "",
        "sampler": s.sampler if own else "",
        "partner": s.partner if own and not one_image(s) else "",
        "seed": s.seed,
        "steps": s.steps or "",
        "revision": revision,
    }
