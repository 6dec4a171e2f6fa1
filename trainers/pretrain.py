"""Self-supervised pre-training: ``accelerate launch trainers/pretrain.py``, ``torchrun`` or plain ``python``.

`build` puts together what is trained, `loop` trains it, `journal` is what is written down meanwhile. What needs torch
is imported where it is used, so that ``--help`` and a refused flag are answered before it is loaded.

Exit status: 0 done, 1 a loss that is not finite, 2 input that cannot be used, 74 files that cannot be read or written
(a full disk; what was saved before stays good), 75 interrupted by SIGTERM or SIGINT after saving a checkpoint (go on
with ``--resume auto``).
"""

import json
import logging
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from amimv.signals import (
    EXIT_INTERRUPTED,
    RESUME,
    guard_imports,
    ignore_signals,
    interruptible,
    is_command,
    rank_of,
)

if is_command(__name__):
    guard_imports(RESUME)

from amimv import EXIT_BAD_INPUT, EXIT_IO, InputError, describe_os_error
from amimv.threads import choose_threads
from amimv.trainers.layers import resolve
from amimv.trainers.settings import PretrainSettings

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from amimv.trainers.build import Training
    from amimv.trainers.journal import Journal

EXIT_NOT_FINITE = 1

logger = logging.getLogger("amimv")


def pretrain(settings: PretrainSettings, sources: dict[str, str]) -> None:
    """One whole run, from the store to the table, in a folder that no other process writes to."""
    from amimv.trainers.launch import make_accelerator, on_main
    from amimv.trainers.length import of_earlier_start, with_views_as_steps
    from amimv.trainers.run_folder import run_path
    from amimv.trainers.start import claim_run

    settings, sources = with_views_as_steps(of_earlier_start(settings), sources)
    folder = run_path(settings)
    accelerator = make_accelerator(settings, folder)
    with ExitStack() as held:
        again = on_main(accelerator, lambda: claim_run(settings, held))
        if settings.baselines != "only":
            pretrain_in(folder, settings, sources, accelerator, again)
        elif accelerator.is_main_process:
            judge_baselines(settings, sources, folder, accelerator.device, again)


def pretrain_in(
    folder: Path, settings: PretrainSettings, sources: dict[str, str], accelerator: "Accelerator", again: bool
) -> None:
    """Build, check, begin or go on, train, finish. Until all is checked, nothing in the folder changes."""
    from amimv.trainers.build import build_training
    from amimv.trainers.checkpoints import check_space, checkpoint_bytes, load_newest
    from amimv.trainers.initial import check_baselines, describe_initial
    from amimv.trainers.journal import Journal
    from amimv.trainers.launch import on_main
    from amimv.trainers.length import fix_length
    from amimv.trainers.loop import restore, train
    from amimv.trainers.start import log_start, tie_to_data
    from amimv.trainers.trackers import tracking

    started = time.perf_counter()
    state = load_newest(folder / "checkpoints") if again else None
    training = build_training(settings, accelerator, initial=state is None)
    sources = fix_length(training, sources)
    settings = training.settings
    views = settings.batch_size * len(training.loader.recipe.views)
    journal = Journal(folder, accelerator, training.total_steps, views, bool(settings.tracker))

    def begin() -> dict[str, Any] | None:
        check_space(folder, checkpoint_bytes(training))
        initial = describe_initial(training.initial, folder, again)
        if settings.evaluate and not training.held_out.no_table:
            check_baselines(settings, training.spec, folder, again)
        tie_to_data(settings, sources, folder, again, training.subset, training.held_out)
        return initial

    initial = on_main(accelerator, begin)
    if again:
        restore(training, state, folder)
    del state  # as large as what is trained
    if accelerator.is_main_process:
        log_start(training, folder, initial)
    with tracking(accelerator, settings, folder, again):
        train(training, journal)
    if accelerator.is_main_process:
        finish(training, journal)
        logger.info("finished in %.0f s: %s", time.perf_counter() - started, folder)
    accelerator.end_training()


def finish(training: "Training", journal: "Journal") -> None:
    """Export the backbone, draw the curves and evaluate; rank 0 only."""
    from amimv.models.backbones import save_backbone
    from amimv.trainers.data import Splits, describe_run
    from amimv.trainers.evaluation.run import evaluate_run, evaluate_without_labels
    from amimv.trainers.run_folder import draw_curves, write_json

    s, store, held_out, folder = training.settings, training.store, training.held_out, journal.folder
    told: dict[str, Any] = {}
    seconds = {"training": sum(row["seconds"] for row in journal.timings.read())}
    online = training.method.online
    save_backbone(online.backbone, training.spec, folder / "backbone")
    draw_curves(journal.metrics.read(), describe_run(s, store), folder / "curves.png")
    if s.evaluate and held_out.no_table:
        logger.warning(held_out.no_table)
        scores = evaluate_without_labels(s, store, online.backbone, training.spec, online.projector)
        told["scores_without_labels"] = scores
    elif s.evaluate:
        seconds["evaluation"] = evaluate_run(s, folder, Splits.of(store, held_out), online.projector)
    environment = folder / "environment.json"
    write_json(environment, json.loads(environment.read_text()) | {"wall_seconds": seconds} | told)


def judge_baselines(
    settings: PretrainSettings, sources: dict[str, str], folder: Path, device: "torch.device", again: bool
) -> None:
    """The evaluation without a pre-training: raw pixels, random initialisation, supervised from scratch."""
    from amimv.trainers.data import Splits, backbone_spec, describe_images, load_held_out, load_training_subset
    from amimv.trainers.evaluation.run import evaluate_run
    from amimv.trainers.initial import check_start
    from amimv.trainers.run_folder import describe_environment, write_json
    from amimv.trainers.start import describe_start, tie_to_data

    subset = load_training_subset(settings, device)
    held_out = load_held_out(settings, subset.store, evaluate=True)
    initial = check_start(settings, backbone_spec(settings, subset.store), folder, again)
    tie_to_data(settings, sources, folder, again, subset, held_out)
    logger.info(describe_images(subset.store))
    splits = Splits.of(subset.store, held_out)
    extra = {"device": str(device), "init": initial, **describe_start(subset.store)}
    write_json(folder / "environment.json", describe_environment(extra))
    seconds = {"evaluation": evaluate_run(settings, folder, splits)}
    write_json(folder / "environment.json", describe_environment(extra | {"wall_seconds": seconds}))


def status_of(error: InputError | OSError) -> tuple[int, str]:
    """The exit status for what the user or the disk did, and its line."""
    if isinstance(error, InputError):
        return EXIT_BAD_INPUT, f"error: {error}"
    return EXIT_IO, f"error: {describe_os_error(error)}: when that is mended, {RESUME}"


def command(settings: PretrainSettings, sources: dict[str, str]) -> tuple[int, str]:
    """The run's exit status and, unless it is 0, the line that says why."""
    from amimv.trainers.journal import NotFiniteError
    from amimv.trainers.launch import take_over
    from amimv.trainers.loop import Interrupted

    try:
        pretrain(*take_over(settings, sources, os.environ))
    except (InputError, OSError) as error:
        return status_of(error)
    except NotFiniteError as error:
        return EXIT_NOT_FINITE, f"error: {error}"
    except Interrupted as interruption:
        return EXIT_INTERRUPTED, f"{interruption}: saved; {RESUME}"
    return 0, ""


def refuse(error: InputError | OSError) -> NoReturn:
    """End before torch is loaded, unless there are other processes, one of which is to say why."""
    status, line = status_of(error)
    if rank_of(os.environ) or "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        from amimv.trainers.launch import run_ranked

        run_ranked(lambda: (status, line), RESUME, os.environ)
    else:
        print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def main() -> None:
    """The command: settings in, exit status out."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if rank_of(os.environ) == 0 else logging.ERROR)
    try:
        settings, sources = resolve(prog="pretrain.py")
    except (InputError, OSError) as error:
        refuse(error)
    if is_command(__name__):
        choose_threads(settings.threads or 0)
    from torch import distributed

    from amimv.trainers.launch import run_ranked

    with interruptible():
        status = run_ranked(lambda: command(settings, sources), RESUME, os.environ)
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    if is_command(__name__):
        ignore_signals()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
