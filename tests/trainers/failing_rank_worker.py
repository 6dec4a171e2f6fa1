"""The command under torchrun, one rank of which fails in its third step: ``failing_rank_worker.py HOW FLAGS``."""

import os
import sys
from collections.abc import Iterator

import torch

from amimv import InputError
from amimv.pipelines import PairBatch
from amimv.trainers import loop, pretrain
from amimv.trainers.build import Training
from amimv.trainers.journal import Step
from amimv.trainers.loop import train_step


def main() -> None:
    how = sys.argv.pop(1)

    def failing_step(training: Training, batches: Iterator[PairBatch], epoch: int) -> Step:
        step = train_step(training, batches, epoch)
        if step.step != 3 or os.environ["RANK"] != "1":
            return step
        if how == "nan":
            return step._replace(values=torch.full_like(step.values, torch.nan))
        raise InputError("cannot decode x.png")

    torch.set_num_threads(1)
    loop.train_step = failing_step
    pretrain.main()


if __name__ == "__main__":
    main()
