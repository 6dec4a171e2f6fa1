"""The public face of the pair pipelines: stores, long tails, recipes, view parameters and the pair loader."""

from amimv.pipelines.loader import BACKENDS, PairBatch, PairLoader, render
from amimv.pipelines.longtail import (
    PROFILES,
    label_fraction,
    largest_total,
    load_indices,
    long_tail,
    realised_ratio,
    save_indices,
)
from amimv.pipelines.params import ViewParams, ViewPolicy, draw_view_params
from amimv.pipelines.recipes import HARD, RECIPES, Recipe, View, get_recipe, soften
from amimv.pipelines.rng import Key
from amimv.pipelines.samplers import SAMPLERS
from amimv.pipelines.stores import ImageStore, load_store

__all__ = [
    "BACKENDS",
    "HARD",
    "PROFILES",
    "RECIPES",
    "SAMPLERS",
    "ImageStore",
    "Key",
    "PairBatch",
    "PairLoader",
    "Recipe",
    "View",
    "ViewParams",
    "ViewPolicy",
    "draw_view_params",
    "get_recipe",
    "label_fraction",
    "largest_total",
    "load_indices",
    "load_store",
    "long_tail",
    "realised_ratio",
    "render",
    "save_indices",
    "soften",
]
