"""Scores without labels: against scikit-learn, what they say of known features, and what a run writes of them."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from amimv import InputError
from amimv.models.backbones import BackboneSpec, build_backbone
from amimv.pipelines import HARD, ImageStore, draw_view_params, render
from amimv.pipelines.rng import Key, Stream
from amimv.tools.commands import ReportSettings
from amimv.tools.report import pack
from amimv.tools.report_page.runs import read_study
from amimv.trainers.data import Splits, backbone_spec
from amimv.trainers.evaluate import EvaluateSettings, evaluate
from amimv.trainers.evaluation import cluster_knn, extract_features, judge_without_labels, rankme, write_results
from amimv.trainers.evaluation import without_labels as module
from amimv.trainers.evaluation.run import evaluate_features
from amimv.trainers.layers import resolve

RNG = np.random.default_rng(0)
PUBLISHED = Path(__file__).resolve().parents[3] / "docs" / "study"
SCORES = ("rankme", "rankme_embeddings", "cluster_knn")


def blobs(n: int, noise: float, seed: int) -> Tensor:
    """``(n, 10)``: six directions, and noise."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(5 * np.eye(6, 10)[rng.integers(0, 6, n)] + noise * rng.normal(size=(n, 10))).float()


def by_scikit_learn(train: np.ndarray, val: np.ndarray, views: np.ndarray, k: int, seed: int) -> float:
    train, val, views = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, val, views))
    kmeans = KMeans(k, n_init=1, random_state=seed).fit(train)
    knn = KNeighborsClassifier(20, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.1))
    return float(balanced_accuracy_score(kmeans.predict(val), knn.fit(train, kmeans.labels_).predict(views)))


@pytest.mark.parametrize("seed", [0, 3])
def test_cluster_knn_is_that_of_scikit_learn(seed: int) -> None:
    train, val = blobs(162, 1.0, 1), blobs(60, 1.0, 2)
    views = val + torch.from_numpy(np.random.default_rng(3).normal(size=val.shape)).float()
    expected = by_scikit_learn(train.numpy(), val.numpy(), views.numpy(), k=9, seed=seed)  # 9 = sqrt(162 / 2)
    assert 0.2 < expected < 0.95
    assert cluster_knn(train, val, views, seed) == pytest.approx(expected, abs=1e-9)
    # Neither the lengths of features nor a second call change anything.
    assert cluster_knn(7 * train, 3 * val, views, seed) == pytest.approx(expected, abs=1e-9)
    assert cluster_knn(train, val, views, seed) == cluster_knn(train, val, views, seed)


def test_the_more_a_view_moves_an_image_the_lower_the_score() -> None:
    train, val = blobs(400, 0.5, 1), blobs(200, 0.5, 2)
    moved = torch.from_numpy(np.random.default_rng(3).normal(size=val.shape)).float()
    scores = [cluster_knn(train, val, val + amount * moved) for amount in (0, 1, 2, 20)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.6
    assert scores[-1] < 0.2
    # Views of other images are at the level of chance, 1 / 14 clusters.
    assert cluster_knn(train, val, val.roll(1, 0)) < 0.2


def test_a_collapsed_network_scores_low() -> None:
    constant = torch.ones(200, 8) * torch.arange(8)
    assert cluster_knn(constant, constant[:50], constant[:50]) == pytest.approx(1 / 10), "K = sqrt(200 / 2)"
    zero = torch.zeros(200, 8)
    assert cluster_knn(zero, zero[:50], zero[:50]) == pytest.approx(1 / 10)
    two = torch.eye(2, 8)[torch.arange(200) % 2]
    assert cluster_knn(two, two[:50], two[:50]) == pytest.approx(2 / 10)
    found = judge_without_labels(constant, constant[:50], constant[:50], 0, torch.nn.Linear(8, 4))
    assert found == pytest.approx({"rankme": 1, "rankme_embeddings": 1, "cluster_knn": 0.1}, rel=1e-4)
    one = torch.ones(1, 4)
    assert cluster_knn(one, one, one) == 1, "nothing is divided by zero"


def test_what_is_not_finite_has_no_score() -> None:
    train, val = blobs(100, 1.0, 1), blobs(30, 1.0, 2)
    broken = val.clone()
    broken[3, 4] = torch.nan
    assert judge_without_labels(train, val, broken) == {"rankme": rankme(train)}
    with pytest.raises(InputError, match="NaN or infinity"):
        cluster_knn(train, val, broken)


def test_of_many_images_some_are_looked_at_evenly_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = blobs(60, 1.0, 1), blobs(30, 1.0, 2)
    monkeypatch.setattr(module, "RANKED", 20)
    monkeypatch.setattr(module, "CLUSTERED", 30)
    found = judge_without_labels(train, val, val)
    assert found == {"rankme": rankme(train[::3]), "cluster_knn": cluster_knn(train[::2], val, val)}


def test_augmented_views_are_those_of_an_images_place() -> None:
    images = RNG.integers(0, 256, (11, 20, 16, 3), dtype=np.uint8)
    store = ImageStore.from_arrays(images, None)
    like = BackboneSpec(size=12, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    policy = replace(HARD, size=12, mean=like.mean, std=like.std)
    params = draw_view_params(policy, torch.arange(11), Key(0, Stream.EVALUATION), 16 / 20)
    expected = render(torch.from_numpy(images), params).flatten(1)
    for chunk in (4, 512):
        found = extract_features(None, store, like, chunk, augment=HARD)
        torch.testing.assert_close(found, expected)
    assert not torch.allclose(extract_features(None, store, like), expected, atol=0.5)


def make_splits(labels: np.ndarray | None = None) -> Splits:
    rng = np.random.default_rng(5)
    train, val, test = (rng.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8) for n in (60, 30, 30))
    given = np.arange(60) % 3 if labels is None else labels
    return Splits(*(ImageStore.from_arrays(x, given[: len(x)], name="n") for x in (train, val, test)))


def rows_of(splits: Splits, *flags: str) -> list[dict]:
    settings = resolve(["--supervised-steps", "2", "--batch-size", "16", "--finetune", *flags])[0]
    spec = backbone_spec(settings, splits.train)
    torch.manual_seed(3)
    return evaluate_features(settings, splits, spec, build_backbone(spec).eval(), "abc", "r")[0]


def test_rows_have_the_scores_of_their_features_whatever_the_labels() -> None:
    splits = make_splits()
    rows = rows_of(splits)
    spec = backbone_spec(resolve([])[0], splits.train)
    for row in rows:
        own = [row[name] != "" for name in SCORES]
        frozen = row["features"] in ("raw pixels", "random", "pretrained") and row["probe"] != "fine-tuned"
        assert own == [frozen, False, frozen], (row["features"], row["probe"])
    kinds = {row["features"]: tuple(row[name] for name in SCORES) for row in rows if row["rankme"] != ""}
    assert len(set(kinds.values())) == len(kinds) == 3
    normalised, val, views = (
        extract_features(None, store, spec, augment=augment)
        for store, augment in ((splits.train, None), (splits.val, None), (splits.val, resolve([])[0].policy()))
    )
    rank, _, score = kinds["raw pixels"]
    assert rank == pytest.approx(rankme(normalised), abs=1e-6)
    assert score == pytest.approx(cluster_knn(normalised, val, views, 0), abs=1e-6)
    others = rows_of(make_splits(np.random.default_rng(1).permutation(np.arange(60) % 3)))
    assert {r["features"]: tuple(r[name] for name in SCORES) for r in others if r["rankme"] != ""} == kinds
    # Of training images without labels, not of those that stand for them.
    bare = ImageStore.from_arrays(splits.train.gather(torch.arange(60)), None, name="n")
    half = Splits(splits.val, splits.val, splits.test, replace(bare, mean=splits.train.mean, std=splits.train.std))
    settings = resolve(["--supervised-steps", "0", "--batch-size", "16"])[0]
    found, _ = evaluate_features(settings, half, spec, None, "abc", "r")
    pixels = next(row for row in found if row["features"] == "raw pixels")
    assert pixels["rankme"] == pytest.approx(rank, abs=1e-4)


def test_results_of_earlier_versions_have_none() -> None:
    rows = read_study([PUBLISHED / "readings.zip"]).rows
    assert len(rows)
    assert rows[list(SCORES)].isna().all(axis=None)


FLAGS = ("--batch-size", "16", "--baselines", "no", "--supervised-steps", "0", "--steps", "6", "--name", "r")


def test_a_run_records_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrain_here: Callable[..., int]
) -> None:
    monkeypatch.chdir(tmp_path)
    splits = make_splits()
    arrays = {}
    for split in ("train", "val", "test"):
        store = getattr(splits, split)
        arrays |= {f"{split}_images": store.gather(torch.arange(len(store))), f"{split}_labels": store.labels}
    np.savez(tmp_path / "n.npz", **arrays)
    assert pretrain_here("--data", "n.npz", *FLAGS, "--knn-every", "1") == 0
    run = Path("runs/r")

    def read() -> list[dict[str, str]]:
        with (run / "results.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    first = read()
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"rankme"' in line][-1]
    assert last["step"] == 6
    assert len(first) > 1
    for row in first:
        assert float(row["rankme_embeddings"]) == pytest.approx(last["rankme"], rel=1e-4)
        assert float(row["rankme"]) > 1
        assert 0 <= float(row["cluster_knn"]) <= 1
    pack(read_study([Path("runs")]), ReportSettings(("runs",), archive="a.zip"), Path("a.zip"))
    for source in ("runs", "a.zip"):
        found = read_study([Path(source)]).rows
        for name in SCORES:
            assert list(found[name]) == [float(row[name]) for row in first]
    # Again, without the projector, which is not exported: what it said stays, unless it was of other features.
    evaluate(EvaluateSettings(str(run)))
    assert read() == first
    for name, value in (("rankme", "99.0"), ("rankme_embeddings", ""), ("rankme", "torn")):
        write_results([row | {name: value} for row in first], run / "results.csv")
        evaluate(EvaluateSettings(str(run)))
        assert read() == [row | {"rankme_embeddings": ""} for row in first]


def test_a_run_without_any_label_records_them_beside_its_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrain_here: Callable[..., int]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "bare.npz", train_images=RNG.integers(0, 256, (48, 12, 12, 3), dtype=np.uint8))
    assert pretrain_here("--data", "bare.npz", *FLAGS) == 0
    found = json.loads(Path("runs/r/environment.json").read_text())["scores_without_labels"]
    assert set(found) == set(SCORES)
    assert found["rankme"] > 1
    assert found["rankme_embeddings"] > 1
    assert 0 <= found["cluster_knn"] <= 1
