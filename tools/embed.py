"""Features of every image of a data set: ``python tools/embed.py runs/NAME --data X -o features.parquet``.

A row an image, for all splits of X: ``split``, ``index`` in it, ``file``, ``label``, ``class`` and ``group`` where
there are any (-1 and empty where one split has none), and ``features``. With ``--predict`` also what a probe on the
training labels says of it (``predicted``, ``predicted_class``, ``score``, the ``scores`` of all classes) and the
``nearest`` training images, the most similar first. A ``.npz`` has the same columns as arrays. Images and rows go
through by the batch: of files, memory holds no more of a million than of a thousand.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amimv.command_line import begin_command, read_command
from amimv.signals import is_command
from amimv.tools.commands import EmbedSettings

if is_command(__name__):
    begin_command(EmbedSettings, __doc__)
    import torch  # noqa: F401 (now, while a signal ends the process at once)

from amimv import run_command, user_path
from amimv.trainers.commands import is_run
from amimv.trainers.data_settings import DataSettings
from amimv.trainers.layers import from_yaml

if TYPE_CHECKING:
    from torch import Tensor, nn

    from amimv.models.backbones import BackboneSpec
    from amimv.pipelines import ImageStore
    from amimv.tools.columns import Part
    from amimv.trainers.evaluation import KnnProbe, LinearProbe

logger = logging.getLogger("amimv")

PREDICT = "--predict"


@dataclass(frozen=True, eq=False)
class Predictor:
    """What is said of features beside themselves.

    Attributes:
        probe: for the scores.
        bank: for the nearest training images.
        train: the training images.
        indices: which of their published split they are.
        data: where they come from, for the names of files.
        nearest: how many are named.
    """

    probe: "KnnProbe | LinearProbe"
    bank: "KnnProbe"
    train: "ImageStore"
    indices: "Tensor"
    data: str
    nearest: int

    def columns(self, features: "Tensor") -> "Part":
        scores, train = self.probe.scores(features), self.train
        similarity, place = self.bank.nearest(features, min(self.nearest, len(train)))
        found: dict[str, Any] = {"scores": scores.cpu().numpy()}
        if train.multi_label:
            found["predicted"] = (scores > 0.5).byte().cpu().numpy()
        else:
            best = scores.max(dim=1)
            found |= {"predicted": best.indices.cpu().numpy(), "score": best.values.cpu().numpy()}
            found["predicted_class"] = [train.class_names[label] for label in best.indices.tolist()]
        found |= {"nearest": self.indices[place].cpu().numpy(), "nearest_similarity": similarity.cpu().numpy()}
        if train.images.paths:
            found["nearest_file"] = [name_file(train.images.paths[i], self.data) for i in place[:, 0].tolist()]
        return found


def embed(settings: EmbedSettings) -> None:
    """Write the file.

    Raises:
        InputError: there is no such backbone, data or split, or its images do not suit.
    """
    from amimv.models.backbones import load_backbone
    from amimv.tools.columns import open_columns
    from amimv.trainers.data import best_device
    from amimv.trainers.evaluation import stream_features
    from amimv.trainers.other_data import as_taken, normalised_as_trained

    run = user_path(settings.run) if is_run(settings.run) else None
    network, trained = load_backbone(run / "backbone" if run else settings.run, best_device())
    given = as_taken(settings.images, trained)
    with open_columns(user_path(settings.output)) as out:
        stores, given = load_splits(given, trained, settings.splits)
        spec = normalised_as_trained(trained, stores[0], given.value_range is not None)
        predictor = None
        if settings.predict != "no":
            own = (run, trained) if run and settings.labels != "data" else (None, spec)
            predictor = fit(settings, network, given, *own)
        for store in stores:
            start = 0
            for features in stream_features(network, store, spec, settings.batch_size):
                rows = slice(start, start := start + len(features))
                part = {**describe(store, rows, stores, given.data), "features": features.cpu().numpy()}
                out.write({**part, **(predictor.columns(features) if predictor else {})})
            logger.info("%s: %d images", store.split, len(store))
    logger.info("written to %s", settings.output)


def load_splits(
    given: DataSettings, spec: "BackboneSpec", wanted: Sequence[str]
) -> tuple[list["ImageStore"], DataSettings]:
    """The splits wanted, or all that there are, images that lie in files left there; and how others are read likewise.

    Raises:
        InputError: one is missing, or all are.
    """
    from amimv.pipelines.sources.listing import SPLITS, NoSplit
    from amimv.trainers.data import best_device
    from amimv.trainers.other_data import load_taken

    stores, missing = [], None
    for split in dict.fromkeys(wanted or SPLITS):
        try:
            store, given = load_taken(given, spec, split, best_device(), resident=False)
            stores.append(store)
        except NoSplit as error:
            missing = error
    if missing and (wanted or not stores):
        raise missing
    return stores, given


def fit(
    settings: EmbedSettings, network: "nn.Module", given: DataSettings, run: Path | None, spec: "BackboneSpec"
) -> Predictor:
    """The probe, fitted on training labels: of the run in that folder, or without one of the data.

    Raises:
        InputError: there are none, or the run's data have changed.
    """
    import torch

    from amimv.trainers.data import Subset, best_device, load_split, load_training_subset
    from amimv.trainers.evaluation import extract_features, fit_knn, fit_linear
    from amimv.trainers.identity import check_data, identify_all

    if run is not None:
        own = from_yaml(run / "config.yaml")
        subset, val = load_training_subset(own, best_device()), load_split(own, "val", best_device())
        check_data(run, identify_all(subset.store, subset.indices, val, None))
        given = own
    else:
        (train, val), _ = load_splits(given, spec, ("train", "val"))
        subset = Subset(train, torch.arange(len(train), device=train.device))
    train = subset.store
    x, val_x = (extract_features(network, store, spec, settings.batch_size) for store in (train, val))
    args = (x, train.known_labels(PREDICT), val_x, val.known_labels(PREDICT), train.n_classes)
    bank = fit_knn(*args)
    probe = bank if settings.predict == "knn" else fit_linear(*args)
    return Predictor(probe, bank, train, subset.indices, given.data, settings.nearest)


def describe(store: "ImageStore", rows: slice, stores: Sequence["ImageStore"], data: str) -> dict[str, Any]:
    """The columns that say which images these are, alike for all ``stores``."""
    import numpy as np

    n = rows.stop - rows.start
    part: dict[str, Any] = {"split": [store.split] * n, "index": np.arange(rows.start, rows.stop)}
    if any(other.images.paths for other in stores):
        part["file"] = [name_file(path, data) for path in store.images.paths[rows]]
    if known := [other.labels for other in stores if other.labels is not None]:
        like = known[0]
        labels = like.new_full((n, *like.shape[1:]), -1) if store.labels is None else store.labels[rows]
        part["label"] = labels.cpu().numpy()
        if like.ndim == 1:
            part["class"] = ["" if label < 0 else store.class_names[label] for label in labels.tolist()]
    if any(other.groups is not None for other in stores):
        part["group"] = np.full(n, -1) if store.groups is None else store.groups[rows].cpu().numpy()
    return part


def name_file(path: str, data: str) -> str:
    """A file's name within the folder, or from beside the CSV file, that the data are."""
    place = user_path(data.partition(":")[2])
    return os.path.relpath(path, place.parent if place.is_file() else place)


def main() -> None:
    """The command: settings in, exit status out (0 done, 2 bad input, 74 files out of reach, 75 a signal)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    run_command(lambda: embed(read_command(EmbedSettings, __doc__)))


if __name__ == "__main__":
    main()
