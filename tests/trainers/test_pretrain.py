"""The real command: exact resume, signals, bad input, two processes."""

import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from amimv import InputError
from amimv.models.backbones import BackboneSpec, build_backbone
from amimv.models.methods import METHODS
from amimv.models.methods.base import Encoder
from amimv.pipelines import SAMPLERS, PairBatch, PairLoader, get_recipe, load_store
from amimv.threads import usable_cores
from amimv.trainers import build, loop
from amimv.trainers import pretrain as module
from amimv.trainers.build import Training
from amimv.trainers.checkpoints import load_newest
from amimv.trainers.journal import Journal, Step
from amimv.trainers.launch import make_accelerator
from amimv.trainers.layers import resolve
from amimv.trainers.run_folder import begin_run, find_run, run_path
from amimv.trainers.schedules import warmup_cosine
from amimv.trainers.settings import PretrainSettings
from amimv.trainers.start import log_start

SCRIPT = Path(module.__file__)
ROOT = Path(__file__).resolve().parents[2]
N_TRAIN = 96
HERE = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom of 96 training images in MedMNIST's layout, so that a whole run takes seconds."""
    from amimv.pipelines.sources.phantom import generate_phantom

    arrays = {}
    for split, counts in (("train", (30, 20, 14, 12, 8, 7, 5)), ("val", (4,) * 7), ("test", (4,) * 7)):
        images, labels = generate_phantom(split, seed=7, counts=counts)
        arrays |= {f"{split}_images": images.numpy(), f"{split}_labels": labels[:, None].numpy()}
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path


def command(*flags: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *flags]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **more}


def run(folder: Path, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*flags), cwd=folder, env=environment(**more), capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture
def run_here(
    pretrain_here: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Like `run` in the test's folder, within this process; what is logged stands before what is printed."""

    def command(*flags: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        caplog.clear()
        with caplog.at_level("INFO", logger="amimv"):
            status = pretrain_here(*flags)
        printed, errors = capfd.readouterr()
        return subprocess.CompletedProcess(flags, status, printed, "\n".join([*caplog.messages, errors]))

    return command


def quick(data: Path, *flags: str) -> tuple[str, ...]:
    """Flags of a run of a few seconds; 6 steps an epoch."""
    return (
        *("--data", str(data), "--batch-size", "16", "--steps", "20", "--log-every", "3", "--knn-every", "2"),
        *("--no-evaluate", "--name", "r", *flags),
    )


def own_last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.replace("\r", "\n").strip().splitlines()[-1]


# One whole run, and what it leaves


def test_a_run_leaves_everything_it_promises_and_its_config_runs_again(
    tiny_npz: Path, tmp_path: Path, run_here: HERE
) -> None:
    flags = (
        "--data",
        str(tiny_npz),
        "--batch-size",
        "16",
        "--steps",
        "8",
        "--supervised-steps",
        "4",
        "--threads",
        "1",
    )
    first = run(tmp_path, *flags, "--knn-every", "1", "--name", "first", "--tracker", "tensorboard")
    assert first.returncode == 0, first.stderr
    assert "pretrained" in first.stdout
    folder = tmp_path / "runs" / "first"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "timings.jsonl", "results.csv", "curves.png"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "backbone" / "model.safetensors").is_file()
    assert any((folder / "checkpoints").iterdir())
    assert list(folder.rglob("events.out.tfevents*")), "the tracker wrote nothing"
    seconds = json.loads((folder / "environment.json").read_text())["wall_seconds"]
    assert set(seconds) == {"training", "evaluation"}
    logged = [json.loads(line)["seconds"] for line in (folder / "timings.jsonl").read_text().splitlines()]
    assert seconds["training"] == pytest.approx(sum(logged))
    assert seconds["evaluation"] > 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert any("knn_val" in row for row in rows)
    with_config = ("--config", str(folder / "config.yaml"), "--name", "second", "--tracker", "None", "--no-evaluate")
    second = run_here(*with_config)
    assert second.returncode == 0, second.stderr
    again = tmp_path / "runs" / "second" / "metrics.jsonl"
    assert again.read_bytes() == (folder / "metrics.jsonl").read_bytes()


def evaluated(monkeypatch: pytest.MonkeyPatch, folder: Path, data: Path, baselines: str) -> Path:
    """The folder of a run of four steps, in this process, of which the own file is found by --root."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(folder)
    flags = (
        *("--data", data.name, "--root", str(data.parent), "--batch-size", "16", "--steps", "4", "--knn-every", "0"),
        *("--supervised-steps", "3", "--supervised-lr", "1e-3", "1e-2", "--label-fractions", "0.5", "1"),
        *("--seed", "3", "--rho", "20", "--baselines", baselines, "--name", baselines),
        *(() if baselines == "only" else ("--finetune",)),
    )
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags])
    module.main()
    return folder / "runs" / baselines


def rows_of(folder: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of a run without its name, by what tells them apart."""
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_kind = {tuple(row.pop(name) for name in ("label_fraction", "features", "probe")): row for row in rows}
    assert len(by_kind) == len(rows)
    assert {row.pop("run") for row in rows} == {folder.name}
    return by_kind


def predictions_of(folder: Path) -> dict[tuple[str, ...], list[int]]:
    with np.load(folder / "predictions.npz") as arrays:
        return {kind: arrays[f"row_{i:03d}"].tolist() for i, kind in enumerate(rows_of(folder))}


@pytest.mark.slow
def test_baselines_and_pretrained_apart_are_what_they_are_together(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: evaluated(monkeypatch, tmp_path, tiny_npz, name) for name in ("yes", "no", "only")}
    rows = {name: rows_of(folder) for name, folder in folders.items()}
    assert {kind[1] for kind in rows["no"]} == {"pretrained"}
    assert {kind[1] for kind in rows["only"]} == {"majority", "raw pixels", "random", "supervised"}
    assert (len(rows["no"]), len(rows["only"])) == (2 * 3, 2 * 8)
    assert rows["no"] | rows["only"] == rows["yes"]
    predicted = {name: predictions_of(folder) for name, folder in folders.items()}
    assert predicted["no"] | predicted["only"] == predicted["yes"]
    for name in ("config.yaml", "environment.json", "train_indices.npy", "predictions.npz"):
        assert all((folder / name).is_file() for folder in folders.values()), name
    indices = [np.load(folder / "train_indices.npy").tolist() for folder in folders.values()]
    assert indices[0] == indices[1] == indices[2]
    assert len(indices[0]) < N_TRAIN, "a subset, so that judging on all would show"
    for name in ("backbone", "checkpoints", "metrics.jsonl", "curves.png"):
        assert not (folders["only"] / name).exists(), name
        assert (folders["no"] / name).exists(), name
    environments = {name: json.loads((f / "environment.json").read_text()) for name, f in folders.items()}
    assert set(environments["only"]["wall_seconds"]) == {"evaluation"}
    assert set(environments["no"]["wall_seconds"]) == {"training", "evaluation"}
    for name in ("training_images", "training_counts", "realised_ratio", "revision", "packages", "device"):
        assert environments["only"][name] == environments["yes"][name], name


@pytest.mark.parametrize("flags", [("--mixed-precision", "bf16"), ("--backend", "dali"), ("--recipe", "multi-crop")])
def test_other_ways_to_run(tiny_npz: Path, run_here: HERE, flags: tuple[str, ...]) -> None:
    if "dali" in flags:
        pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    result = run_here(*quick(tiny_npz, "--method", "simclr", *flags))
    assert result.returncode == 0, result.stderr


# Exact resume

CLUSTERED = ("--sampler", "cluster-balanced", "--cluster-every", "1", "--clusters", "3", "--accumulation", "2")
RESUMED = [
    pytest.param(("--method", "mimv", *CLUSTERED), id="mimv-clustered-accumulated"),
    pytest.param(("--method", "simclr", "--partner", "class-balanced"), id="simclr", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("flags", RESUMED)
def test_killed_in_mid_epoch_and_resumed_equals_uninterrupted(
    tiny_npz: Path, tmp_path: Path, run_here: HERE, flags: tuple[str, ...]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    flags = quick(tiny_npz, "--save-every", "4", "--threads", "1", *flags)
    assert run_here(*flags).returncode == 0
    process = subprocess.Popen(
        command(*flags, "--resume", "auto"), cwd=broken, env=environment(), stderr=subprocess.DEVNULL
    )
    # Step 8 is inside the second epoch, after its clustering.
    _wait_for(broken / "runs" / "r" / "checkpoints" / "step-00000008.pt", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    log = broken / "runs" / "r" / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"step": 9, "loss": 1')  # a torn last line
    result = run_here(*flags, "--resume", "auto", "--output", str(broken / "runs"))
    assert result.returncode == 0, result.stderr
    assert log.read_bytes() == (tmp_path / "runs" / "r" / "metrics.jsonl").read_bytes()


def test_resume_passes_over_a_torn_checkpoint(tiny_npz: Path, tmp_path: Path, run_here: HERE) -> None:
    flags = quick(tiny_npz, "--save-every", "4", "--resume", "auto")
    assert run_here(*flags).returncode == 0
    folder = tmp_path / "runs" / "r"
    expected = (folder / "metrics.jsonl").read_bytes()
    newest = sorted((folder / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    result = run_here(*flags)
    assert result.returncode == 0, result.stderr
    assert "going back one checkpoint" in result.stderr
    assert (folder / "metrics.jsonl").read_bytes() == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_with_75(tiny_npz: Path, tmp_path: Path, number: signal.Signals) -> None:
    flags = quick(tiny_npz, "--steps", "4000", "--knn-every", "0", "--save-every", "100000")
    process = subprocess.Popen(command(*flags), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "runs" / "r" / "metrics.jsonl", process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    assert stderr.replace("\r", "\n").strip().splitlines()[-1].endswith("go on with --resume auto")
    assert len(list((tmp_path / "runs" / "r" / "checkpoints").glob("*.pt"))) == 1


@pytest.mark.slow
def test_sigint_in_the_evaluation_has_the_same_status(tiny_npz: Path, tmp_path: Path) -> None:
    flags = [word for word in quick(tiny_npz, "--steps", "4") if word != "--no-evaluate"]
    slow = ("--supervised-steps", "100000", "--resume", "auto")
    process = subprocess.Popen(
        command(*flags, *slow), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )  # fmt: skip
    _wait_for(tmp_path / "runs" / "r" / "curves.png", process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    assert stderr.replace("\r", "\n").strip().splitlines()[-1] == "SIGINT: go on with --resume auto"
    assert "Traceback" not in stderr
    again = run(tmp_path, *flags, "--supervised-steps", "5", "--resume", "auto", "--knn-every", "3")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "runs" / "r" / "results.csv").is_file()


def _wait_for(path: Path, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, f"the run ended (status {process.returncode}) before it wrote {path.name}"
        time.sleep(0.05)
    raise AssertionError(f"{path.name} was never written")


def test_a_nan_stops_the_run_and_names_the_step_and_its_pairs(tiny_npz: Path, tmp_path: Path, run_here: HERE) -> None:
    # The published self term subtracts more than a column of 16 rows can hold: NaN by its own arithmetic.
    flags = quick(tiny_npz, "--method", "mimv", "--self-term", "published", "--save-every", "1")
    result = run_here(*flags)
    assert result.returncode == 1
    line = own_last_line(result)
    folder = tmp_path / "runs" / "r"
    report = json.loads((folder / "not_finite.json").read_text())
    step = report["step"]
    assert f"loss is nan at step {step} (learning rate {report['lr']:.3g}; first pairs" in line
    assert np.array(report["pairs"]).shape == (16, 2)
    logged = [json.loads(text)["step"] for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, step)), "every loss before the first bad one, and none after"
    saved = sorted(int(path.stem.split("-")[1]) for path in folder.glob("checkpoints/*.pt"))
    assert saved[-1:] == logged[-1:], "a checkpoint past a loss that is not finite"


# Optimisers, in this process

#: Of whatever a method's settings have.
SMALL_HEADS = {"projector_hidden": 32, "projector_out": 16, "predictor_hidden": 24, "prototypes": 10, "queue": 32}
LARC_METHODS = ("simclr", "moco-v3", "byol", "dino", "nnclr", "vicreg", "barlow-twins", "swav")


def published(method: str, *flags: str) -> PretrainSettings:
    """As published, but for heads of a few units."""
    settings, _ = resolve(["--method", method, "--preset", "none", *flags])
    return replace(settings, **{name: value for name, value in SMALL_HEADS.items() if name in vars(settings)})


def network_of(settings: PretrainSettings) -> Encoder:
    torch.manual_seed(0)
    network: Encoder = METHODS[settings.method].build(build_backbone(BackboneSpec(settings.backbone)), settings).online
    return network


def larc_step(
    weight: Tensor, gradient: Tensor, buffer: Tensor, lr: float, decay: float, trust: float
) -> tuple[Tensor, Tensor, float]:
    """LARS with a clipped rate (You et al. 2017, equation 6; clipped as in NVIDIA's LARC), momentum 0.9."""
    size, slope = float(weight.norm()), float(gradient.norm())
    rate = min(trust * size / (slope + decay * size) / lr, 1.0)
    buffer = 0.9 * buffer + rate * (gradient + decay * weight)
    return weight - lr * buffer, buffer, rate


@pytest.mark.parametrize("method", LARC_METHODS)
def test_published_lars_adapts_and_decays_weights_only(method: str) -> None:
    settings = published(method, "--data", "retinamnist", "--batch-size", "128")
    network = network_of(settings)
    optimizer = build.make_optimizer(settings, network)
    # Half the batch, half the rate.
    lr = {"byol": 1.0, "simclr": 0.4, "nnclr": 0.4, "swav": 0.6}.get(method, 0.3) / 2
    decay = {"simclr": 1e-4, "vicreg": 1e-4, "barlow-twins": 1e-4, "byol": 1e-5, "nnclr": 1e-5}.get(method, 1e-6)
    generator = torch.Generator().manual_seed(0)
    expected = {name: p.detach().double() for name, p in network.named_parameters()}
    buffers = {name: torch.zeros_like(p) for name, p in expected.items()}
    rates = []
    for _ in range(2):
        for i, (name, parameter) in enumerate(network.named_parameters()):
            # Slopes over four decades, so that some rates are clipped and others are not.
            gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** (i % 5 - 4)
            parameter.grad = gradient
            if parameter.ndim == 1:  # biases and norms: SGD with momentum, no more
                buffers[name] = 0.9 * buffers[name] + gradient.double()
                expected[name] = expected[name] - lr * buffers[name]
            else:
                expected[name], buffers[name], rate = larc_step(
                    expected[name], gradient.double(), buffers[name], lr, decay, 0.02
                )
                rates.append(rate)
        optimizer.step()
    assert any(rate == 1.0 for rate in rates)
    assert any(rate < 1.0 for rate in rates)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    adapted = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert adapted == {id(p) for p in network.parameters() if p.ndim > 1}


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_in_one_group(method: str) -> None:
    network = network_of(published(method))
    grouped = [id(p) for g in build.make_optimizer(published(method), network).param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())


@pytest.mark.parametrize("method", ["mimv", "moco-v3", "dino"])
def test_a_vits_positions_are_not_decayed(method: str) -> None:
    settings = published(method, "--backbone", "test_vit", "--weight-decay", "0.5")
    network = network_of(settings)
    optimizer = build.make_optimizer(settings, network)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in decayed}
    assert not {name for name in names if "pos_embed" in name or "cls_token" in name or name.endswith("bias")}
    assert {"backbone.pos_embed", "backbone.cls_token"} <= {name for name, _ in network.named_parameters()}
    assert "backbone.blocks.0.attn.qkv.weight" in names
    # MoCo v3 leaves a ViT's random patch embedding as it is.
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    patches = id(network.get_parameter("backbone.patch_embed.proj.weight"))
    assert (patches in trained) == (patches in decayed) == (method != "moco-v3")


# Training, in this process


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> tuple[Training, Journal]:
    """A run that is ready to train, gone on with where there is one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings, sources = resolve([*flags, "--output", str(folder)])
    settings = replace(settings, **{name: value for name, value in SMALL_HEADS.items() if name in vars(settings)})
    again, path = find_run(settings), run_path(settings)
    path.mkdir(parents=True, exist_ok=True)
    training = build.build_training(settings, make_accelerator(settings, path))
    if again:
        loop.restore(training, load_newest(path / "checkpoints"), path)
    else:
        begin_run(path, settings, sources, {}, training.subset.indices)
    return training, Journal(path, training.accelerator, training.total_steps, views_per_step=1)


def rates_of(
    started: tuple[Training, Journal], monkeypatch: pytest.MonkeyPatch, stop_after: int = 0
) -> list[tuple[float, float]]:
    """Train; the learning rates of the predictor and of the rest in every step."""
    found = []
    training, journal = started
    predictor = {id(p) for p in training.method.online.head.parameters()}
    train_step = loop.train_step

    def noting(training: Training, batches: Iterator[PairBatch], epoch: int) -> Step:
        step = train_step(training, batches, epoch)
        head: set[float] = set()
        rest: set[float] = set()
        for group in training.optimizer.param_groups:
            for parameter in group["params"]:
                (head if id(parameter) in predictor else rest).add(group["lr"])
        assert len(head) == len(rest) == 1
        found.append((head.pop(), rest.pop()))
        if training.step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return step

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", noting)
        if stop_after:
            with pytest.raises(loop.Interrupted):
                loop.train(training, journal)
        else:
            loop.train(training, journal)
    return found


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_simsiams_predictor_keeps_its_learning_rate(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, fixed: bool
) -> None:
    flags = (
        *quick(tiny_npz, "--method", "simsiam", "--steps", "8", "--warmup", "0.25", "--knn-every", "0"),
        *("--optimizer", optimizer, "--lr", "0.5", "--lr-batch", "32", "--resume", "auto"),
        *(() if fixed else ("--no-fixed-predictor-lr",)),
    )
    schedule = [0.25 * warmup_cosine(step, 8, 2) for step in range(8)]
    expected = [(0.25 if fixed else rate, rate) for rate in schedule]
    whole = rates_of(start(monkeypatch, tmp_path / "whole", *flags), monkeypatch)
    broken = rates_of(start(monkeypatch, tmp_path / "broken", *flags), monkeypatch, stop_after=5)
    assert len(broken) == 5
    resumed = start(monkeypatch, tmp_path / "broken", *flags)
    assert resumed[0].step == 5
    broken += rates_of(resumed, monkeypatch)
    assert whole == broken == [pytest.approx(pair) for pair in expected]


def test_a_fixed_predictor_learns_where_the_rest_has_no_rate_left(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = quick(tiny_npz, "--method", "simsiam", "--steps", "2", "--warmup", "0", "--knn-every", "0")
    training, _ = start(monkeypatch, tmp_path, *flags)
    # A training of one step more than its schedule is long: there the cosine is at 0.
    training.total_steps, training.step = 1, 1
    before = {name: p.detach().clone() for name, p in training.method.online.named_parameters()}
    loop.train_step(training, training.loader.epoch(0), 0)
    moved = {name for name, p in training.method.online.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith("head.") for name in moved)


@pytest.mark.parametrize("method", METHODS)
def test_a_queue_is_capped_at_the_data_set(method: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = resolve(["--method", method, "--preset", "none"])[0]
    caplog.set_level(logging.INFO, logger="amimv")
    capped = build.cap_queue(settings, 96)
    if method not in ("nnclr", "ressl", "swav"):
        assert capped is settings
        assert "queue" not in vars(settings)
        assert not caplog.messages
        return
    length = {"nnclr": 65536, "ressl": 65536, "swav": 3840}[method]
    assert vars(capped) == vars(settings) | {"queue": 96}
    assert caplog.messages == [f"the queue of {length} embeddings is capped at the data set's 96 images"]
    assert build.cap_queue(settings, length) is settings
    assert build.cap_queue(capped, 96) is capped
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("queue", "length"), [("5000", 96), ("40", 40)])
def test_a_runs_queue_is_capped_and_its_config_is_not(
    tiny_npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    queue: str,
    length: int,
) -> None:
    caplog.set_level(logging.INFO, logger="amimv")
    monkeypatch.delitem(SMALL_HEADS, "queue")
    training, journal = start(monkeypatch, tmp_path, *quick(tiny_npz, "--method", "swav", "--queue", queue))
    assert [len(q.rows) for q in (training.method.queue_a, training.method.queue_b)] == [length, length]
    assert sum("capped" in message for message in caplog.messages) == (length != int(queue))
    # So that the same flags go on with the run, and fit another data set.
    assert f"queue: {queue} " in (journal.folder / "config.yaml").read_text()
    log_start(training, journal.folder, None)
    assert json.loads((journal.folder / "environment.json").read_text())["queue"] == length


MULTI_CROP = ("--recipe", "multi-crop", "--backbone", "test_vit", "--local-crops", "2", "--knn-every", "0")


@pytest.mark.parametrize("method", METHODS)
def test_multi_crop_with_a_vit(tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    flags = quick(tiny_npz, "--method", method, *MULTI_CROP, "--local-size", "12", "--steps", "1", "--warmup", "0")
    training, journal = start(monkeypatch, tmp_path, *flags)
    sizes: list[int] = []
    for network in training.method.online.modules():  # more than one where a method has a twin
        if type(network) is type(training.method.online.backbone):
            network.register_forward_pre_hook(lambda _, views: sizes.append(views[0].shape[-1]))
    before = {name: p.detach().clone() for name, p in training.method.online.named_parameters()}
    loop.train(training, journal)
    (row,) = journal.metrics.read()
    assert np.isfinite(row["loss"])
    assert sizes.count(12) == 2
    assert set(sizes) == {12, 28}
    moved = {name for name, p in training.method.online.named_parameters() if not torch.equal(p, before[name])}
    assert "backbone.pos_embed" in moved
    assert ("backbone.patch_embed.proj.weight" in moved) == (method != "moco-v3")


@pytest.mark.parametrize(("size", "local"), [(28, 12), (64, 24), (128, 48), (224, 96)])
def test_local_crops_are_three_sevenths_of_the_views_in_whole_patches(size: int, local: int) -> None:
    settings, _ = resolve(["--recipe", "multi-crop"])
    assert build.make_recipe(settings, size).sides[2][0].policy.size == local
    viewed, _ = resolve(["--recipe", "multi-crop", "--view-size", str(size)])
    assert build.make_recipe(viewed, 500).sides[2][0].policy.size == local
    given, _ = resolve(["--recipe", "multi-crop", "--local-size", "20"])
    assert build.make_recipe(given, size).sides[2][0].policy.size == 20


def test_a_local_size_that_a_vits_patch_does_not_divide(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = quick(tiny_npz, "--method", "dino", *MULTI_CROP, "--local-size", "10")
    _main_fails(tmp_path, capsys, monkeypatch, flags, "backbone 'test_vit' cannot take images of 10 pixels")
    with pytest.raises(InputError) as caught:
        start(monkeypatch, tmp_path, *flags)
    assert "\n" not in str(caught.value)


# Bad input: one clear line, status 2, earlier results untouched


def _bad_arrays(data: Path, folder: Path, **changed: np.ndarray | None) -> str:
    with np.load(data) as arrays:
        content = {**arrays, **{k: v for k, v in changed.items() if v is not None}}
    for name, value in changed.items():
        if value is None:
            del content[name]
    path = folder / "bad.npz"
    np.savez(path, **content)
    return str(path)


BAD_FLAGS = {
    "missing file": (("--data", "nowhere.npz"), "nowhere.npz"),
    "unknown data set": (("--data", "retinamnst"), "retinamnist"),
    "unknown method": (("--method", "simcrl"), "simclr"),
    "unknown recipe": (("--recipe", "mimvv"), "mimv"),
    "unknown sampler": (("--sampler", "clas-balanced"), "class-balanced"),
    "unknown backbone": (("--backbone", "resnet81"), "resnet18"),
    "unknown optimizer": (("--optimizer", "adamww"), "adamw"),
    "missing config": (("--config", "nowhere.yaml"), "nowhere.yaml"),
    "crop larger than image": (("--view-size", "64"), "larger than the images"),
    "batch larger than data": (("--batch-size", "500"), "96 images"),
    "batch not divisible": (("--accumulation", "3"), "does not divide"),
    "bad probability": (("--hflip", "1.5"), "hflip is 1.5, expected 0 to 1"),
    "impossible ratio": (("--rho", "0.5"), "0.5"),
    "fp16 without gpu": (("--mixed-precision", "fp16"), "GPU"),
    "no length": (("--steps", "None"), "give --epochs, --steps, --views or --minutes"),
    "rate of 0": (("--supervised-lr", "0"), "supervised learning rates are (0.0,)"),
    "unknown baselines": (("--baselines", "maybe"), "unknown value of baselines 'maybe'"),
    "missing file of baselines": (("--baselines", "only", "--evaluate", "--data", "nowhere.npz"), "nowhere.npz"),
}


@pytest.mark.parametrize(("flags", "said"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_end_in_one_line(
    tiny_npz: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    said: str,
) -> None:
    if "fp16" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU, where fp16 works")
    _main_fails(tmp_path, capsys, monkeypatch, quick(tiny_npz, *flags), said)


def _main_fails(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    said: str,
) -> None:
    """The command's own main in this process: importing torch anew for each case would take minutes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags])
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]


def test_bad_files_end_in_one_line(
    tiny_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gap = np.zeros((96, 1), dtype=np.uint8)
    gap[:48] = 2
    cases = {
        "nan": ({"train_images": np.full((96, 28, 28, 3), np.nan, dtype=np.float32)}, "NaN"),
        "lost": ({"val_labels": None}, "val images have no labels"),
        "gap": ({"train_labels": gap}, "class 1"),
    }
    for name, (changed, said) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        flags = quick(Path(_bad_arrays(tiny_npz, folder, **changed)), "--sampler", "class-balanced")
        _main_fails(folder, capsys, monkeypatch, flags, said)
    garbled = tmp_path / "garbled.npz"
    garbled.write_bytes(b"this is no archive")
    _main_fails(tmp_path, capsys, monkeypatch, quick(garbled), "garbled.npz")


def test_a_wrong_md5_ends_in_one_line(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = bytearray((real_data / "breastmnist.npz").read_bytes())
    broken[5000] ^= 1
    (tmp_path / "breastmnist.npz").write_bytes(broken)
    flags = ("--data", "breastmnist", "--root", str(tmp_path), "--name", "r")
    _main_fails(tmp_path, capsys, monkeypatch, flags, "MD5")


def test_a_second_start_leaves_the_first_untouched(tiny_npz: Path, tmp_path: Path, run_here: HERE) -> None:
    flags = quick(tiny_npz, "--steps", "4")
    assert run_here(*flags).returncode == 0
    folder = tmp_path / "runs" / "r"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = run_here(*flags)
    other = run_here(*flags, "--resume", "auto", "--lr", "0.1")
    for result, said in ((again, "--resume auto"), (other, "lr 0.005, not 0.1")):
        assert result.returncode == 2
        assert own_last_line(result).startswith("error: ")
        assert said in own_last_line(result)
        assert "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# Two processes


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    more = environment(ACCELERATE_USE_CPU="true")
    return subprocess.run(launcher, cwd=folder, env=more, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_two_processes_see_the_pairs_of_one_and_start_from_its_loss(tiny_npz: Path, tmp_path: Path) -> None:
    """A ViT has no batch statistics in the backbone, and the projector's are taken out by the worker."""
    two = torchrun(tmp_path, str(Path(__file__).parent / "two_process_worker.py"), str(tiny_npz), str(tmp_path))
    assert two.returncode == 0, two.stderr
    one = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "two_process_worker.py"), str(tiny_npz), str(tmp_path)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    parts = [torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2)]
    whole = torch.load(tmp_path / "1-0.pt")
    assert [part["processes"] for part in parts] == [2, 2]
    for name in SAMPLERS:
        assert torch.equal(torch.cat([part["pairs"][name] for part in parts], dim=1), whole["pairs"][name]), name
    for method in ("mimv", "simclr"):
        for part in parts:
            torch.testing.assert_close(part[method]["loss"], whole[method]["loss"], rtol=1e-5, atol=0)
        for name, gradient in whole[method]["gradients"].items():
            scale = float(gradient.abs().max()) or 1.0
            error = float((parts[0][method]["gradients"][name] - gradient).abs().max())
            assert error <= 1e-5 * scale, (method, name, error / scale)


@pytest.mark.slow
def test_two_processes_run_the_whole_command(tiny_npz: Path, tmp_path: Path) -> None:
    result = torchrun(tmp_path, str(SCRIPT), *quick(tiny_npz, "--sampler", "cluster-balanced", "--cluster-every", "1"))
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "runs" / "r" / "environment.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_processes(
    tiny_npz: Path, tmp_path: Path, pretrain_here: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    """Without batch statistics and dropout, as if the number had not changed; Adam would enlarge what is rounded."""
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    flags = (
        *("--data", str(tiny_npz), "--batch-size", "16", "--steps", "8", "--knn-every", "0", "--no-evaluate"),
        *("--method", "ressl", "--backbone", "test_vit", "--preset", "none", "--optimizer", "sgd", "--queue", "64"),
        *("--sampler", "class-balanced", "--name", "r"),
    )

    def copied(source: Path, folder: Path, step: int) -> None:
        shutil.copytree(source, folder)
        (folder / "r" / "checkpoints" / "step-00000008.pt").unlink()
        assert [path.stem for path in (folder / "r" / "checkpoints").iterdir()] == [f"step-{step:08d}"]

    def numbers(folder: Path) -> tuple[list[float], dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()]
        state = torch.load(folder / "r" / "checkpoints" / "step-00000008.pt", weights_only=True)
        return [row["loss"] for row in rows], state

    caplog.set_level(logging.INFO, logger="amimv")
    assert pretrain_here(*flags, "--output", str(one), "--save-every", "4") == 0
    copied(one, two, 4)
    resume = ("--save-every", "2", "--resume", "auto")
    result = torchrun(tmp_path, str(SCRIPT), *flags, *resume, "--output", str(two))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("goes on on 2 process(es), where 1 were") == 1
    copied(two, again, 6)
    assert pretrain_here(*flags, *resume, "--output", str(again)) == 0
    assert "goes on on 1 process(es), where 2 were" in caplog.text
    losses, state = numbers(one)
    assert len(losses) == 8
    for folder in (two, again):
        other, moved = numbers(folder)
        assert other == pytest.approx(losses, rel=1e-4)
        torch.testing.assert_close(moved["optimizer"]["state"], state["optimizer"]["state"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(moved["method"]["queue.rows"], state["method"]["queue.rows"], rtol=1e-3, atol=1e-4)
        assert moved["loader"] == state["loader"]


@pytest.mark.slow
def test_two_processes_refuse_a_batch_that_they_cannot_share(tiny_npz: Path, tmp_path: Path) -> None:
    bad = torchrun(tmp_path, str(SCRIPT), *quick(tiny_npz, "--batch-size", "15", "--name", "bad"))
    assert bad.returncode != 0
    own = [line for line in bad.stderr.splitlines() if line.startswith("error: ")]
    assert own == ["error: batch size 15 does not divide by 2 processes x 1 micro-batches"]


@pytest.mark.parametrize(
    ("omp", "flags", "threads"),
    [
        ("", (), usable_cores(physical=True)),
        pytest.param("", ("--threads", "1"), 1, marks=pytest.mark.slow),
        pytest.param("2", ("--threads", "1"), 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_accelerate_launch_uses_the_cores(
    tiny_npz: Path, tmp_path: Path, omp: str, flags: tuple[str, ...], threads: int
) -> None:
    """It gives a process one thread unless it is told otherwise."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_NUM", "MKL_NUM"))}
    env |= {"HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""} | ({"OMP_NUM_THREADS": omp} if omp else {})
    words = [sys.executable, "-m", "accelerate.commands.launch", str(SCRIPT), *quick(tiny_npz, "--steps", "1", *flags)]
    launched = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert launched.returncode == 0, launched.stderr
    assert json.loads((tmp_path / "runs" / "r" / "environment.json").read_text())["threads"] == threads


@pytest.mark.slow
def test_started_otherwise_a_process_keeps_its_threads(tiny_npz: Path, tmp_path: Path) -> None:
    assert run(tmp_path, *quick(tiny_npz, "--steps", "1")).returncode == 0
    assert json.loads((tmp_path / "runs" / "r" / "environment.json").read_text())["threads"] == 1


def test_loader_on_the_real_sets(real_data: Path) -> None:
    for name, channels in (("retinamnist", 3), ("breastmnist", 1), (str(real_data / "ham10000_28.npz"), 3)):
        store = load_store(name, root=real_data)
        pair = next(iter(PairLoader(store, get_recipe("amimv"), 32, sampler="class-balanced").epoch(0)))
        assert pair.sides[0][0].shape == (32, channels, 28, 28)
        assert torch.equal(pair.labels, store.labels[pair.indices])
        assert all(view.isfinite().all() for side in pair.sides for view in side)


def test_the_script_is_where_the_package_says() -> None:
    assert shutil.which("amimv-pretrain", path=str(Path(sys.executable).parent)), "the console script is missing"
    assert SCRIPT.name == "pretrain.py"
