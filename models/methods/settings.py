"""The methods' own settings, by the methods' names on the command line. Defaults are the published ones.

They stand apart from the methods so that a command line can be read without loading torch. A class here is a method:
`BarlowTwinsSettings` are those of ``barlow-twins``, which is `BarlowTwins` in ``barlow_twins.py``. To add one, see
``docs/adding-a-method.md``.
"""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from amimv.fields import setting


@dataclass(frozen=True)
class MethodSettings:
    """What all methods' settings are.

    Attributes:
        has_negatives: whether the loss compares an image with others of the batch, of which some may be copies of it.
    """

    has_negatives: ClassVar[bool] = False


@dataclass(frozen=True)
class BarlowTwinsSettings(MethodSettings):
    """Barlow Twins: self-supervised learning via redundancy reduction (Zbontar et al. 2021, arXiv 2103.03230)."""

    redundancy: float = setting(0.0051, "lambda, the weight of the off-diagonal correlations")
    loss_scale: float = setting(0.1, "of the whole loss", above=True)
    projector_hidden: int = setting(2048, "width of the projector's two hidden layers", 1)
    projector_out: int = setting(2048, "width of the embedding", 1)


@dataclass(frozen=True)
class ByolSettings(MethodSettings):
    """BYOL: bootstrap your own latent (Grill et al. 2020, arXiv 2006.07733)."""

    momentum: float = setting(0.99, "of the moving-average target at the start; 1 at the end, by a cosine", 0, 1)
    projector_hidden: int = setting(4096, "width of the projector's hidden layer", 1)
    projector_out: int = setting(256, "width of the embedding", 1)
    predictor_hidden: int = setting(4096, "width of the predictor's hidden layer", 1)


@dataclass(frozen=True)
class DinoSettings(MethodSettings):
    """DINO: emerging properties in self-supervised vision transformers (Caron et al. 2021, arXiv 2104.14294)."""

    student_temperature: float = setting(0.1, "of the student's softmax", above=True)
    teacher_temperature: float = setting(0.07, "of the teacher's softmax, after the warm-up", above=True)
    teacher_temperature_start: float = setting(
        0.04, "of the teacher's softmax at the start; from there a line up", above=True
    )
    teacher_temperature_warmup: float = setting(0.05, "share of the training that the line takes", 0, 1)
    momentum: float = setting(0.9995, "of the moving-average teacher at the start; 1 at the end, by a cosine", 0, 1)
    centre_momentum: float = setting(
        0.9, "of the running mean of the teacher's scores, which moves once per micro-batch", 0, 1
    )
    freeze_prototypes: float = setting(0.001, "share of the training with fixed prototypes, at the start", 0, 1)
    projector_norm: bool = setting(False, "BatchNorm after the projector's hidden layers")
    projector_hidden: int = setting(2048, "width of the projector's two hidden layers", 1)
    projector_out: int = setting(256, "width of the embedding", 1)
    prototypes: int = setting(4096, "number of prototypes", 2)


@dataclass(frozen=True)
class MimvSettings(MethodSettings):
    """MIMV: multi-image, multi-view pairs against a moving-average target (arXiv 2509.08469)."""

    has_negatives: ClassVar[bool] = True
    temperature: float = setting(0.3, "of the cosine similarities", above=True)
    momentum: float = setting(0.9, "of the moving-average target, constant", 0, 1)
    self_term: str = setting(
        "once",
        "how a row's similarity with itself is left out: once, or published (twice, as the published code does)",
        choices=("once", "published"),
        called="self-term",
    )
    high: float | None = setting(0.9, "similarities above are eliminated; None: kept", -math.inf)
    low: float | None = setting(-0.9, "similarities below are eliminated; None: kept", -math.inf)
    near_zero: float | None = setting(0.1, "similarities this near to 0 are eliminated; None: kept", -math.inf)
    spare_positives: bool = setting(False, "never eliminate positives, however extreme (published: they are)")
    average: str = setting(
        "ratios",
        "what is averaged over a batch: ratios, before the logarithm (published), or logs, after it",
        choices=("ratios", "logs"),
    )
    shared_norm: bool = setting(
        False, "a side's views share BatchNorm statistics: one concatenated batch (published: one pass per view)"
    )
    projector_hidden: int | None = setting(
        None, "width of the projector's two hidden layers; None: that of the features", 1
    )
    projector_out: int | None = setting(None, "width of the embedding; None: a quarter of the features'", 1)


@dataclass(frozen=True)
class MocoV3Settings(MethodSettings):
    """MoCo v3: training self-supervised vision transformers (Chen et al. 2021, arXiv 2104.02057)."""

    has_negatives: ClassVar[bool] = True
    temperature: float = setting(0.2, "of the cosine similarities", above=True)
    momentum: float = setting(0.99, "of the moving-average target at the start; 1 at the end, by a cosine", 0, 1)
    projector_hidden: int = setting(4096, "width of the projector's hidden layers: one, or two for a ViT", 1)
    projector_out: int = setting(256, "width of the embedding", 1)
    predictor_hidden: int = setting(4096, "width of the predictor's hidden layer", 1)
    freeze_patch_embedding: bool = setting(True, "a ViT's patch embedding is not trained")


@dataclass(frozen=True)
class NnclrSettings(MethodSettings):
    """NNCLR: with a little help from my friends (Dwibedi et al. 2021, arXiv 2104.14548)."""

    has_negatives: ClassVar[bool] = True
    temperature: float = setting(0.2, "of the cosine similarities", above=True)
    queue: int = setting(65536, "projections of earlier batches; the trainer caps it at the data set's size", 1)
    projector_hidden: int = setting(2048, "width of the projector's two hidden layers", 1)
    projector_out: int = setting(256, "width of the embedding", 1)
    predictor_hidden: int = setting(4096, "width of the predictor's hidden layer", 1)


@dataclass(frozen=True)
class ResslSettings(MethodSettings):
    """ReSSL: relational self-supervised learning with weak augmentation (Zheng et al. 2021, arXiv 2107.09282)."""

    student_temperature: float = setting(0.1, "of the student's similarities", above=True)
    teacher_temperature: float = setting(0.04, "of the teacher's similarities", above=True)
    momentum: float = setting(0.99, "of the moving-average teacher at the start; 1 at the end, by a cosine", 0, 1)
    queue: int = setting(65536, "embeddings of earlier batches; the trainer caps it at the data set's size", 1)
    projector_hidden: int = setting(4096, "width of the projector's hidden layer", 1)
    projector_out: int = setting(256, "width of the embedding", 1)


@dataclass(frozen=True)
class SdclrSettings(MethodSettings):
    """SDCLR: self-damaging contrastive learning (Jiang et al. 2021, arXiv 2106.02990), for long-tailed data."""

    has_negatives: ClassVar[bool] = True
    temperature: float = setting(0.2, "of the cosine similarities", above=True)
    pruned: float = setting(0.9, "share of the backbone's weights that the twin does without", 0, 1)
    prune_every: float = setting(
        0.0005, "share of the training between two choices of these weights; 0.0005: an epoch of 2,000", 0, 1
    )
    projector_hidden: int = setting(512, "width of the projector's two hidden layers", 1)
    projector_out: int = setting(128, "width of the embedding", 1)


@dataclass(frozen=True)
class SimclrSettings(MethodSettings):
    """SimCLR: contrastive learning of visual representations (Chen et al. 2020, arXiv 2002.05709)."""

    has_negatives: ClassVar[bool] = True
    temperature: float = setting(0.2, "of the cosine similarities", above=True)
    projector_hidden: int = setting(2048, "width of the projector's hidden layer", 1)
    projector_out: int = setting(256, "width of the embedding", 1)


@dataclass(frozen=True)
class SimclrTsSettings(SimclrSettings):
    """SimCLR with a temperature schedule, for long-tailed data (Kukleva et al. 2023, arXiv 2303.13664)."""

    temperature: float = setting(0.1, "the lowest, of the cosine similarities", above=True)
    highest_temperature: float = setting(1.0, "where the schedule starts, and comes back to", above=True)
    periods: float = setting(5.0, "how often it does so in the training")
    projector_hidden: int = setting(512, "width of the projector's hidden layer", 1)
    projector_out: int = setting(128, "width of the embedding", 1)


@dataclass(frozen=True)
class SimsiamSettings(MethodSettings):
    """SimSiam: exploring simple siamese representation learning (Chen and He 2021, arXiv 2011.10566)."""

    projector_hidden: int = setting(2048, "width of the projector's two hidden layers", 1)
    projector_out: int = setting(2048, "width of the embedding", 1)
    predictor_hidden: int = setting(512, "width of the predictor's hidden layer", 1)
    fixed_predictor_lr: bool = setting(True, "the predictor's learning rate stays at its peak")


@dataclass(frozen=True)
class SwavSettings(MethodSettings):
    """SwAV: unsupervised learning of visual features by contrasting cluster assignments (Caron et al. 2020)."""

    temperature: float = setting(0.1, "of the prediction", above=True)
    epsilon: float = setting(0.05, "smoothness of the codes", above=True)
    iterations: int = setting(3, "of Sinkhorn-Knopp", 1)
    queue: int = setting(
        3840, "embeddings of earlier batches of each side; the trainer caps it at the data set's size", 1
    )
    queue_start: float = setting(0.05, "share of the training before the queue is used", 0, 1)
    freeze_prototypes: float = setting(0.002, "share of the training with fixed prototypes, at the start", 0, 1)
    projector_hidden: int = setting(2048, "width of the projector's hidden layer", 1)
    projector_out: int = setting(128, "width of the embedding", 1)
    prototypes: int = setting(3000, "number of prototypes", 2)


@dataclass(frozen=True)
class VicregSettings(MethodSettings):
    """VICReg: variance-invariance-covariance regularisation (Bardes et al. 2022, arXiv 2105.04906)."""

    invariance: float = setting(25.0, "weight of the distance between the sides")
    variance: float = setting(25.0, "weight of the hinge on each dimension's standard deviation")
    covariance: float = setting(1.0, "weight of the covariances")
    projector_hidden: int = setting(2048, "width of the projector's two hidden layers", 1)
    projector_out: int = setting(2048, "width of the embedding", 1)


def _name(settings: type) -> str:
    words = re.findall("[A-Z][a-z]*[0-9]*", settings.__name__.removesuffix("Settings"))
    return "-".join(words).lower()


#: The settings of each method, by its name.
SETTINGS: dict[str, type[MethodSettings]] = {
    _name(kind): kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, MethodSettings) and kind is not MethodSettings
}
