"""Options of training on labels: losses, mixup, smoothing, samplers, and what validation chooses."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amimv import InputError
from amimv.models.backbones import build_backbone
from amimv.models.supervised_losses import balanced_softmax_loss, cross_entropy_loss
from amimv.pipelines import ImageStore
from amimv.pipelines.sources.phantom import CLASS_NAMES, generate_phantom
from amimv.trainers.data import backbone_spec
from amimv.trainers.evaluation import best_supervised, supervised, train_supervised
from amimv.trainers.evaluation.run import supervised_settings
from amimv.trainers.layers import resolve

COUNTS = (24, 14, 10, 8, 6, 5, 4)


def store_of(split: str) -> ImageStore:
    images, labels = generate_phantom(split, seed=7, counts=COUNTS)
    return ImageStore.from_arrays(images, labels, name="synthetic", split=split, class_names=tuple(CLASS_NAMES))


@pytest.fixture(scope="module")
def train() -> ImageStore:
    return store_of("train")


@pytest.fixture(scope="module")
def start(train: ImageStore) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(backbone_spec(resolve(["--steps", "1"])[0], train))


def weights(start: nn.Module, train: ImageStore, **how: Any) -> Tensor:
    network = train_supervised(copy.deepcopy(start), train, steps=3, batch_size=16, **how)
    return torch.cat([p.detach().flatten() for part in network for p in part.parameters()])


def test_every_option_changes_the_training_and_its_neutral_value_does_not(start: nn.Module, train: ImageStore) -> None:
    plain = weights(start, train)
    neutral = {"mixup": 0.0, "smoothing": 0.0, "loss": cross_entropy_loss, "sampler": "class-balanced"}
    assert torch.equal(weights(start, train, **neutral), plain)
    options: tuple[dict[str, Any], ...] = (
        {"mixup": 0.4},
        {"smoothing": 0.1},
        {"sampler": "uniform"},
        {"loss": balanced_softmax_loss},
    )
    found = [weights(start, train, **one) for one in options]
    assert not any(torch.equal(one, other) for i, one in enumerate(found) for other in (plain, *found[:i]))
    assert torch.equal(weights(start, train, mixup=0.4), found[0])  # the seed decides the shares


def test_a_mixed_batch_is_the_sum_of_two_and_so_is_its_target() -> None:
    view, labels = torch.randn(6, 3, 4, 4), torch.arange(6)
    mixed, parts = supervised._mixed(view, labels, 0.5, np.random.default_rng(3))
    (share, own), (rest, other) = parts
    assert torch.equal(own, labels)
    assert share + rest == 1
    torch.testing.assert_close(mixed, torch.stack([share * view[i] + rest * view[j] for i, j in enumerate(other)]))
    shares = [supervised._mixed(view, labels, 0.5, np.random.default_rng(i))[1][0][0] for i in range(400)]
    # The variance of Beta(a, a) is 1 / (4 (2 a + 1)).
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert np.var(shares) == pytest.approx(1 / 8, abs=0.02)


def test_the_counts_are_those_of_the_labelled_images(start: nn.Module, train: ImageStore) -> None:
    seen = []

    def loss(logits: Tensor, labels: Tensor, counts: list[int], **how: Any) -> Tensor:
        seen.append(tuple(counts))
        return balanced_softmax_loss(logits, labels, counts, **how)

    weights(start, train, loss=loss)
    assert set(seen) == {COUNTS}


def test_what_validation_chooses_is_the_best_of_all_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [store_of(split) for split in ("train", "val", "test")]
    tried = []

    def train_as_told(backbone: nn.Module, *args: Any, **how: Any) -> tuple[nn.Module, float]:
        tried.append((how["lr"], how["steps"], how["mixup"]))
        return backbone, how["lr"] * how["steps"] - how["mixup"]

    def classify(network: tuple[nn.Module, float], store: ImageStore, like: object) -> Tensor:
        n = round(network[1])  # so many images are answered rightly
        assert store.labels is not None
        answers = torch.where(torch.arange(len(store)) < n, store.labels, (store.labels + 1) % 7)
        return torch.nn.functional.one_hot(answers, 7).float()

    monkeypatch.setattr(supervised, "train_supervised", train_as_told)
    monkeypatch.setattr(supervised, "classify", classify)
    choices = {"steps": (10, 30), "mixup": (5.0, 0.0)}
    _, val, _ = best_supervised(nn.Identity(), *stores, lrs=(1, 2), choices=choices, steps=4)
    assert tried == [(lr, steps, mixup) for lr in (1, 2) for steps in (10, 30) for mixup in (5.0, 0.0)]
    assert torch.equal(val, classify((nn.Identity(), 60.0), stores[1], None))


def test_settings_say_what_is_tried() -> None:
    flags = ("--supervised-steps", "300", "--supervised-more-steps", "900", "--supervised-mixup", "0", "0.2")
    flags += ("--supervised-smoothing", "0.1", "--supervised-sampler", "uniform", "--supervised-loss")
    how = supervised_settings(resolve([*flags, "balanced-softmax"])[0])
    assert how["choices"] == {"steps": (300, 900), "mixup": (0.0, 0.2), "smoothing": (0.1,)}
    assert (how["loss"], how["sampler"]) == (balanced_softmax_loss, "uniform")
    plain = supervised_settings(resolve([])[0])
    assert (plain["loss"], plain["sampler"]) == (cross_entropy_loss, "class-balanced")
    assert {len(values) for values in plain["choices"].values()} == {1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--supervised-loss", "logit-adjusted"),
            "corrects for the classes' counts, and so does the supervised sampler",
        ),
        (("--supervised-mixup", "-1"), "one or more alphas of at least 0"),
        (("--supervised-smoothing", "1"), r"shares in \[0, 1\)"),
        (("--supervised-more-steps", "0"), "numbers of steps of at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(list(flags))
