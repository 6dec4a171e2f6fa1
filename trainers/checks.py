"""What settings can be: the range of each, what contradicts each other, and what does nothing beside the others."""

import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from timm.optim import get_optimizer_info, list_optimizers

from amimv import InputError, check_choice, shown
from amimv.pipelines import BACKENDS, PARTNERS, PROFILES, SAMPLERS
from amimv.pipelines.operations import Jitter
from amimv.pipelines.params import operation_settings
from amimv.pipelines.recipes import RECIPES, get_recipe, parse_recipe
from amimv.pipelines.samplers import SAME_GROUP
from amimv.pipelines.sources.arrays import check_range
from amimv.pipelines.sources.labels import check_task_name

if TYPE_CHECKING:
    from amimv.trainers.settings import PretrainSettings

#: Settings that touch no result: where things are, and how often something is said, saved or scored.
NO_EFFECT = (
    *("resume", "output", "name", "config", "preset", "root", "cache", "tracker"),
    *("log_every", "save_every", "knn_every"),
)
#: Settings that may change when a run is resumed: the training does not depend on them.
FREE_ON_RESUME = (
    *NO_EFFECT,
    *("evaluate", "label_fractions", "supervised_steps", "supervised_lr", "finetune"),
)
#: What a run without pre-training depends on; a study leaves everything else at its default there.
OF_BASELINES = (
    *("data", "data_seed", "size", "channels", "task", "root", "rho", "profile", "total", "backbone", "batch_size"),
    *("cache", "value_range", "preset", "view_size", *operation_settings(), "seed"),
    *("label_fractions", "supervised_steps", "supervised_lr"),
)
#: timm's forms of LARS, which take a trust coefficient.
LARS = ("lars", "larc", "nlars", "nlarc")

#: Methods whose losses compare no image with others of the batch: there is no copy of it to leave out.
NO_NEGATIVES = ("barlow-twins", "byol", "dino", "ressl", "simsiam", "swav", "vicreg")

#: The least that whole numbers may be; others 0, and widths 1 unless 0 is their default and has a meaning.
LEAST = dict.fromkeys(("accumulation", "log_every", "save_every", "cluster_every", "partners", "batch_size"), 1)
LEAST |= {"clusters": 2, "queue": 1, "prototypes": 2, "iterations": 1}
WIDTHS = ("projector_hidden", "projector_out", "predictor_hidden")
POSITIVE = ("lr", "trust_coefficient", "epsilon", "teacher_temperature_start", "loss_scale")
NOT_EMPTY = ("data", "method", "backbone", "optimizer", "output", "preset")
#: Settings of text with a closed list of values: what errors call them, and the values.
CHOICES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sampler": ("sampler", SAMPLERS),
    "partner": ("partner sampler", PARTNERS),
    "backend": ("backend", BACKENDS),
    "profile": ("profile", PROFILES),
    "channels": ("number of channels", ("0", "1", "3")),
    "mixed_precision": ("mixed precision", ("no", "bf16", "fp16")),
    "resume": ("resume mode", ("no", "auto")),
    "exclude_duplicates": ("value of exclude-duplicates", ("auto", "yes", "no")),
    "baselines": ("value of baselines", ("yes", "no", "only")),
    "online": ("online strength", ("hard", "soft")),
    "self_term": ("self-term", ("once", "published")),
    "average": ("average", ("ratios", "logs")),
    "optimizer": ("optimizer", tuple(list_optimizers())),
}
SHARES = (
    *("freeze_prototypes", "queue_start", "teacher_temperature_warmup", "pruned", "prune_every"),
    *("weight_decay", "beta"),
)
#: Any 64-bit integer: what PyTorch takes as a seed, and what tells one seed from another in `amimv.pipelines.rng`.
SEEDS = ("seed", "data_seed")
NOT_NEGATIVE = ("redundancy", "invariance", "variance", "covariance", "periods")


def check(settings: "PretrainSettings") -> None:
    """Raise an `InputError` for a value that no run could use."""
    s = settings
    for field in fields(s):
        check_value(field.name, getattr(s, field.name), field.default)
    if s.profile == "natural" and s.rho != 1:
        raise InputError(f"profile natural has no ratio, but rho is {s.rho:g}: leave one of them out")
    if not s.data.startswith("folder:"):  # which scales to any size
        check_choice("size", str(s.size), ("0", "28", "64", "128", "224"))
    if not s.epochs and not s.steps:
        raise InputError("no length of training: give --epochs or --steps")
    if get_optimizer_info(s.optimizer).second_order:
        raise InputError(f"optimizer {s.optimizer} needs second derivatives, which training lacks: give another")
    if s.optimizer in LARS and s.weight_decay == 0:
        raise InputError(f"weight decay 0 turns the adaptation of {s.optimizer} off: give a small one, such as 1e-9")
    s.policy()
    s.second_policy()


def words_of(name: str) -> tuple[str, ...]:
    """The values that a setting of text can have, where they are few."""
    words = CHOICES.get(name, ("", ()))[1]
    return words if len(words) <= 20 else ()


def check_value(name: str, value: Any, default: Any) -> None:
    """Raise an `InputError` for a value that its setting cannot have, whatever the others are."""
    if name == "task" and value:
        check_task_name(value)
    if name == "recipe":
        get_recipe(value)
    if name in CHOICES:
        check_choice(CHOICES[name][0], str(value), CHOICES[name][1])
    if name == "label_fractions" and not (value and all(0 < fraction <= 1 for fraction in value)):
        raise InputError(f"label fractions are {shown(value)}, expected shares in (0, 1]")
    if name == "supervised_lr" and not (value and all(0 < rate < math.inf for rate in value)):
        raise InputError(f"supervised learning rates are {shown(value)}, expected one or more above 0")
    if name == "value_range" and value is not None:
        check_range(value)
    if name == "warmup" and not 0 <= value < 1:
        raise InputError(f"warmup is {value}, expected a share of the training in [0, 1)")
    if name == "rho" and not 1 <= value < math.inf:
        raise InputError(f"rho is {value}, expected a ratio (largest over smallest class) of at least 1")
    if isinstance(value, str):
        _check_text(name, value)
    elif isinstance(value, int) and not isinstance(value, bool):
        _check_whole(name, value, default)
    elif isinstance(value, float):
        _check_number(name, value)


def _check_text(name: str, value: str) -> None:
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        raise InputError(f"{name} is {shown(value)}, expected text without line breaks and other controls")
    if not value and name in NOT_EMPTY:
        raise InputError(f"{name} is empty: give one, or leave it out")
    if name == "name" and (Path(value).is_absolute() or ".." in Path(value).parts):
        raise InputError(f"name is {shown(value)}, expected that of a folder in --output")


def _check_whole(name: str, value: int, default: Any) -> None:
    least, most = LEAST.get(name, 1 if default and name in WIDTHS else 0), 2**31 - 1
    if name in SEEDS:
        least, most = -(2**63), 2**63 - 1
    if value < least:
        raise InputError(f"{name} is {shown(value)}, expected at least {least}")
    if value > most:
        raise InputError(f"{name} is {shown(value)}, expected at most {most}")


def _check_number(name: str, value: float) -> None:
    """Raise an `InputError` for a number that is out of the range that its name stands for, or not a number."""
    if (name.endswith("temperature") or name in POSITIVE) and not 0 < value < math.inf:
        raise InputError(f"{name} is {value}, expected more than 0")
    if (name.endswith("momentum") or name in SHARES) and not 0 <= value <= 1:
        raise InputError(f"{name} is {value}, expected 0 to 1")
    if name in NOT_NEGATIVE and not value >= 0:
        raise InputError(f"{name} is {value}, expected at least 0")
    if not -math.inf < value < math.inf:
        raise InputError(f"{name} is {value}, expected a number")


def refuse_contradictions(settings: "PretrainSettings") -> None:
    """Raise an `InputError` for two settings of which one would silently undo the other.

    All of them are left at their defaults by the methods' files and the presets: who sets them means them. They are
    looked for where settings are given, not in `check`: what an earlier version has trained can be evaluated.
    """
    s = settings
    subset = {"profile": s.profile != "exp", "rho": s.rho != 1, "total": bool(s.total)}
    drawn = ", ".join(f"{name} {getattr(s, name)}" for name, given in subset.items() if given)
    found = (
        (s.indices and drawn, f"indices are the training subset, which {drawn} would draw"),
        (one_image(s) and s.partners > 1, f"recipe {s.recipe} has no partner, but partners is {s.partners}"),
        (
            "y2" in _letters(s) and s.partners > 1,
            f"recipe {s.recipe} names its own, but partners is {s.partners}",
        ),
        (s.finetune and not s.supervised_steps, "finetune trains for supervised_steps, which is 0"),
        (s.finetune and s.baselines == "only", "baselines only trains nothing that finetune could start from"),
    )
    for contradiction, words in found:
        if contradiction:
            raise InputError(f"{words}: leave one of them out")


def _letters(s: "PretrainSettings") -> set[str]:
    """What the recipe is written with: letters of views, ``x``, and ``y`` and ``y2`` where it has partners."""
    terms = [term for side in parse_recipe(RECIPES.get(s.recipe, s.recipe)) for term in side]
    return {term.letter for term in terms} | {("x", "y", "y2")[min(term.slot, 2)] for term in terms}


def one_image(settings: "PretrainSettings") -> bool:
    """Whether all views of the recipe are of the anchor."""
    return "y" not in _letters(settings)


class Idle(NamedTuple):
    """Settings that do nothing, the condition for it, and why; ``{}`` in the reason is filled from the settings."""

    names: tuple[str, ...]
    when: Callable[["PretrainSettings"], bool]
    reason: str


def _samplers(s: "PretrainSettings") -> tuple[str, str]:
    return s.sampler, s.partner


def _untrained_labels(s: "PretrainSettings") -> bool:
    return not s.supervised_steps or (s.baselines == "no" and not s.finetune)


def _nothing_drawn(s: "PretrainSettings") -> bool:
    whole = bool(s.indices) or (not s.total and (s.profile == "natural" or (s.profile == "exp" and s.rho == 1)))
    return s.data != "phantom" and whole and set(s.label_fractions) == {1}


#: Beside `OF_BASELINES` and `NO_EFFECT`, what acts without pre-training.
_WITHOUT_TRAINING = (*OF_BASELINES, *NO_EFFECT, "indices", "baselines", "threads")
IDLE = (
    Idle(("online",), lambda s: not _letters(s) & set("HS"), "recipe {recipe} has no hard and soft strength"),
    Idle(
        ("partner",),
        lambda s: one_image(s) and s.partner != "uniform",
        "recipe {recipe} has no partner",
    ),
    Idle(
        ("second_crop_min", "second_jitter_p", "second_grey_p", "second_blur_p", "second_solarise_p"),
        lambda s: not one_image(s),
        "recipe {recipe} has partners",
    ),
    Idle(
        ("local_crops", "local_size", "local_crop_max"),
        lambda s: "L" not in _letters(s),
        "recipe {recipe} has no local crops",
    ),
    Idle(("groups",), lambda s: s.partner != SAME_GROUP, "the partner is {partner}, not same-group"),
    Idle(("beta",), lambda s: "effective-number" not in _samplers(s), "no sampler is effective-number"),
    Idle(
        ("clusters", "cluster_every"),
        lambda s: "cluster-balanced" not in _samplers(s),
        "no sampler is cluster-balanced",
    ),
    Idle(
        ("exclude_duplicates",),
        lambda s: s.exclude_duplicates == "yes" and s.method in NO_NEGATIVES,
        "method {method} has no negatives among a batch",
    ),
    Idle(
        ("brightness", "contrast", "saturation", "hue"),
        lambda s: s.policy().get(Jitter).jitter_p == 0 and not s.second_jitter_p,
        "jitter_p is 0",
    ),
    Idle(("trust_coefficient",), lambda s: s.optimizer not in LARS, "optimizer {optimizer} is no form of LARS"),
    Idle(
        ("optimizer_momentum",),
        lambda s: not get_optimizer_info(s.optimizer).has_momentum,
        "optimizer {optimizer} has none",
    ),
    Idle(("supervised_lr",), _untrained_labels, "nothing is trained on labels"),
    Idle(
        ("supervised_steps",),
        lambda s: bool(s.supervised_steps) and _untrained_labels(s),
        "nothing is trained on labels",
    ),
    Idle(("data_seed",), _nothing_drawn, "neither phantom, a subset nor a share of the labels is drawn"),
    Idle(("cache",), lambda s: not s.data.startswith("folder:"), "{data} is no folder of images"),
    Idle(("root",), lambda s: s.data == "phantom" or s.data.startswith("folder:"), "{data} is not looked for there"),
)


def idle(settings: "PretrainSettings", given: Iterable[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The given settings that do nothing beside the others: their names, and why."""
    given = tuple(given)
    untrained = tuple(name for name in given if name not in _WITHOUT_TRAINING)
    if settings.baselines == "only" and untrained:
        yield untrained, "baselines only trains nothing, and evaluates always"
        return
    for names, when, reason in IDLE:
        found = tuple(name for name in given if name in names)
        if found and when(settings):
            yield found, reason.format_map(vars(settings))
