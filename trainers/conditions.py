"""What single settings can be beyond a range or a choice, and when they do nothing beside the others; the fields of
`amimv.trainers.settings` have these.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amimv import InputError, check_choice, shown
from amimv.fields import SEED, Idle
from amimv.pipelines.names import FILES, SAME_GROUP
from amimv.pipelines.policy import operation_settings
from amimv.pipelines.recipes import HARD, RECIPES, parse_recipe
from amimv.pipelines.sources.listing import SPLITS
from amimv.trainers.optimizers import optimizers

if TYPE_CHECKING:
    from amimv.trainers.settings import PretrainSettings


#: Initial weights as a network is built with them.
RANDOM = "random"


def check_frozen(value: tuple[str, ...]) -> None:
    for name in value:
        if not name or not name.isprintable():
            raise InputError(f"frozen has {shown(name)}, expected names of models of timm")


def _each(
    told: str, expected: str, inside: Callable[[Any], bool], empty: bool = False
) -> Callable[[tuple[Any, ...]], None]:
    """A check of several values, of which one at least is there unless it may be ``empty``."""

    def check(value: tuple[Any, ...]) -> None:
        if not (value or empty) or not all(map(inside, value)):
            raise InputError(f"{told} {shown(value)}, expected {expected}")

    return check


check_fractions = _each("label fractions are", "shares in (0, 1]", lambda share: 0 < share <= 1)
check_rates = _each("supervised learning rates are", "one or more above 0", lambda rate: 0 < rate < math.inf)
check_lengths = _each("supervised_more_steps is", "numbers of steps of at least 1", lambda steps: steps >= 1, True)
check_mixup = _each("supervised_mixup is", "one or more alphas of at least 0", lambda alpha: 0 <= alpha < math.inf)
check_smoothing = _each("supervised_smoothing is", "one or more shares in [0, 1)", lambda share: 0 <= share < 1)


def check_label_seeds(value: tuple[int, ...]) -> None:
    if len(set(value)) < len(value) or not all(SEED[0] <= seed <= SEED[1] for seed in value):
        raise InputError(f"label seeds are {shown(value)}, expected different 64-bit integers")


def check_warmup(value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"warmup is {value}, expected a share of the training in [0, 1)")


def check_rho(value: float) -> None:
    if not 1 <= value < math.inf:
        raise InputError(f"rho is {value}, expected a ratio (largest over smallest class) of at least 1")


def check_shares(value: tuple[float, ...]) -> None:
    if len(value) != len(SPLITS) or not all(share > 0 for share in value) or abs(sum(value) - 1) > 1e-6:
        raise InputError(f"split is {shown(value)}, expected shares of train, val and test whose sum is 1")


def check_name(value: str) -> None:
    if Path(value).is_absolute() or ".." in Path(value).parts:
        raise InputError(f"name is {shown(value)}, expected that of a folder in --output")


def read_second(words: tuple[str, ...]) -> dict[str, Any]:
    """Settings of operations by name, from ``NAME=VALUE``, or ``NAME=LOW,HIGH`` for a pair.

    Raises:
        InputError: no such setting, or a value that is neither numbers nor None.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        check_choice("setting of an operation", name, operation_settings())
        try:
            numbers = None if text == "None" else tuple(map(float, text.split(",")))
        except ValueError as error:
            raise InputError(f"second is {shown(word)}, expected NAME=VALUE, such as blur_p=0.1") from error
        found[name] = numbers[0] if numbers and len(numbers) == 1 else numbers
    return found


def write_second(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Such words, each setting once and in the order of operations."""
    texts = {
        name: ",".join(map(str, given[name] if isinstance(given[name], tuple | list) else (given[name],)))
        for name in given
    }
    return tuple(f"{name}={texts[name]}" for name in sorted(texts, key=list(operation_settings()).index))


def check_second(value: tuple[str, ...]) -> None:
    HARD.changed(**{name: numbers for name, numbers in read_second(value).items() if numbers is not None})


def letters(s: "PretrainSettings") -> set[str]:
    """What the recipe is written with: letters of views, ``x``, and ``y`` and ``y2`` where it has partners."""
    terms = [term for side in parse_recipe(RECIPES.get(s.recipe, s.recipe)) for term in side]
    return {term.letter for term in terms} | {("x", "y", "y2")[min(term.slot, 2)] for term in terms}


def one_image(settings: "PretrainSettings") -> bool:
    """Whether all views of the recipe are of the anchor."""
    return "y" not in letters(settings)


def is_natural(s: "PretrainSettings") -> bool:
    """Whether the training subset is the whole split, given no indices."""
    return s.total is None and (s.profile == "natural" or (s.profile == "exp" and s.rho == 1))


def _untrained_labels(s: "PretrainSettings") -> bool:
    return not s.supervised_steps or (s.baselines == "no" and not s.finetune)


def _nothing_drawn(s: "PretrainSettings") -> bool:
    drawn = set(s.label_fractions) != {1} and not s.label_seeds
    return s.data != "phantom" and (s.indices is not None or is_natural(s)) and not drawn


NO_STRENGTHS = Idle("recipe {recipe} has no hard and soft strength", lambda s: not letters(s) & set("HS"))
NO_PARTNER = Idle("recipe {recipe} has no partner", lambda s: one_image(s) and s.partner != "uniform")
PARTNERED = Idle("recipe {recipe} has partners", lambda s: not one_image(s))
NO_LOCAL_CROPS = Idle("recipe {recipe} has no local crops", lambda s: "L" not in letters(s))
NO_GROUPS = Idle(
    "the partner is {partner}, not same-group, and nothing is split or evaluated",
    lambda s: s.partner != SAME_GROUP and not s.split and not s.evaluate,
)
NOT_CUT = Idle("no split is given", lambda s: not s.split)
NO_BETA = Idle("no sampler is effective-number", lambda s: "effective-number" not in (s.sampler, s.partner))
NO_CLUSTERS = Idle("no sampler is cluster-balanced", lambda s: "cluster-balanced" not in (s.sampler, s.partner))
NO_NEGATIVES = Idle(
    "method {method} has no negatives among a batch", lambda s: s.exclude_duplicates == "yes" and not s.has_negatives
)
NO_LARS = Idle("optimizer {optimizer} is no form of LARS", lambda s: not optimizers()[s.optimizer].lars)
NO_MOMENTUM = Idle("optimizer {optimizer} has none", lambda s: not optimizers()[s.optimizer].has_momentum)
NO_LABELS = Idle("nothing is trained on labels", _untrained_labels)
NO_LABEL_STEPS = Idle(NO_LABELS.reason, lambda s: bool(s.supervised_steps) and _untrained_labels(s))
NOTHING_DRAWN = Idle("neither phantom, a subset nor a share of the labels is drawn", _nothing_drawn)
NO_START = Idle(
    "baselines only trains nothing, and the baselines do not start from it (--init-baselines)",
    lambda s: s.baselines == "only" and not s.init_baselines,
)
NO_INITIAL = Idle("init is {init}, baselines {baselines}", lambda s: s.init == RANDOM or s.baselines == "no")
NO_BASELINES = Idle("baselines is {baselines}", lambda s: s.baselines == "no")
ALL_LABELS = Idle("all labels are used, and none are drawn", lambda s: set(s.label_fractions) == {1})
NO_FILES = Idle("{data} is neither a folder of images nor a CSV file", lambda s: not s.data.startswith(FILES))
NO_ROOT = Idle("{data} is not looked for there", lambda s: s.data == "phantom" or s.data.startswith(FILES))
