"""A run's backbone on data that it was not trained on, beside the baselines of these data."""

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from amimv.models.backbones import BackboneSpec, build_backbone, load_backbone, save_backbone
from amimv.pipelines import ImageStore
from amimv.trainers import evaluate as command
from amimv.trainers.data import Splits, backbone_spec, load_split
from amimv.trainers.data_settings import DataSettings
from amimv.trainers.evaluation import judge_features, result_row
from amimv.trainers.evaluation.run import evaluate_features
from amimv.trainers.layers import resolve, to_yaml
from amimv.trainers.other_data import as_taken, normalised_as_trained
from amimv.trainers.settings import PretrainSettings

SPLITS = {"train": 42, "val": 21, "test": 24}
OWN = "made for training"


def draw(n: int, channels: int, size: int, seed: int, step: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Three classes, the brighter the higher; two labels each of which is bright corners."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 90, (n, size, size, channels), dtype=np.uint8) + step * labels[:, None, None, None]
    return images.astype(np.uint8), labels


def write_npz(path: Path, channels: int = 3, size: int = 28, multi_label: bool = False, step: int = 40) -> Path:
    arrays = {}
    for seed, (split, n) in enumerate(SPLITS.items()):
        images, labels = draw(n, channels, size, seed + 10 * channels + size, step)
        arrays[f"{split}_images"] = images[..., 0] if channels == 1 else images
        arrays[f"{split}_labels"] = np.stack([labels == 1, labels > 0], 1).astype(np.uint8) if multi_label else labels
    np.savez(path, **arrays)
    return path


def write_folder(path: Path, size: int) -> Path:
    for seed, (split, n) in enumerate(SPLITS.items()):
        for i, (image, label) in enumerate(zip(*draw(n, 3, size, seed), strict=True)):
            place = path / split / "abc"[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i:03d}.png")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with results of its own, and other data beside it."""
    place = tmp_path_factory.mktemp("other")
    own = write_npz(place / "own.npz", step=70)
    flags = ("--supervised-steps", "2", "--batch-size", "16", "--seed", "5", "--label-fractions", "0.5", "1")
    settings, sources = resolve(["--data", str(own), *flags])
    run = place / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(settings, sources))
    spec = backbone_spec(settings, load_split(settings, "train", "cpu"))
    torch.manual_seed(3)
    backbone = build_backbone(spec)
    with torch.no_grad():
        backbone.train()(torch.randn(16, 3, 28, 28))
    save_backbone(backbone, spec, run / "backbone")
    (run / "results.csv").write_text(OWN)
    (run / "predictions.npz").write_text(OWN)
    write_npz(place / "grey.npz", channels=1)
    write_npz(place / "rgb.npz")
    write_npz(place / "two.npz", channels=2)
    write_npz(place / "hot.npz", multi_label=True)
    write_folder(place / "files", 40)
    return place


def call(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    try:
        command.main()
    except SystemExit as exit_:
        return int(str(exit_.code))
    return 0


def read(folder: Path) -> tuple[list[dict[str, str]], dict[str, np.ndarray]]:
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with np.load(folder / "predictions.npz") as arrays:
        return rows, dict(arrays)


def by_kind(rows: list[dict]) -> dict[tuple[str, ...], dict]:
    return {(str(row["features"]), str(row["probe"]), str(row["label_fraction"])): row for row in rows}


def told(settings: PretrainSettings) -> list[dict]:
    """The rows of a run of baselines on these data."""
    splits = Splits(*(load_split(settings, split, "cpu") for split in SPLITS))
    return evaluate_features(settings, splits, backbone_spec(settings, splits.train), None, "abc", "r")[0]


def features_one_by_one(network: nn.Module, store: ImageStore, spec: BackboneSpec) -> Tensor:
    """Normalised by hand."""
    rows = []
    for image in store.gather(torch.arange(len(store))):
        x = (image.double() / 255 - torch.tensor(spec.mean).double()) / torch.tensor(spec.std).double()
        rows.append(network(x.permute(2, 0, 1)[None].float()))
    return torch.cat(rows).detach()


SCORES = ("val_balanced_accuracy", "accuracy", "balanced_accuracy", "macro_f1", "auc")
CASES = {
    "rgb": ("rgb.npz", (), "rgb"),
    "grey": ("grey.npz", (), "grey"),
    "multi-label": ("hot.npz", ("--label-fractions", "1"), "hot"),
    "folder": ("folder:files", ("--supervised-steps", "0"), "folder-files"),
}
OFTEN = ("grey", "folder")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in OFTEN else pytest.mark.slow) for c in CASES])
def test_rows_are_of_the_backbone_normalised_as_in_training_and_of_the_datas_own_baselines(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, flags, title = CASES[case]
    data = f"folder:{folder / 'files'}" if "folder" in name else str(folder / name)
    assert call(monkeypatch, folder / "run", "--data", data, *flags) == 0
    place = folder / "run" / "evaluations" / title
    assert {path.name for path in place.iterdir()} == {"config.yaml", "results.csv", "predictions.npz", "lock"}
    assert [(folder / "run" / file).read_text() for file in ("results.csv", "predictions.npz")] == [OWN, OWN]
    rows, arrays = read(place)
    assert {(row["pretrained_on"], row["data"], row["run"]) for row in rows} == {("own", title.split("-")[-1], "run")}

    # As `pretrain.py --data OTHER --baselines only` has them, at the backbone's size and channels.
    as_run = ("--supervised-steps", "2", "--batch-size", "16", "--seed", "5", "--label-fractions", "0.5", "1")
    adapted = ("--size", "28") if case == "folder" else ("--channels", "3")
    other, _ = resolve(["--data", data, "--baselines", "only", *as_run, *adapted, *flags])
    expected = by_kind(told(other))
    found = by_kind(rows)
    assert set(found) - set(expected) == {key for key in found if key[0] == "pretrained"}
    for key, row in expected.items():
        assert [found[key][score] for score in SCORES] == [str(row[score]) for score in SCORES], key

    network, spec = load_backbone(folder / "run" / "backbone")
    stores = [load_split(other, split, "cpu") for split in SPLITS]
    assert stores[0].mean != pytest.approx(spec.mean, abs=1e-3)
    features = [features_one_by_one(network, store, spec) for store in stores]
    for one in judge_features("pretrained", features, *stores):
        row = result_row(one, *stores)
        scores = found["pretrained", one.probe, "1.0"]
        assert [float(scores[s]) for s in SCORES[:3]] == pytest.approx([row[s] for s in SCORES[:3]], abs=1e-6)
        predicted = arrays[f"row_{rows.index(scores):03d}"]
        mine = one.test > 0.5 if stores[2].multi_label else one.test.argmax(1)
        assert np.array_equal(predicted, mine.numpy().astype(np.int16))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("{0}/own.npz", "--data", "{0}/rgb.npz"), "holds no run"),
        (("{0}/run", "--data", "{0}/two.npz"), "two has images of 2 channel(s), the backbone takes 3: convert them"),
        (("{0}/run", "--data", "{0}/none.npz"), "there is no file"),
        (("{0}/run", "--data", "retinamnits"), "did you mean retinamnist or"),
        (("{0}/run", "--data", "{0}/rgb.npz", "--channels", "2"), "number of channels '2'"),
        (("{0}/run", "--data", "{0}/rgb.npz", "--label-fractions", "2"), "label fractions"),
        (("{0}/run", "--size", "64"), "give --data"),
    ],
)
def test_what_cannot_be_is_one_line(
    folder: Path,
    argv: tuple[str, ...],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, *(word.format(folder) for word in argv)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert line in error


def test_images_smaller_than_the_views_are_enlarged_and_not_fine_tuned_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_npz(folder / "tiny.npz", size=14)
    flags = ("--data", data, "--label-fractions", "1")
    assert call(monkeypatch, folder / "run", *flags) == 0
    rows, _ = read(folder / "run" / "evaluations" / "tiny")
    assert {row["features"] for row in rows} == {"majority", "raw pixels", "random", "pretrained", "supervised"}
    tuned = shutil.copytree(folder / "run", folder / "tuned")
    config = tuned / "config.yaml"
    config.write_text(config.read_text().replace("finetune: false", "finetune: true"))
    assert call(monkeypatch, tuned, *flags) == 2
    assert "too small for fine-tuning" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "trained", "given", "expected"),
    [
        (np.uint8, None, False, None),
        (np.uint16, (0.0, 4095.0), False, (0.0, 4095.0)),
        (np.uint16, (0.0, 4095.0), True, "own"),
        (np.uint16, None, False, "own"),
        (np.uint8, (0.0, 4095.0), False, None),
    ],
)
def test_values_have_the_range_of_the_training_where_they_are_of_its_kind(
    dtype: type, trained: tuple[float, float] | None, given: bool, expected: object
) -> None:
    store = ImageStore.from_arrays((np.arange(2 * 64).reshape(2, 8, 8, 1) * 2).astype(dtype))
    spec = normalised_as_trained(BackboneSpec(value_range=trained), store, given)
    assert spec.value_range == (store.value_range if expected == "own" else expected)


def test_images_are_read_as_large_as_the_views() -> None:
    for wanted, size in ((28, 28), (40, 64), (64, 64), (300, 224)):
        assert as_taken(DataSettings("retinamnist"), BackboneSpec(size=wanted)).size == size
    assert as_taken(DataSettings("a.npz"), BackboneSpec(size=40)).size is None
    files = as_taken(DataSettings("folder:x"), BackboneSpec(size=40, channels=1))
    assert (files.size, files.channels) == (40, 1)
    assert as_taken(DataSettings("phantom", size=28), BackboneSpec(size=64)).size == 28
