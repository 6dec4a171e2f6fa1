"""Recipes: the sides of each, which views are distinct, and the settings."""

from dataclasses import replace

import pytest

from amimv import InputError
from amimv.pipelines.params import ViewPolicy
from amimv.pipelines.recipes import ALIASES, HARD, RECIPES, Recipe, View, get_recipe, soften

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
STRONG = replace(HARD, size=24, rotation=30.0, solarise_p=0.3, vflip=0.5)


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
    soft = ViewPolicy(size=24, crop=(0.9, 1.0))
    recipe = get_recipe(name, hard=STRONG, soft=soft, partners=partners if name in OF_TWO_PARTNERS else 1)
    for view in recipe.views:
        kind, image = view.label.rstrip(")").split("(")
        assert view.slot == {"x": 0, "y": 1, "y1": 1, "y2": 2}[image]
        if kind == "N":
            assert view.policy == ViewPolicy(size=24)
        elif kind in ("A", "A'", "H"):
            assert view.policy == STRONG
        elif kind == "S":
            assert view.policy == soft
        else:
            assert view.policy == replace(STRONG, size=12, crop=(0.05, 0.4))
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
    assert recipe.sides[0][1].policy == soften(STRONG)
    assert recipe.sides[1][0].policy == STRONG


def test_amimv_is_an_alias() -> None:
    assert get_recipe() == get_recipe("amimv") == get_recipe(ALIASES["amimv"])
    assert get_recipe("amimv").name == ALIASES["amimv"] in RECIPES


@pytest.mark.parametrize("name", ["two-view", "multi-crop"])
def test_a_second_augmentation(name: str) -> None:
    second = replace(STRONG, blur_p=0.1)
    recipe = get_recipe(name, hard=STRONG, second=second)
    assert [side[0].policy for side in recipe.sides[:2]] == [STRONG, second]
    assert all(side[0].policy.blur_p == STRONG.blur_p for side in recipe.sides[2:])


def test_local_sides() -> None:
    local = replace(HARD, size=8, crop=(0.1, 0.3))
    recipe = get_recipe("multi-crop", local=local, local_crops=20)
    assert len(recipe.sides) == 22
    assert all(side == (View(0, local, 2 + i),) for i, side in enumerate(recipe.sides[2:]))
    assert written(get_recipe("multi-crop", local_crops=0)) == SIDES["two-view"]


def test_soften_halves() -> None:
    soft = soften(STRONG)
    assert soft.crop == (pytest.approx(0.54), 1.0)
    for name in ("rotation", "brightness", "contrast", "saturation", "hue"):
        assert getattr(soft, name) == pytest.approx(getattr(STRONG, name) / 2)
    for name in ("grey_p", "blur_p", "solarise_p"):
        assert getattr(soft, name) == 0
    for name in ("size", "mean", "std", "ratio", "hflip", "vflip", "jitter_p"):
        assert getattr(soft, name) == getattr(STRONG, name)
    assert soften(ViewPolicy()) == ViewPolicy()


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
    with pytest.raises(InputError, match="online strength is 'firm', expected 'hard' or 'soft'"):
        get_recipe("amimv", online="firm")


@pytest.mark.parametrize("name", RECIPES)
def test_distinct_views_have_streams_of_their_own(name: str) -> None:
    for partners in (1,) if name in ("two-view", "multi-crop") else (1, 3):
        views = get_recipe(name, partners=partners).views
        drawn = [view.stream for view in views if view.policy != view.policy.normalised()]
        assert len(set(drawn)) == len(drawn)
