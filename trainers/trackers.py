"""Trackers of Accelerate: a run that is resumed is the same run there, too."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from accelerate import Accelerator

from amimv import InputError, first_line
from amimv.trainers.launch import on_main
from amimv.trainers.run_folder import write_json
from amimv.trainers.settings import PretrainSettings

PROJECT = "amimv"


class Tracker(NamedTuple):
    """What a tracker takes and gives, beside the project.

    Attributes:
        begin: of the run's folder: the arguments by which it begins a run.
        name: of a run that has begun: what it is called there.
        again: of that name: the arguments by which it goes on with the run.
    """

    begin: Callable[[Path], dict[str, str]]
    name: Callable[[Any], str]
    again: Callable[[str], dict[str, str]]


#: Any other begins another run when a run is resumed.
TRACKERS = {
    "tensorboard": Tracker(lambda folder: {}, lambda writer: PROJECT, lambda name: {}),  # one folder is one run
    "wandb": Tracker(
        lambda folder: {"name": folder.name, "dir": str(folder)},
        lambda run: run.id,
        lambda name: {"id": name, "resume": "allow"},
    ),
    "mlflow": Tracker(
        lambda folder: {"run_name": folder.name}, lambda run: run.info.run_id, lambda name: {"run_id": name}
    ),
    "trackio": Tracker(  # knows a run by its name alone, which another folder may have, too
        lambda folder: {"name": f"{folder.name}-{uuid4().hex[:6]}"},
        lambda run: run.name,
        lambda name: {"name": name, "resume": "allow"},
    ),
}


@contextmanager
def tracking(accelerator: Accelerator, settings: PretrainSettings, folder: Path, again: bool) -> Iterator[None]:
    """In here the run's tracker, if it has one, takes what rank 0 logs; at the end it has all of it.

    Raises:
        InputError: on every process, if it cannot be started.
    """
    if settings.tracker:
        on_main(accelerator, lambda: start(accelerator, settings, folder, again))
    try:
        yield
    finally:
        while accelerator.trackers:
            accelerator.trackers.pop().finish()


def start(accelerator: Accelerator, settings: PretrainSettings, folder: Path, again: bool) -> None:
    """Begin a run in the tracker, or go on with the one that stands in ``trackers.json`` of the run's folder."""
    assert settings.tracker is not None
    path, tracker = folder / "trackers.json", TRACKERS.get(settings.tracker)
    known = json.loads(path.read_text()) if again and path.is_file() else {}
    name = known.get(settings.tracker)
    arguments = tracker.begin(folder) if tracker else {}
    if tracker and name:
        arguments |= tracker.again(name)
    config = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(settings).items()}
    try:
        # What a run was configured with stands there already.
        accelerator.init_trackers(PROJECT, None if name else config, {settings.tracker: arguments})
    except Exception as error:  # each library has its own
        where = f"go on with the run {name}" if name else "begin a run"
        raise InputError(
            f"tracker '{settings.tracker}' cannot {where}: set it up, or leave it out. It says: {first_line(error)}"
        ) from error
    if tracker:
        write_json(path, known | {settings.tracker: tracker.name(accelerator.trackers[0].tracker)})
