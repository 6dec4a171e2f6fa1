"""Self-supervised pre-training: ``accelerate launch trainers/pretrain.py``, ``torchrun`` or plain ``python``.

One batch: `PairLoader` renders the sides of the pairs on the device, the method turns them into a loss, and once per
optimiser step the teacher moves, the micro-batches' gradients add up and the optimiser steps.

Exit status: 0 done, 1 a loss that is not finite, 2 input that cannot be used, 74 files that cannot be read or written
(a full disk; what was saved before stays good), 75 interrupted by SIGTERM or SIGINT after saving a checkpoint (go on
with ``--resume auto``).
"""

import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from amimv.signals import (
    EXIT_INTERRUPTED,
    RESUME,
    SIGNALS,
    guard_imports,
    ignore_signals,
    interruptible,
    is_command,
    rank_of,
)

if is_command(__name__):
    guard_imports(RESUME)

import torch
import torch.distributed as dist
from accelerate import Accelerator
from sklearn.cluster import MiniBatchKMeans
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from tqdm import tqdm

from amimv import EXIT_BAD_INPUT, EXIT_IO, InputError, check_choice, describe_os_error, first_line
from amimv.models.backbones import BackboneSpec, build_backbone, check_sizes, patch_size, save_backbone
from amimv.models.methods import METHODS
from amimv.models.methods.encoder import Encoder
from amimv.pipelines import (
    ImageStore,
    PairBatch,
    PairLoader,
    Recipe,
    get_recipe,
)
from amimv.pipelines.recipes import LOCAL_AREA
from amimv.pipelines.rng import library_seed
from amimv.trainers.checkpoints import JsonLines, check_space, load_newest, save_checkpoint
from amimv.trainers.checks import LARS
from amimv.trainers.data import (
    HeldOut,
    Subset,
    backbone_spec,
    describe_images,
    load_held_out,
    load_training_subset,
)
from amimv.trainers.evaluation import Splits, describe_run, evaluate_run, extract_features
from amimv.trainers.launch import main_first, make_accelerator, on_main, run_ranked, share, take_over, without_effect
from amimv.trainers.probes import balanced_accuracy, knn_probe
from amimv.trainers.run_folder import (
    describe_environment,
    draw_curves,
    run_path,
    write_json,
)
from amimv.trainers.schedules import warmup_cosine
from amimv.trainers.settings import PretrainSettings, resolve
from amimv.trainers.start import claim_run, describe_start, tie_to_data

EXIT_NOT_FINITE = 1

#: Without a terminal progress is said at most this often.
QUIET_SECONDS = 30.0

logger = logging.getLogger("amimv")


class NotFiniteError(ArithmeticError):
    """The loss is NaN or infinite; the message names the first such step."""


class Interrupted(Exception):
    """SIGTERM or SIGINT came; a checkpoint has been written."""


@dataclass
class Training:
    """A run in progress: what it is made of, and what it has not yet written down."""

    settings: PretrainSettings
    folder: Path
    accelerator: Accelerator
    store: ImageStore
    indices: Tensor
    held_out: HeldOut
    spec: BackboneSpec
    loader: PairLoader
    method: Any
    online: Any
    optimizer: Any
    total_steps: int
    metrics: JsonLines
    timings: JsonLines
    step: int = 0
    unread: list[tuple[dict[str, Any], Tensor, Tensor]] = field(default_factory=list)
    waited: float = 0.0
    read_at: float = field(default_factory=time.perf_counter)
    said_at: float = field(default_factory=time.perf_counter)
    stop_signal: int = 0
    progress: Any = field(default_factory=lambda: tqdm(disable=True))


def make_recipe(settings: PretrainSettings, size: int = 28) -> Recipe:
    """The recipe that the settings describe, for images of this size in pixels."""
    hard = settings.policy()
    size = settings.view_size or size
    patch = patch_size(size)
    # Three sevenths of the size, as 96 is of DINO's 224, and whole patches of a ViT.
    local_size = settings.local_size or patch * round(size * 3 / 7 / patch)
    local = replace(hard, size=local_size).changed(crop_min=LOCAL_AREA[0], crop_max=settings.local_crop_max)
    return get_recipe(
        settings.recipe,
        hard=hard,
        second=settings.second_policy(),
        online=settings.online,
        partners=settings.partners,
        local=local,
        local_crops=settings.local_crops,
    )


def make_optimizer(settings: PretrainSettings, network: Encoder) -> torch.optim.Optimizer:
    """timm's optimiser of that name; biases and norms are neither decayed nor, by LARS, adapted."""
    s = settings
    check_choice("optimizer", s.optimizer, list_optimizers())
    try:
        optimizer = create_optimizer_v2(
            network,
            opt=s.optimizer,
            lr=s.lr * (s.batch_size / s.lr_batch if s.lr_batch else 1.0),
            weight_decay=s.weight_decay,
            momentum=s.optimizer_momentum,
            **({"trust_coeff": s.trust_coefficient} if s.optimizer in LARS else {}),
        )
    except (AssertionError, ImportError, ValueError) as error:  # some need a GPU or a package
        raise InputError(f"optimizer {s.optimizer} cannot be used here: {first_line(error)}") from error
    if getattr(s, "fixed_predictor_lr", False) and network.head is not None:
        predictor = set(network.head.parameters())
        for group in list(optimizer.param_groups):
            apart = [p for p in group["params"] if p in predictor]
            group["params"] = [p for p in group["params"] if p not in predictor]
            optimizer.add_param_group({**group, "params": apart, "fixed_lr": True})
    return optimizer


def cap_queue(settings: PretrainSettings, images: int) -> PretrainSettings:
    """Settings whose queue, if the method has one, is no longer than the data set: it would hold images twice."""
    queue = getattr(settings, "queue", 0)
    if queue <= images:
        return settings
    logger.info("the queue of %d embeddings is capped at the data set's %d images", queue, images)
    capped: dict[str, Any] = {"queue": images}
    return replace(settings, **capped)


def build_loader(settings: PretrainSettings, store: ImageStore, accelerator: Accelerator) -> PairLoader:
    """The process's share of the pairs, for as many epochs as the run has steps."""
    s = settings
    loader = PairLoader(
        store,
        make_recipe(s, store.size),
        s.batch_size,
        s.sampler,
        s.partner,
        s.backend,
        s.seed,
        beta=s.beta,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        micro_batches=s.accumulation,
        # On a CPU compiled views are slower; DALI's operators are compiled already.
        compile=s.compile and accelerator.device.type == "cuda" and s.backend == "kornia",
    )
    epochs = math.ceil(s.steps / loader.steps_per_epoch) if s.steps else s.epochs
    loader.sampler.epochs = epochs
    if "cluster-balanced" in (s.sampler, s.partner) and epochs <= s.cluster_every:
        logger.warning(
            "cluster-balanced draws uniformly in all %d epochs: the first clusters come after %d (--cluster-every)",
            epochs,
            s.cluster_every,
        )
    return loader


def build_training(settings: PretrainSettings, folder: Path, accelerator: Accelerator) -> Training:
    """Store, loader, networks and optimiser, on the process's device."""
    s = settings
    device = accelerator.device

    def load() -> tuple[Subset, HeldOut]:
        subset = load_training_subset(s, device)
        return subset, load_held_out(s, subset.store, s.evaluate) if accelerator.is_main_process else HeldOut()

    subset, held_out = main_first(accelerator, load)  # which downloads what is missing
    store = subset.store
    loader = build_loader(s, store, accelerator)
    total_steps = s.steps or s.epochs * loader.steps_per_epoch
    spec = backbone_spec(s, store)
    torch.manual_seed(s.seed)
    backbone = build_backbone(spec)
    check_sizes(backbone, spec, [view.policy.size or spec.size for view in loader.recipe.views])
    method = METHODS[s.method].build(backbone, cap_queue(s, len(store))).to(device)
    if s.sync_bn:
        method = convert_sync_batchnorm(method)  # timm's, which keeps the activation inside its norms
    optimizer = make_optimizer(s, method.online)
    if s.compile:
        for network in method.children():
            network.compile()
    online, optimizer = accelerator.prepare(method.online, optimizer)
    return Training(
        settings=s,
        folder=folder,
        accelerator=accelerator,
        store=store,
        indices=subset.indices,
        held_out=held_out,
        spec=spec,
        loader=loader,
        method=method,
        online=online,
        optimizer=optimizer,
        total_steps=total_steps,
        metrics=JsonLines(folder / "metrics.jsonl"),
        timings=JsonLines(folder / "timings.jsonl"),
    )


def duplicate_ids(settings: PretrainSettings, pair: PairBatch) -> Tensor | None:
    """The anchors, where rows of the same image are to be left out of the negatives."""
    wanted = settings.exclude_duplicates
    if wanted == "no" or (wanted == "auto" and settings.sampler == "uniform"):
        return None
    return pair.indices[0]


def train_step(run: Training, batches: Iterator[PairBatch], epoch: int) -> None:
    """One optimiser step: `accumulation` micro-batches."""
    s, accelerator = run.settings, run.accelerator
    run.method.begin_step(run.step, run.total_steps)
    factor = warmup_cosine(run.step, run.total_steps, round(s.warmup * run.total_steps))
    for group in run.optimizer.param_groups:
        peak = group.setdefault("peak_lr", group["lr"])
        group["lr"] = peak if group.get("fixed_lr") else factor * peak
    losses, spreads, indices = [], [], []
    for micro in range(s.accumulation):
        asked = time.perf_counter()
        pair = next(batches)
        run.waited += time.perf_counter() - asked
        last = micro == s.accumulation - 1
        # Gradients travel between processes once per step.
        with nullcontext() if last else accelerator.no_sync(run.online):
            with accelerator.autocast():
                loss, embeddings = run.method.loss(run.online, pair.sides, duplicate_ids(s, pair))
            accelerator.backward(loss / s.accumulation)
        losses.append(loss.detach())
        spreads.append(nn.functional.normalize(embeddings.detach().float(), dim=1).std(dim=0).mean())
        indices.append(pair.indices)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1
    row = {"step": run.step, "epoch": epoch, "lr": run.optimizer.param_groups[0]["lr"]}
    values = torch.stack([torch.stack(losses).mean(), torch.stack(spreads).mean()])
    run.unread.append((row, values, torch.cat(indices, dim=1)))


def read_losses(run: Training) -> None:
    """Bring the losses of the steps since the last read to the host, check and log them.

    Raises:
        NotFiniteError: naming the first bad step, its learning rate and its pairs.
    """
    if not run.unread:
        return
    values = torch.stack([value for _, value, _ in run.unread]).tolist()
    rows = [
        {**row, "loss": loss, "embedding_std": spread}
        for (row, _, _), (loss, spread) in zip(run.unread, values, strict=True)
    ]
    losses = share(run.accelerator, [row["loss"] for row in rows])
    if bad := first_not_finite(losses):
        step, ranks = bad
        write_good_rows(run, rows[:step])
        stop_not_finite(run, step, ranks, losses[ranks[0]][step])
    write_good_rows(run, rows)
    now = time.perf_counter()
    seconds, steps = now - run.read_at, len(rows)
    views = steps * run.settings.batch_size * len(run.loader.recipe.views)
    timing = {"step": run.step, "seconds": seconds, "views_per_second": views / seconds}
    timing["wait_share"] = run.waited / seconds
    if run.accelerator.is_main_process:
        run.timings.append([timing])
    say_progress(
        run,
        f"loss {rows[-1]['loss']:.3f}, {timing['views_per_second']:,.0f} views/s, "
        f"{100 * timing['wait_share']:.0f} % waiting for data",
    )
    run.read_at, run.waited = now, 0.0
    run.unread.clear()


def say_progress(run: Training, text: str) -> None:
    """Behind the bar; where there is none, for there is no terminal, in a line of its own every half minute or so."""
    run.progress.set_postfix_str(text)
    if run.progress.disable and time.perf_counter() - run.said_at >= QUIET_SECONDS:
        run.said_at = time.perf_counter()
        logger.info("step %d of %d: %s", run.step, run.total_steps, text)


def first_not_finite(losses: list[list[float]]) -> tuple[int, list[int]] | None:
    """Of each rank's losses: the first step at which one is not finite, and the ranks where it is not."""
    for step, of_ranks in enumerate(zip(*losses, strict=True)):
        if ranks := [rank for rank, loss in enumerate(of_ranks) if not math.isfinite(loss)]:
            return step, ranks
    return None


def stop_not_finite(run: Training, step: int, ranks: list[int], loss: float) -> NoReturn:
    """Raise `NotFiniteError` on every rank, with the pairs of those whose loss it was."""
    row, _, indices = run.unread[step]
    shares = share(run.accelerator, indices.T.tolist())
    pairs = [pair for rank in ranks for pair in shares[rank]]
    alone = {} if len(ranks) == len(shares) else {"ranks": ranks}
    if run.accelerator.is_main_process:
        write_json(run.folder / "not_finite.json", {**row, "loss": str(loss), **alone, "pairs": pairs})
    where = f" on rank {ranks[0]}" if alone else ""
    raise NotFiniteError(
        f"loss is {loss} at step {row['step']}{where} (learning rate {row['lr']:.3g}; first pairs of image indices "
        f"{pairs[:3]}, all in {run.folder / 'not_finite.json'}): run it again with a lower --lr and another --name"
    )


def write_good_rows(run: Training, rows: list[dict[str, Any]]) -> None:
    if not run.accelerator.is_main_process:
        return
    run.metrics.append(rows)
    if run.settings.tracker:
        for row in rows:
            run.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


def refresh_clusters(run: Training, epoch: int) -> None:
    """New clusters for `cluster-balanced`: rank 0 runs k-means on the current features, everyone gets the result."""
    s = run.settings
    if "cluster-balanced" not in (s.sampler, s.partner) or epoch == 0 or epoch % s.cluster_every:
        return
    assignments = torch.zeros(len(run.store), dtype=torch.int64, device=run.store.device)
    if run.accelerator.is_main_process:
        features = extract_features(run.method.online.backbone, run.store, run.spec)
        rows = nn.functional.normalize(features, dim=1).cpu().numpy()
        random_state = library_seed(s.seed, epoch)
        kmeans = MiniBatchKMeans(min(s.clusters, len(run.store)), random_state=random_state, n_init=1)
        assignments = torch.from_numpy(kmeans.fit_predict(rows)).to(assignments)
    if run.accelerator.num_processes > 1:
        dist.broadcast(assignments, src=0)
    run.loader.set_clusters(assignments)


def score_on_val(run: Training, epoch: int) -> None:
    """kNN on the validation split, on rank 0, at the end of an epoch that is due."""
    every, store = run.settings.knn_every, run.held_out.val
    if not every or (epoch + 1) % every or store is None or run.store.labels is None:
        return
    backbone = run.method.online.backbone
    train, val = (extract_features(backbone, images, run.spec) for images in (run.store, store))
    labels, val_labels = (images.known_labels("kNN on val") for images in (run.store, store))
    scores, k = knn_probe(train, labels, val, val_labels, val, run.store.n_classes)
    value = float(balanced_accuracy(scores, val_labels))
    run.metrics.append([{"step": run.step, "epoch": epoch, "knn_val": value, "k": k}])
    if run.settings.tracker:
        run.accelerator.log({"knn_val": value}, step=run.step)
    run.progress.write(f"step {run.step}: kNN on val {100 * value:.1f} % balanced accuracy (k = {k})")


def save(run: Training) -> None:
    """A checkpoint of everything that the next step depends on; every loss up to it is read and finite."""
    read_losses(run)
    if not run.accelerator.is_main_process:
        return
    scaler = run.accelerator.scaler
    state = {
        "step": run.step,
        "method": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "loader": run.loader.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "processes": run.accelerator.num_processes,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    save_checkpoint(run.folder / "checkpoints", run.step, state)


def restore(run: Training) -> None:
    """Go on from the newest good checkpoint, if there is one, and cut the logs back to it."""
    state = load_newest(run.folder / "checkpoints")
    if state is not None:
        if state["processes"] != run.accelerator.num_processes:
            raise InputError(
                f"{run.folder} was run on {state['processes']} processes, not {run.accelerator.num_processes}: "
                "resume on as many"
            )
        run.step = state["step"]
        run.method.load_state_dict(state["method"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.loader.load_state_dict(state["loader"])
        if state["scaler"] is not None and run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
    if run.accelerator.is_main_process:
        run.metrics.cut(run.step)
        run.timings.cut(run.step)
    run.progress.update(run.step)


def should_stop(run: Training) -> bool:
    """Whether any process was told to stop. Processes agree when losses are read, which waits for them anyway."""
    if run.accelerator.num_processes == 1:
        return run.stop_signal > 0
    if run.step % run.settings.log_every:
        return False
    flag = torch.tensor([run.stop_signal], device=run.accelerator.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    run.stop_signal = int(flag)
    return run.stop_signal > 0


def train(run: Training) -> None:
    """All epochs, from where the run stands; a signal is noted and acted on after the step."""

    def note_signal(number: int, frame: FrameType | None) -> None:
        run.stop_signal = number

    previous = {number: signal.signal(number, note_signal) for number in SIGNALS}
    try:
        train_epochs(run)
    finally:
        run.progress.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def train_epochs(run: Training) -> None:
    """Epoch by epoch, step by step; raises `Interrupted` after the step in which a signal came."""
    s, per_epoch = run.settings, run.loader.steps_per_epoch
    run.read_at = time.perf_counter()
    while run.step < run.total_steps:
        epoch, start = divmod(run.step, per_epoch)
        if start == 0:
            refresh_clusters(run, epoch)
        batches = run.loader.epoch(epoch, start)
        for _ in range(min(per_epoch - start, run.total_steps - run.step)):
            train_step(run, batches, epoch)
            run.progress.update()
            if run.step % s.log_every == 0:
                read_losses(run)
            if run.step % per_epoch == 0:
                read_losses(run)
                score_on_val(run, epoch)
            stopping = should_stop(run)
            if stopping or run.step % s.save_every == 0 or run.step == run.total_steps:
                save(run)
            if stopping and run.step < run.total_steps:
                raise Interrupted(signal.Signals(run.stop_signal).name)


def finish(run: Training) -> None:
    """Export the backbone, draw the curves and evaluate; rank 0 only."""
    s = run.settings
    seconds = {"training": sum(row["seconds"] for row in run.timings.read())}
    save_backbone(run.method.online.backbone, run.spec, run.folder / "backbone")
    draw_curves(run.metrics.read(), describe_run(s, run.store), run.folder / "curves.png")
    if s.evaluate and run.held_out.no_table:
        logger.warning(run.held_out.no_table)
    elif s.evaluate:
        seconds["evaluation"] = evaluate_run(s, run.folder, Splits.of(run.store, run.held_out))
    environment = run.folder / "environment.json"
    write_json(environment, json.loads(environment.read_text()) | {"wall_seconds": seconds})


def judge_baselines(
    settings: PretrainSettings, sources: dict[str, str], folder: Path, device: torch.device, again: bool
) -> None:
    """The evaluation without a pre-training: raw pixels, random initialisation, supervised from scratch."""
    subset = load_training_subset(settings, device)
    held_out = load_held_out(settings, subset.store, evaluate=True)
    tie_to_data(settings, sources, folder, again, subset, held_out)
    logger.info(describe_images(subset.store))
    splits = Splits.of(subset.store, held_out)
    extra = {"device": str(device), **describe_start(subset.store)}
    write_json(folder / "environment.json", describe_environment(extra))
    seconds = {"evaluation": evaluate_run(settings, folder, splits)}
    write_json(folder / "environment.json", describe_environment(extra | {"wall_seconds": seconds}))


def log_start(run: Training) -> None:
    """What the run is, on the console and in ``environment.json``."""
    s, accelerator = run.settings, run.accelerator
    logger.info(describe_images(run.store))
    logger.info(
        "%s on %s, %s, %d steps of %d pairs, accumulation %d, precision %s, %d process(es) on %s, %s",
        s.method,
        s.recipe,
        s.backbone,
        run.total_steps,
        s.batch_size,
        s.accumulation,
        s.mixed_precision,
        accelerator.num_processes,
        accelerator.device,
        run.folder,
    )
    if s.accumulation > 1:
        logger.info("negatives come from micro-batches of %d pairs", s.batch_size // s.accumulation)
    extra = {
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "queue": getattr(run.method.settings, "queue", None),
        **describe_start(run.store),
    }
    write_json(run.folder / "environment.json", describe_environment(extra))


def checkpoint_bytes(run: Training) -> int:
    """At least; the optimiser has one number or more for each that it trains."""
    tensors = [*run.method.state_dict().values(), *run.method.online.parameters()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def pretrain(settings: PretrainSettings, sources: dict[str, str]) -> None:
    """One whole run, from the store to the table, in a folder that no other process writes to."""
    folder = run_path(settings)
    accelerator = make_accelerator(settings, folder)
    with ExitStack() as held:
        again = on_main(accelerator, lambda: claim_run(settings, held))
        if settings.baselines != "only":
            pretrain_in(folder, settings, sources, accelerator, again)
        elif accelerator.is_main_process:
            judge_baselines(settings, sources, folder, accelerator.device, again)


def pretrain_in(
    folder: Path, settings: PretrainSettings, sources: dict[str, str], accelerator: Accelerator, run_again: bool
) -> None:
    """Build, check, begin or go on, train, finish. Until all is checked, nothing in the folder changes."""
    started = time.perf_counter()
    run = build_training(settings, folder, accelerator)

    def begin() -> None:
        check_space(folder, checkpoint_bytes(run))
        tie_to_data(settings, sources, folder, run_again, Subset(run.store, run.indices), run.held_out)

    on_main(accelerator, begin)
    hidden = not accelerator.is_main_process or not sys.stderr.isatty()
    run.progress = tqdm(total=run.total_steps, unit="step", disable=hidden, mininterval=1.0)
    if run_again:
        restore(run)
    if accelerator.is_main_process:
        for line in without_effect(os.environ):
            logger.warning(line)
        log_start(run)
    if settings.tracker:
        accelerator.init_trackers("amimv", config={k: str(v) for k, v in vars(settings).items()})
    train(run)
    if accelerator.is_main_process:
        finish(run)
        logger.info("finished in %.0f s: %s", time.perf_counter() - started, folder)
    accelerator.end_training()


def main() -> None:
    """The command: settings in, exit status out."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if rank_of(os.environ) == 0 else logging.ERROR)

    def command() -> tuple[int, str]:
        try:
            pretrain(*take_over(*resolve(prog="pretrain.py"), os.environ))
        except InputError as error:
            return EXIT_BAD_INPUT, f"error: {error}"
        except OSError as error:
            return EXIT_IO, f"error: {describe_os_error(error)}: when that is mended, {RESUME}"
        except NotFiniteError as error:
            return EXIT_NOT_FINITE, f"error: {error}"
        except Interrupted as interruption:
            return EXIT_INTERRUPTED, f"{interruption}: saved; {RESUME}"
        return 0, ""

    with interruptible():
        status = run_ranked(command, RESUME, os.environ)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    if is_command(__name__):
        ignore_signals()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
