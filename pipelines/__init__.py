"""The public face of the pair pipelines: stores, long tails, recipes, view parameters and the pair loader."""

from amimv.pipelines.groups import leaked
from amimv.pipelines.loader import PairBatch, PairLoader
from amimv.pipelines.longtail import (
    PROFILES,
    label_fraction,
    largest_total,
    load_indices,
    long_tail,
    realised_ratio,
    save_indices,
)
from amimv.pipelines.pair_sampler import PairSampler
from amimv.pipelines.params import ViewParams, ViewPolicy, build_policy, draw_view_params
from amimv.pipelines.recipes import HARD, RECIPES, Recipe, View, get_recipe
from amimv.pipelines.rng import Key
from amimv.pipelines.samplers import PARTNERS, SAMPLERS
from amimv.pipelines.sources.load import load_store
from amimv.pipelines.splits import split_indices
from amimv.pipelines.store import ImageStore
from amimv.pipelines.views import BACKENDS, PairViews, render

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
    "split_indices",
]
