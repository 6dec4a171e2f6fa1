"""A published backbone: what others load gives the run's features, and the card says what the run was."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from amimv import InputError
from amimv.models.backbones import BackboneSpec, build_backbone, encode, load_backbone, save_backbone
from amimv.tools import publish as publishing
from amimv.tools.model_card import data_licence
from amimv.tools.publish import PublishSettings, publish
from amimv.tools.report_page.runs import read_study
from amimv.trainers.comparisons import paired_bootstrap


@pytest.fixture
def run(old_run: Path) -> Path:
    """A finished run of the small backbone below the working folder."""
    return old_run


def with_backbone(run: Path, name: str, size: int) -> BackboneSpec:
    """Put another backbone into the run."""
    spec = BackboneSpec(name, 3, size, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (0, 4095))
    torch.manual_seed(1)
    save_backbone(build_backbone(spec), spec, run / "backbone")
    return spec


def by_its_own_words(card: str) -> tuple[Tensor, Tensor]:
    """Images and features of the Python that the card shows."""
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope["images"], scope["features"]


@torch.no_grad()
def features_of(run: Path, images: Tensor) -> Tensor:
    """Of the run's own export, for images in [0, 1]."""
    network, spec = load_backbone(run / "backbone")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    return encode(network, (images - mean) / std)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        pytest.param("test_vit", 32, "timm alone gives the run's features", marks=pytest.mark.slow),
        pytest.param("test_resnet", 160, "timm alone gives the run's features", marks=pytest.mark.slow),
        ("test_resnet", 64, "timm alone cannot build this network (its stem was changed for 64 pixels)"),
        ("small", 28, "timm alone cannot build this network (it is no network of timm's)"),
    ],
)
def test_what_the_card_shows_gives_the_features_of_the_run(
    run: Path, name: str, size: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with_backbone(run, name, size)
    publish(PublishSettings(str(run), "skin"))
    assert said in capsys.readouterr().out
    assert {path.name for path in Path("skin").iterdir()} == set(publishing.FILES)
    card, config = Path("skin/README.md").read_text(), json.loads(Path("skin/config.json").read_text())
    assert ("cannot" in said) == ("imm alone cannot build" in card) == ("note" in config)
    assert ("import timm" in card) == ("library_name: timm" in card) == ("cannot" not in said)
    assert "scaled so that 0 becomes 0 and 4095 becomes 1" in card
    images, features = by_its_own_words(card)
    torch.testing.assert_close(features, features_of(run, images), rtol=1e-4, atol=1e-4)


def test_the_card_says_what_the_run_was(run: Path) -> None:
    publish(PublishSettings(str(run), "out/skin"))
    card = Path("out/skin/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "amimv"
    for words in (
        "trained on 64 images of tiny, without their labels: method ressl, recipe `two-view`, 10 optimiser steps",
        "Images per class: 22, 21, 21 (the largest class has 1.0 times as many as the smallest)",
        "Licence of the data: unknown to this card",
        "python trainers/pretrain.py --data tiny.npz --method ressl",
        "Revision 42813d28deb7, torch 2.14.1",
        "projector_hidden: 32                     # flag",
        "natural distribution, 50 % of the labels (31 images",
    ):
        assert words in card
    # A number and an interval of the last table, by the run's own files.
    rows = read_study([run]).rows
    rows = rows[(rows["label_fraction"] == 1) & rows["features"].isin(["raw pixels", "pretrained"])]
    best = rows.loc[rows.groupby("features")["val_balanced_accuracy"].idxmax()].set_index("features")
    with np.load(run / "predictions.npz") as stored:
        lines = [stored[f"row_{best.loc[name, 'line']:03d}"] for name in ("pretrained", "raw pixels")]
        found = paired_bootstrap(stored["labels"], *lines)
    cells = [line for line in card.splitlines() if line.startswith("| raw pixels")][-1].split(" | ")
    knn = rows[(rows["features"] == "raw pixels") & (rows["probe"] == "knn")]["balanced_accuracy"].item()
    assert cells[1].strip() == f"{100 * knn:.1f}"
    text = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    assert text in map(str.strip, cells)
    assert "With 50 % of the labels (31 images), ReSSL (" in card


def test_a_run_without_results_has_a_card_that_says_so(run: Path) -> None:
    for name in ("results.csv", "environment.json", "metrics.jsonl"):
        (run / name).unlink()
    config = (run / "config.yaml").read_text()
    config = config.replace("sampler: cluster-balanced", "sampler: class-balanced ").replace("tiny.npz", "phantom ")
    (run / "config.yaml").write_text(config)
    publish(PublishSettings(str(run), "skin"))
    card = Path("skin/README.md").read_text()
    assert "The run was not evaluated." in card
    assert "the labels decided how often an image was drawn (sampler class-balanced), and nothing else" in card
    assert "**phantom is synthetic" in card
    assert "the run does not say by which command" in card


def test_licences_of_data() -> None:
    assert data_licence("retinamnist") == "CC BY 4.0, by MedMNIST's own list"
    assert data_licence("dermamnist").startswith("CC BY-NC 4.0")
    assert data_licence("folder:retinamnist").startswith("unknown")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "runs/old holds no run: expected a folder with config.yaml"),
        (lambda run: (run / "backbone/backbone.json").unlink(), "no exported backbone in runs/old/backbone"),
        (
            lambda run: (run / "results.csv").write_text("a,b\n"),
            "no finished run in runs/old: .*results.csv has no data",
        ),
        (lambda run: Path("skin").mkdir() or Path("skin/thesis.tex").touch(), "skin holds something else"),
        (lambda run: Path("skin").touch(), "skin holds something else"),
    ],
)
def test_what_cannot_be_published_is_one_line(run: Path, broken: Any, message: str) -> None:
    broken(run)
    with pytest.raises(InputError, match=message) as error:
        publish(PublishSettings(str(run), "skin"))
    assert "\n" not in str(error.value)
    assert not Path("skin/README.md").exists()


@pytest.mark.slow
def test_a_network_that_timm_would_build_otherwise_is_not_published(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if nobody had noticed that the stem was changed: only the features tell."""
    monkeypatch.setattr("amimv.models.backbones.stem_is_changed", lambda spec: False)
    with_backbone(run, "test_resnet", 64)
    with pytest.raises(InputError, match="skin loaded by timm alone gives other features, by"):
        publish(PublishSettings(str(run), "skin"))
    monkeypatch.setattr(publishing, "ALONE", "raise RuntimeError('size mismatch')")
    with pytest.raises(InputError, match=r"^skin cannot be loaded by timm alone \('?RuntimeError: size mismatch"):
        publish(PublishSettings(str(run), "skin"))
    assert not Path("skin/README.md").exists()


def test_push(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pushed: dict[str, Any] = {}

    class Hub:
        def __init__(self, **options: Any) -> None:
            pushed.update(options)

        def create_repo(self, name: str, exist_ok: bool) -> Any:
            assert exist_ok
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **given: Any) -> Any:
            pushed.update(given)
            assert "README.md" in {path.name for path in Path(given["folder_path"]).iterdir()}
            return SimpleNamespace(repo_url="https://hub/me/skin")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    publish(PublishSettings(str(run), "out", push="skin"))
    assert pushed["repo_id"] == "me/skin"
    assert pushed["allow_patterns"] == list(publishing.FILES)
    assert capsys.readouterr().out.endswith("pushed to https://hub/me/skin\n")
    assert 'load_backbone("hf-hub:skin")' in Path("out/README.md").read_text()


def test_a_push_without_a_network_is_one_line_and_the_folder_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["publish.py", str(run), "-o", "out", "--push", "me/skin"])
    with pytest.raises(SystemExit) as status:
        publishing.main()
    assert status.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: out is written, but not pushed to me/skin (")
    assert Path("out/README.md").exists()
