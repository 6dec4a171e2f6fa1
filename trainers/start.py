"""The start of a run: whose folder it is, which data it has, and that nothing which it will need is missing."""

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from amimv.pipelines import ImageStore, realised_ratio
from amimv.trainers.build import Training
from amimv.trainers.data import HeldOut, Subset, check_readable, describe_images
from amimv.trainers.identity import identify_all
from amimv.trainers.launch import without_effect
from amimv.trainers.run_folder import (
    begin_run,
    describe_environment,
    find_run,
    go_on,
    lock_run,
    run_path,
    write_json,
)
from amimv.trainers.settings import PretrainSettings

logger = logging.getLogger("amimv")


def claim_run(settings: PretrainSettings, held: ExitStack) -> bool:
    """Keep others out of the run's folder as long as ``held``; whether there is a run to go on with."""
    find_run(settings)  # a folder that is none of ours is left as it is
    held.enter_context(lock_run(run_path(settings)))
    return find_run(settings)


def tie_to_data(
    settings: PretrainSettings, sources: dict[str, str], folder: Path, again: bool, subset: Subset, held_out: HeldOut
) -> None:
    """The last look before anything is written: the data are those of the run's beginning, or can all be read."""
    data = identify_all(subset.store, subset.indices, held_out.val, held_out.test)
    if again:
        go_on(folder, data)
        return
    for store in (held_out.val, held_out.test):
        if store is not None:
            check_readable(store)
    begin_run(folder, settings, sources, data, subset.indices)


def log_start(training: Training, folder: Path, initial: dict[str, Any] | None) -> None:
    """What the run is, and which weights it began with, on the console and in ``environment.json``."""
    s, accelerator = training.settings, training.accelerator
    for line in without_effect(os.environ):
        logger.warning(line)
    logger.info(describe_images(training.store))
    logger.info(
        "%s on %s, %s, %d steps of %d pairs, accumulation %d, precision %s, %d process(es) on %s, %s",
        s.method,
        s.recipe,
        s.backbone,
        training.total_steps,
        s.batch_size,
        s.accumulation,
        s.mixed_precision,
        accelerator.num_processes,
        accelerator.device,
        folder,
    )
    if training.initial is not None:
        logger.info(training.initial)
    if s.accumulation > 1:
        logger.info("negatives come from micro-batches of %d pairs", s.batch_size // s.accumulation)
    extra = {
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "queue": getattr(training.method.settings, "queue", None),
        "init": initial,
        **describe_start(training.store),
    }
    write_json(folder / "environment.json", describe_environment(extra))


def describe_start(store: ImageStore) -> dict[str, Any]:
    """The command, the task and the training images."""
    counts = store.class_counts()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "task": store.task,
        "training_images": len(store),
        "training_counts": counts,
        "realised_ratio": realised_ratio(counts) if counts and 0 not in counts else None,
    }
