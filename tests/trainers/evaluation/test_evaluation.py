"""Evaluation: features against a plain loop, every row, column and prediction, training on the labels."""

import copy
import csv
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch import Tensor, nn

from amimv import InputError
from amimv.models.backbones import BackboneSpec, build_backbone, save_backbone
from amimv.pipelines import ImageStore, load_store
from amimv.pipelines.recipes import ALIASES
from amimv.pipelines.sources.labels import MULTI_LABEL
from amimv.pipelines.sources.phantom import CLASS_NAMES, generate_phantom
from amimv.trainers import evaluate as command
from amimv.trainers.data import Splits, backbone_spec, load_split
from amimv.trainers.evaluate import EvaluateSettings, evaluate
from amimv.trainers.evaluation import (
    COLUMNS,
    Judged,
    best_supervised,
    build_random,
    extract_features,
    print_table,
    stream_features,
    supervised,
    train_supervised,
    write_results,
)
from amimv.trainers.evaluation import run as run_module
from amimv.trainers.evaluation.run import evaluate_features, evaluate_run, judge, supervised_settings
from amimv.trainers.layers import resolve, to_yaml
from amimv.trainers.run_folder import default_name
from amimv.trainers.settings import PretrainSettings

EXPECTED_COLUMNS = (
    "run,data,profile,rho,realised_ratio,total,n_train,method,recipe,sampler,partner,features,probe,k,label_fraction,"
    "label_seed,seed,steps,val_balanced_accuracy,accuracy,balanced_accuracy,macro_f1,auc,head,medium,tail,"
    "unleaked_balanced_accuracy,rankme,rankme_embeddings,cluster_knn,revision"
)
TRAIN_COUNTS = (20, 14, 10, 8, 6, 5, 4)


def make_store(images: Tensor, labels: Tensor, names: tuple[str, ...], split: str, task: str) -> ImageStore:
    return ImageStore.from_arrays(images, labels, name="synthetic", split=split, class_names=names, task=task)


def phantom_store(split: str, counts: tuple[int, ...]) -> ImageStore:
    images, labels = generate_phantom(split, seed=7, counts=counts)
    return make_store(images, labels, tuple(CLASS_NAMES), split, "multi-class")


@pytest.fixture(scope="module")
def tiny() -> Splits:
    even = (4,) * 7
    return Splits(phantom_store("train", TRAIN_COUNTS), phantom_store("val", even), phantom_store("test", even))


def settings_for(*flags: str) -> PretrainSettings:
    return resolve(["--supervised-steps", "2", "--batch-size", "16", *flags])[0]


def how(settings: PretrainSettings) -> dict:
    """Of `train_supervised`, all but the learning rate and what validation chooses."""
    return {name: value for name, value in supervised_settings(settings).items() if name not in ("lrs", "choices")}


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
    for image in store.gather(torch.arange(len(store))):
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
    # The fractions stand in rising order, however they were given.
    flags = ("--sampler", "class-balanced", "--partner", "square-root", "--steps", "9", "--finetune")
    rows = judged(settings_for("--label-fractions", "1", "0.5", *flags), tiny)
    assert ",".join(COLUMNS) == EXPECTED_COLUMNS
    assert all(set(row) == set(COLUMNS) for row in rows)
    kinds = [(row["features"], row["probe"]) for row in rows if row["label_fraction"] == 1.0]
    probed = [(name, p) for name in ("raw pixels", "random", "pretrained", "supervised") for p in ("knn", "linear")]
    probed.insert(6, ("pretrained", "fine-tuned"))
    assert kinds == [("majority", ""), *probed, ("supervised", "classifier")]
    assert [(row["features"], row["probe"]) for row in rows] == 2 * kinds
    assert [row["label_fraction"] for row in rows] == [0.5] * len(kinds) + [1.0] * len(kinds)
    half = sum(max(1, round(0.5 * n)) for n in TRAIN_COUNTS)
    for row in rows:
        assert row["n_train"] == (sum(TRAIN_COUNTS) if row["label_fraction"] == 1 else half)
        own = row["features"] == "pretrained"
        named = ("mimv", ALIASES["amimv"], "class-balanced", "square-root") if own else ("",) * 4
        assert (row["method"], row["recipe"], row["sampler"], row["partner"]) == named
        assert (row["total"], row["steps"]) == (0, 9)
        assert (row["run"], row["revision"], row["data"]) == ("r", "abc", "synthetic")
        assert (row["profile"], row["rho"], row["seed"]) == ("exp", 1.0, 0)
        assert row["realised_ratio"] == (5.0 if row["label_fraction"] == 1 else 10 / 2)
        assert (row["k"] != "") == (row["probe"] == "knn")
        for name in COLUMNS[COLUMNS.index("val_balanced_accuracy") : COLUMNS.index("unleaked_balanced_accuracy")]:
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
    backbone, classifier = train_supervised(build_random(spec, 0, "cpu"), train, spec, **how(settings))
    with torch.no_grad():
        logits = classifier(extract_features(backbone, test, spec))
    assert (logits.argmax(dim=1) == test.labels).double().mean() > 0.95
    assert not backbone.training
    torch.manual_seed(1234)  # what was drawn from the global generator before must not matter
    again, head = train_supervised(build_random(spec, 0, "cpu"), train, spec, **how(settings))
    for one, other in ((backbone, again), (classifier, head)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_a_few_labels_are_normalised_as_all_images_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics of the spec count in training too, not those of the few labelled images."""
    seen = []
    real_loader = supervised.PairLoader

    def spy(*args: object, **kwargs: object) -> object:
        loader = real_loader(*args, **kwargs)  # type: ignore[arg-type]
        seen.extend((view.policy.mean, view.policy.std) for view in loader.recipe.views)
        return loader

    monkeypatch.setattr(supervised, "PairLoader", spy)
    train = easy_store("train", 16)
    settings = settings_for("--supervised-steps", "1")
    spec = backbone_spec(settings, train)
    few = train.subset(torch.tensor([0, 1, 2, 3]))
    assert few.mean != train.mean
    train_supervised(build_random(spec, 0, "cpu"), few, spec, **how(settings))
    assert seen == [(spec.mean, spec.std)]


@pytest.mark.parametrize("steps", [1, 5])
def test_supervised_training_takes_so_many_steps(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = []
    real_schedule = supervised.warmup_cosine

    def spy(step: int, total: int, warmup: int) -> float:
        factors.append((step, total))
        return real_schedule(step, total, warmup)

    monkeypatch.setattr(supervised, "warmup_cosine", spy)
    train = easy_store("train", 3)
    settings = settings_for("--supervised-steps", str(steps), "--batch-size", "4")
    spec = backbone_spec(settings, train)
    train_supervised(build_random(spec, 0, "cpu"), train, spec, **how(settings))  # two steps an epoch
    assert sorted(set(factors)) == [(step, steps) for step in range(steps)]  # once per parameter group


# Training on the labels: from scratch, fine-tuned, at several rates


def state_of(*networks: nn.Module) -> list[Tensor]:
    """All parameters and buffers, apart from the networks."""
    return [value.clone() for network in networks for value in network.state_dict().values()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def pretrained_backbone(spec: BackboneSpec) -> nn.Module:
    """Not a start of any seed: BatchNorm's statistics and the weights have moved."""
    torch.manual_seed(11)
    backbone = build_backbone(spec)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
        backbone.train()(torch.randn(16, 3, 28, 28))
    return backbone.eval()


def easy_splits() -> Splits:
    return Splits(easy_store("train", 16), easy_store("val", 8), easy_store("test", 10))


def found_by(settings: PretrainSettings, splits: Splits, pretrained: nn.Module | None, probe: str) -> Judged:
    spec = backbone_spec(settings, splits.train)
    (one,) = [j for _, j in judge(settings, splits, spec, pretrained) if j.probe == probe]
    return one


def plain_scores(network: tuple[nn.Module, nn.Module], store: ImageStore, spec: BackboneSpec) -> Tensor:
    with torch.no_grad():
        return network[1](plain_features(network[0], store, spec)).softmax(dim=1)


@pytest.mark.parametrize("training", [True, False])
def test_fine_tuning_leaves_the_backbone_as_it_was(training: bool) -> None:
    splits = easy_splits()
    settings = settings_for("--finetune", "--supervised-steps", "3", "--supervised-lr", "0.01", "0.001")
    spec = backbone_spec(settings, splits.train)
    backbone = pretrained_backbone(spec).train(training)
    before = state_of(backbone)
    wanted = [parameter.requires_grad for parameter in backbone.parameters()]
    rows, _ = evaluate_features(settings, splits, spec, backbone, "abc", "r")
    assert ("pretrained", "fine-tuned") in [(row["features"], row["probe"]) for row in rows]
    assert equal(state_of(backbone), before)
    assert [parameter.requires_grad for parameter in backbone.parameters()] == wanted
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert backbone.training is training


def test_fine_tuning_starts_from_the_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = easy_splits()
    flags = ("--finetune", "--supervised-steps", "3", "--batch-size", "24", "--label-fractions", "0.5", "1")
    settings = settings_for(*flags, "--supervised-lr", "0.002", "0.001", "--baselines", "no")
    spec = backbone_spec(settings, splits.train)
    backbone = pretrained_backbone(spec)
    starts, rates, train = [], [], supervised.train_supervised

    def spy(start: nn.Module, store: ImageStore, like: BackboneSpec, *, lr: float, **settings: object) -> object:
        starts.append(state_of(start))
        rates.append((len(store), lr))
        return train(start, store, like, lr=lr, **settings)

    monkeypatch.setattr(supervised, "train_supervised", spy)
    list(judge(settings, splits, spec, backbone))
    # Every training, also the second at that rate and that of the next fraction, starts where pre-training ended.
    assert rates == [(24, 0.002), (24, 0.001), (48, 0.002), (48, 0.001)]
    assert all(equal(start, state_of(backbone)) for start in starts)


def test_a_fine_tuned_row_is_a_training_from_there() -> None:
    splits = easy_splits()
    flags = ("--finetune", "--supervised-steps", "4", "--batch-size", "24", "--supervised-lr", "0.002")
    settings = settings_for(*flags)
    spec = backbone_spec(settings, splits.train)
    backbone = pretrained_backbone(spec)
    one = found_by(settings, splits, backbone, "fine-tuned")
    assert (one.features, one.k) == ("pretrained", "")
    network = train_supervised(copy.deepcopy(backbone), splits.train, spec, lr=0.002, **how(settings))
    for scores, store in ((one.val, splits.val), (one.test, splits.test)):
        torch.testing.assert_close(scores, plain_scores(network, store, spec), rtol=1e-3, atol=1e-4)
    assert not equal(state_of(network[0]), state_of(backbone)), "the backbone is trained, too"
    scratch = train_supervised(build_random(spec, 0, "cpu"), splits.train, spec, lr=0.002, **how(settings))
    assert (one.test - plain_scores(scratch, splits.test, spec)).abs().max() > 0.01


@pytest.mark.parametrize("pretrained", [True, False])
def test_the_supervised_row_is_a_training_from_the_runs_random_start(pretrained: bool) -> None:
    splits = easy_splits()
    settings = settings_for("--supervised-steps", "4", "--batch-size", "24", "--seed", "5", "--finetune")
    spec = backbone_spec(settings, splits.train)
    one = found_by(settings, splits, pretrained_backbone(spec) if pretrained else None, "classifier")
    assert one.features == "supervised"
    torch.manual_seed(5)
    network = train_supervised(build_backbone(spec), splits.train, spec, **how(settings))
    for scores, store in ((one.val, splits.val), (one.test, splits.test)):
        torch.testing.assert_close(scores, plain_scores(network, store, spec), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rates", [("1e-9", "0.005"), ("0.005", "1e-9")])
@pytest.mark.slow
def test_a_rate_that_cannot_learn_is_not_taken(rates: tuple[str, str]) -> None:
    splits = easy_splits()
    flags = ("--supervised-steps", "40", "--batch-size", "24", "--hue", "0", "--baselines", "only")
    one = found_by(settings_for(*flags, "--supervised-lr", *rates), splits, None, "classifier")
    alone = found_by(settings_for(*flags, "--supervised-lr", "0.005"), splits, None, "classifier")
    lost = found_by(settings_for(*flags, "--supervised-lr", "1e-9"), splits, None, "classifier")
    assert balanced_accuracy_score(splits.val.labels, one.val.argmax(1)) > 0.9
    assert balanced_accuracy_score(splits.val.labels, lost.val.argmax(1)) < 0.7
    assert torch.equal(one.val, alone.val)
    assert torch.equal(one.test, alone.test)


def with_accuracy(labels: Tensor, right: int) -> Tensor:
    """Scores that are right for so many images of each class."""
    seen, rows = [0, 0, 0], []
    for label in labels.tolist():
        rows.append(label if seen[label] < right else (label + 1) % 3)
        seen[label] += 1
    return nn.functional.one_hot(torch.tensor(rows), 3).float()


@pytest.mark.parametrize(
    ("val", "test", "taken"),
    [
        ((2, 7, 5), (9, 1, 5), 1),  # best on val, worst on test
        ((7, 2, 5), (1, 9, 5), 0),
        ((2, 5, 7), (9, 5, 1), 2),
        ((2, 7, 7), (1, 3, 9), 1),  # of equals the first, although a later one is better on test
    ],
)
def test_the_rate_is_chosen_on_val_and_never_on_test(
    monkeypatch: pytest.MonkeyPatch, val: tuple[int, ...], test: tuple[int, ...], taken: int
) -> None:
    splits = easy_splits()
    rates = (0.1, 0.2, 0.3)
    backbones = {rate: nn.Identity() for rate in rates}
    right = {"val": val, "test": test}

    def train(*args: object, lr: float) -> object:
        return backbones[lr], nn.Identity()

    def classify(network: tuple[nn.Module, nn.Module], store: ImageStore, spec: BackboneSpec) -> Tensor:
        i = [backbones[rate] for rate in rates].index(network[0])  # type: ignore[arg-type]
        return with_accuracy(store.labels, right[store.split][i])

    monkeypatch.setattr(supervised, "train_supervised", train)
    monkeypatch.setattr(supervised, "classify", classify)
    network, *scores = best_supervised(nn.Identity(), splits.train, splits.val, splits.test, lrs=rates)
    assert network is backbones[rates[taken]]
    assert torch.equal(scores[0], with_accuracy(splits.val.labels, val[taken]))
    assert torch.equal(scores[1], with_accuracy(splits.test.labels, test[taken]))


def test_the_labels_of_test_decide_nothing(tiny: Splits) -> None:
    flags = ("--finetune", "--supervised-steps", "3", "--supervised-lr", "0.005", "0.0005")
    settings = settings_for(*flags, "--label-fractions", "0.5", "1")
    spec = backbone_spec(settings, tiny.train)
    swapped = replace(tiny, test=replace(tiny.test, labels=(tiny.test.labels + 3) % 7))
    results = [evaluate_features(settings, s, spec, pretrained_backbone(spec), "abc", "r") for s in (tiny, swapped)]
    (rows, arrays), (other_rows, other_arrays) = results
    for name in ("features", "probe", "k", "label_fraction", "val_balanced_accuracy"):
        assert [row[name] for row in rows] == [row[name] for row in other_rows], name
    for name in set(arrays) - {"labels"}:
        assert np.array_equal(arrays[name], other_arrays[name]), name
    assert [row["accuracy"] for row in rows] != [row["accuracy"] for row in other_rows]


@pytest.mark.parametrize(
    ("flags", "pretrained"),
    [
        (("--baselines", "only", "--finetune"), False),
        (("--baselines", "no", "--finetune"), True),
        (("--baselines", "no", "--finetune", "--supervised-steps", "0"), True),
        (("--baselines", "yes", "--finetune", "--supervised-steps", "0"), True),
        (("--baselines", "yes"), True),
    ],
)
def test_which_rows_there_are(tiny: Splits, flags: tuple[str, ...], pretrained: bool) -> None:
    # Of earlier versions there may be runs with settings that are refused together now.
    settings = settings_for(*(flag for flag in flags if flag not in ("--finetune", "--supervised-steps", "0")))
    steps = "--supervised-steps" not in flags
    settings = replace(settings, finetune="--finetune" in flags, supervised_steps=2 if steps else 0)
    spec = backbone_spec(settings, tiny.train)
    rows, arrays = evaluate_features(
        settings, tiny, spec, pretrained_backbone(spec) if pretrained else None, "abc", "r"
    )
    expected = []
    if "no" not in flags:
        expected += [("majority", ""), *((name, p) for name in ("raw pixels", "random") for p in ("knn", "linear"))]
    if pretrained:
        expected += [("pretrained", "knn"), ("pretrained", "linear")]
        expected += [("pretrained", "fine-tuned")] if "--finetune" in flags and steps else []
    if "no" not in flags and steps:
        expected += [("supervised", probe) for probe in ("knn", "linear", "classifier")]
    assert [(row["features"], row["probe"]) for row in rows] == expected
    assert ("projection" in arrays) is pretrained


# Val, and every prediction


@pytest.mark.slow
def test_the_score_on_val_is_that_of_the_scores_on_val(tiny: Splits) -> None:
    splits = replace(tiny, val=phantom_store("val", (9, 5, 4, 3, 3, 2, 2)))
    settings = settings_for("--finetune", "--supervised-steps", "4", "--label-fractions", "0.5", "1")
    spec = backbone_spec(settings, splits.train)
    rows, _ = evaluate_features(settings, splits, spec, pretrained_backbone(spec), "abc", "r")
    expected = {}
    for draw, one in judge(settings, splits, spec, pretrained_backbone(spec)):
        assert one.val.shape == (28, 7)
        score = balanced_accuracy_score(splits.val.labels.numpy(), one.val.numpy().argmax(1))
        expected[draw.fraction, one.features, one.probe] = score
    assert len(rows) == len(expected) == 22
    for row in rows:
        score = expected[row["label_fraction"], row["features"], row["probe"]]
        assert row["val_balanced_accuracy"] == pytest.approx(score, abs=1e-6), row
    assert [row["val_balanced_accuracy"] for row in rows] != [row["balanced_accuracy"] for row in rows]


def read_run(folder: Path) -> tuple[list[dict[str, str]], dict[str, np.ndarray]]:
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
        return rows, dict(arrays)


def test_every_rows_predictions_give_its_accuracies(tiny: Splits, tmp_path: Path) -> None:
    rising = TRAIN_COUNTS[::-1]
    splits = replace(tiny, train=phantom_store("train", rising), test=phantom_store("test", (8, 6, 5, 4, 3, 2, 2)))
    # With 5 % every class has one label, and still the training images say which are head and tail.
    flags = ("--supervised-steps", "4", "--finetune", "--label-fractions", "1", "0.05", "--batch-size", "16")
    write_run(tmp_path, splits, *flags)
    evaluate(EvaluateSettings(str(tmp_path / "run")))
    rows, arrays = read_run(tmp_path / "run")
    named = {"labels", "train_counts", "class_names", "projection"}
    assert set(arrays) == named | {f"row_{i:03d}" for i in range(len(rows))}
    assert len(rows) == 22
    assert np.array_equal(arrays["labels"], splits.test.labels.numpy())
    assert arrays["train_counts"].tolist() == list(rising)
    assert arrays["class_names"].tolist() == [str(c) for c in range(7)]
    for i, row in enumerate(rows):
        predicted = arrays[f"row_{i:03d}"]
        assert predicted.shape == (30,)
        expected = accuracy_score(arrays["labels"], predicted), balanced_accuracy_score(arrays["labels"], predicted)
        assert (float(row["accuracy"]), float(row["balanced_accuracy"])) == pytest.approx(expected, abs=1e-6), row
        right = predicted == arrays["labels"]
        recall = [right[arrays["labels"] == c].mean() for c in range(7)]
        thirds = [sum(recall[c] for c in ids) / len(ids) for ids in ((6, 5), (4, 3, 2), (1, 0))]
        assert [float(row[name]) for name in ("head", "medium", "tail")] == pytest.approx(thirds, abs=1e-6), row
    assert len({arrays[f"row_{i:03d}"].tobytes() for i in range(len(rows))}) > 10, "rows differ"


def test_the_projection_is_that_of_principal_components(tiny: Splits) -> None:
    settings = settings_for("--supervised-steps", "0", "--baselines", "no")
    spec = backbone_spec(settings, tiny.train)
    backbone = pretrained_backbone(spec)
    _, arrays = evaluate_features(settings, tiny, spec, backbone, "abc", "r")
    with torch.no_grad():
        features = plain_features(backbone, tiny.test, spec).double().numpy()
    u, s, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    assert s[1] > 1.05 * s[2], "two components that are told apart from the rest"
    assert s[0] > 1.05 * s[1]
    expected = u[:, :2] * s[:2]
    found = arrays["projection"]
    assert (found.shape, found.dtype) == ((28, 2), np.float32)
    found = found * np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found, expected, atol=2e-3 * s[0] / len(found) ** 0.5)


def test_predictions_are_there_before_the_results(
    tiny: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """results.csv says that a run is done, so whatever else it leaves stands by then."""
    settings = write_run(tmp_path, tiny, "--baselines", "no")
    folder = tmp_path / "run"
    seen = []

    def write(rows: list[dict], path: Path) -> None:
        with np.load(folder / "predictions.npz") as arrays:
            seen.append(set(arrays))
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_results", write)
        with pytest.raises(OSError, match="the disk is full"):
            evaluate_run(settings, folder, tiny)
    assert seen == [{"labels", "train_counts", "class_names", "projection", "row_000", "row_001"}]
    assert not (folder / "results.csv").exists()

    (folder / "predictions.npz").unlink()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", fail)
        with pytest.raises(OSError, match="the disk is full"):
            evaluate_run(settings, folder, tiny)
    assert not (folder / "results.csv").exists()
    assert not (folder / "predictions.npz").exists()
    assert evaluate_run(settings, folder, tiny) > 0
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "backbone", "predictions.npz", "results.csv"}


@pytest.mark.slow
def test_multi_hot_labels_of_an_own_file_are_judged_and_fine_tuned(tmp_path: Path) -> None:
    splits = Splits(multi_label_store("train", 60), multi_label_store("val", 24), multi_label_store("test", 36))
    flags = ("--supervised-steps", "40", "--finetune", "--batch-size", "24", "--supervised-lr", "1e-9", "5e-3")
    write_run(tmp_path, splits, *flags)
    before = (tmp_path / "run" / "backbone" / "model.safetensors").read_bytes()
    evaluate(EvaluateSettings(str(tmp_path / "run")))
    assert (tmp_path / "run" / "backbone" / "model.safetensors").read_bytes() == before
    rows, arrays = read_run(tmp_path / "run")
    assert len(rows) == 11
    truth = splits.test.labels.numpy()
    assert np.array_equal(arrays["labels"], truth)
    for i, row in enumerate(rows):
        predicted = arrays[f"row_{i:03d}"]
        assert predicted.shape == truth.shape
        balanced = np.mean([balanced_accuracy_score(truth[:, c], predicted[:, c]) for c in range(2)])
        expected = (predicted == truth).mean(), balanced
        assert (float(row["accuracy"]), float(row["balanced_accuracy"])) == pytest.approx(expected, abs=1e-6), row
    found = {(row["features"], row["probe"]): row for row in rows}
    for kind in (("pretrained", "fine-tuned"), ("supervised", "classifier")):
        assert float(found[kind]["accuracy"]) > 0.9, kind
        assert float(found[kind]["val_balanced_accuracy"]) > 0.85, kind


@pytest.mark.slow
def test_the_score_on_val_of_multi_hot_labels() -> None:
    splits = Splits(multi_label_store("train", 60), multi_label_store("val", 24), multi_label_store("test", 36))
    settings = settings_for("--supervised-steps", "6", "--finetune", "--batch-size", "24")
    spec = backbone_spec(settings, splits.train)
    rows, _ = evaluate_features(settings, splits, spec, pretrained_backbone(spec), "abc", "r")
    truth, expected = splits.val.labels.numpy(), {}
    for _, one in judge(settings, splits, spec, pretrained_backbone(spec)):
        assert -1e-6 < float(one.val.min()) <= float(one.val.max()) < 1 + 1e-6
        predicted = one.val.numpy() > 0.5
        score = np.mean([balanced_accuracy_score(truth[:, c], predicted[:, c]) for c in range(2)])
        expected[one.features, one.probe] = score
    assert {(r["features"], r["probe"]): r["val_balanced_accuracy"] for r in rows} == pytest.approx(expected, abs=1e-6)


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


def write_run(folder: Path, splits: Splits, *flags: str) -> PretrainSettings:
    """A finished run as pre-training leaves it."""
    arrays = {}
    for split in ("train", "val", "test"):
        store = getattr(splits, split)
        arrays |= {
            f"{split}_images": store.gather(torch.arange(len(store))).numpy(),
            f"{split}_labels": store.known_labels("a test").numpy(),
        }
    np.savez(folder / "own.npz", **arrays)
    settings, sources = resolve(["--data", str(folder / "own.npz"), "--supervised-steps", "0", *flags])
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


def test_given_indices_are_told_as_such(tiny: Splits, tmp_path: Path) -> None:
    """Also of a run that an earlier version started with a ratio, which it did not use."""
    indices = np.arange(0, len(tiny.train), 2)
    np.save(tmp_path / "some.npy", indices)
    settings = write_run(tmp_path, tiny, "--indices", str(tmp_path / "some.npy"))
    for rho in ("1.0", "100.0"):
        config = tmp_path / "run" / "config.yaml"
        config.write_text(config.read_text().replace("rho: 1.0", f"rho: {rho}"))
        evaluate(EvaluateSettings(str(tmp_path / "run")))
        rows, _ = read_run(tmp_path / "run")
        told = {(row["profile"], row["rho"], row["total"], row["n_train"]) for row in rows}
        assert told == {("indices", "", str(len(indices)), str(len(indices)))}
        counts = np.bincount(tiny.train.labels.numpy()[indices])
        assert {float(row["realised_ratio"]) for row in rows} == {round(counts.max() / counts.min(), 4)}
    assert "indices" in default_name(settings)
    assert "rho" not in default_name(settings)


def test_no_partner_is_told_of_a_recipe_without_one(tiny: Splits, tmp_path: Path) -> None:
    write_run(tmp_path, tiny, "--method", "simclr", "--partner", "class-balanced")
    evaluate(EvaluateSettings(str(tmp_path / "run")))
    assert {row["partner"] for row in read_run(tmp_path / "run")[0]} == {""}


def test_evaluate_refuses_bad_fractions(tiny: Splits, tmp_path: Path) -> None:
    write_run(tmp_path, tiny)
    with pytest.raises(InputError, match="label fractions"):
        evaluate(EvaluateSettings(str(tmp_path / "run"), label_fractions=(1.5,)))


def test_a_run_of_baselines_only_is_evaluated_again(tiny: Splits, tmp_path: Path) -> None:
    """It has no backbone to be read."""
    write_run(tmp_path, tiny, "--baselines", "only")
    for path in (tmp_path / "run" / "backbone").iterdir():
        path.unlink()
    (tmp_path / "run" / "backbone").rmdir()
    evaluate(EvaluateSettings(str(tmp_path / "run")))
    rows, arrays = read_run(tmp_path / "run")
    assert {row["features"] for row in rows} == {"majority", "raw pixels", "random"}
    assert "projection" not in arrays


def test_a_rate_that_diverges_is_passed_over_and_all_of_them_are_an_error(tiny: Splits) -> None:
    settings = settings_for("--supervised-lr", "1e30", "1e-4", "--supervised-steps", "4")
    spec = backbone_spec(settings, tiny.train)
    start = build_random(spec, 0, "cpu")
    stores = (tiny.train, tiny.val, tiny.test, spec)
    _, val, _ = best_supervised(start, *stores, **supervised_settings(settings))
    assert val.isfinite().all()
    with pytest.raises(InputError, match=r"diverged at every learning rate \(1e\+30\)"):
        best_supervised(start, *stores, **supervised_settings(replace(settings, supervised_lr=(1e30,))))


# The library alone


def test_nothing_in_it_knows_of_runs() -> None:
    """All but what composes it for them."""
    modules = sorted(Path(run_module.__file__).parent.glob("*.py"))
    known = {path.name: set(re.findall(r"from (amimv\.trainers\.\S+) import", path.read_text())) for path in modules}
    assert "amimv.trainers.settings" in known.pop("run.py")
    assert len(known) >= 6
    within = {f"amimv.trainers.evaluation.{path.stem}" for path in modules} - {"amimv.trainers.evaluation.run"}
    assert set().union(*known.values()) <= within | {"amimv.trainers.schedules"}


def test_images_are_rendered_by_their_own_statistics_or_anothers(tiny: Splits) -> None:
    own, train = tiny.test, tiny.train
    assert own.mean != train.mean
    for like in (own, train):
        spec = BackboneSpec(size=28, mean=like.mean, std=like.std)
        expected = plain_features(None, own, spec)
        torch.testing.assert_close(extract_features(None, own, like, chunk=9), expected, rtol=0, atol=2e-5)
    assert torch.equal(extract_features(None, own), extract_features(None, own, own))


def test_a_network_that_gives_no_features_is_one_line(tiny: Splits) -> None:
    with pytest.raises(InputError, match=r"gives \(28, 16, 26, 26\), expected features \(B, D\)"):
        extract_features(nn.Conv2d(3, 16, 3), tiny.test)


def test_training_on_labels_needs_them(tiny: Splits) -> None:
    with pytest.raises(InputError, match="supervised training needs labels"):
        train_supervised(nn.Identity(), replace(tiny.train, labels=None))


def test_features_come_in_parts_that_nobody_keeps(tiny: Splits) -> None:
    parts = [weakref.ref(part) for part in stream_features(None, tiny.test, chunk=10)]
    assert len(parts) == 3
    assert not any(part() is not None for part in parts)
    whole = torch.cat(list(stream_features(None, tiny.test, chunk=10)))
    assert torch.equal(whole, extract_features(None, tiny.test, chunk=10))
