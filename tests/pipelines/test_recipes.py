"""Recipes: the sides of each, which views are distinct, and the settings."""

import re
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest

from amimv import InputError
from amimv.pipelines.operations import Blur
from amimv.pipelines.policy import ViewPolicy, build_policy
from amimv.pipelines.recipes import ALIASES, HARD, LETTERS, RECIPES, Recipe, Term, View, get_recipe, parse_recipe

SIDES = {
    "two-view": ("A(x)", "A'(x)"),
    "multi-crop": ("A(x)", "A'(x)", "L1(x)", "L2(x)", "L3(x)", "L4(x)", "L5(x)", "L6(x)"),
    "mimv": ("N(x) + A(y)", "A(x) + N(y)"),
    "amimv-roles": ("N(x) + A(y)", "A(x) + A'(y)"),
    "amimv-strength": ("N(x) + H(y)", "S(x) + N(y)"),
    "amimv-views": ("N(x) + A(y)", "A(x) + A'(x) + N(y)"),
}
OF_TWO_PARTNERS = {
    "mimv": ("N(x) + A(y1) + A(y2)", "A(x) + N(y1) + N(y2)"),
    "amimv-roles": ("N(x) + A(y1) + A(y2)", "A(x) + A'(y1) + A'(y2)"),
    "amimv-strength": ("N(x) + H(y1) + H(y2)", "S(x) + N(y1) + N(y2)"),
    "amimv-views": ("N(x) + A(y1) + A(y2)", "A(x) + A'(x) + N(y1) + N(y2)"),
}
STRONG = replace(HARD, size=28).changed(rotation=30.0, solarise_p=0.3, vflip=0.5)


def written(recipe: Recipe) -> tuple[str, ...]:
    return tuple(" + ".join(view.label for view in side) for side in recipe.sides)


def test_every_recipe_is_listed() -> None:
    assert set(RECIPES) == set(SIDES)


@pytest.mark.parametrize("name", RECIPES)
def test_sides(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.name == name
    assert written(recipe) == SIDES[name]
    assert recipe.slots == (1 if name in ("two-view", "multi-crop") else 2)


@pytest.mark.parametrize("name", OF_TWO_PARTNERS)
def test_sides_with_two_partners(name: str) -> None:
    recipe = get_recipe(name, partners=2)
    assert written(recipe) == OF_TWO_PARTNERS[name]
    assert recipe.slots == 3


@pytest.mark.parametrize("partners", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_a_label_says_what_its_view_is(name: str, partners: int) -> None:
    soft = build_policy({"crop_min": 0.9}, 28)
    recipe = get_recipe(name, hard=STRONG, soft=soft, partners=partners if name in OF_TWO_PARTNERS else 1)
    for view in recipe.views:
        kind, image = view.label.rstrip(")").split("(")
        assert view.slot == {"x": 0, "y": 1, "y1": 1, "y2": 2}[image]
        if kind == "N":
            assert view.policy == ViewPolicy(size=28)
        elif kind in ("A", "A'", "H"):
            assert view.policy == STRONG
        elif kind == "S":
            assert view.policy == soft
        else:
            assert view.policy == replace(STRONG, size=12).changed(crop_min=0.05, crop_max=0.4)
    augmented = [view for view in recipe.views if not view.label.startswith("N")]
    assert len({(view.slot, view.draw) for view in augmented}) == len(augmented)  # no two share random numbers


@pytest.mark.parametrize(
    ("name", "distinct"),
    [("two-view", 2), ("multi-crop", 8), ("mimv", 4), ("amimv-roles", 4), ("amimv-strength", 4), ("amimv-views", 5)],
)
def test_distinct_views(name: str, distinct: int) -> None:
    views = get_recipe(name).views
    assert len(views) == len(set(views)) == distinct


def test_equal_views_count_once_whatever_their_label() -> None:
    whole = View(0, ViewPolicy(), label="N(x)")
    again = View(0, ViewPolicy(), label="another name")
    recipe = Recipe("own", ((whole, View(1, HARD)), (again, View(1, HARD, draw=1))))
    assert recipe.views == (whole, View(1, HARD), View(1, HARD, 1))


def test_online_softly_swaps_the_strengths() -> None:
    recipe = get_recipe("amimv-strength", hard=STRONG, online="soft")
    assert written(recipe) == ("N(x) + S(y)", "H(x) + N(y)")
    assert recipe.sides[0][1].policy == STRONG.soft()
    assert recipe.sides[1][0].policy == STRONG


def test_amimv_is_an_alias() -> None:
    assert get_recipe() == get_recipe("amimv") == get_recipe(ALIASES["amimv"])
    assert get_recipe("amimv").name == ALIASES["amimv"] in RECIPES


@pytest.mark.parametrize("name", ["two-view", "multi-crop"])
def test_a_second_augmentation(name: str) -> None:
    second = STRONG.changed(blur_p=0.1)
    recipe = get_recipe(name, hard=STRONG, second=second)
    assert [side[0].policy for side in recipe.sides[:2]] == [STRONG, second]
    assert all(side[0].policy.get(Blur) == STRONG.get(Blur) for side in recipe.sides[2:])


def test_local_sides() -> None:
    local = replace(HARD, size=8).changed(crop_min=0.1, crop_max=0.3)
    recipe = get_recipe("multi-crop", local=local, local_crops=20)
    assert len(recipe.sides) == 22
    assert all(side == (View(0, local, 2 + i),) for i, side in enumerate(recipe.sides[2:]))
    assert written(get_recipe("multi-crop", local_crops=0)) == SIDES["two-view"]


def test_soft_is_half_as_strong() -> None:
    strong, soft = (SimpleNamespace(**policy.settings()) for policy in (STRONG, STRONG.soft()))
    assert (soft.crop_min, soft.crop_max) == (pytest.approx(0.54), 1.0)
    for name in ("rotation", "brightness", "contrast", "saturation", "hue"):
        assert getattr(soft, name) == pytest.approx(getattr(strong, name) / 2)
    for name in ("grey_p", "blur_p", "solarise_p"):
        assert getattr(soft, name) == 0
    for name in ("crop_ratio", "hflip", "vflip", "jitter_p"):
        assert getattr(soft, name) == getattr(strong, name)
    bound = replace(STRONG, mean=(0.5,), std=(0.2,))
    assert (bound.soft().size, bound.soft().mean, bound.soft().std) == (28, (0.5,), (0.2,))
    assert ViewPolicy().soft() == ViewPolicy()


@pytest.mark.parametrize("name", RECIPES)
def test_statistics_reach_every_view(name: str) -> None:
    recipe = get_recipe(name)
    for mean, std in (((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ((0.3,), (0.2,))):
        bound = recipe.with_statistics(mean, std)
        assert all((view.policy.mean, view.policy.std) == (mean, std) for view in bound.views)
        assert written(bound) == written(recipe)
        assert len(bound.views) == len(recipe.views)


@pytest.mark.parametrize(
    ("name", "near"),
    [("mimvv", "mimv"), ("amimv-role", "amimv-roles"), ("twoview", "two-view"), ("multicrop", "multi-crop")],
)
def test_an_unknown_name_lists_the_near_misses(name: str, near: str) -> None:
    with pytest.raises(InputError, match=rf"unknown recipe '{name}': did you mean {near}( or|\?)") as error:
        get_recipe(name)
    assert "\n" not in str(error.value)
    assert all(known in str(error.value) for known in (*RECIPES, *ALIASES))


def test_a_name_like_no_other_lists_all() -> None:
    with pytest.raises(InputError, match="unknown recipe 'qqqq': choose from amimv, two-view"):
        get_recipe("qqqq")


def test_settings_that_do_not_fit() -> None:
    for name in ("two-view", "multi-crop"):
        with pytest.raises(InputError, match=f"2 partners do not fit recipe '{name}'"):
            get_recipe(name, partners=2)
    with pytest.raises(InputError, match="0 partners do not fit recipe 'mimv'"):
        get_recipe("mimv", partners=0)
    with pytest.raises(InputError, match="unknown online strength 'firm': choose from hard, soft"):
        get_recipe("amimv", online="firm")


@pytest.mark.parametrize("name", RECIPES)
def test_distinct_views_have_streams_of_their_own(name: str) -> None:
    for partners in (1,) if name in ("two-view", "multi-crop") else (1, 3):
        views = get_recipe(name, partners=partners).views
        drawn = [view.stream for view in views if view.policy != view.policy.normalised()]
        assert len(set(drawn)) == len(drawn)


#: (slot, policy by its letter, draw) of every view of every side, as these recipes have always been.
VIEWS = {
    "two-view": ("0A0", "0A1"),
    "multi-crop": ("0A0", "0A1", "0L2", "0L3", "0L4", "0L5", "0L6", "0L7"),
    "mimv": ("0N0 1A0", "0A0 1N0"),
    "amimv-roles": ("0N0 1A0", "0A0 1A1"),
    "amimv-strength": ("0N0 1H0", "0S0 1N0"),
    "amimv-views": ("0N0 1A0", "0A0 0A1 1N0"),
}
#: The same of two partners.
VIEWS_OF_TWO = {
    "mimv": ("0N0 1A0 2A0", "0A0 1N0 2N0"),
    "amimv-roles": ("0N0 1A0 2A0", "0A0 1A1 2A1"),
    "amimv-strength": ("0N0 1H0 2H0", "0S0 1N0 2N0"),
    "amimv-views": ("0N0 1A0 2A0", "0A0 0A1 1N0 2N0"),
}


@pytest.mark.parametrize(("name", "partners"), [*((n, 1) for n in VIEWS), *((n, 2) for n in VIEWS_OF_TWO)])
def test_named_recipes_are_what_they_have_always_been(name: str, partners: int) -> None:
    """The random numbers of a view are those of its slot and draw, so these decide what a seed gives."""
    local = replace(HARD, size=12).changed(crop_min=0.05, crop_max=0.4)
    policies = {"N": ViewPolicy(28), "A": STRONG, "H": STRONG, "S": STRONG.soft(), "L": local}
    table = (VIEWS if partners == 1 else VIEWS_OF_TWO)[name]
    expected = tuple(
        tuple(View(int(slot), policies[letter], int(draw)) for slot, letter, draw in side.split()) for side in table
    )
    for text in (name, RECIPES[name]):
        assert get_recipe(text, hard=STRONG, local=local, partners=partners).sides == expected


# --- recipes as text ------------------------------------------------------------------------------


def as_text(sides: tuple[tuple[Term, ...], ...], between: str = "") -> str:
    def view(term: Term) -> str:
        image = "x" if term.slot == 0 else "y" if term.slot == 1 else f"y{term.slot}"
        return f"{term.letter}{term.primes * chr(39)}({image})"

    return f"{between}|{between}".join(f"{between}+{between}".join(map(view, side)) for side in sides)


TERMS = [
    Term(letter, primes, slot)
    for letter, primes, slot in product(LETTERS, range(4), range(13))
    if letter != "N" or not primes
]


def test_what_is_written_is_what_is_read() -> None:
    for i in range(200):
        terms = [TERMS[(i * 37 + k * 101) % len(TERMS)] for k in range(2 + i % 7)]
        cut = 1 + i % (len(terms) - 1)
        sides = (tuple(terms[:cut]), tuple(terms[cut:]))
        for between in ("", " ", "  \t"):
            text = as_text(sides, between)
            assert parse_recipe(text) == parse_recipe(f" {text} \n") == sides
    three = ((TERMS[0],), (TERMS[1],), (TERMS[2],))
    assert parse_recipe(as_text(three)) == three
    assert parse_recipe("A(y1)|A(x)") == parse_recipe("A(y)|A(x)")


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("B(x) | A(x)", 1, "one of N, A, H, S, L for a view"),
        ("A(x) | n(x)", 8, "one of N, A, H, S, L for a view"),
        ("A(x) | A(z)", 10, "x for the anchor, or y, y2, y3, ... for its partners"),
        ("A(x) | A(x2)", 10, "x for the anchor, or y"),
        ("A(x) | A(y0)", 10, "x for the anchor, or y"),
        ("A(x) | A(y02)", 10, "x for the anchor, or y"),
        ("A(x | A(y)", 1, r"a view such as A\(x\)"),
        ("A(x) | A(y", 8, r"a view such as A\(x\)"),
        ("A(x) | A(X)", 8, r"a view such as A\(x\)"),
        ("A(x) | A()", 8, r"a view such as A\(x\)"),
        ("A(x) | (x)", 8, r"a view such as A\(x\)"),
        ("A(x) | A(y٢)", 8, r"a view such as A\(x\)"),
        ("А(x) | A(x)", 1, r"a view such as A\(x\)"),  # noqa: RUF001 - a Cyrillic letter
        ("A(x) | A’(x)", 8, r"a view such as A\(x\)"),  # noqa: RUF001 - a typographic prime
        ("A(x) | N'(x)", 9, r"'\(': nothing is drawn for N"),
        ("| A(x)", 1, r"a view such as A\(x\)"),
        ("A(x) || A(x)", 7, r"a view such as A\(x\)"),
        ("A(x)++A(y) | A(x)", 6, r"a view such as A\(x\)"),
        ("A(x)A(y) | A(x)", 5, r"'\+' or '\|'"),
        ("A(x), A(y)", 5, r"'\+' or '\|'"),
        ("A(x) |", "the end", r"a view such as A\(x\)"),
        ("A(x) + ", "the end", r"a view such as A\(x\)"),
        ("A(x)", "the end", r"'\|' and another side"),
        ("A(x)+A(y)  ", "the end", r"'\|' and another side"),
        ("", "the end", r"a view such as A\(x\)"),
        (" \n", "the end", r"a view such as A\(x\)"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_at_the_character(text: str, at: int | str, expected: str) -> None:
    character, place = (repr(text[at - 1]), at) if isinstance(at, int) else (at, len(text.rstrip()) + 1)
    pattern = rf": {re.escape(character)} at character {place}, expected {expected}"
    with pytest.raises(InputError, match=pattern) as error:
        parse_recipe(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200
    if text.strip():
        with pytest.raises(InputError, match=pattern):
            get_recipe(text)


@pytest.mark.parametrize("text", ["A(x) | A(y2)", "A(y) | A'(y)", "N(x) | A(y2)+A(y3)", "A(y)\n|\nA(y2)"])
def test_an_image_that_is_left_out_is_refused(text: str) -> None:
    with pytest.raises(
        InputError, match=r"leaves out an image: expected x, then y, y2, \.\.\. without a gap"
    ) as error:
        get_recipe(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", " ", "A", "amimv views", "Ä"])
def test_neither_a_name_nor_a_text(text: str) -> None:
    with pytest.raises(InputError, match=f"unknown recipe '{text}'") as error:
        get_recipe(text)
    assert "\n" not in str(error.value)


def test_a_text_makes_a_recipe_of_that_name() -> None:
    text = " N(x)+A(y2) |A'(x)+  H(y)"
    recipe = get_recipe(text, hard=STRONG)
    assert recipe.name == text
    assert written(recipe) == ("N(x) + A(y2)", "A'(x) + H(y1)")
    assert recipe.slots == 3
    assert recipe.sides[0] == (View(0, STRONG.normalised()), View(2, STRONG))
    assert recipe.sides[1] == (View(0, STRONG, 1), View(1, STRONG))


@pytest.mark.parametrize("partners", [1, 2, 5])
def test_every_view_of_y_is_one_of_each_partner(partners: int) -> None:
    recipe = get_recipe("A(x) | N(y) + S'(y)", partners=partners)
    assert [view.slot for view in recipe.sides[1]] == [*range(1, partners + 1)] * 2
    assert recipe.slots == partners + 1
    images = ["y"] if partners == 1 else [f"y{k}" for k in range(1, partners + 1)]
    assert written(recipe)[1] == " + ".join(f"{kind}({image})" for kind in ("N", "S'") for image in images)


@pytest.mark.parametrize("text", ["A(x) | A(y)+A(y2)", "A(x) | A'(x)"])
def test_partners_do_not_fit_a_text_that_names_them_or_has_none(text: str) -> None:
    assert get_recipe(text, partners=1).slots == len(set(re.findall(r"\((.*?)\)", text)))
    with pytest.raises(InputError, match=r"2 partners do not fit recipe .*: give 1, or more with a recipe of x and y"):
        get_recipe(text, partners=2)
    with pytest.raises(InputError) as error:
        get_recipe(text.replace(" ", "\n"), partners=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "H(x) | S(x)",
        "S(x) | A(x)+A'(x)",
        "S(x)+S'(x) | A(x)+A'(x)",
        "A'(x) | S'(x)+A(x)+S(x)+A''(x)",
        "A(x) | A''(x) | L(x)",
        "A'''(x) | S(x) | L(x)",
        "L(x)+L'(x) | A''(x)+S''(x)",
        "L(y)+S(y)+A(y)+A'(y) | A(x)",
    ],
)
def test_different_views_of_an_image_have_numbers_of_their_own(text: str) -> None:
    recipe = get_recipe(text, hard=STRONG)
    labels = [view.label for side in recipe.sides for view in side]
    assert len(recipe.views) == len(set(labels))
    streams = [view.stream for view in recipe.views]
    assert len(set(streams)) == len(streams)


def test_a_view_named_twice_is_one() -> None:
    recipe = get_recipe("N(x)+A(y) | A(x)+A(y)+N(x)+H(y)")
    assert len(recipe.views) == 3
    assert recipe.sides[0] == (recipe.sides[1][2], recipe.sides[1][1])
    assert recipe.sides[1][3] == recipe.sides[1][1]  # H is A


def test_sides_a_and_b_are_there_whatever_the_number_of_local_crops() -> None:
    for crops in (0, 1, 3):
        assert written(get_recipe("A(x) | L(x)", local_crops=crops)) == ("A(x)", "L1(x)")
        assert written(get_recipe("L(x) | A(x)", local_crops=crops)) == ("L1(x)", "A(x)")
        assert len(get_recipe("A(x) | N(x) | L(x)", local_crops=crops).sides) == 2 + crops


def test_more_views_than_an_image_has_streams_for() -> None:
    many = " + ".join("A" + "'" * k + "(x)" for k in range(17))
    assert len(get_recipe(f"{many} | N(x)").views) == 18  # there is no other image to collide with
    with pytest.raises(InputError, match="can be augmented in 16 ways at most: use fewer views"):
        get_recipe(f"{many} | A(y)")
