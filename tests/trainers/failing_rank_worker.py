"""The command under torchrun, one rank of which fails in its third step: ``failing_rank_worker.py HOW FLAGS``."""

import os
import sys
from collections.abc import Iterator

import torch

from amimv import InputError
from amimv.pipelines import PairBatch
from amimv.trainers import pretrain
from amimv.trainers.pretrain import Training, train_step


def main() -> None:
    how = sys.argv.pop(1)

    def failing_step(run: Training, batches: Iterator[PairBatch], epoch: int) -> None:
        train_step(run, batches, epoch)
        if run.step != 3 or os.environ["RANK"] != "1":
            return
        if how == "nan":
            run.unread[-1][1].fill_(torch.nan)
        else:
            raise InputError("cannot decode x.png")

    torch.set_num_threads(1)
    pretrain.train_step = failing_step
    pretrain.main()


if __name__ == "__main__":
    main()
