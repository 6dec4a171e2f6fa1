"""The start of a run: whose folder it is, which data it has, and that nothing which it will need is missing."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from amimv.pipelines import ImageStore, realised_ratio
from amimv.trainers.data import HeldOut, Subset, check_readable
from amimv.trainers.identity import identify_all
from amimv.trainers.run_folder import begin_run, find_run, go_on, lock_run, run_path
from amimv.trainers.settings import PretrainSettings


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
