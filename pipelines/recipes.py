"""Recipes: which views of which images make up which side of a loss, and how strongly each is augmented.

A recipe is written as text, such as ``N(x)+A(y) | A(x)+N(y)``: sides, divided by ``|``, of views, joined by ``+``,
whose embeddings are summed. A view is a letter and an image:

- ``N`` only normalises; ``A`` is the augmentation, ``A'``, ``A''`` further draws of it; ``H`` and ``S`` are its hard
  and soft strength (``H`` is ``A``); ``L`` is a small, local crop;
- ``x`` is the anchor, ``y``, ``y2``, ``y3`` ... its partners.

Sides a and b come first, local sides after them. These names stand for texts (``RECIPES``):

=================  =================================  ==========================================================
recipe             text                               source
=================  =================================  ==========================================================
`two-view`         ``A(x) | A'(x)``                   SimCLR (Chen et al. 2020)
`multi-crop`       ``A(x) | A'(x) | L(x)``            DINO (Caron et al. 2021); the local side stands for several
`mimv`             ``N(x)+A(y) | A(x)+N(y)``          MIMV (arXiv 2509.08469)
`amimv-roles`      ``N(x)+A(y) | A(x)+A'(y)``         this project's reading of AMIMV
`amimv-strength`   ``N(x)+H(y) | S(x)+N(y)``          this project's reading of AMIMV
`amimv-views`      ``N(x)+A(y) | A(x)+A'(x)+N(y)``    this project's reading of AMIMV
=================  =================================  ==========================================================

AMIMV (arXiv 2604.01947) is defined in print by its abstract only ("asymmetric multi-image, multi-view pairs"); what
exactly is asymmetric is not known, so the three ``amimv-*`` recipes are this project's readings of it.
"""

import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn

from amimv import InputError, check_choice
from amimv.pipelines.operations.blur import Blur
from amimv.pipelines.operations.crop import Crop
from amimv.pipelines.operations.flip import Flip
from amimv.pipelines.operations.grey import Grey
from amimv.pipelines.operations.jitter import Jitter
from amimv.pipelines.policy import ViewPolicy
from amimv.pipelines.rng import Stream

#: MIMV's augmentation ``A`` (arXiv 2509.08469 and its published code).
HARD = ViewPolicy(
    operations=(
        Crop(0.08, 1.0, (3 / 4, 4 / 3)),
        Flip(0.5),
        Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter_p=0.8),
        Grey(0.2),
        Blur(0.5, (0.1, 2.0)),
    )
)
#: Areas of local crops, as shares of the image: DINO's.
LOCAL_AREA = (0.05, 0.4)

RECIPES = {
    "two-view": "A(x) | A'(x)",
    "multi-crop": "A(x) | A'(x) | L(x)",
    "mimv": "N(x)+A(y) | A(x)+N(y)",
    "amimv-roles": "N(x)+A(y) | A(x)+A'(y)",
    "amimv-strength": "N(x)+H(y) | S(x)+N(y)",
    "amimv-views": "N(x)+A(y) | A(x)+A'(x)+N(y)",
}
#: ``amimv`` is the reading that this project recommends: it did best on validation data, see docs/study.
ALIASES = {"amimv": "amimv-views"}
#: What a letter means, for people.
LETTERS = {
    "N": "normalised",
    "A": "augmented",
    "H": "hard augmentation",
    "S": "soft augmentation",
    "L": "small crop",
}
#: Streams of random numbers that an image of a pair has.
_DRAWS = 16


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
        return Stream.VIEW + _DRAWS * self.slot + self.draw


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

    def with_statistics(
        self, mean: tuple[float, ...], std: tuple[float, ...], value_range: tuple[float, float] | None = None
    ) -> "Recipe":
        """The recipe for a data set with these channel statistics, in units of the range that becomes [0, 1]."""

        def bind(view: View) -> View:
            return replace(view, policy=replace(view.policy, mean=mean, std=std, value_range=value_range))

        return replace(self, sides=tuple(tuple(bind(view) for view in side) for side in self.sides))


class Term(NamedTuple):
    """A view as written: its letter, how many primes, and its slot."""

    letter: str
    primes: int
    slot: int


_TERM = re.compile(r"([A-Za-z])('*)\(([a-z])([0-9]*)\)")


def parse_recipe(text: str) -> tuple[tuple[Term, ...], ...]:
    """The sides that a recipe's text describes, as written.

    Raises:
        InputError: saying at which character what was expected.
    """
    sides: list[list[Term]] = [[]]
    at, joined = 0, False
    compact = text.rstrip()
    while at < len(compact):
        if compact[at].isspace():
            at += 1
        elif compact[at] in "+|" and joined:
            sides += [[]] if compact[at] == "|" else []
            at, joined = at + 1, False
        elif not joined and (found := _TERM.match(compact, at)):
            sides[-1].append(_term(found, text))
            at, joined = found.end(), True
        else:
            _refuse(text, at, "'+' or '|'" if joined else "a view such as A(x)")
    if not joined:
        _refuse(text, len(compact), "a view such as A(x)")
    if len(sides) < 2:
        _refuse(text, len(compact), "'|' and another side")
    return tuple(tuple(side) for side in sides)


def _term(found: re.Match[str], text: str) -> Term:
    letter, primes, image, number = found.groups()
    if letter not in LETTERS:
        _refuse(text, found.start(), f"one of {', '.join(LETTERS)} for a view")
    if letter == "N" and primes:
        _refuse(text, found.start(2), "'(': nothing is drawn for N, so there is one of it")
    if image not in "xy" or (image == "x" and number) or number.startswith("0"):
        _refuse(text, found.start(3), "x for the anchor, or y, y2, y3, ... for its partners")
    return Term(letter, len(primes), 0 if image == "x" else int(number or 1))


def _refuse(text: str, at: int, expected: str) -> NoReturn:
    rest = repr(text[at]) if text[at:].strip() else "the end"
    raise InputError(f"recipe {text!r}: {rest} at character {at + 1}, expected {expected}")


def get_recipe(
    name: str = "amimv",
    *,
    size: int | None = None,
    hard: ViewPolicy = HARD,
    soft: ViewPolicy | None = None,
    second: ViewPolicy | None = None,
    online: str = "hard",
    partners: int = 1,
    local: ViewPolicy | None = None,
    local_crops: int = 6,
) -> Recipe:
    """A recipe by name or by text.

    Args:
        name: one of `RECIPES`, ``amimv``, or a text such as ``A(x) | A(y)``.
        size: height and width of the views, in pixels; None: that of ``hard``, or of the images.
        hard: the augmentation ``A`` (and ``H``).
        soft: ``S``; default the soft counterpart of ``hard``.
        second: another augmentation for ``A'`` where all views are of the anchor, as BYOL has it for side b; default
            ``hard``.
        online: "soft" swaps ``H`` and ``S`` of the recipe.
        partners: partner images per anchor: each view of ``y`` is one of every partner. Only for recipes with ``y``
            and no further partner in their text.
        local: policy of ``L``; its ``size`` is set. Default: crops of DINO's ``LOCAL_AREA`` at three sevenths of
            ``size`` (of 28, if that is not known), as 96 is of DINO's 224.
        local_crops: how many local sides a side ``L(x)`` behind a and b stands for.

    Raises:
        InputError: for an unknown name, a text that cannot be read, or a setting that does not fit the recipe.
    """
    name = ALIASES.get(name, name)
    if not any(character in name for character in "(|+"):
        check_choice("recipe", name, (*ALIASES, *RECIPES))
    text = RECIPES.get(name, name)
    check_choice("online strength", online, ("hard", "soft"))
    if online == "soft":
        text = text.translate(str.maketrans("HS", "SH"))
    sides = _with_partners(parse_recipe(text), name, partners)
    sides = _with_local_crops(sides, local_crops)
    slots = {term.slot for side in sides for term in side}
    if slots != set(range(len(slots))):
        raise InputError(f"recipe {name!r} leaves out an image: expected x, then y, y2, ... without a gap")
    hard = replace(hard, size=size or hard.size)
    if local is None:
        small = replace(hard, size=max(4, round((hard.size or 28) * 3 / 7)))
        local = small.changed(crop_min=LOCAL_AREA[0], crop_max=LOCAL_AREA[1])
    policies = {"N": hard.normalised(), "A": hard, "H": hard, "S": soft or hard.soft(), "L": local}
    return Recipe(name, _bound(sides, policies, second if slots == {0} else None))


def _with_partners(sides: tuple[tuple[Term, ...], ...], name: str, partners: int) -> tuple[tuple[Term, ...], ...]:
    """The sides with each view of ``y`` once for every partner."""
    last = max(term.slot for side in sides for term in side)
    if partners < 1 or (partners > 1 and last != 1):
        raise InputError(f"{partners} partners do not fit recipe {name!r}: give 1, or more with a recipe of x and y")
    repeated = (tuple(t._replace(slot=y) for t in side for y in _images(t, partners)) for side in sides)
    return tuple(repeated)


def _images(term: Term, partners: int) -> range:
    return range(1, partners + 1) if term.slot == 1 else range(term.slot, term.slot + 1)


def _with_local_crops(sides: tuple[tuple[Term, ...], ...], local_crops: int) -> tuple[tuple[Term, ...], ...]:
    """The sides with each one behind a and b that is ``L(x)`` so many times, each another draw."""
    made = list(sides[:2])
    for side in sides[2:]:
        local = all(term == Term("L", 0, term.slot) for term in side)
        made += [tuple(t._replace(primes=i) for t in side) for i in range(local_crops)] if local else [side]
    return tuple(made)


def _bound(
    sides: tuple[tuple[Term, ...], ...], policies: dict[str, ViewPolicy], second: ViewPolicy | None
) -> tuple[tuple[View, ...], ...]:
    """The sides with policies; views of one image that differ have random numbers of their own."""
    partners = max(term.slot for side in sides for term in side)
    primes = max((term.primes for side in sides for term in side if term.letter != "L"), default=0)
    draws: dict[tuple[int, int], tuple[ViewPolicy, int]] = {}

    def bind(term: Term) -> View:
        policy = second if second and term.letter == "A" and term.primes == 1 else policies[term.letter]
        draw = term.primes + (max(2, primes + 1) if term.letter == "L" else 0)
        if term.letter != "N":
            while draws.setdefault((term.slot, draw), (policy, term.primes)) != (policy, term.primes):
                draw += 1
        if draw >= _DRAWS and partners:
            raise InputError(f"an image of a pair can be augmented in {_DRAWS} ways at most: use fewer views")
        return View(term.slot, policy, draw, _label(term, partners))

    return tuple(tuple(bind(term) for term in side) for side in sides)


def _label(term: Term, partners: int) -> str:
    image = "x" if term.slot == 0 else "y" if partners == 1 else f"y{term.slot}"
    kind = f"L{term.primes + 1}" if term.letter == "L" else term.letter + "'" * term.primes
    return f"{kind}({image})"
