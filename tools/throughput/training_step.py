"""Where the time of one training step goes, and what memory it takes, measured on the trainer's own step."""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from amimv.pipelines import PairBatch
from amimv.tools.throughput.measure import Stopwatch, peak_memory, waiter
from amimv.trainers.launch import make_accelerator
from amimv.trainers.pretrain import Training, build_training, train_step
from amimv.trainers.settings import resolve

WARM_UP_STEPS = 5


def endless_pairs(run: Training) -> Iterator[PairBatch]:
    """Batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from run.loader.epoch(epoch)
        epoch += 1


def run_steps(run: Training, batches: Iterator[PairBatch], seconds: float) -> tuple[int, float]:
    """Training steps of at least so many seconds together: how many, and seconds per step."""
    wait = waiter(run.accelerator.device)
    wait()
    run.waited, steps, started = 0.0, 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        train_step(run, batches, epoch=0)
        run.unread.clear()
        steps += 1
    wait()
    return steps, (time.perf_counter() - started) / steps


def profile_step(argv: list[str], seconds: float, cpu: bool = False) -> dict[str, float]:
    """Profile the trainer's step.

    Args:
        argv: flags of ``trainers/pretrain.py``.
        seconds: how long is measured, once with and once without the device being waited for around each part.
        cpu: train on the CPU, even if there is a GPU.

    Returns:
        ``step_ms`` and ``data_wait_share`` of a step as it is trained; ``data_ms``, ``forward_ms``,
        ``backward_ms``, ``optimizer_ms`` and ``other_ms`` of a step whose parts are waited for; ``views_per_second``,
        ``peak_memory_mib``.
    """
    settings, _ = resolve([*argv, "--no-evaluate"], prog="profile_throughput.py")
    with TemporaryDirectory() as folder:
        run = build_training(settings, Path(folder), make_accelerator(settings, Path(folder), cpu))
    run.total_steps = 10**9  # the schedules never end
    batches = endless_pairs(run)
    for _ in range(WARM_UP_STEPS):
        train_step(run, batches, epoch=0)
    if run.accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.accelerator.device)
    steps, per_step = run_steps(run, batches, seconds)
    result = {
        "step_ms": 1000 * per_step,
        "data_wait_share": run.waited / (steps * per_step),
        "views_per_second": settings.batch_size * len(run.loader.recipe.views) / per_step,
    }
    stopwatch = Stopwatch(waiter(run.accelerator.device))
    next_pair = stopwatch.timed("data", next)
    parts = {
        "forward": (run.method, "loss"),
        "backward": (run.accelerator, "backward"),
        "optimizer": (run.optimizer, "step"),
    }
    with stopwatch.watch(parts):
        steps, per_step = run_steps(run, iter(lambda: next_pair(batches), None), seconds)
    spent = {part: stopwatch.seconds[part] / steps for part in ("data", *parts)}
    spent["other"] = per_step - sum(spent.values())
    result |= {f"{part}_ms": 1000 * value for part, value in spent.items()}
    return result | {"peak_memory_mib": peak_memory(run.accelerator.device)}
