"""The loop: epoch by epoch and step by step, with what is measured, written and saved between the steps.

One batch: `PairLoader` renders the sides of the pairs on the device, the method turns them into a loss, and once per
optimiser step the teacher moves, the micro-batches' gradients add up and the optimiser steps.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from amimv import InputError
from amimv.pipelines import PairBatch
from amimv.pipelines.rng import library_seed
from amimv.signals import SIGNALS
from amimv.trainers.build import Training
from amimv.trainers.checkpoints import load_state, save_checkpoint, state_of
from amimv.trainers.evaluation import extract_features
from amimv.trainers.journal import Journal, Step
from amimv.trainers.launch import share
from amimv.trainers.measures import EPOCH_MEASURES, STEP_MEASURES
from amimv.trainers.schedules import warmup_cosine
from amimv.trainers.settings import PretrainSettings


class Interrupted(Exception):
    """SIGTERM or SIGINT came; a checkpoint has been written."""


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """In here SIGTERM and SIGINT do nothing but add their number to this list."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(training: Training, journal: Journal) -> None:
    """All epochs, from where the training stands.

    Raises:
        Interrupted: after the step in which a signal came, and a checkpoint.
        NotFiniteError: the loss is NaN or infinite.
    """
    s, per_epoch = training.settings, training.loader.steps_per_epoch
    with noted_signals() as noted, journal.opened(training.step):
        while training.step < training.total_steps:
            epoch, start = divmod(training.step, per_epoch)
            if start == 0:
                refresh_clusters(training, epoch)
            batches = training.loader.epoch(epoch, start)
            for _ in range(min(per_epoch - start, training.total_steps - training.step)):
                journal.note(train_step(training, batches, epoch))
                if training.step % s.log_every == 0:
                    journal.read()
                if training.step % per_epoch == 0:
                    journal.read()
                    measure_epoch(training, journal, epoch)
                stopping = stop_signal(training, noted)
                if stopping or training.step % s.save_every == 0 or training.step == training.total_steps:
                    save(training, journal)
                if stopping and training.step < training.total_steps:
                    raise Interrupted(signal.Signals(stopping).name)


def train_step(training: Training, batches: Iterator[PairBatch], epoch: int) -> Step:
    """One optimiser step of ``accumulation`` micro-batches; nothing in it waits for the device."""
    training.method.begin_step(training.step, training.total_steps)
    lr = set_learning_rates(training)
    values, indices, waited = [], [], 0.0
    for micro in range(training.settings.accumulation):
        asked = time.perf_counter()
        pair = next(batches)
        waited += time.perf_counter() - asked
        values.append(backward(training, pair, last=micro == training.settings.accumulation - 1))
        indices.append(pair.indices)
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.step += 1
    means = torch.stack([torch.stack(of_micros).mean() for of_micros in zip(*values, strict=True)])
    return Step(training.step, epoch, lr, means, torch.cat(indices, dim=1), waited)


def set_learning_rates(training: Training) -> float:
    """Those of the step that is next, a function of its number; the first group's is returned."""
    total = training.total_steps
    factor = warmup_cosine(training.step, total, round(training.settings.warmup * total))
    for group in training.optimizer.param_groups:
        peak = group.setdefault("peak_lr", group["lr"])
        group["lr"] = peak if group.get("fixed_lr") else factor * peak
    lr: float = training.optimizer.param_groups[0]["lr"]
    return lr


def backward(training: Training, pair: PairBatch, last: bool) -> list[Tensor]:
    """Add a micro-batch's gradients; its `STEP_MEASURES`."""
    accelerator, s = training.accelerator, training.settings
    # Gradients travel between processes once per step.
    with nullcontext() if last else accelerator.no_sync(training.online):
        with accelerator.autocast():
            outcome = training.method.loss(training.online, pair.sides, duplicate_ids(s, pair))
        accelerator.backward(outcome.loss / s.accumulation)
    return [measure(outcome) for measure in STEP_MEASURES.values()]


def duplicate_ids(settings: PretrainSettings, pair: PairBatch) -> Tensor | None:
    """The anchors, where rows of the same image are to be left out of the negatives."""
    wanted = settings.exclude_duplicates
    if wanted == "no" or (wanted == "auto" and settings.sampler == "uniform"):
        return None
    return pair.indices[0]


def refresh_clusters(training: Training, epoch: int) -> None:
    """New clusters for `cluster-balanced`: rank 0 runs k-means on the current features, everyone gets the result."""
    s, store = training.settings, training.store
    if "cluster-balanced" not in (s.sampler, s.partner) or epoch == 0 or epoch % s.cluster_every:
        return
    assignments = torch.zeros(len(store), dtype=torch.int64, device=store.device)
    if training.accelerator.is_main_process:
        features = extract_features(training.method.online.backbone, store, training.spec)
        rows = nn.functional.normalize(features, dim=1).cpu().numpy()
        random_state = library_seed(s.seed, epoch)
        kmeans = MiniBatchKMeans(min(s.clusters, len(store)), random_state=random_state, n_init=1)
        assignments = torch.from_numpy(kmeans.fit_predict(rows)).to(assignments)
    if training.accelerator.num_processes > 1:
        dist.broadcast(assignments, src=0)
    training.loader.set_clusters(assignments)


def measure_epoch(training: Training, journal: Journal, epoch: int) -> None:
    """`EPOCH_MEASURES` at the end of an epoch that is due, on rank 0."""
    every = training.settings.knn_every
    if not every or (epoch + 1) % every or not training.accelerator.is_main_process:
        return
    given = (training.method.online, training.spec, training.store, training.held_out.val)
    found = [measured for measure in EPOCH_MEASURES if (measured := measure(*given)) is not None]
    if found:
        row = {"step": training.step, "epoch": epoch}
        journal.write([row | {name: value for measured in found for name, value in measured.values.items()}])
        journal.progress.write(f"step {training.step}: {', '.join(measured.words for measured in found)}")


def stop_signal(training: Training, noted: list[int]) -> int:
    """The signal that told any process to stop, or 0. Processes agree when losses are read, which waits anyway."""
    number = noted[-1] if noted else 0
    if training.accelerator.num_processes == 1:
        return number
    if training.step % training.settings.log_every:
        return 0
    flag = torch.tensor([number], device=training.accelerator.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag)


def save(training: Training, journal: Journal) -> None:
    """A checkpoint of everything that the next step depends on; every loss up to it is read and finite."""
    journal.read()
    if training.accelerator.is_main_process:
        save_checkpoint(journal.folder / "checkpoints", training.step, state_of(training))


def restore(training: Training, state: dict[str, Any] | None, folder: Path) -> None:
    """Go on from the newest checkpoint that this process found in the run's folder; None if there is none.

    Raises:
        InputError: on every process, if not all of them find the same.
    """
    if state is not None:
        load_state(training, state)
    if len(steps := set(share(training.accelerator, training.step))) > 1:
        found = f"some processes find step {max(steps)} in {folder}, others {min(steps)}"
        raise InputError(f"{found}: give an --output that all machines see")
