"""Settings of the commands beside pre-training, which are read before torch is loaded."""

from dataclasses import MISSING, dataclass
from typing import Annotated

import tyro

from amimv import InputError, user_path
from amimv.command_line import shown_as
from amimv.fields import check_settings, setting
from amimv.trainers.conditions import check_fractions, check_frozen, check_label_seeds
from amimv.trainers.data_settings import DataSettings

#: No other data than the run's.
THEIR_OWN: DataSettings = shown_as(DataSettings)(data="")


def is_run(place: str) -> bool:
    """Whether it is a run's folder, not an exported backbone."""
    return (user_path(place) / "config.yaml").is_file()


def check_run(value: str) -> None:
    """Raise an `InputError` for a place that is no run's folder."""
    if not is_run(value):
        raise InputError(f"{value} holds no run: expected a folder with config.yaml and backbone/")


def _check_study(value: str) -> None:
    if not user_path(value).exists():
        raise InputError(f"no such config file: {value}")


@dataclass(frozen=True)
class EvaluateSettings:
    run: Annotated[str, tyro.conf.Positional] = setting(
        MISSING, "folder of a run, with its config.yaml and backbone/", check=check_run
    )
    label_fractions: tuple[float, ...] | None = setting(
        None, "shares of the training labels to use; unset: the run's own", check=check_fractions
    )
    label_seeds: tuple[int, ...] | None = setting(
        None, "seeds of draws of these shares; unset: the run's own", check=check_label_seeds
    )
    supervised_steps: int | None = setting(None, "training of the supervised reference; 0: none; unset: the run's own")
    frozen: tuple[str, ...] = setting(
        (),
        "models of timm whose frozen features stand in the table, too; none given: the run's own",
        check=check_frozen,
    )
    other: DataSettings = setting(
        THEIR_OWN,
        "the data to evaluate on, with the flags of pretrain.py; none given: the run's own (root: if it has moved)",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class BenchmarkSettings:
    study: Annotated[str, tyro.conf.Positional] = setting(
        MISSING, "YAML file of the study, such as trainers/configs/study.yaml", check=_check_study
    )
    output: str | None = setting(None, "folder of the run folders; unset: runs/ and the study's name")
    dry_run: bool = setting(
        False, "only list the cells and what they will cost, from a few measured steps of each kind"
    )
    workers: int = setting(
        1, "cells at a time, each a process; on a GPU they share it, on a CPU its cores; on SLURM: jobs at a time", 1
    )
    shard: str = setting(
        "1/1", "which part of the cells, such as 2/4, to run here: other machines run the others into the same folder"
    )
    keep_checkpoints: bool = setting(False, "of cells that are done (their exported backbones stay)")
    cluster: str | None = setting(
        None, "run the cells as jobs through submitit; local: all at once, on this machine", choices=("slurm", "local")
    )
    partition: str | None = setting(None, "of SLURM")
    gpus: int = setting(1, "per job, of SLURM")
    cpus: int = setting(8, "per job, of SLURM", 1)
    hours: float = setting(24.0, "time limit of a job", above=True)

    def __post_init__(self) -> None:
        check_settings(self)
