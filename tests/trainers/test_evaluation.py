"""Evaluation: features against a plain loop, every row and column of the table, the supervised reference."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amimv import InputError
from amimv.models.backbones import BackboneSpec, build_backbone, save_backbone
from amimv.pipelines import ImageStore, load_store
from amimv.pipelines.phantom import CLASS_NAMES, generate_phantom
from amimv.pipelines.stores import MULTI_LABEL, channel_statistics
from amimv.trainers import evaluate as command
from amimv.trainers.data import backbone_spec, load_split
from amimv.trainers.evaluate import EvaluateSettings, evaluate
from amimv.trainers.evaluation import (
    COLUMNS,
    Splits,
    evaluate_features,
    extract_features,
    print_table,
    train_supervised,
    write_results,
)
from amimv.trainers.settings import PretrainSettings, resolve, to_yaml

EXPECTED_COLUMNS = (
    "run,data,profile,rho,realised_ratio,n_train,method,recipe,sampler,features,probe,k,label_fraction,seed,"
    "accuracy,balanced_accuracy,macro_f1,auc,head,medium,tail,revision"
)
TRAIN_COUNTS = (20, 14, 10, 8, 6, 5, 4)


def make_store(images: Tensor, labels: Tensor, names: tuple[str, ...], split: str, task: str) -> ImageStore:
    mean, std = channel_statistics(images)
    return ImageStore(images, labels, "synthetic", split, names, task, torch.device("cpu"), mean, std)


def phantom_store(split: str, counts: tuple[int, ...]) -> ImageStore:
    images, labels = generate_phantom(split, seed=7, counts=counts)
    return make_store(images, labels, tuple(CLASS_NAMES), split, "multi-class")


@pytest.fixture(scope="module")
def tiny() -> Splits:
    even = (4,) * 7
    return Splits(phantom_store("train", TRAIN_COUNTS), phantom_store("val", even), phantom_store("test", even))


def settings_for(*flags: str) -> PretrainSettings:
    return resolve(["--supervised-steps", "2", "--batch-size", "16", *flags])[0]


def judged(settings: PretrainSettings, splits: Splits) -> list[dict]:
    spec = backbone_spec(settings, splits.train)
    torch.manual_seed(3)
    return evaluate_features(settings, splits, spec, build_backbone(spec).eval(), "abc", "r")[0]


def easy_store(split: str, per_class: int) -> ImageStore:
    """Three classes told apart by their colour alone."""
    rng = np.random.default_rng(("train", "val", "test").index(split))
    labels = torch.arange(3 * per_class) % 3
    images = rng.integers(40, 100, (len(labels), 28, 28, 3), dtype=np.uint8)
    images[np.arange(len(labels)), :, :, labels.numpy()] += 110
    return make_store(torch.from_numpy(images), labels, ("red", "green", "blue"), split, "multi-class")


def multi_label_store(split: str, n: int) -> ImageStore:
    """Two labels, each one a bright channel; some images carry both, some none."""
    rng = np.random.default_rng(("train", "val", "test").index(split))
    labels = torch.stack([torch.arange(n) % 2, (torch.arange(n) // 2) % 3 == 0], dim=1).long()
    images = rng.integers(40, 100, (n, 28, 28, 3), dtype=np.uint8)
    images[..., :2] += (110 * labels.numpy()[:, None, None, :]).astype(np.uint8)
    return make_store(torch.from_numpy(images), labels, ("a", "b"), split, MULTI_LABEL)


# Features


def plain_features(network: nn.Module | None, store: ImageStore, spec: BackboneSpec) -> Tensor:
    """One image at a time, in evaluation mode, at the store's own size."""
    rows = []
    for image in store.images:
        x = (image.double() / 255 - torch.tensor(spec.mean).double()) / torch.tensor(spec.std).double()
        x = x.permute(2, 0, 1)[None].float()
        rows.append(x.flatten(1) if network is None else network(x))
    return torch.cat(rows)


@pytest.mark.parametrize("training", [True, False])
def test_features_equal_a_plain_loop_and_leave_the_network_as_it_was(tiny: Splits, training: bool) -> None:
    # Statistics that are not the store's own: those of the spec count.
    spec = BackboneSpec(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    torch.manual_seed(0)
    network = build_backbone(spec)
    store = tiny.val.subset(torch.arange(9))
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 28, 28))  # moves BatchNorm's statistics away from their start
        expected = plain_features(network.eval(), store, spec)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train(training)
    features = extract_features(network, store, spec, chunk=4)
    assert network.training is training
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_raw_pixels_are_the_normalised_view(tiny: Splits) -> None:
    spec = BackboneSpec(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    features = extract_features(None, tiny.val, spec, chunk=5)
    assert features.shape == (28, 3 * 28 * 28)
    torch.testing.assert_close(features, plain_features(None, tiny.val, spec), rtol=1e-5, atol=1e-5)


def test_the_view_size_is_respected(tiny: Splits) -> None:
    spec = backbone_spec(settings_for("--view-size", "14"), tiny.train)
    assert spec.size == 14
    assert spec.mean == tiny.train.mean
    features = extract_features(None, tiny.val, spec)
    assert features.shape == (28, 3 * 14 * 14)
    # Half the size is the mean of 2 x 2 pixels, whatever the interpolation.
    whole = plain_features(None, tiny.val, spec).view(-1, 3, 14, 2, 14, 2).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(features, whole, rtol=1e-3, atol=1e-3)


# Rows


def test_rows_have_every_column_and_every_baseline(tiny: Splits) -> None:
    settings = settings_for("--label-fractions", "0.5", "1", "--sampler", "class-balanced")
    rows = judged(settings, tiny)
    assert ",".join(COLUMNS) == EXPECTED_COLUMNS
    assert all(set(row) == set(COLUMNS) for row in rows)
    kinds = [(row["features"], row["probe"]) for row in rows if row["label_fraction"] == 1.0]
    probed = [(name, p) for name in ("raw pixels", "random", "pretrained", "supervised") for p in ("knn", "linear")]
    assert kinds == [("majority", ""), *probed, ("supervised", "classifier")]
    assert kinds == [(row["features"], row["probe"]) for row in rows if row["label_fraction"] == 0.5]
    half = sum(max(1, round(0.5 * n)) for n in TRAIN_COUNTS)
    for row in rows:
        assert row["n_train"] == (sum(TRAIN_COUNTS) if row["label_fraction"] == 1 else half)
        own = row["features"] == "pretrained"
        named = ("mimv", "amimv-strength", "class-balanced") if own else ("", "", "")
        assert (row["method"], row["recipe"], row["sampler"]) == named
        assert (row["run"], row["revision"], row["data"]) == ("r", "abc", "synthetic")
        assert (row["profile"], row["rho"], row["seed"]) == ("exp", 1.0, 0)
        assert row["realised_ratio"] == (5.0 if row["label_fraction"] == 1 else 10 / 2)
        assert (row["k"] != "") == (row["probe"] == "knn")
        for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc", "head", "medium", "tail"):
            assert 0 <= row[name] <= 1


def test_the_majority_row_is_the_share_of_the_largest_training_class(tiny: Splits) -> None:
    test = phantom_store("test", (3, 5, 2, 2, 1, 1, 2))
    splits = replace(tiny, test=test)
    (row, *_) = judged(settings_for("--supervised-steps", "0"), splits)
    largest = int(torch.bincount(tiny.train.labels).argmax())
    assert row["features"] == "majority"
    assert row["accuracy"] == pytest.approx((test.labels == largest).double().mean().item(), abs=1e-6)
    assert row["balanced_accuracy"] == pytest.approx(1 / 7, abs=1e-6)
    assert row["auc"] == 0.5


def test_without_a_supervised_reference_and_again_the_same(tiny: Splits) -> None:
    settings = settings_for("--supervised-steps", "0")
    rows = judged(settings, tiny)
    assert "supervised" not in {row["features"] for row in rows}
    assert rows == judged(settings, tiny)


def test_the_random_row_is_the_networks_own_start(tiny: Splits) -> None:
    settings = settings_for("--supervised-steps", "0", "--seed", "5")
    spec = backbone_spec(settings, tiny.train)
    torch.manual_seed(5)
    rows, _ = evaluate_features(settings, tiny, spec, build_backbone(spec), "abc", "r")
    values = {
        (row["features"], row["probe"]): [row[name] for name in ("k", "accuracy", "auc", "macro_f1")] for row in rows
    }
    for probe in ("knn", "linear"):
        assert values["random", probe] == values["pretrained", probe]
        assert values["random", probe] != values["raw pixels", probe]


def test_grey_binary_real_data(real_data: Path) -> None:
    if not (real_data / "breastmnist.npz").is_file():
        pytest.skip(f"real data not found: no breastmnist.npz in {real_data}")
    train, val, test = (load_store("breastmnist", split=s, root=real_data) for s in ("train", "val", "test"))
    splits = Splits(train.subset(torch.arange(80)), val, test)
    rows = judged(settings_for("--data", "breastmnist"), splits)
    assert rows[0]["accuracy"] == pytest.approx((test.labels == 1).double().mean().item(), abs=1e-6)
    assert all(row["medium"] == "" for row in rows), "two classes have no third between them"
    assert {row["data"] for row in rows} == {"breastmnist"}
    assert next(row for row in rows if row["features"] == "raw pixels")["auc"] > 0.55


def test_multi_label(tmp_path: Path) -> None:
    splits = Splits(multi_label_store("train", 60), multi_label_store("val", 24), multi_label_store("test", 36))
    rows = judged(settings_for("--supervised-steps", "40", "--batch-size", "24", "--label-fractions", "1"), splits)
    found = {(row["features"], row["probe"]): row for row in rows}
    assert len(rows) == 10
    # Label a is on half of the images, b on a third: always "no" is right for 1/2 and 2/3.
    assert found["majority", ""]["accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2, abs=1e-6)
    assert found["raw pixels", "linear"]["accuracy"] > 0.95
    assert found["supervised", "classifier"]["accuracy"] > 0.9
    write_results(rows, tmp_path / "results.csv")


# The supervised reference


def test_supervised_training_learns_an_easy_set_and_is_deterministic() -> None:
    settings = resolve(["--supervised-steps", "40", "--batch-size", "24", "--hue", "0"])[0]
    train, test = easy_store("train", 16), easy_store("test", 20)
    spec = backbone_spec(settings, train)
    backbone, classifier = train_supervised(settings, spec, train, build_random(spec, 0, "cpu"))
    with torch.no_grad():
        logits = classifier(extract_features(backbone, test, spec))
    assert (logits.argmax(dim=1) == test.labels).double().mean() > 0.95
    assert not backbone.training
    torch.manual_seed(1234)  # what was drawn from the global generator before must not matter
    again, head = train_supervised(settings, spec, train, build_random(spec, 0, "cpu"))
    for one, other in ((backbone, again), (classifier, head)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_a_few_labels_are_normalised_as_all_images_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics of the spec count in training too, not those of the few labelled images."""
    from amimv.trainers import evaluation

    seen = []
    real_loader = evaluation.PairLoader

    def spy(*args: object, **kwargs: object) -> object:
        loader = real_loader(*args, **kwargs)  # type: ignore[arg-type]
        seen.extend((view.policy.mean, view.policy.std) for view in loader.recipe.views)
        return loader

    monkeypatch.setattr(evaluation, "PairLoader", spy)
    train = easy_store("train", 16)
    settings = settings_for("--supervised-steps", "1")
    spec = backbone_spec(settings, train)
    few = train.subset(torch.tensor([0, 1, 2, 3]))
    assert few.mean != train.mean
    train_supervised(settings, spec, few, build_random(spec, 0, "cpu"))
    assert seen == [(spec.mean, spec.std)]


@pytest.mark.parametrize("steps", [1, 5])
def test_supervised_training_takes_so_many_steps(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from amimv.trainers import evaluation

    factors = []
    real_schedule = evaluation.warmup_cosine

    def spy(step: int, total: int, warmup: int) -> float:
        factors.append((step, total))
        return real_schedule(step, total, warmup)

    monkeypatch.setattr(evaluation, "warmup_cosine", spy)
    train = easy_store("train", 3)
    settings = settings_for("--supervised-steps", str(steps), "--batch-size", "4")
    spec = backbone_spec(settings, train)
    train_supervised(settings, spec, train, build_random(spec, 0, "cpu"))  # two steps an epoch
    assert sorted(set(factors)) == [(step, steps) for step in range(steps)]  # once per parameter group


# Tables and the command


def test_the_table_file_is_whole_and_the_printed_one_readable(
    tiny: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = judged(settings_for("--supervised-steps", "0"), tiny)
    write_results(rows, tmp_path / "results.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    with (tmp_path / "results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert ",".join(read[0]) == EXPECTED_COLUMNS
    assert read == [{name: str(row[name]) for name in COLUMNS} for row in rows]
    print_table(rows, "the title")
    printed = capsys.readouterr().out
    for word in ("the title", "majority class", "raw pixels", "random", "pretrained", "kNN, k ="):
        assert word in printed
    pretrained = next(row for row in rows if row["features"] == "pretrained")
    assert f"{100 * pretrained['balanced_accuracy']:.1f}" in printed


def write_run(folder: Path, tiny: Splits) -> PretrainSettings:
    """A finished run as pre-training leaves it."""
    arrays = {}
    for split in ("train", "val", "test"):
        store = getattr(tiny, split)
        arrays |= {f"{split}_images": store.images.numpy(), f"{split}_labels": store.labels.numpy()}
    np.savez(folder / "own.npz", **arrays)
    settings, sources = resolve(["--data", str(folder / "own.npz"), "--supervised-steps", "0"])
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(to_yaml(settings, sources))
    spec = backbone_spec(settings, load_split(settings, "train", "cpu"))
    torch.manual_seed(3)
    save_backbone(build_backbone(spec), spec, folder / "run" / "backbone")
    return settings


def test_evaluate_scores_the_exported_backbone(tiny: Splits, tmp_path: Path) -> None:
    settings = write_run(tmp_path, tiny)
    evaluate(EvaluateSettings(str(tmp_path / "run"), label_fractions=(0.5, 1.0)))
    with (tmp_path / "run" / "results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert {row["label_fraction"] for row in read} == {"0.5", "1.0"}
    expected = judged(settings, tiny)
    for row, other in zip([row for row in read if row["label_fraction"] == "1.0"], expected, strict=True):
        assert row["features"] == other["features"]
        assert row["run"] == "run"
        assert float(row["accuracy"]) == pytest.approx(other["accuracy"], abs=1e-6)


@pytest.mark.parametrize("have_config", [False, True])
def test_evaluate_without_a_run_is_one_line_and_status_2(
    tiny: Splits,
    tmp_path: Path,
    have_config: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if have_config:
        write_run(tmp_path, tiny)
        (tmp_path / "run" / "backbone" / "model.safetensors").unlink()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert ("no exported backbone" if have_config else "holds no run") in line
    assert not (tmp_path / "run" / "results.csv").exists()


def test_evaluate_refuses_bad_fractions(tiny: Splits, tmp_path: Path) -> None:
    write_run(tmp_path, tiny)
    with pytest.raises(InputError, match="label fractions"):
        evaluate(EvaluateSettings(str(tmp_path / "run"), label_fractions=(1.5,)))
