"""What can be set: groups of settings as frozen dataclasses, which together are the flat `PretrainSettings`.

A setting is declared here and nowhere else (those of data in ``data_settings.py``, those of operations and of methods
beside these): its default, range and meaning, what depends on it, and when it does nothing. Lists of settings are
derived from that. Layers of files and flags are in `amimv.trainers.layers`.
"""

from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, cast, get_type_hints

from amimv import check_choice
from amimv.fields import EVALUATION, NOTHING, SEED, Field, setting
from amimv.models.methods import METHODS
from amimv.pipelines import BACKENDS, PARTNERS, SAMPLERS, ViewPolicy, build_policy
from amimv.pipelines.operations import OPERATIONS
from amimv.pipelines.policy import operation_settings
from amimv.pipelines.recipes import HARD, get_recipe
from amimv.trainers import conditions
from amimv.trainers.data_settings import ALONE, PATH, DataSettings
from amimv.trainers.optimizers import optimizers

#: ``amimv`` is the method `mimv` on the recipe that this project recommends; it has a YAML of its own.
METHOD_ALIASES = {"amimv": "mimv"}
#: What the settings of all training on labels have in common.
OF_LABELS: dict[str, Any] = {"touches": EVALUATION, "roles": (ALONE,), "idle": conditions.NO_LABELS}


@dataclass(frozen=True)
class PairSettings:
    """Which images make up a pair."""

    recipe: str = setting(
        "amimv",
        "which views of which images make up a pair: amimv, two-view, multi-crop, mimv, amimv-roles, ..., or a "
        "text such as 'N(x)+A(y) | A(x)+N(y)'",
        check=get_recipe,
    )
    online: str = setting(
        "hard",
        "of recipe amimv-strength: which augmentation the online side sees",
        choices=("hard", "soft"),
        called="online strength",
        idle=conditions.NO_STRENGTHS,
    )
    partners: int = setting(1, "partner images per anchor", 1)
    sampler: str = setting("uniform", "of the anchors", choices=SAMPLERS)
    partner: str = setting(
        "uniform",
        "of the partners; same-group: another image of the anchor's patient, lesion or slide",
        choices=PARTNERS,
        called="partner sampler",
        idle=conditions.NO_PARTNER,
    )
    beta: float = setting(0.999, "of effective-number", 0, 1, idle=conditions.NO_BETA)
    clusters: int = setting(20, "k-means clusters of cluster-balanced", 2, idle=conditions.NO_CLUSTERS)
    cluster_every: int = setting(5, "epochs between two clusterings", 1, idle=conditions.NO_CLUSTERS)
    exclude_duplicates: str = setting(
        "auto",
        "leave other rows of the same image out of the negatives; auto: with a rebalancing sampler",
        choices=("auto", "yes", "no"),
        called="value of exclude-duplicates",
        idle=conditions.NO_NEGATIVES,
    )


@dataclass(frozen=True)
class ViewSettings:
    """How the images are augmented and rendered; of several operations the order is fixed."""

    backend: str = setting("kornia", "what renders the views", choices=BACKENDS)
    view_size: int | None = setting(None, "of the views, in pixels; unset: that of the images", 4, roles=(ALONE,))
    second: tuple[str, ...] = setting(
        (),
        "what is otherwise in side b's view of recipes two-view and multi-crop: settings of operations, such as "
        "blur_p=0.1 crop_ratio=0.8,1.2; None: as in side a's",
        check=conditions.check_second,
        idle=conditions.PARTNERED,
    )
    local_crops: int = setting(6, "local sides of recipe multi-crop", idle=conditions.NO_LOCAL_CROPS)
    local_size: int | None = setting(
        None,
        "of the local crops, in pixels; unset: about three sevenths of the views",
        4,
        idle=conditions.NO_LOCAL_CROPS,
    )
    local_crop_max: float = setting(
        0.4, "largest area of the local crops", 0, 1, above=True, idle=conditions.NO_LOCAL_CROPS
    )


@dataclass(frozen=True)
class MethodChoice:
    """The self-supervised method, and its own settings."""

    method: str = setting("amimv", f"one of {', '.join((*METHOD_ALIASES, *METHODS))}")


@dataclass(frozen=True)
class TrainingSettings:
    """The networks' backbone and how long and by what it is trained."""

    backbone: str = setting("small", "small, small-v1 (the small of before), or any timm model", roles=(ALONE,))
    init: str = setting(
        conditions.RANDOM,
        "initial weights of the backbone: random, timm (its pretrained weights), hf-hub:NAME, local-dir:FOLDER, a "
        "run's folder, or a file of weights as timm, Lightly, solo-learn, MoCo v3, DINO or VISSL write them",
        roles=(ALONE,),
        idle=conditions.NO_START,
    )
    epochs: int | None = setting(None, "length of the training; or give steps, views or minutes", 1)
    steps: int | None = setting(None, "length of the training in optimiser steps; or give epochs, views or minutes", 1)
    views: int | None = setting(
        None,
        "length of the training in rendered views, each view of a pair one, for recipes at equal cost: makes it a "
        "number of steps, fewer for pairs of more views, which the run's config.yaml has",
        1,
        10**12,
    )
    minutes: float | None = setting(
        None,
        "length of the training in minutes (loading and evaluation come on top): its rate is measured first, and "
        "makes it a number of steps, which the run's config.yaml has",
        above=True,
    )
    batch_size: int = setting(256, "global: over all processes and accumulated micro-batches", 1, roles=(ALONE,))
    accumulation: int = setting(1, "micro-batches per optimiser step", 1)
    optimizer: str = setting(
        "adamw",
        "sgd, adamw, lars, larc (LARS with a clipped rate) or another of timm's",
        check=lambda value: check_choice("optimizer", value, optimizers()),
    )
    lr: float = setting(1e-3, "peak learning rate, at lr_batch", above=True)
    lr_batch: int | None = setting(None, "the learning rate is scaled by batch_size / lr_batch; unset: not scaled", 1)
    weight_decay: float = setting(1e-4, "not applied to biases and norms", 0, 1)
    optimizer_momentum: float = setting(0.9, "of SGD and LARS", 0, 1, idle=conditions.NO_MOMENTUM)
    trust_coefficient: float = setting(0.001, "of LARS", above=True, idle=conditions.NO_LARS)
    warmup: float = setting(
        0.05, "share of the training spent in linear warm-up, before the cosine", 0, 1, check=conditions.check_warmup
    )
    mixed_precision: str = setting(
        "no", "type of the forward pass", choices=("no", "bf16", "fp16"), called="mixed precision"
    )
    compile: bool = setting(False, "torch.compile the networks, and on a GPU the views, too")
    sync_bn: bool = setting(False, "BatchNorm statistics over all processes (CUDA)")
    threads: int | None = setting(
        None,
        "of each process on the CPU; unset: what OMP_NUM_THREADS says, else its share of the cores that it may use; "
        "the 1 that accelerate launch gives to whatever it starts does not count",
        1,
        roles=(ALONE,),
    )
    seed: int = setting(
        0,
        "of the weights and of everything drawn in training: any 64-bit integer",
        *SEED,
        roles=(ALONE,),
    )


@dataclass(frozen=True)
class EvaluationSettings:
    """What is judged, during the training and after it."""

    knn_every: int = setting(10, "epochs between two kNN scores on the validation split; 0: none", touches=NOTHING)
    evaluate: bool = setting(True, "evaluate at the end", touches=EVALUATION)
    label_fractions: tuple[float, ...] = setting(
        (1.0,),
        "shares of the training labels that the evaluation may use",
        0,
        1,
        above=True,
        check=conditions.check_fractions,
        touches=EVALUATION,
        roles=(ALONE,),
    )
    label_seeds: tuple[int, ...] = setting(
        (),
        "seeds of several draws of each share of the labels below 1, over all of which the probes and the training on "
        "labels are repeated; none given: one draw, by data_seed",
        *SEED,
        check=conditions.check_label_seeds,
        touches=EVALUATION,
        roles=(ALONE,),
        idle=conditions.ALL_LABELS,
    )
    supervised_steps: int = setting(
        300,
        "training of the supervised reference in the evaluation, and of fine-tuning; 0: neither",
        touches=EVALUATION,
        roles=(ALONE,),
        idle=conditions.NO_LABEL_STEPS,
    )
    supervised_lr: tuple[float, ...] = setting(
        (5e-3,),
        "learning rates for these; of several, the best on validation data is taken",
        0,
        above=True,
        check=conditions.check_rates,
        **OF_LABELS,
    )
    supervised_more_steps: tuple[int, ...] = setting(
        (),
        "further lengths for these; of all, the best on validation data is taken",
        1,
        check=conditions.check_lengths,
        **OF_LABELS,
    )
    supervised_loss: str = setting(
        "cross-entropy",
        "of these; logit-adjusted (Menon et al. 2021, tau 1) and balanced-softmax (Ren et al. 2020), which are the "
        "same then, correct for the classes' counts",
        choices=("cross-entropy", "logit-adjusted", "balanced-softmax"),
        called="supervised loss",
        **OF_LABELS,
    )
    supervised_sampler: str = setting(
        "class-balanced",
        "of the images for these; uniform for a loss that corrects for the counts",
        choices=("class-balanced", "square-root", "uniform"),
        called="supervised sampler",
        **OF_LABELS,
    )
    supervised_mixup: tuple[float, ...] = setting(
        (0.0,),
        "alphas of mixup for these, 0 without; of several, the best on validation data is taken",
        check=conditions.check_mixup,
        **OF_LABELS,
    )
    supervised_smoothing: tuple[float, ...] = setting(
        (0.0,),
        "label smoothing for these; of several, the best on validation data is taken",
        0,
        1,
        check=conditions.check_smoothing,
        **OF_LABELS,
    )
    finetune: bool = setting(False, "evaluate the pretrained backbone fine-tuned, too", touches=EVALUATION)
    init_baselines: bool = setting(
        False,
        "start the untrained network in the table, and the supervised reference, from the initial weights, too",
        touches=EVALUATION,
        roles=(ALONE,),
        idle=conditions.NO_INITIAL,
    )
    frozen: tuple[str, ...] = setting(
        (),
        "models of timm (a name, hf-hub:NAME or local-dir:FOLDER) whose frozen features stand in the table, too",
        check=conditions.check_frozen,
        touches=EVALUATION,
        roles=(ALONE,),
        idle=conditions.NO_BASELINES,
    )
    baselines: str = setting(
        "yes",
        "evaluate raw pixels, random initialisation and the supervised reference; only: no pre-training",
        choices=("yes", "no", "only"),
        called="value of baselines",
        roles=(ALONE,),
    )


@dataclass(frozen=True)
class RunSettings:
    """Where a run is kept, what it begins from, and how often something is said or saved."""

    output: str = setting("runs", "folder of the run folders", touches=NOTHING, roles=(PATH,))
    name: str | None = setting(
        None, "of the run folder; unset: made from the settings", check=conditions.check_name, touches=NOTHING
    )
    resume: str = setting(
        "no",
        "auto: go on from the newest good checkpoint, if there is one",
        choices=("no", "auto"),
        called="resume mode",
        touches=NOTHING,
    )
    preset: str = setting(
        "auto",
        "what the images are, for their augmentation: photograph, microscopy, dermatoscopy or xray; auto: what is "
        "known of a MedMNIST set, else photograph; small: the short training that all have with the small backbone; "
        "none: as the method was published",
        touches=NOTHING,
        roles=(ALONE,),
    )
    config: str | None = setting(
        None, "a YAML file of settings, such as a run's config.yaml", touches=NOTHING, roles=(PATH,)
    )
    tracker: str | None = setting(
        None,
        "of Accelerate: tensorboard, wandb, mlflow, trackio, ...; a resumed run goes on in the same run of these four",
        touches=NOTHING,
    )
    log_every: int = setting(
        10, "steps between two reads of the loss (every step's value is logged)", 1, touches=NOTHING
    )
    save_every: int = setting(200, "steps between two checkpoints", 1, touches=NOTHING)


@dataclass(frozen=True)
class PretrainSettings(
    RunSettings, EvaluationSettings, TrainingSettings, MethodChoice, ViewSettings, PairSettings, DataSettings
):
    """All settings of a run but those of operations and of its method, which `settings_class` adds."""

    def policy(self) -> ViewPolicy:
        """The augmentation ``A``."""
        return self._policy({})

    def second_policy(self) -> ViewPolicy:
        """The augmentation ``A'`` of side b in two-view recipes."""
        given = conditions.read_second(self.second)
        return self._policy({name: value for name, value in given.items() if value is not None})

    def _policy(self, changes: dict[str, Any]) -> ViewPolicy:
        return build_policy({name: getattr(self, name) for name in operation_settings()} | changes, self.view_size)


@cache
def groups(method: str) -> dict[str, type]:
    """The settings of a run with this method as classes, by the names of the groups, in the order of ``--help``."""
    described = {field.name: field for kind in OPERATIONS for field in fields(kind)}
    types = {name: kind for operation in OPERATIONS for name, kind in get_type_hints(operation).items()}
    augmentation = [
        (name, types[name], field(default=value, metadata={**described[name].metadata, "roles": (ALONE,)}))
        for name, value in HARD.settings().items()
    ]
    space = {"__module__": __name__, "__doc__": ViewSettings.__doc__}
    views = make_dataclass("Views", augmentation, bases=(ViewSettings,), frozen=True, namespace=space)
    space = {"__module__": __name__, "__doc__": f"{MethodChoice.__doc__}: {METHODS[method].settings.__doc__}"}
    own = make_dataclass("Method", [], bases=(METHODS[method].settings, MethodChoice), frozen=True, namespace=space)
    return {
        "data": DataSettings,
        "pairs": PairSettings,
        "views": views,
        "method": own,
        "training": TrainingSettings,
        "evaluation": EvaluationSettings,
        "run": RunSettings,
    }


def settings_class(method: str) -> type[PretrainSettings]:
    """`PretrainSettings` with the settings of operations and a method's own; one class for a method and its alias."""
    check_choice("method", method, (*METHOD_ALIASES, *METHODS))
    return _combined(METHOD_ALIASES.get(method, method))


@cache
def _combined(method: str) -> type[PretrainSettings]:
    kinds = groups(method).values()
    names = [field.name for kind in kinds for field in fields(kind)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"settings of method {method} have names of the trainer's: {', '.join(sorted(twice))}")
    bases = (PretrainSettings, *reversed(kinds))
    made = make_dataclass("Settings", [], bases=bases, frozen=True, namespace={"__module__": __name__})
    return cast(type[PretrainSettings], made)


def every_setting() -> dict[str, Field]:
    """The settings that runs of all methods have, by name."""
    kinds = groups(next(iter(METHODS)))
    own = {field.name for field in fields(METHODS[next(iter(METHODS))].settings)}
    return {field.name: field for kind in kinds.values() for field in fields(kind) if field.name not in own}


def of_role(role: str) -> tuple[str, ...]:
    """The names of the settings that all methods have, with this role."""
    return tuple(name for name, field in every_setting().items() if role in field.metadata["roles"])


def that_touch(*results: str) -> tuple[str, ...]:
    """The names of the settings that all methods have, on which no more than these results depend."""
    return tuple(name for name, field in every_setting().items() if field.metadata["touches"] in results)
