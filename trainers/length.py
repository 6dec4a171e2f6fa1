"""The length of a run that is given in views or in minutes: a number of steps, for minutes by its measured rate."""

import copy
import logging
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from amimv import InputError
from amimv.pipelines import PairBatch
from amimv.trainers.build import Training, make_recipe, set_length
from amimv.trainers.checkpoints import load_state, state_of
from amimv.trainers.launch import agree
from amimv.trainers.layers import from_yaml
from amimv.trainers.loop import train_step
from amimv.trainers.run_folder import holds_run, run_path
from amimv.trainers.settings import PretrainSettings

#: Steps that go before the measured ones: they compile, allocate and fill caches.
WARM_UP = 5
#: Seconds that the measured steps take, about, and how many there are at least and at most.
SECONDS, FEWEST, MOST = 5.0, 10, 500
#: Where the schedules stand meanwhile does not matter, but that they have not ended.
FAR = 10**6

logger = logging.getLogger("amimv")


def with_views_as_steps(
    settings: PretrainSettings, sources: dict[str, str]
) -> tuple[PretrainSettings, dict[str, str]]:
    """Settings and where they come from, the length in views, if it is given so, as the steps that render no more.

    Raises:
        InputError: one step renders more.
    """
    s = settings
    if s.views is None:
        return settings, sources
    of_step = s.batch_size * len(make_recipe(s).views)
    if s.views < of_step:
        raise InputError(
            f"views is {s.views:,}, but one step renders {of_step:,} ({of_step // s.batch_size} of each of "
            f"{s.batch_size} pairs): give as many at least, or a smaller --batch-size"
        )
    told = {"views": "default", "steps": f"views {s.views} at {of_step} a step"}
    return replace(s, views=None, steps=s.views // of_step), sources | told


def of_earlier_start(settings: PretrainSettings) -> PretrainSettings:
    """Settings with the length that the run had when it began, if it is to go on and minutes are given again."""
    folder = run_path(settings)
    if settings.minutes is None or settings.resume != "auto" or not holds_run(folder):
        return settings
    earlier = from_yaml(folder / "config.yaml")
    logger.info("%s began with %s: it keeps that length", folder, _told(earlier))
    return replace(settings, minutes=None, steps=earlier.steps, epochs=earlier.epochs)


def _told(settings: PretrainSettings) -> str:
    return f"{settings.steps} steps" if settings.steps else f"{settings.epochs} epochs"


def fix_length(training: Training, sources: dict[str, str]) -> dict[str, str]:
    """Make the minutes that the run is given, if it is, the steps that fit into them by its measured rate.

    Returns:
        Where its settings come from, which are now those of a run that is given so many steps.
    """
    s = training.settings
    if s.minutes is None:
        return sources
    rate = measure_rate(training)
    steps = max(1, round(60 * s.minutes * rate))
    training.settings = replace(s, minutes=None, steps=steps)
    training.total_steps = set_length(training.loader, training.settings)
    return sources | {"minutes": "default", "steps": f"minutes {s.minutes:g} at {rate:.3g} steps/s"}


def measure_rate(training: Training) -> float:
    """Optimiser steps a second of this training, which is afterwards what it was before: its next step is the one
    that it would have been. All processes measure, rank 0's number is everyone's.
    """
    before, length = copy.deepcopy(state_of(training)), training.total_steps
    training.total_steps = FAR
    batches = endless_batches(training)
    crude = time_steps(training, batches, WARM_UP)
    (steps,) = agree(training.accelerator, [min(max(round(SECONDS * crude), FEWEST), MOST)])
    (rate,) = agree(training.accelerator, [time_steps(training, batches, steps)])
    logger.info("%.3g steps a second, over %d steps that are taken back", rate, steps)
    load_state(training, before)
    training.total_steps = length
    return float(rate)


def endless_batches(training: Training) -> Iterator[PairBatch]:
    """Those of the first epoch, again and again."""
    while True:
        yield from training.loader.epoch(0)


def time_steps(training: Training, batches: Iterator[PairBatch], steps: int) -> float:
    """Train for so many steps; how many they are in a second."""
    cuda = training.accelerator.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        train_step(training, batches, 0)
    if cuda:
        torch.cuda.synchronize()
    return steps / (time.perf_counter() - started)
