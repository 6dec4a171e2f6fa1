"""Evaluate a finished run again: ``python trainers/evaluate.py runs/NAME``. Rewrites the run's ``results.csv``."""

import logging
from dataclasses import dataclass, replace
from typing import Annotated

from amimv.signals import AGAIN, guard_imports, is_command

if is_command(__name__):
    guard_imports(AGAIN)

import torch
import tyro

from amimv import InputError, run_command, user_path
from amimv.trainers.checks import check
from amimv.trainers.data import Splits, load_held_out, load_training_subset
from amimv.trainers.evaluation.run import evaluate_run
from amimv.trainers.identity import check_data, identify_all
from amimv.trainers.layers import from_yaml
from amimv.trainers.run_folder import lock_run

logger = logging.getLogger("amimv")


@dataclass(frozen=True)
class EvaluateSettings:
    run: Annotated[str, tyro.conf.Positional]
    """folder of a run, with its config.yaml and backbone/"""
    label_fractions: tuple[float, ...] = ()
    """shares of the training labels to use; none given: the run's own"""
    supervised_steps: int = -1
    """training of the supervised reference; 0: none; -1: the run's own"""
    root: str = ""
    """folder of MedMNIST's files, if it is not where it was"""


def evaluate(settings: EvaluateSettings) -> None:
    """Score the run's exported backbone beside its baselines, write and print the table."""
    folder = user_path(settings.run)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} holds no run: expected a folder with config.yaml and backbone/")
    run = from_yaml(folder / "config.yaml")
    run = replace(
        run,
        label_fractions=settings.label_fractions or run.label_fractions,
        supervised_steps=run.supervised_steps if settings.supervised_steps < 0 else settings.supervised_steps,
        root=settings.root or run.root,
    )
    check(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with lock_run(folder):
        subset = load_training_subset(run, device)
        held_out = load_held_out(run, subset.store, evaluate=True)
        check_data(folder, identify_all(subset.store, subset.indices, held_out.val, held_out.test))
        evaluate_run(run, folder, Splits.of(subset.store, held_out))


def main() -> None:
    """The command: settings in, exit status out (0 done, 2 bad input, 74 files out of reach, 75 a signal)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    run_command(lambda: evaluate(tyro.cli(EvaluateSettings, prog="evaluate.py", description=__doc__)))


if __name__ == "__main__":
    main()
