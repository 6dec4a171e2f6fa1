"""Initial weights through the real command: what starts from them, what is written down, and how a run goes on."""

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

from amimv import InputError
from amimv.command_line import shown_as
from amimv.models.backbones import load_backbone
from amimv.models.frozen import load_frozen
from amimv.pipelines import load_store
from amimv.tools.publish import PublishSettings, publish
from amimv.tools.report import ReportSettings, report
from amimv.trainers import loop, pretrain
from amimv.trainers.build import Training
from amimv.trainers.data_settings import DataSettings
from amimv.trainers.evaluate import EvaluateSettings, evaluate
from amimv.trainers.evaluation import balanced_accuracy, build_random, extract_features, knn_probe
from amimv.trainers.initial import build_start
from amimv.trainers.layers import from_yaml, resolve
from amimv.trainers.run_folder import default_name
from amimv.trainers.study import read_study

OLD_RUN = Path(__file__).resolve().parents[1] / "data" / "run-0.1.zip"
#: Two steps on the old run's images; its backbone is a file that weights can come from.
OLD = ("--data", "tiny.npz", "--backbone", "small-v1", "--threads", "1")
FLAGS = (*OLD, "--steps", "2", "--batch-size", "16", "--knn-every", "0")
QUICK = (*FLAGS, "--method", "byol", "--no-evaluate", "--name", "new")
NEW = Path("runs/new")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The state of each run's method when its training began."""
    states: list[dict[str, torch.Tensor]] = []
    train = loop.train

    def noting(training: Training, journal: Any) -> None:
        states.append({name: tensor.clone() for name, tensor in training.method.state_dict().items()})
        train(training, journal)

    monkeypatch.setattr(loop, "train", noting)
    return states


def environment() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((NEW / "environment.json").read_text())
    return found


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.usefixtures("old_run")
def test_networks_and_teacher_start_from_the_weights_and_the_rest_as_without(
    pretrain_here: Callable[..., int], begun: list[dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="amimv")
    assert pretrain_here(*QUICK, "--init", "runs/old") == 0
    record = environment()["init"]
    shutil.rmtree(NEW)
    assert pretrain_here(*QUICK) == 0
    assert environment()["init"] is None
    given = load_file("runs/old/backbone/model.safetensors")
    from_file, random = begun
    for name, tensor in random.items():
        _, _, own = name.partition("backbone.")
        if own:
            assert torch.equal(from_file[name], given[own])
        else:  # heads: no random number is drawn differently
            assert torch.equal(from_file[name], tensor)
    assert sum("backbone." in name for name in random) == 2 * len(given)  # the teacher has them, too
    weights = [name for name in given if not name.endswith("num_batches_tracked")]
    assert record == {
        "source": "runs/old",
        "prefix": "",
        "loaded": len(weights),
        "missing": [],
        "unexpected": [],
        "adapted": [],
        "digest": record["digest"],
    }
    assert f"initial weights from runs/old: {len(weights)} of {len(weights)} tensors" in caplog.text


@pytest.mark.usefixtures("old_run")
def test_a_run_goes_on_without_the_file_that_it_began_with(
    pretrain_here: Callable[..., int], begun: list[dict[str, torch.Tensor]]
) -> None:
    shutil.copy("runs/old/backbone/model.safetensors", "weights.safetensors")
    flags = (*QUICK, "--init", "weights.safetensors", "--save-every", "1")
    assert pretrain_here(*flags) == 0
    metrics, record = (NEW / "metrics.jsonl").read_bytes(), environment()["init"]
    (NEW / "checkpoints" / "step-00000002.pt").unlink()
    Path("weights.safetensors").unlink()
    assert pretrain_here(*flags, "--resume", "auto") == 0
    assert (NEW / "metrics.jsonl").read_bytes() == metrics
    assert environment()["init"] == record
    assert not torch.equal(begun[0]["online.backbone.conv1.0.weight"], begun[1]["online.backbone.conv1.0.weight"])


@pytest.mark.usefixtures("old_run")
def test_a_run_without_a_checkpoint_begins_again_with_the_same_weights_only(
    pretrain_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    given = load_file("runs/old/backbone/model.safetensors")
    torch.save(given, "weights.pth")
    flags = (*QUICK, "--init", "weights.pth", "--resume", "auto")
    assert pretrain_here(*flags) == 0
    metrics = (NEW / "metrics.jsonl").read_bytes()
    shutil.rmtree(NEW / "checkpoints")
    assert pretrain_here(*flags) == 0
    assert (NEW / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(NEW / "checkpoints")
    torch.save(given | {"bn1.bias": given["bn1.bias"] + 1}, "weights.pth")
    assert pretrain_here(*flags) == 2
    assert "the weights of weights.pth are not those that runs/new began with: bring them back" in refused(capsys)
    assert pretrain_here(*QUICK, "--resume", "auto") == 2
    assert "runs/new was run with init 'weights.pth', not 'random'" in refused(capsys)
    assert (NEW / "metrics.jsonl").read_bytes() == metrics


def save_vit() -> None:
    torch.save(timm.create_model("test_vit").state_dict(), "weights.pth")


@pytest.mark.usefixtures("old_run")
@pytest.mark.parametrize(
    ("write", "flags", "message"),
    [
        (save_vit, ("--init", "weights.pth"), "weights.pth holds weights of another network: 0 of the"),
        (lambda: Path("weights.pth").touch(), ("--init", "weights.pth"), "weights.pth is empty"),
        (lambda: torch.save(nn.Linear(2, 2), "weights.pth"), ("--init", "weights.pth"), "could run code"),
        (lambda: None, ("--init", "weights.pth"), "no initial weights at weights.pth: give random, timm"),
        (lambda: None, ("--init", "timm"), "backbone 'small-v1' has no weights at timm"),
        (lambda: None, ("--init", ""), "init is empty: give one, or leave it out"),
        (
            lambda: None,
            ("--init", "timm", "--backbone", "resnet10t.c3_in1k"),
            "no pretrained weights of resnet10t.c3_in1k (",
        ),
        (lambda: None, ("--init", "hf-hub:me/skin"), "no pretrained weights of hf-hub:me/skin ("),
    ],
)
def test_weights_that_cannot_be_used_are_one_line_and_nothing_is_written(
    pretrain_here: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[], None],
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "no-cache")
    write()
    assert pretrain_here(*QUICK, *flags) == 2
    assert message in refused(capsys)
    assert not (NEW / "config.yaml").exists()


@pytest.mark.usefixtures("old_run")
def test_weights_for_another_size_are_adapted_and_it_says_so(
    pretrain_here: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"backbone": timm.create_model("test_vit").state_dict()}, "weights.pth")
    assert pretrain_here(*QUICK, "--backbone", "test_vit", "--init", "weights.pth") == 0
    record = environment()["init"]
    assert record["prefix"] == "backbone."
    assert record["unexpected"] == ["head.weight", "head.bias"]
    assert "patch_embed.proj.weight from 64x3x16x16 to 64x3x2x2" in record["adapted"]
    assert "initial weights from weights.pth below 'backbone.'" in caplog.text
    assert "adapted: pos_embed from " in caplog.text


def test_runs_from_other_weights_have_other_names() -> None:
    def name(*flags: str) -> str:
        return default_name(resolve(["--method", "simclr", "--preset", "small", *flags])[0])

    names = [
        name(*flags)
        for flags in (
            (),
            ("--init", "timm"),
            ("--init", "hf-hub:me/skin"),
            ("--init", "a/w.pth"),
            ("--init", "b/w.pth"),
        )
    ]
    assert names[0] == "phantom-simclr-two-view-small-seed0"
    assert names[1] == "phantom-simclr-two-view-small-from-timm-seed0"
    assert len(set(names)) == len(names)


# The table


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run from the old one's weights, with baselines that start from them, too, and a frozen model."""
    folder = tmp_path_factory.mktemp("judged")
    with zipfile.ZipFile(OLD_RUN) as archive:
        archive.extractall(folder)
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=5)
    timm.models.save_for_hf(network, folder / "frozen")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", ["pretrain.py", *TABLE])
        AcceleratorState._reset_state(reset_partial_state=True)
        pretrain.main()
        yield folder


TABLE = (*FLAGS, "--name", "table", "--supervised-steps", "3", "--init", "runs/old", "--init-baselines")
TABLE = (*TABLE, "--frozen", "local-dir:frozen")
ROWS = {
    "majority": [""],
    "raw pixels": ["knn", "linear"],
    "initial weights": ["knn", "linear"],
    "frozen local-dir:frozen": ["knn", "linear"],
    "pretrained": ["knn", "linear"],
    "supervised from initial weights": ["knn", "linear", "classifier"],
}


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return {(row["features"], row["probe"]): row for row in csv.DictReader(file)}


def test_the_table_has_the_rows_in_order(judged: Path) -> None:
    assert list(rows_of(judged / "runs/table")) == [(name, probe) for name in ROWS for probe in ROWS[name]]


def test_initial_and_frozen_rows_are_those_of_the_networks_by_themselves(judged: Path) -> None:
    train, val, test = (load_store("tiny.npz", split=split) for split in ("train", "val", "test"))
    old, spec = load_backbone("runs/old/backbone")
    spec = replace(spec, mean=train.mean, std=train.std)
    rows = rows_of(judged / "runs/table")
    for name, network, like in (
        ("initial weights", old, spec),
        ("frozen local-dir:frozen", *load_frozen("local-dir:frozen", spec)),
    ):
        train_x, val_x, test_x = (extract_features(network, store, like) for store in (train, val, test))
        scores, k = knn_probe(train_x, train.labels, val_x, val.labels, test_x, 3)
        row = rows[name, "knn"]
        assert int(row["k"]) == k
        assert float(row["balanced_accuracy"]) == pytest.approx(
            float(balanced_accuracy(scores, test.labels)), abs=1e-6
        )
    assert load_frozen("local-dir:frozen", spec)[1].size == 160  # its own


def test_the_supervised_reference_starts_from_the_initial_weights(judged: Path) -> None:
    settings = from_yaml(judged / "runs/table/config.yaml")
    spec = load_backbone("runs/table/backbone")[1]
    start = build_start(settings, spec).state_dict()
    for name, tensor in load_file("runs/old/backbone/model.safetensors").items():
        assert torch.equal(start[name], tensor)
    random = build_start(replace(settings, init_baselines=False), spec).state_dict()
    assert not torch.equal(random["conv1.0.weight"], start["conv1.0.weight"])
    assert torch.equal(
        random["conv1.0.weight"], build_random(spec, settings.seed, "cpu").state_dict()["conv1.0.weight"]
    )


def test_an_evaluation_again_gives_the_same_and_refuses_other_weights(judged: Path) -> None:
    before = (judged / "runs/table/results.csv").read_bytes()
    evaluate(EvaluateSettings("runs/table"))
    assert (judged / "runs/table/results.csv").read_bytes() == before
    weights = judged / "runs/old/backbone/model.safetensors"
    kept = weights.read_bytes()
    given = load_file(weights)
    save_file(given | {"bn1.bias": given["bn1.bias"] + 1}, weights)
    with pytest.raises(InputError, match=r"^the weights of runs/old are not those that runs/table began with"):
        evaluate(EvaluateSettings("runs/table"))
    with pytest.raises(InputError, match=r"^the weights of runs/old are not those that runs/table began with"):
        evaluate(EvaluateSettings("runs/table", other=shown_as(DataSettings)(data="tiny.npz")))
    weights.write_bytes(kept)
    assert (judged / "runs/table/results.csv").read_bytes() == before


def test_the_report_and_the_card_have_the_rows(judged: Path) -> None:
    report(ReportSettings(("runs/table",), output="report.html"))
    publish(PublishSettings("runs/table", "skin"))
    page, card = Path("report.html").read_text(), Path("skin/README.md").read_text()
    for name in ROWS:
        if name not in ("majority", "pretrained"):
            assert name in page
            assert f"| {name} " in card
    assert "It started from the weights of runs/old" in card
    assert "random initialisation" not in card


def test_baselines_alone_start_from_the_weights(judged: Path, pretrain_here: Callable[..., int]) -> None:
    del judged
    only = ("--baselines", "only", "--name", "only", "--init", "runs/old/backbone", "--supervised-steps", "0")
    assert pretrain_here(*FLAGS, *only, "--init-baselines") == 0
    assert [name for name, _ in rows_of(Path("runs/only"))][-1] == "initial weights"
    evaluate(EvaluateSettings("runs/only", frozen=("local-dir:frozen",)))
    rows = rows_of(Path("runs/only"))
    assert list(rows)[-1] == ("frozen local-dir:frozen", "linear")
    accuracy = rows_of(Path("runs/table"))["frozen local-dir:frozen", "knn"]["balanced_accuracy"]
    assert rows["frozen local-dir:frozen", "knn"]["balanced_accuracy"] == accuracy
    assert json.loads(Path("runs/only/environment.json").read_text())["init"]["source"] == "runs/old/backbone"


@pytest.mark.usefixtures("old_run")
def test_a_frozen_model_that_is_not_there_is_refused_before_the_training(
    pretrain_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_here(*FLAGS, "--name", "new", "--frozen", "local-dir:nowhere") == 2
    assert "no pretrained weights of local-dir:nowhere" in refused(capsys)
    assert not (NEW / "config.yaml").exists()
    assert pretrain_here(*FLAGS, "--name", "new", "--frozen", "") == 2
    assert "frozen has '', expected names of models of timm" in refused(capsys)


def test_what_does_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="amimv")
    resolve(["--init-baselines", "--baselines", "no", "--frozen", "test_vit"])
    assert "no effect here: init_baselines: init is random, baselines no" in caplog.text
    assert "no effect here: frozen: baselines is no" in caplog.text
    resolve(["--baselines", "only", "--init", "timm"])
    assert "no effect here: init: baselines only trains nothing" in caplog.text


@pytest.mark.usefixtures("old_run")
def test_initial_weights_are_an_axis_of_a_study(tmp_path: Path) -> None:
    """Baselines once for each of them where they start from them, and else once for all."""
    for shared, baselines in (("true", 2), ("false", 1)):
        text = f"grids: {{g: {{data: tiny.npz, init: [random, runs/old], init_baselines: {shared}, steps: 2}}}}\n"
        (tmp_path / "study.yaml").write_text(text)
        cells = read_study(tmp_path / "study.yaml")
        kinds = [cell.kind for cell in cells]
        assert kinds == ["baselines"] * baselines + ["cell"] * 2
        assert len({cell.run for cell in cells}) == len(cells)
        assert [cell.settings.init for cell in cells[baselines:]] == ["random", "runs/old"]
        assert "--init runs/old" in cells[-1].command()
        assert "-from-runs-old-" in cells[-1].run


@pytest.mark.slow
@pytest.mark.usefixtures("old_run")
def test_two_processes_start_from_the_same_weights_and_miss_them_in_one_line() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [*launcher, pretrain.__file__, *FLAGS, "--method", "byol", "--no-evaluate", *flags]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)

    assert run("--name", "new", "--init", "runs/old", "--lr", "1e-12").returncode == 0
    assert environment()["processes"] == 2
    state = torch.load(NEW / "checkpoints" / "step-00000002.pt", weights_only=True)["method"]
    for name, tensor in load_file("runs/old/backbone/model.safetensors").items():
        if name.endswith("weight"):  # at such a rate they are where they began
            torch.testing.assert_close(state[f"online.backbone.{name}"], tensor, atol=1e-6, rtol=0)
    lines = [line for line in run("--name", "no", "--init", "no.pth").stderr.splitlines() if "no.pth" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: no initial weights at no.pth")
