"""What a run writes down while it trains: losses, measures and times, to its folder, the console and a tracker."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from amimv.trainers.checkpoints import JsonLines
from amimv.trainers.launch import share
from amimv.trainers.measures import STEP_MEASURES
from amimv.trainers.run_folder import write_json

#: Without a terminal progress is said at most this often.
QUIET_SECONDS = 30.0

logger = logging.getLogger("amimv")


class NotFiniteError(ArithmeticError):
    """The loss is NaN or infinite; the message names the first such step."""


class Step(NamedTuple):
    """What one optimiser step did. The tensors stay on the device until the journal is read.

    Attributes:
        step: its number, from 1.
        epoch: its epoch, from 0.
        lr: its learning rate.
        values: one number for each of `STEP_MEASURES`.
        indices: ``(slots, B)`` the images of this process's pairs.
        waited: seconds until its batches were there.
    """

    step: int
    epoch: int
    lr: float
    values: Tensor
    indices: Tensor
    waited: float

    @property
    def row(self) -> dict[str, Any]:
        return {"step": self.step, "epoch": self.epoch, "lr": self.lr}


@dataclass
class Journal:
    """What is written down of a run, and the steps that are not yet.

    Attributes:
        folder: of the run; its metrics hold only what is deterministic.
        accelerator: of this process; rank 0 writes.
        total_steps: of the whole run.
        views_per_step: over all processes.
        tracked: whether Accelerate's tracker is told, too.
        unread: steps whose values are still on the device.
        told: the last step that was written before, by a start that was killed; a tracker is not told it twice.
    """

    folder: Path
    accelerator: Accelerator
    total_steps: int
    views_per_step: int
    tracked: bool = False
    unread: list[Step] = field(default_factory=list)
    told: int = 0
    progress: Any = field(default_factory=lambda: tqdm(disable=True))
    read_at: float = field(default_factory=time.perf_counter)
    said_at: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.metrics, self.timings = (JsonLines(self.folder / f"{name}.jsonl") for name in ("metrics", "timings"))

    @contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """In here the steps after this one are noted: what was written of them is cut, a terminal shows a bar."""
        hidden = not self.accelerator.is_main_process or not sys.stderr.isatty()
        self.progress = tqdm(total=self.total_steps, initial=step, unit="step", disable=hidden, mininterval=1.0)
        if self.accelerator.is_main_process:
            self.told = self.metrics.cut(step)
            self.timings.cut(step)
        self.read_at = time.perf_counter()
        with self.progress:
            yield

    def note(self, step: Step) -> None:
        """Keep what a step did; nothing waits for the device."""
        self.unread.append(step)
        self.progress.update()

    def read(self) -> None:
        """Bring the values of the steps since the last read to the host, check and write them.

        Raises:
            NotFiniteError: naming the first bad step, its learning rate and its pairs.
        """
        if not self.unread:
            return
        values = torch.stack([step.values for step in self.unread]).tolist()
        rows = [
            step.row | dict(zip(STEP_MEASURES, of_step, strict=True))
            for step, of_step in zip(self.unread, values, strict=True)
        ]
        losses = share(self.accelerator, [row["loss"] for row in rows])
        bad = first_not_finite(losses)
        self.write(rows[: bad[0]] if bad else rows)
        if bad:
            self._stop(*bad, losses)
        self._time(rows[-1])
        self.unread.clear()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Rows with their step, to the metrics and the tracker."""
        if not self.accelerator.is_main_process:
            return
        self.metrics.append(rows)
        if self.tracked:
            for row in rows:
                if row["step"] > self.told:
                    self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def say(self, step: int, text: str) -> None:
        """Behind the bar; where there is none, for there is no terminal, in a line each half minute or so."""
        self.progress.set_postfix_str(text)
        if self.progress.disable and time.perf_counter() - self.said_at >= QUIET_SECONDS:
            self.said_at = time.perf_counter()
            logger.info("step %d of %d: %s", step, self.total_steps, text)

    def _time(self, last: dict[str, Any]) -> None:
        """How fast the unread steps were, to the timings and the console."""
        now = time.perf_counter()
        seconds, waited = now - self.read_at, sum(step.waited for step in self.unread)
        rate, share_waited = len(self.unread) * self.views_per_step / seconds, waited / seconds
        timing = {"step": last["step"], "seconds": seconds, "views_per_second": rate, "wait_share": share_waited}
        if self.accelerator.is_main_process:
            self.timings.append([timing])
        waiting = f"{100 * share_waited:.0f} % waiting for data"
        self.say(last["step"], f"loss {last['loss']:.3f}, {rate:,.0f} views/s, {waiting}")
        self.read_at = now

    def _stop(self, place: int, ranks: list[int], losses: list[list[float]]) -> NoReturn:
        """Raise `NotFiniteError` on every rank, with the pairs of those whose loss it was."""
        step, loss = self.unread[place], losses[ranks[0]][place]
        shares = share(self.accelerator, step.indices.T.tolist())
        pairs = [pair for rank in ranks for pair in shares[rank]]
        alone = {} if len(ranks) == len(shares) else {"ranks": ranks}
        path = self.folder / "not_finite.json"
        if self.accelerator.is_main_process:
            write_json(path, {**step.row, "loss": str(loss), **alone, "pairs": pairs})
        where = f" on rank {ranks[0]}" if alone else ""
        raise NotFiniteError(
            f"loss is {loss} at step {step.step}{where} (learning rate {step.lr:.3g}; first pairs of image indices "
            f"{pairs[:3]}, all in {path}): run it again with a lower --lr and another --name"
        )


def first_not_finite(losses: list[list[float]]) -> tuple[int, list[int]] | None:
    """Of each rank's losses: the first step at which one is not finite, and the ranks where it is not."""
    for step, of_ranks in enumerate(zip(*losses, strict=True)):
        if ranks := [rank for rank, loss in enumerate(of_ranks) if not math.isfinite(loss)]:
            return step, ranks
    return None
