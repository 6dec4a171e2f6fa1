"""Evaluation of a run: its frozen features beside their baselines, one row per features x probe x label fraction."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from amimv.files import replacing
from amimv.models.backbones import BackboneSpec, load_backbone
from amimv.pipelines import ImageStore, label_fraction, realised_ratio
from amimv.trainers.conditions import one_image
from amimv.trainers.data import EVALUATION, Splits, backbone_spec, describe_run
from amimv.trainers.evaluation.features import build_random, extract_features
from amimv.trainers.evaluation.metrics import SCORES, compute_scores
from amimv.trainers.evaluation.probes import balanced_accuracy, knn_probe, linear_probe
from amimv.trainers.evaluation.results import ORDER, Judged, print_table, write_results
from amimv.trainers.evaluation.supervised import best_supervised
from amimv.trainers.run_folder import revision
from amimv.trainers.settings import PretrainSettings

logger = logging.getLogger("amimv")


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
        "total": len(splits.train) if s.indices else s.total or 0,
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
    for name in SCORES:
        value = getattr(result, name)
        row[name] = "" if value is None else round(value, 6)
    return row
