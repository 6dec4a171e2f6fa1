"""The public face, as `amimv.pipelines` loads it name by name."""

from .groups import leaked
from .loader import PairBatch, PairLoader
from .longtail import (
    distinct_draws,
    label_fraction,
    largest_total,
    load_indices,
    long_tail,
    realised_ratio,
    save_indices,
)
from .names import BACKENDS, PARTNERS, PROFILES, SAMPLERS
from .pair_sampler import PairSampler
from .params import ViewParams, draw_view_params
from .policy import ViewPolicy, build_policy
from .recipes import HARD, RECIPES, Recipe, View, get_recipe
from .rng import Key
from .sources.load import load_store
from .splits import split_by_group, split_indices
from .store import ImageStore
from .views import PairViews, render

__all__ = [
    "BACKENDS",
    "HARD",
    "PARTNERS",
    "PROFILES",
    "RECIPES",
    "SAMPLERS",
    "ImageStore",
    "Key",
    "PairBatch",
    "PairLoader",
    "PairSampler",
    "PairViews",
    "Recipe",
    "View",
    "ViewParams",
    "ViewPolicy",
    "build_policy",
    "distinct_draws",
    "draw_view_params",
    "get_recipe",
    "label_fraction",
    "largest_total",
    "leaked",
    "load_indices",
    "load_store",
    "long_tail",
    "realised_ratio",
    "render",
    "save_indices",
    "split_by_group",
    "split_indices",
]
