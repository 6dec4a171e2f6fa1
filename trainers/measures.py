"""What a training is watched by: numbers of every step, and of the network as it stands every few epochs.

To add one, write a function and put it into `STEP_MEASURES` or `EPOCH_MEASURES`; its rows go to ``metrics.jsonl``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amimv.models.backbones import BackboneSpec
from amimv.models.methods.base import Encoder, Outcome
from amimv.pipelines import ImageStore
from amimv.pipelines.images import spaced
from amimv.trainers.evaluation import balanced_accuracy, extract_features, knn_probe
from amimv.trainers.evaluation.without_labels import RANKED, embed, rankme


def loss_value(outcome: Outcome) -> Tensor:
    """The loss itself."""
    return outcome.loss.detach()


def embedding_std(outcome: Outcome) -> Tensor:
    """Standard deviation of the normalised embeddings ``(B, D)`` over the batch, mean over dimensions.

    0 where all images have the same embedding, ``1 / sqrt(D)`` where they lie in all directions (Chen and He 2021,
    section 4.1).
    """
    return nn.functional.normalize(outcome.embeddings.detach().float(), dim=1).std(dim=0).mean()


#: Of every micro-batch, by their names in the metrics; they ask nothing of the host.
STEP_MEASURES: dict[str, Callable[[Outcome], Tensor]] = {"loss": loss_value, "embedding_std": embedding_std}


class Measured(NamedTuple):
    """Numbers by their names in the metrics, and in words for the console."""

    values: dict[str, float]
    words: str


def knn_on_val(encoder: Encoder, spec: BackboneSpec, train: ImageStore, val: ImageStore | None) -> Measured | None:
    """Weighted kNN of the backbone's features on the validation split; None without labels."""
    if val is None or train.labels is None:
        return None
    features, queries = (extract_features(encoder.backbone, images, spec) for images in (train, val))
    labels, val_labels = (images.known_labels("kNN on val") for images in (train, val))
    scores, k = knn_probe(features, labels, queries, val_labels, queries, train.n_classes)
    value = float(balanced_accuracy(scores, val_labels))
    return Measured({"knn_val": value, "k": k}, f"kNN on val {100 * value:.1f} % balanced accuracy (k = {k})")


@torch.inference_mode()
def rankme_of_train(
    encoder: Encoder, spec: BackboneSpec, train: ImageStore, val: ImageStore | None
) -> Measured | None:
    """`rankme` of what the projector makes, in evaluation mode, of up to ``RANKED`` training images, evenly spaced, as
    normalised views. None where an embedding is not finite: the next loss will tell.
    """
    indices = spaced(len(train), RANKED, train.device)
    embeddings = embed(encoder.projector, extract_features(encoder.backbone, train, spec, indices=indices))
    if not embeddings.isfinite().all():
        return None
    value = rankme(embeddings)
    return Measured({"rankme": value}, f"RankMe {value:.1f}")


#: Of the network after every ``knn_every`` epochs, on rank 0: functions of its encoder and backbone's spec, the
#: training images and those of val, if the run has them. One that has nothing to measure gives None.
EPOCH_MEASURES: tuple[Callable[[Encoder, BackboneSpec, ImageStore, ImageStore | None], Measured | None], ...] = (
    knn_on_val,
    rankme_of_train,
)
