"""Data that a backbone was not trained on, read as it takes them."""

import logging
from dataclasses import fields, replace
from typing import TypeVar

import torch

from amimv import InputError
from amimv.fields import check_setting
from amimv.models.backbones import BackboneSpec
from amimv.pipelines import ImageStore
from amimv.pipelines.names import FILES
from amimv.pipelines.sources.npz import SIZES
from amimv.trainers.data import load_split
from amimv.trainers.data_settings import DataSettings

logger = logging.getLogger("amimv")
T = TypeVar("T", bound=DataSettings)


def as_taken(given: T, spec: BackboneSpec) -> T:
    """The settings, checked, with what they leave open as the backbone takes it.

    Files are read in its size and channels, and of sizes that are published the smallest is taken that is no smaller;
    an ``.npz`` has what it has.
    """
    for field in fields(DataSettings):
        check_setting(field, getattr(given, field.name))
    size, channels = given.size, given.channels
    if given.data.startswith(FILES):
        size = size or spec.size
        channels = channels or (spec.channels if spec.channels in (1, 3) else None)
    elif not given.data.endswith(".npz"):
        size = size or next((size for size in SIZES if size >= spec.size), SIZES[-1])
    return replace(given, size=size, channels=channels)


def load_taken(
    given: T, spec: BackboneSpec, split: str, device: torch.device | str, resident: bool | None = None
) -> tuple[ImageStore, T]:
    """A split in the channels that the backbone takes, and the settings by which the others are read likewise.

    Raises:
        InputError: they cannot be had.
    """
    store = load_split(given, split, device, resident)
    if (store.channels, spec.channels, given.channels) == (1, 3, None):
        logger.info("%s is grey, and the backbone takes RGB: grey is repeated", store.name)
        given = replace(given, channels=3)
        store = load_split(given, split, device, resident)
    if store.channels != spec.channels:
        have, wanted = store.channels, spec.channels
        raise InputError(f"{store.name} has images of {have} channel(s), the backbone takes {wanted}: convert them")
    return store, given


def normalised_as_trained(spec: BackboneSpec, store: ImageStore, own_range: bool = False) -> BackboneSpec:
    """The backbone's spec for these images: size, mean and std of its training.

    So is the value range, unless the stored values are of another kind (8 bits there, 16 here), or ``own_range`` says
    that the store's was given.
    """
    same_kind = (spec.value_range is None) == (store.value_range is None)
    return spec if same_kind and not own_range else replace(spec, value_range=store.value_range)
