"""Several draws of the labels from one pre-training: which labels, which rows, and what cannot be drawn."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from amimv import InputError
from amimv.models.backbones import build_backbone
from amimv.pipelines import ImageStore, distinct_draws, label_fraction
from amimv.pipelines.sources.phantom import CLASS_NAMES, generate_phantom
from amimv.trainers.data import Splits, backbone_spec, load_held_out
from amimv.trainers.evaluation import knn_probe, print_table
from amimv.trainers.evaluation import run as run_module
from amimv.trainers.evaluation.features import extract_features
from amimv.trainers.evaluation.run import evaluate_features, supervised_settings
from amimv.trainers.evaluation.supervised import best_supervised
from amimv.trainers.label_draws import draw_labels
from amimv.trainers.layers import resolve
from amimv.trainers.settings import PretrainSettings

FLAGS = ("--label-fractions", "0.5", "1", "--supervised-steps", "2", "--batch-size", "16", "--steps", "1")


def settings_for(*flags: str) -> PretrainSettings:
    return resolve([*FLAGS, *flags])[0]


def phantom_store(split: str, counts: Sequence[int]) -> ImageStore:
    images, labels = generate_phantom(split, seed=7, counts=tuple(counts))
    return ImageStore.from_arrays(images, labels, name="synthetic", split=split, class_names=tuple(CLASS_NAMES))


@pytest.fixture(scope="module")
def tiny() -> Splits:
    counts = (20, 14, 10, 8, 6, 5, 4)
    return Splits(phantom_store("train", counts), *(phantom_store(split, (4,) * 7) for split in ("val", "test")))


@pytest.fixture(scope="module")
def network(tiny: Splits) -> nn.Module:
    torch.manual_seed(3)
    return build_backbone(backbone_spec(settings_for(), tiny.train)).eval()


def rows_of(settings: PretrainSettings, splits: Splits, network: nn.Module) -> tuple[list[dict[str, Any]], dict]:
    return evaluate_features(settings, splits, backbone_spec(settings, splits.train), network, "abc", "r")


def without_draw(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "label_seed"} for row in rows]


@pytest.mark.slow
def test_each_draw_has_the_rows_of_an_evaluation_with_that_data_seed(tiny: Splits, network: nn.Module) -> None:
    several, arrays = rows_of(settings_for("--label-seeds", "5", "0", "9", "--finetune"), tiny, network)
    assert {row["label_seed"] for row in several if row["label_fraction"] == 1} == {""}
    one_draw = len([row for row in several if row["label_fraction"] == 1])
    assert len(several) == 4 * one_draw
    assert {"row_000", f"row_{len(several) - 1:03d}"} < set(arrays)
    for seed in (5, 0, 9):
        rows, alone = rows_of(settings_for("--data-seed", str(seed), "--finetune"), tiny, network)
        assert {row["label_seed"] for row in rows} == {seed, ""}
        own = [i for i, row in enumerate(several) if row["label_seed"] in (seed, "")]
        assert without_draw([several[i] for i in own]) == without_draw(rows)
        for place, i in enumerate(own):
            assert (arrays[f"row_{i:03d}"] == alone[f"row_{place:03d}"]).all()


def test_a_draw_gives_the_probe_and_the_fine_tuning_the_same_labels(tiny: Splits, network: nn.Module) -> None:
    settings = settings_for("--label-seeds", "1", "2", "--finetune")
    spec = backbone_spec(settings, tiny.train)
    found = {(d.fraction, d.seed, j.probe): j for d, j in run_module.judge(settings, tiny, spec, network)
             if j.features == "pretrained"}  # fmt: skip
    for seed in (1, 2):
        labelled = tiny.train.subset(label_fraction(tiny.train.labels, 0.5, seed))
        train, val, test = (extract_features(network, one, spec) for one in (labelled, tiny.val, tiny.test))
        scores, _ = knn_probe(train, labelled.labels, val, tiny.val.labels, test, 7)
        torch.testing.assert_close(found[0.5, seed, "knn"].test, scores)
        _, _, tuned = best_supervised(network, labelled, tiny.val, tiny.test, spec, **supervised_settings(settings))
        torch.testing.assert_close(found[0.5, seed, "fine-tuned"].test, tuned)


@pytest.mark.slow
def test_frozen_features_are_computed_once(tiny: Splits, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for seeds in (("1",), ("1", "2", "3")):
        calls: list[nn.Module | None] = []

        def counting(*args: Any, calls: list[nn.Module | None] = calls) -> torch.Tensor:
            calls.append(args[0])
            return extract_features(*args)

        monkeypatch.setattr(run_module, "extract_features", counting)
        rows_of(settings_for("--label-seeds", *seeds, "--supervised-steps", "0"), tiny, network)
        counts.append(len(calls))
    assert counts[0] == counts[1] == 10  # raw pixels, random, pretrained on three splits; the projection


def test_without_label_seeds_the_data_seed_draws(tiny: Splits) -> None:
    drawn = list(draw_labels(settings_for("--data-seed", "4"), tiny.train))
    assert [(draw.fraction, draw.seed) for draw, _ in drawn] == [(0.5, 4), (1.0, None)]
    assert drawn[0][1].tolist() == label_fraction(tiny.train.labels, 0.5, 4).tolist()
    assert drawn[1][1].tolist() == list(range(len(tiny.train)))


def test_distinct_draws_are_counted_as_a_plain_list_of_them() -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2])
    chosen = {tuple(label_fraction(labels, 0.4, seed).tolist()) for seed in range(400)}
    every = itertools.product(itertools.combinations(range(5), 2), itertools.combinations(range(5, 8), 1), [(8,)])
    assert chosen == {a + b + c for a, b, c in every}
    assert distinct_draws(labels, 0.4) == len(chosen) == 30
    assert distinct_draws(labels, 1.0) == distinct_draws(torch.arange(4), 0.01) == 1
    assert distinct_draws(torch.eye(5, dtype=torch.int64), 0.4) == 10


def test_more_draws_than_there_are_is_one_line_before_the_training(tiny: Splits) -> None:
    few = phantom_store("train", (1, 2, 1, 1, 1, 1, 1))
    settings = settings_for("--label-seeds", "0", "1", "2", "--data", "phantom")
    line = "label_seeds asks for 3 draws of 50 % of synthetic's labels, but only 2 can differ: give fewer seeds"
    with pytest.raises(InputError, match=line):
        load_held_out(settings, few, evaluate=True)
    load_held_out(settings, few, evaluate=False)
    load_held_out(settings_for("--label-seeds", "0", "1"), few, evaluate=True)


@pytest.mark.parametrize("seeds", [("1", "1"), (str(2**63),)])
def test_seeds_that_are_no_different_integers_are_refused(seeds: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="expected different 64-bit integers"):
        settings_for("--label-seeds", *seeds)


def test_the_table_tells_the_spread_over_draws(
    tiny: Splits, network: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = rows_of(settings_for("--label-seeds", "1", "2", "--supervised-steps", "0"), tiny, network)
    print_table(rows, "title")
    printed = capsys.readouterr().out
    one, other = (
        row["balanced_accuracy"] for row in rows
        if (row["features"], row["probe"], row["label_fraction"]) == ("raw pixels", "linear", 0.5)
    )  # fmt: skip
    (line,) = [line for line in printed.splitlines() if "raw pixels" in line and "linear" in line and "50 %" in line]
    assert f"{50 * (one + other):.1f} ± {100 * abs(one - other) / 2**0.5:.1f}" in line
    assert "(33, 2 draws)" in line
