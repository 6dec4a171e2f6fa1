"""Which training labels an evaluation may use: at each share of them as many draws as a run asks for."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines import ImageStore, distinct_draws, label_fraction
from amimv.trainers.evaluation.results import EVALUATION
from amimv.trainers.settings import PretrainSettings


class Draw(NamedTuple):
    """Labelled images: their share of the training images, the draw's seed (None of all, which nothing draws), and
    the images.
    """

    fraction: float
    seed: int | None
    labelled: ImageStore


def draw_seeds(settings: PretrainSettings, fraction: float) -> tuple[int | None, ...]:
    """The seeds by which this share of the labels is drawn."""
    return (None,) if fraction == 1 else settings.label_seeds or (settings.data_seed,)


def draw_labels(settings: PretrainSettings, train: ImageStore) -> Iterator[tuple[Draw, Tensor]]:
    """Every draw of every share, with the images' indices in ``train``.

    Raises:
        InputError: as `check_draws`.
    """
    labels = train.known_labels(EVALUATION)
    check_draws(settings, labels, train.name)
    for fraction in settings.label_fractions:
        for seed in draw_seeds(settings, fraction):
            if seed is None:
                yield Draw(fraction, None, train), torch.arange(len(train), device=train.device)
            else:
                chosen = label_fraction(labels, fraction, seed)
                yield Draw(fraction, seed, train.subset(chosen)), chosen


def check_draws(settings: PretrainSettings, labels: Tensor, name: str) -> None:
    """Raise an `InputError` where more draws are asked for than differ, as where a share takes one image of one."""
    for fraction in settings.label_fractions:
        wanted = len(draw_seeds(settings, fraction))
        if wanted > 1 and (there_are := distinct_draws(labels, fraction)) < wanted:
            raise InputError(
                f"label_seeds asks for {wanted} draws of {100 * fraction:g} % of {name}'s labels, but only "
                f"{there_are} can differ: give fewer seeds, or another share"
            )
