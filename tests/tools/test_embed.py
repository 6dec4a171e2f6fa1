"""Features of every image: columns against plain loops, whose labels a probe learns from, what is held meanwhile."""

import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn

from amimv import InputError
from amimv.models import backbones
from amimv.models.backbones import BackboneSpec, build_backbone, load_backbone, save_backbone
from amimv.pipelines import load_store
from amimv.tools import embed as command
from amimv.tools.commands import EmbedSettings
from amimv.tools.embed import embed
from amimv.trainers.data_settings import DataSettings
from amimv.trainers.evaluation import linear_probe
from amimv.trainers.identity import identify_all
from amimv.trainers.layers import resolve, to_yaml
from amimv.trainers.run_folder import write_json

SIZES = {"train": 30, "val": 12, "test": 17}


def draw(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes, the brighter the higher."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 3)
    images = rng.integers(0, 130, (n, 28, 28, 3)) + 50 * labels[:, None, None, None]
    return images.astype(np.uint8), labels


def write_npz(path: Path, seed: int, multi_label: bool = False, unlabelled: bool = False) -> None:
    arrays: dict[str, Any] = {}
    for i, (split, n) in enumerate(SIZES.items()):
        arrays[f"{split}_images"], labels = draw(n, seed + i)
        if not unlabelled:
            arrays[f"{split}_labels"] = np.stack([labels == 1, labels > 0], 1).astype(int) if multi_label else labels
        if split == "train":
            arrays["train_groups"] = np.arange(n) // 2
    np.savez(path, **arrays)


def write_files(folder: Path) -> None:
    for i, (split, n) in enumerate(SIZES.items()):
        for k, (image, label) in enumerate(zip(*draw(n, 20 + i), strict=True)):
            place = folder / split / ("benign", "naïve", "other one")[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{k:02d}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on own.npz, whose training subset is not the first images, and other data beside it."""
    place = tmp_path_factory.mktemp("embed")
    write_npz(place / "own.npz", 0)
    write_npz(place / "other.npz", 10)
    write_npz(place / "hot.npz", 10, multi_label=True)
    write_npz(place / "bare.npz", 10, unlabelled=True)
    write_files(place / "files")
    np.save(place / "some.npy", np.arange(5, 30))
    settings, sources = resolve(["--data", str(place / "own.npz"), "--indices", str(place / "some.npy")])
    run = place / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(settings, sources))
    store = load_store(place / "own.npz")
    write_json(run / "data.json", identify_all(store.subset(torch.arange(5, 30)), torch.arange(5, 30), None, None))
    spec = BackboneSpec(mean=store.mean, std=store.std)
    torch.manual_seed(3)
    backbone = build_backbone(spec)
    with torch.no_grad():
        backbone.train()(torch.randn(16, 3, 28, 28))
    save_backbone(backbone, spec, run / "backbone")
    return place


def embedded(place: Path, data: str, kind: str = "npz", run: str = "run", **settings: Any) -> dict[str, Any]:
    """The columns of the file."""
    output = place / f"features.{kind}"
    embed(EmbedSettings(str(place / run), str(output), batch_size=7, images=DataSettings(data), **settings))
    if kind == "parquet":
        table = parquet.read_table(output)
        return {name: np.array(table[name].to_pylist()) for name in table.column_names}
    with np.load(output, allow_pickle=False) as arrays:
        return dict(arrays)


def features_one_by_one(place: Path, images: Tensor) -> Tensor:
    network, spec = load_backbone(place / "run" / "backbone")
    mean, std = (torch.tensor(values).double() for values in (spec.mean, spec.std))
    views = ((image.double() / 255 - mean) / std for image in images)
    with torch.no_grad():
        return torch.cat([network(view.permute(2, 0, 1)[None].float()) for view in views])


def images_of(path: Path, split: str) -> Tensor:
    with np.load(path) as arrays:
        return torch.from_numpy(arrays[f"{split}_images"])


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_each_image_has_a_row_with_its_features(place: Path, kind: str) -> None:
    found = embedded(place, str(place / "other.npz"), kind)
    assert list(found) == ["split", "index", "label", "class", "group", "features"]
    assert found["split"].tolist() == [split for split, n in SIZES.items() for _ in range(n)]
    assert found["index"].tolist() == [i for n in SIZES.values() for i in range(n)]
    features = torch.cat([features_one_by_one(place, images_of(place / "other.npz", split)) for split in SIZES])
    np.testing.assert_allclose(found["features"], features, atol=1e-4)
    with np.load(place / "other.npz") as arrays:
        labels = np.concatenate([arrays[f"{split}_labels"] for split in SIZES])
    assert found["label"].tolist() == labels.tolist()
    assert found["class"].tolist() == [str(label) for label in labels]
    assert found["group"].tolist() == [i // 2 for i in range(30)] + [-1] * 29


def test_neighbours_and_scores_are_those_of_the_runs_training_images(place: Path) -> None:
    found = embedded(place, str(place / "bare.npz"), predict="knn", nearest=3, splits=("test",))
    assert set(found) == {"split", "index", "features", "scores", "predicted", "score", "predicted_class"} | {
        *("nearest", "nearest_similarity")
    }
    assert set(found["split"]) == {"test"}
    bank = nn.functional.normalize(features_one_by_one(place, images_of(place / "own.npz", "train")[5:]).double())
    with np.load(place / "own.npz") as arrays:
        labels = arrays["train_labels"][5:]
    queries = nn.functional.normalize(features_one_by_one(place, images_of(place / "bare.npz", "test")).double())
    cosines = (queries @ bank.T).numpy()
    assert (np.diff(np.sort(cosines)[:, -4:]) > 1e-6).all(), "no ties"
    assert found["nearest"].tolist() == (np.argsort(-cosines)[:, :3] + 5).tolist()
    np.testing.assert_allclose(found["nearest_similarity"], -np.sort(-cosines)[:, :3], atol=1e-5)
    # With the k that the scores tell: weights exp(cosine / 0.1) of the k nearest, Wu et al. 2018.
    fits = []
    for k in (1, 5, 20):
        near = np.argsort(-cosines)[:, :k]
        weights = np.exp(np.take_along_axis(cosines, near, 1) / 0.1)
        shares = [np.bincount(labels[i], w, minlength=3) / w.sum() for i, w in zip(near, weights, strict=True)]
        fits.append(np.abs(np.array(shares) - found["scores"]).max() < 1e-4)
    assert sum(fits) == 1
    assert found["predicted"].tolist() == found["scores"].argmax(1).tolist()
    assert found["score"].tolist() == found["scores"].max(1).tolist()
    assert found["predicted_class"].tolist() == found["predicted"].astype(str).tolist()


@pytest.mark.parametrize("data", ["other", "hot"])
def test_a_linear_probe_on_the_datas_own_labels(place: Path, data: str) -> None:
    """Of a run if that is asked for, and of an export always."""
    path = place / f"{data}.npz"
    found = embedded(place, str(path), predict="linear", labels="data", splits=("val", "test"))
    again = embedded(place, str(path), predict="linear", run="run/backbone", splits=("val", "test"))
    assert all(np.array_equal(found[name], again[name]) for name in found)
    with np.load(path) as arrays:
        labels = {split: torch.from_numpy(arrays[f"{split}_labels"]) for split in SIZES}
    x = {split: features_one_by_one(place, images_of(path, split)) for split in SIZES}
    n_classes = 3 if data == "other" else 2
    args = (x["train"], labels["train"], x["val"], labels["val"], torch.cat([x["val"], x["test"]]), n_classes)
    scores = linear_probe(*args)[0].numpy()
    np.testing.assert_allclose(found["scores"], scores, atol=2e-3)
    if data == "hot":
        assert found["label"].tolist() == torch.cat([labels["val"], labels["test"]]).tolist()
        assert found["predicted"].tolist() == (found["scores"] > 0.5).astype(int).tolist()
        assert "predicted_class" not in found
    else:
        assert (found["predicted"] == found["scores"].argmax(1)).all()


def test_files_have_their_names(place: Path) -> None:
    found = embedded(place, f"folder:{place / 'files'}", "parquet", predict="knn", labels="data", nearest=1)
    names = sorted(path.relative_to(place / "files").as_posix() for path in (place / "files").rglob("*.png"))
    assert sorted(found["file"]) == names
    for i, name in enumerate(found["file"]):
        split, label, _ = name.split("/")
        assert (found["split"][i], found["class"][i]) == (split, label)
        if split == "train":  # each is the nearest to itself
            assert found["nearest_file"][i] == name
            assert found["nearest"][i].tolist() == [found["index"][i]]


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_memory_does_not_grow_with_the_data(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine batches never more than two are there, neither their images nor their features."""
    network, spec = load_backbone(place / "run" / "backbone")
    seen: list[list[weakref.ref]] = []
    alive = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], features: Tensor) -> None:
        seen.append([weakref.ref(inputs[0]), weakref.ref(features)])
        alive.append(max(sum(batch[part]() is not None for batch in seen) for part in (0, 1)))

    network.register_forward_hook(watch)
    monkeypatch.setattr(backbones, "load_backbone", lambda *_: (network, spec))
    found = embedded(place, f"folder:{place / 'files'}", kind)
    assert len(found["features"]) == sum(SIZES.values())
    assert len(seen) == sum(-(-n // 7) for n in SIZES.values())
    assert max(alive) <= 2


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("{0}/run", "-o", "{0}/no.npz"), "no data: give --data"),
        (("{0}/files", "--data", "{0}/own.npz", "-o", "{0}/no.npz"), "no exported backbone in"),
        (("{0}/run", "--data", "{0}/own.npz", "-o", "{0}/no.txt"), "expected a name that ends in .parquet or .npz"),
        (("{0}/run", "--data", "{0}/none.npz", "-o", "{0}/no.npz"), "there is no file"),
        (
            ("{0}/run", "--data", "{0}/bare.npz", "-o", "{0}/no.npz", *("--predict", "knn", "--labels", "data")),
            "needs",
        ),
        (("{0}/run/backbone", "--data", "{0}/own.npz", "-o", "{0}/no.npz", "--labels", "run"), "holds no run"),
        (("{0}/run", "--data", "folder:{0}/files/test", "-o", "{0}/no.npz", "--splits", "val"), "val"),
        (("{0}/run", "--data", "{0}/own.npz", "-o", "{0}/no.npz", "--nearest", "0"), "expected at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(
    place: Path,
    argv: tuple[str, ...],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["embed.py", *(word.format(place) for word in argv)])
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert line in error
    assert not list(place.glob("no.*"))


def test_a_runs_own_data_that_changed_are_not_learnt_from(place: Path) -> None:
    before = (place / "own.npz").read_bytes()
    write_npz(place / "own.npz", 77)
    try:
        with pytest.raises(InputError, match="not those of the run's beginning"):
            embedded(place, str(place / "other.npz"), predict="knn")
    finally:
        (place / "own.npz").write_bytes(before)
