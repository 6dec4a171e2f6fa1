"""Recipes: which views of which images make up which side of a loss, and how strongly each is augmented.

Notation: ``x`` is the anchor image, ``y`` its partner; ``N`` only normalises, ``A`` and ``A'`` are two draws of the
augmentation, ``H`` and ``S`` its hard and soft strength. The embeddings of the views of one side are summed.

=================  ==============  =======================  ====================================================
recipe             side a          side b                   source
=================  ==============  =======================  ====================================================
`two-view`         A(x)            A'(x)                    SimCLR (Chen et al. 2020)
`multi-crop`       A(x)            A'(x)                    DINO (Caron et al. 2021): + local sides of small crops
`mimv`             N(x) + A(y)     A(x) + N(y)              MIMV (arXiv 2509.08469)
`amimv-roles`      N(x) + A(y)     A(x) + A'(y)             this project's reading of AMIMV
`amimv-strength`   N(x) + H(y)     S(x) + N(y)              this project's reading of AMIMV
`amimv-views`      N(x) + A(y)     A(x) + A'(x) + N(y)      this project's reading of AMIMV
=================  ==============  =======================  ====================================================

AMIMV (arXiv 2604.01947) is defined in print by its abstract only ("asymmetric multi-image, multi-view pairs"); what
exactly is asymmetric is not known, so the three ``amimv-*`` recipes are this project's readings of it.
"""

from dataclasses import dataclass, field, replace

from amimv import InputError, check_choice
from amimv.pipelines.params import ViewPolicy
from amimv.pipelines.rng import Stream

#: MIMV's augmentation ``A`` (arXiv 2509.08469 and its published code).
HARD = ViewPolicy(
    crop=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    hflip=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    jitter_p=0.8,
    grey_p=0.2,
    blur_p=0.5,
)

RECIPES = ("two-view", "multi-crop", "mimv", "amimv-roles", "amimv-strength", "amimv-views")
#: ``amimv`` is the reading that this project recommends: it did best on validation data, see docs/study.
ALIASES = {"amimv": "amimv-views"}


@dataclass(frozen=True)
class View:
    """One rendering of one slot. Equal views of a recipe are rendered once.

    Attributes:
        slot: 0 is the anchor, 1.. its partners.
        policy: how it is rendered.
        draw: views of one slot with different draws have independent random numbers.
        label: for people, such as ``N(x)``.
    """

    slot: int
    policy: ViewPolicy
    draw: int = 0
    label: str = field(default="", compare=False)

    @property
    def stream(self) -> int:
        """Of its random numbers, for a `Key`: every view of a recipe has its own."""
        return Stream.VIEW + 16 * self.slot + self.draw


@dataclass(frozen=True)
class Recipe:
    """Sides ``a`` and ``b``, then local sides; each a tuple of views whose embeddings are summed."""

    name: str
    sides: tuple[tuple[View, ...], ...]

    @property
    def views(self) -> tuple[View, ...]:
        """The distinct views, in order of first use: what has to be rendered."""
        return tuple(dict.fromkeys(view for side in self.sides for view in side))

    @property
    def slots(self) -> int:
        """How many distinct images make up one training pair."""
        return 1 + max(view.slot for view in self.views)

    def with_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "Recipe":
        """The recipe for a data set with these channel statistics, in units of [0, 1]."""

        def bind(view: View) -> View:
            return replace(view, policy=replace(view.policy, mean=mean, std=std))

        return replace(self, sides=tuple(tuple(bind(view) for view in side) for side in self.sides))


def soften(policy: ViewPolicy) -> ViewPolicy:
    """The soft counterpart of a hard policy: half the colour jitter and rotation, crops that keep at least half of
    what the hard ones may cut away, the same flips; no greyscale, blur or solarisation."""
    return replace(
        policy,
        crop=((policy.crop[0] + 1) / 2, 1.0),
        rotation=policy.rotation / 2,
        brightness=policy.brightness / 2,
        contrast=policy.contrast / 2,
        saturation=policy.saturation / 2,
        hue=policy.hue / 2,
        grey_p=0.0,
        blur_p=0.0,
        solarise_p=0.0,
    )


def get_recipe(
    name: str = "amimv",
    *,
    hard: ViewPolicy = HARD,
    soft: ViewPolicy | None = None,
    second: ViewPolicy | None = None,
    online: str = "hard",
    partners: int = 1,
    local: ViewPolicy | None = None,
    local_crops: int = 6,
) -> Recipe:
    """A recipe by name.

    Args:
        name: one of `RECIPES`, or ``amimv``.
        hard: the augmentation ``A`` (and ``H``).
        soft: ``S`` of `amimv-strength`; default `soften` of ``hard``.
        second: another augmentation for side b of `two-view` and `multi-crop`, as BYOL has it; default ``hard``.
        online: `amimv-strength` augments hard on side a ("hard") or the other way round ("soft").
        partners: partner images per anchor, each seen in the partner's views; only for recipes with a partner.
        local: policy of the small crops of `multi-crop`; its ``size`` is set. Default: crops of 5 to 40 % of the
            area (DINO's) at 12 pixels, which is to 28 what 96 is to 224.
        local_crops: how many local sides.

    Raises:
        InputError: for an unknown name or a setting that does not fit the recipe.
    """
    name = ALIASES.get(name, name)
    check_choice("recipe", name, (*ALIASES, *RECIPES))
    if online not in ("hard", "soft"):
        raise InputError(f"online strength is '{online}', expected 'hard' or 'soft'")
    if partners < 1 or (partners > 1 and name in ("two-view", "multi-crop")):
        raise InputError(f"{partners} partners do not fit recipe '{name}': give 1, or more with a pair recipe")
    if name in ("two-view", "multi-crop"):
        local = local or replace(hard, size=12, crop=(0.05, 0.4))
        return _one_image(name, hard, second or hard, local, local_crops)
    return _pair(name, hard, soft or soften(hard), online, partners)


def _one_image(name: str, first: ViewPolicy, second: ViewPolicy, local: ViewPolicy, local_crops: int) -> Recipe:
    """The recipes of one slot."""
    sides = [(View(0, first, 0, "A(x)"),), (View(0, second, 1, "A'(x)"),)]
    if name == "multi-crop":
        sides += [(View(0, local, 2 + i, f"L{i + 1}(x)"),) for i in range(local_crops)]
    return Recipe(name, tuple(sides))


def _pair(name: str, hard: ViewPolicy, soft: ViewPolicy, online: str, partners: int) -> Recipe:
    """The recipes of an anchor and its partners."""
    whole = hard.normalised()
    ys = range(1, partners + 1)

    def view(kind: str, slot: int, policy: ViewPolicy, draw: int = 0) -> View:
        image = "x" if slot == 0 else "y" if partners == 1 else f"y{slot}"
        return View(slot, policy, draw, f"{kind}({image})")

    if name == "amimv-strength":
        first, other = (("H", hard), ("S", soft)) if online == "hard" else (("S", soft), ("H", hard))
        a = (view("N", 0, whole), *(view(first[0], y, first[1]) for y in ys))
        b = (view(other[0], 0, other[1]), *(view("N", y, whole) for y in ys))
        return Recipe(name, (a, b))

    a = (view("N", 0, whole), *(view("A", y, hard) for y in ys))
    if name == "mimv":
        b = (view("A", 0, hard), *(view("N", y, whole) for y in ys))
    elif name == "amimv-roles":
        b = (view("A", 0, hard), *(view("A'", y, hard, 1) for y in ys))
    else:
        b = (view("A", 0, hard), view("A'", 0, hard, 1), *(view("N", y, whole) for y in ys))
    return Recipe(name, (a, b))
