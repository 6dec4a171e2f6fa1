"""Evaluate a finished run again: ``python trainers/evaluate.py runs/NAME``. Rewrites the run's ``results.csv``.

With ``--data OTHER`` the run's backbone is evaluated on data that it was not trained on, beside the baselines of these
data; results and predictions are in ``runs/NAME/evaluations/OTHER`` (with size, long tail, split and seeds where they
are given), and the run's own stay as they are.
"""

import logging
from dataclasses import fields, replace
from pathlib import Path

from amimv.command_line import begin_command, read_command
from amimv.signals import is_command
from amimv.trainers.commands import THEIR_OWN, EvaluateSettings

if is_command(__name__):
    begin_command(EvaluateSettings, __doc__)
    import torch  # noqa: F401 (now, while a signal ends the process at once)

from amimv import InputError, run_command, user_path
from amimv.files import replacing
from amimv.trainers.checks import check
from amimv.trainers.data_settings import DataSettings
from amimv.trainers.layers import from_yaml, to_yaml
from amimv.trainers.settings import PretrainSettings

logger = logging.getLogger("amimv")


def evaluate(settings: EvaluateSettings) -> None:
    """Score the run's exported backbone beside baselines, write and print the table."""
    folder, other = user_path(settings.run), settings.other
    run = from_yaml(folder / "config.yaml")
    steps, fractions, seeds = settings.supervised_steps, settings.label_fractions, settings.label_seeds
    run = replace(
        run,
        label_fractions=run.label_fractions if fractions is None else fractions,
        label_seeds=run.label_seeds if seeds is None else seeds,
        supervised_steps=run.supervised_steps if steps is None else steps,
        frozen=settings.frozen or run.frozen,
        baselines="yes" if settings.frozen and run.baselines == "no" else run.baselines,
    )
    if other.data:
        evaluate_other(folder, run, other)
    elif replace(other, root=None) != THEIR_OWN:
        raise InputError("the run's own data are read as they were: give --data, or no flags of data but --root")
    else:
        evaluate_again(folder, replace(run, root=other.root or run.root))


def evaluate_again(folder: Path, run: PretrainSettings) -> None:
    """On the run's own data."""
    from amimv.trainers.data import Splits, best_device, load_held_out, load_training_subset
    from amimv.trainers.evaluation.run import evaluate_run
    from amimv.trainers.identity import check_data, identify_all
    from amimv.trainers.run_folder import lock_run

    check(run)
    with lock_run(folder):
        subset = load_training_subset(run, best_device())
        held_out = load_held_out(run, subset.store, evaluate=True)
        check_data(folder, identify_all(subset.store, subset.indices, held_out.val, held_out.test))
        evaluate_run(run, folder, Splits.of(subset.store, held_out))


def evaluate_other(folder: Path, run: PretrainSettings, given: DataSettings) -> None:
    """On data that the run has not seen."""
    from amimv.models.backbones import load_backbone
    from amimv.trainers.data import Splits, best_device, load_held_out, subset_of
    from amimv.trainers.evaluation.run import evaluate_elsewhere
    from amimv.trainers.initial import check_start
    from amimv.trainers.other_data import as_taken, load_taken, normalised_as_trained
    from amimv.trainers.run_folder import lock_run, name_data, name_evaluation

    backbone, spec = load_backbone(folder / "backbone", best_device())
    theirs = {field.name: getattr(given, field.name) for field in fields(DataSettings)}
    settings = as_taken(replace(run, baselines="yes", **theirs), spec)
    check(settings)
    store, settings = load_taken(settings, spec, "train", best_device())
    if settings.finetune and settings.supervised_steps and store.size < spec.size:
        raise InputError(f"{store.name} has images of {store.size} px, too small for fine-tuning on {spec.size} px")
    subset = subset_of(settings, store)
    splits = Splits.of(subset.store, load_held_out(settings, subset.store, evaluate=True))
    spec = normalised_as_trained(spec, splits.train, given.value_range is not None)
    check_start(settings, spec, folder, again=True)
    place = folder / "evaluations" / name_evaluation(settings)
    with lock_run(place):
        sources = {name: "flag" if name in theirs else "run" for name in vars(settings)}
        with replacing(place / "config.yaml") as file:
            file.write(to_yaml(settings, sources))
        evaluate_elsewhere(settings, splits, backbone, spec, place, folder.name, name_data(run))
    logger.info("written to %s", place)


def main() -> None:
    """The command: settings in, exit status out (0 done, 2 bad input, 74 files out of reach, 75 a signal)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    run_command(lambda: evaluate(read_command(EvaluateSettings, __doc__)))


if __name__ == "__main__":
    main()
