"""The data of a run: its training subset, and the whole validation and test splits."""

import logging
from dataclasses import dataclass

import torch

from amimv import InputError
from amimv.models.backbones import BackboneSpec
from amimv.pipelines import ImageStore, label_fraction, leaked, load_indices, load_store, long_tail, realised_ratio
from amimv.pipelines.sources.listing import NoSplit
from amimv.trainers.conditions import is_natural
from amimv.trainers.data_settings import DataSettings
from amimv.trainers.evaluation.results import EVALUATION
from amimv.trainers.label_draws import check_draws
from amimv.trainers.settings import PretrainSettings

logger = logging.getLogger("amimv")


@dataclass(frozen=True)
class Subset:
    """The training images and which ones of the training split they are (sorted ``int64`` indices)."""

    store: ImageStore
    indices: torch.Tensor


@dataclass(frozen=True)
class HeldOut:
    """The validation and test images; None where the run has no use for them.

    Attributes:
        no_table: why the run cannot be evaluated though it was asked for; empty if it can.
    """

    val: ImageStore | None = None
    test: ImageStore | None = None
    no_table: str = ""


@dataclass(frozen=True)
class Splits:
    """What an evaluation is about.

    Attributes:
        train, val, test: images with labels.
        unlabelled: the training images where they have no labels, and others stand for them in ``train``.
    """

    train: ImageStore
    val: ImageStore
    test: ImageStore
    unlabelled: ImageStore | None = None

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
        return cls(val.subset(learnt), val.subset(rest.nonzero().squeeze(1)), held_out.test, train)

    def unleaked(self) -> torch.Tensor | None:
        """Which test images are of no group (patient, lesion, slide) that images for training are of.

        Returns:
            ``(M,)`` ``bool`` on the device of the test images; None where groups are unknown, or where that is all
            of the images or none.
        """
        learnt = [self.train] if self.unlabelled is None else [self.train, self.unlabelled]
        groups = [store.groups for store in learnt if store.groups is not None]
        if self.test.groups is None or len(groups) < len(learnt):
            return None
        apart = ~leaked(torch.cat(groups), self.test.groups)
        return apart if 0 < int(apart.sum()) < len(apart) else None


def best_device() -> str:
    """Where a command without a launcher works."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_split(
    settings: DataSettings, split: str, device: torch.device | str, resident: bool | None = None
) -> ImageStore:
    """One split of the run's data set, whole. On a GPU the test images stay in host memory, as they wait for the end
    of the training; ``resident`` is for the others as in `load_store`.
    """
    s = settings
    waits = split == "test" and torch.device(device).type == "cuda"
    return load_store(
        s.data,
        split=split,
        size=s.size,
        root=s.root,
        device=device,
        channels=s.channels,
        seed=s.data_seed,
        task=s.task,
        groups=s.groups,
        value_range=s.value_range,
        resident=False if waits else resident,
        cache=s.cache,
        columns=s.columns,
        shares=s.split,
        split_seed=s.split_seed,
        skip_damaged=s.skip_damaged,
        resplit=s.resplit,
    )


def subset_indices(settings: PretrainSettings, store: ImageStore) -> torch.Tensor:
    """Which images of the training split the run's long tail (or its saved indices) keeps."""
    s = settings
    if s.indices:
        return load_indices(s.indices, len(store)).to(store.device)
    if is_natural(s):  # as it is: also where a class has no image, or an image several labels
        return torch.arange(len(store), device=store.device)
    labels = store.known_labels("a long tail")
    return long_tail(labels, s.rho, s.profile, s.data_seed, s.total, store.n_classes)


def load_training_subset(settings: PretrainSettings, device: torch.device | str) -> Subset:
    """The training split, cut to the run's long tail (or to saved indices)."""
    return subset_of(settings, load_split(settings, "train", device))


def subset_of(settings: PretrainSettings, store: ImageStore) -> Subset:
    """The training split ``store`` likewise."""
    indices = subset_indices(settings, store)
    return Subset(store if len(indices) == len(store) else store.subset(indices), indices)


def load_held_out(settings: PretrainSettings, train: ImageStore, evaluate: bool) -> HeldOut:
    """What the run will need besides its training images, with all that would stop it at its end found now.

    Args:
        settings: of the run; ``knn_every`` needs the validation images.
        train: the training images.
        evaluate: whether the run evaluates, which needs both splits.

    Raises:
        InputError: a split is missing, is too small, or its images have not the size and channels of those of train.
    """
    unlabelled = train.labels is None
    wanted = {"val": evaluate or (settings.knn_every and not unlabelled), "test": evaluate}
    try:
        val, test = (load_split(settings, split, train.device) if wanted[split] else None for split in wanted)
    except NoSplit:
        if not unlabelled:
            raise
        return HeldOut(no_table="no table: the training images have no labels, and there are no val and test splits")
    loaded = [store for store in (train, val, test) if store is not None]
    if missing := [store.split for store in loaded if store.labels is None]:
        if not unlabelled:
            raise InputError(
                f"{train.name}: {' and '.join(missing)} images have no labels, which the evaluation needs: add them, "
                "or give --no-evaluate and --knn-every 0"
            )
        if evaluate and len(missing) > 1:
            return HeldOut(no_table=f"no table: there are no labels of {', '.join(missing)} images")
    for store in (val, test):
        if store is not None:
            _check_beside(store, train)
    if test is not None and min(len(test), test.n_classes) < 2:
        raise InputError(
            f"{test.name}: the evaluation needs two or more test images and classes, "
            f"got {len(test)} and {test.n_classes}: add some, or give --no-evaluate"
        )
    if evaluate and train.labels is not None:
        check_draws(settings, train.labels, train.name)
    return HeldOut(val, test)


def _check_beside(store: ImageStore, train: ImageStore) -> None:
    """Held-out images are of the form of those for training; says in the log how many are of the same groups."""
    if store.channels != train.channels:
        raise InputError(
            f"{store.name}: {store.split} images have {store.channels} channels, those of train {train.channels}: "
            "convert them (--channels 3 makes grey RGB)"
        )
    if store.size != train.size:
        raise InputError(
            f"{store.name}: {store.split} images are {store.size} px, those of train {train.size} px: resize them"
        )
    if train.groups is None or store.groups is None:
        return
    if shared := int(leaked(train.groups, store.groups).sum()):
        told = "share a group (patient, lesion, slide) with training images, which flatters every score"
        logger.warning("%s, %s: %d of %d images %s", store.name, store.split, shared, len(store), told)


def check_readable(store: ImageStore, chunk: int = 512) -> None:
    """Read every image once, if they lie in files: a damaged one would stop an evaluation after its training.

    Raises:
        InputError: naming a file that cannot be read or decoded.
    """
    if not store.images.decoded:
        for _ in store.stream(torch.arange(len(store)).split(chunk)):
            pass


def backbone_spec(settings: PretrainSettings, store: ImageStore) -> BackboneSpec:
    """The backbone for this run's views of this store."""
    size = settings.view_size or store.size
    return BackboneSpec(settings.backbone, store.channels, size, store.mean, store.std, store.value_range)


def describe_data(store: ImageStore) -> str:
    """The data set for titles; a synthetic one says so."""
    return f"{store.name} (synthetic)" if store.name == "phantom" else store.name


def describe_run(settings: PretrainSettings, store: ImageStore) -> str:
    """A title for tables and curves."""
    return f"{describe_data(store)}: {settings.method} on {settings.recipe}, seed {settings.seed}"


def describe_images(store: ImageStore) -> str:
    """The training images and their task, as the start log has them."""
    counts = store.class_counts()
    if not counts:
        return f"{describe_data(store)}: {len(store)} training images without labels"
    return (
        f"{describe_data(store)}: {len(store)} training images, task {store.task}, per class {counts}, "
        f"realised imbalance ratio {realised_ratio(counts):.1f}"
    )
