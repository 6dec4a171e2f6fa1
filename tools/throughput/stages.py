"""Where the time of one batch goes, stage by stage: as a table, and as a trace for a browser."""

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from amimv.pipelines import ImageStore, PairLoader, PairSampler, Recipe, images, kornia_backend, views
from amimv.pipelines.operations import PIXELS
from amimv.tools.throughput.measure import Stopwatch, waiter

#: The stages of a batch in their order: the object that each function is looked up in, and its name there.
STAGES: dict[str, tuple[Any, str]] = {
    "sampler": (PairSampler, "epoch_indices"),
    "draw": (views, "draw_view_params"),
    "gather": (images.ResidentImages, "gather"),
    "host to device": (images, "_copied_aside"),
    "to float": (kornia_backend, "to_float"),
    "resample": (kornia_backend, "apply_affine"),
    "colour": (kornia_backend, "apply_colour"),
    **{operation.key(): (operation, "apply") for operation in PIXELS},
    "normalise": (kornia_backend, "normalise"),
}
OTHER = "other (Python, labels)"
ROUNDS = 5


class StageRow(NamedTuple):
    """A stage's time per batch, in milliseconds, and its share of the watched batch."""

    stage: str
    milliseconds: float
    share: float


def run_epochs(pairs: PairLoader, seconds: float) -> tuple[int, float]:
    """Whole epochs that take at least so long together, one at least: batches, and seconds per batch."""
    wait = waiter(pairs.store.device)
    batches, epoch, started = 0, 0, time.perf_counter()
    while epoch == 0 or time.perf_counter() - started < seconds:
        batches += sum(1 for _ in pairs.epoch(epoch))
        wait()
        epoch += 1
    return batches, (time.perf_counter() - started) / batches


def break_down(store: ImageStore, recipe: Recipe, batch_size: int, seconds: float) -> list[StageRow]:
    """Time per batch of each stage of the `kornia` backend, over whole epochs of at least ``seconds`` together.

    Stages that the recipe or the store has no use for are left out. The device is waited for around each stage, so
    on a GPU their sum exceeds the time of a batch that is not watched.
    """
    pairs = PairLoader(store, recipe, batch_size)
    run_epochs(pairs, 0.0)  # one epoch: warms up
    stopwatch = Stopwatch(waiter(store.device))
    with stopwatch.watch(STAGES):
        batches, per_batch = run_epochs(pairs, seconds)
    rows = {stage: stopwatch.seconds[stage] / batches for stage in STAGES if stage in stopwatch.seconds}
    rows[OTHER] = per_batch - sum(rows.values())
    return [StageRow(stage, 1000 * spent, spent / per_batch) for stage, spent in rows.items()]


def compare_views(store: ImageStore, recipe: Recipe, batch_size: int, seconds: float) -> dict[str, float]:
    """Milliseconds per batch of each distinct view through a loader of its own, and of the whole recipe (``pair``).

    Nothing is rendered twice: the pair costs no more than its views.
    """
    rows = {view.label: Recipe(view.label, ((replace(view, slot=0),),)) for view in recipe.views} | {"pair": recipe}
    loaders = {label: PairLoader(store, of_recipe, batch_size) for label, of_recipe in rows.items()}
    for pairs in loaders.values():
        run_epochs(pairs, 0.0)
    # In turns, so that whatever else the machine does meets them all.
    spent = [
        {label: run_epochs(pairs, seconds / ROUNDS)[1] for label, pairs in loaders.items()} for _ in range(ROUNDS)
    ]
    return {label: 1000 * statistics.median(turn[label] for turn in spent) for label in loaders}


def write_trace(store: ImageStore, recipe: Recipe, batch_size: int, path: Path) -> None:
    """One epoch (of at most eight batches) in torch's profiler, as a Chrome trace with the stages' names.

    Open it in ``chrome://tracing`` or at ui.perfetto.dev.
    """
    pairs = PairLoader(store, recipe, batch_size)
    run_epochs(pairs, 0.0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if store.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    stopwatch = Stopwatch(lambda: None)  # the trace shows what overlaps
    with stopwatch.watch(STAGES), torch.profiler.profile(activities=activities) as profiler:
        for _ in zip(range(8), pairs.epoch(1), strict=False):
            pass
        waiter(store.device)()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
