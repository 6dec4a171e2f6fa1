"""The trainer's own step on views from elsewhere: same images, network, optimiser, batch and loss."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch

from amimv import InputError, first_line
from amimv.pipelines import PairBatch
from amimv.tools.throughput.measure import summarise, waiter
from amimv.tools.throughput.rivals import RIVALS, Rival
from amimv.tools.throughput.training_step import WARM_UP_STEPS, endless_pairs, run_steps
from amimv.trainers.build import Training
from amimv.trainers.loop import train_step

#: Modules of the rivals by which the step is fed.
FED_BY = ("lightly", "kornia")
HEADER = ("fed by", "ms/step", "quartiles", "ratio", "waiting", "alone, ms/batch", "ratio")
Pairs = Generator[PairBatch, None, None]


class Turn(NamedTuple):
    """Milliseconds of one turn: a training step, of that the waiting for its batch, and a batch that nothing is done
    with, as for a network that costs nothing."""

    step: float
    waited: float
    batch: float


def rival_pairs(rival: Rival, training: Training, n: int) -> Pairs:
    """A rival's views, augmented as strongly as the training's own, as pairs."""
    store, batch = training.store, training.settings.batch_size
    each = torch.arange(batch, device=store.device)[None]  # another image
    with closing(rival.views(store, batch, n, training.settings.policy())) as batches:
        for first, second in batches:
            yield PairBatch(((first,), (second,)), each, None)


def list_feeds(training: Training, cores: int) -> dict[str, Callable[[], Pairs]]:
    """By name what opens the batches: the training's own loader's, then those of others."""
    feeds: dict[str, Callable[[], Pairs]] = {"amimv, this trainer": partial(endless_pairs, training)}
    for rival in RIVALS:
        if rival.module in FED_BY:
            n = 0 if rival.threads == "nothing" else cores
            name = rival.name + (f": {n}" if rival.threads == "workers" else "")
            feeds[name] = partial(rival_pairs, rival, training, n)
    return feeds


def take_turn(training: Training, pairs: Callable[[], Pairs], seconds: float) -> Turn:
    """Open the batches, train on them and then only take them, so many seconds each after a warm-up.

    The warm-up is longer than what a `DataLoader` has ready.
    """
    with closing(pairs()) as batches:
        for _ in range(WARM_UP_STEPS):
            train_step(training, batches, epoch=0)
        _, step, waited = run_steps(training, batches, seconds)
        for _ in range(WARM_UP_STEPS):
            next(batches)
        wait = waiter(training.accelerator.device)
        taken, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            next(batches)
            wait()
            taken += 1
        return Turn(*(1e3 * value for value in (step, waited, (time.perf_counter() - started) / taken)))


def compare_feeds(training: Training, cores: int, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Medians and quartiles over turns: a turn of each, then the next of each; what cannot run says why."""
    feeds = list_feeds(training, cores)
    turns: dict[str, list[Turn]] = {name: [] for name in feeds}
    notes: dict[str, str] = {}
    for _ in range(repeats):
        for name in [name for name in feeds if name not in notes]:
            try:
                turns[name].append(take_turn(training, feeds[name], seconds))
            except (InputError, RuntimeError) as error:
                notes[name] = first_line(error)
    rows: list[dict[str, Any]] = []
    for name, taken in turns.items():
        parts = {} if name in notes else dict(zip(Turn._fields, map(list, zip(*taken, strict=True)), strict=True))
        summed = {part: summarise(values)._asdict() for part, values in parts.items()}
        rows.append({"fed_by": name, "note": notes.get(name, ""), **summed})
    return rows


def cells_of_feeds(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The lines of the table; ratios are to the first row, which is ours."""
    cells: list[tuple[str, ...]] = []
    for row in rows:
        if row["note"]:
            cells.append((row["fed_by"], "skipped", *[""] * 5))
            continue
        (step, waited, batch), ours = (row[part] for part in Turn._fields), rows[0]
        spread = f"{step['low']:.1f} to {step['high']:.1f}"
        share = f"{100 * waited['median'] / step['median']:.0f} %"
        times = [f"{row[part]['median'] / ours[part]['median']:.2f}x" for part in ("step", "batch")]
        shown = (f"{step['median']:.1f}", spread, times[0], share, f"{batch['median']:.2f}", times[1])
        cells.append((row["fed_by"], *shown))
    return cells
