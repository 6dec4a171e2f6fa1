"""Where the time of one training step goes, and what memory it takes, measured on the trainer's own step."""

import time
from collections.abc import Generator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from amimv.pipelines import PairBatch
from amimv.tools.throughput.measure import Stopwatch, peak_memory, waiter
from amimv.trainers.build import Training, build_training
from amimv.trainers.launch import make_accelerator
from amimv.trainers.layers import resolve
from amimv.trainers.loop import train_step

WARM_UP_STEPS = 5


def endless_pairs(training: Training) -> Generator[PairBatch, None, None]:
    """Batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from training.loader.epoch(epoch)
        epoch += 1


def run_steps(training: Training, batches: Iterator[PairBatch], seconds: float) -> tuple[int, float, float]:
    """Training steps of at least so many seconds together: how many, and seconds and seconds of waiting per step."""
    wait = waiter(training.accelerator.device)
    wait()
    waited, steps, started = 0.0, 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        waited += train_step(training, batches, epoch=0).waited
        steps += 1
    wait()
    return steps, (time.perf_counter() - started) / steps, waited / steps


def build(argv: list[str], cpu: bool = False) -> Training:
    """What ``trainers/pretrain.py`` trains by these flags, on the CPU even if there is a GPU; no schedule ends."""
    settings, _ = resolve([*argv, "--no-evaluate"], prog="profile_throughput.py")
    with TemporaryDirectory() as folder:
        training = build_training(settings, make_accelerator(settings, Path(folder), cpu))
    training.total_steps = 10**9
    return training


def warm_up(training: Training, batches: Iterator[PairBatch]) -> None:
    for _ in range(WARM_UP_STEPS):
        train_step(training, batches, epoch=0)


def profile_step(argv: list[str], seconds: float, cpu: bool = False) -> dict[str, float]:
    """Profile the trainer's step.

    Args:
        argv, cpu: see `build`.
        seconds: how long is measured, once with and once without the device being waited for around each part.

    Returns:
        ``step_ms`` and ``data_wait_share`` of a step as it is trained; ``data_ms``, ``forward_ms``,
        ``backward_ms``, ``optimizer_ms`` and ``other_ms`` of a step whose parts are waited for; ``views_per_second``,
        ``peak_memory_mib``.
    """
    training = build(argv, cpu)
    batches = endless_pairs(training)
    warm_up(training, batches)
    if training.accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(training.accelerator.device)
    _, per_step, waited = run_steps(training, batches, seconds)
    result = {
        "step_ms": 1000 * per_step,
        "data_wait_share": waited / per_step,
        "views_per_second": training.settings.batch_size * len(training.loader.recipe.views) / per_step,
    }
    stopwatch = Stopwatch(waiter(training.accelerator.device))
    next_pair = stopwatch.timed("data", next)
    parts = {
        "forward": (training.method, "loss"),
        "backward": (training.accelerator, "backward"),
        "optimizer": (training.optimizer, "step"),
    }
    with stopwatch.watch(parts):
        steps, per_step, _ = run_steps(training, iter(lambda: next_pair(batches), None), seconds)
    spent = {part: stopwatch.seconds[part] / steps for part in ("data", *parts)}
    spent["other"] = per_step - sum(spent.values())
    result |= {f"{part}_ms": 1000 * value for part, value in spent.items()}
    return result | {"peak_memory_mib": peak_memory(training.accelerator.device)}
