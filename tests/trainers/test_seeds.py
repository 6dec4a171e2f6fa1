"""Every seed that the settings accept works in everything that it reaches; any other is refused before the start."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from sklearn.utils import check_random_state

from amimv import InputError
from amimv.pipelines import label_fraction, long_tail
from amimv.pipelines.rng import Key, hashes, library_seed
from amimv.pipelines.sources.phantom import draw_counts, generate_phantom
from amimv.trainers import pretrain
from amimv.trainers.layers import from_yaml, resolve

EXTREME = (-(2**63), -(2**32) - 1, -1, 2**31, 2**32 - 1, 20240131123, 2**53 + 1, 2**63 - 1)
BEYOND = (-(2**63) - 1, 2**63, 2**64, 10**30, -(10**100))


@pytest.mark.parametrize("seed", EXTREME)
@pytest.mark.parametrize("epoch", [0, 1, 10**6])
def test_a_librarys_seed_is_in_its_range(seed: int, epoch: int) -> None:
    check_random_state(library_seed(seed, epoch))
    np.random.default_rng(library_seed(seed, epoch))


@pytest.mark.parametrize("seed", [0, 1, 7, 4_000_000_000])
def test_a_librarys_seed_of_an_ordinary_one_is_its_sum_with_the_epoch(seed: int) -> None:
    assert [library_seed(seed, epoch) for epoch in (0, 5, 1000)] == [seed, seed + 5, seed + 1000]


def test_no_two_seeds_draw_the_same_data() -> None:
    positions = torch.arange(4)
    assert len({tuple(hashes(Key(seed, 0), positions, 2).flatten().tolist()) for seed in EXTREME}) == len(EXTREME)
    labels = torch.arange(4).repeat_interleave(25)
    for seed in EXTREME:
        assert len(long_tail(labels, rho=5, seed=seed)) < 100
        assert 4 <= len(label_fraction(labels, 0.1, seed)) <= 12
        assert sorted(draw_counts("train", seed)) == sorted(draw_counts("train"))
        assert len(generate_phantom("val", seed=seed, counts=(1,) * 7)[0]) == 7


@pytest.fixture(scope="module")
def tiny_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arrays = {}
    for split, counts in (("train", (12, 10, 8, 8, 4, 4, 4)), ("val", (2,) * 7), ("test", (2,) * 7)):
        images, labels = generate_phantom(split, seed=7, counts=counts)
        arrays |= {f"{split}_images": images.numpy(), f"{split}_labels": labels[:, None].numpy()}
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("seed", [-(2**63), pytest.param(2**32 - 1, marks=pytest.mark.slow)])
def test_a_whole_run_with_an_extreme_seed(
    tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """With clusters, which scikit-learn finds, a drawn subset, a share of the labels, and all of the evaluation."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    flags = (
        *("--data", str(tiny_npz), "--batch-size", "8", "--steps", "9", "--knn-every", "1", "--rho", "3"),
        *("--sampler", "cluster-balanced", "--cluster-every", "1", "--clusters", "3", "--finetune"),
        *("--supervised-steps", "1", "--label-fractions", "0.5", "1", "--output", str(tmp_path)),
        *("--seed", str(seed), "--data-seed", str(seed)),
    )
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags])
    pretrain.main()
    (results,) = tmp_path.glob("*/results.csv")
    with results.open(newline="") as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {str(seed)}
    assert from_yaml(results.parent / "config.yaml").data_seed == seed


@pytest.mark.parametrize("name", ["seed", "data_seed"])
@pytest.mark.parametrize("value", BEYOND)
def test_other_seeds_are_refused_by_flag_and_by_file(tmp_path: Path, name: str, value: int) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(f"{name}: {value}\n")
    for flags in ([f"--{name.replace('_', '-')}", str(value)], ["--config", str(config)]):
        ends = r"(-9223372036854775808 to |at most )9223372036854775807"
        with pytest.raises(InputError, match=rf"{name} is \S+, expected {ends}$") as caught:
            resolve(flags)
        assert len(str(caught.value).replace(str(tmp_path), "")) < 200


@pytest.mark.parametrize("value", EXTREME)
def test_accepted_seeds_are_the_same_by_flag_and_by_file(tmp_path: Path, value: int) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(f"seed: {value}\n")
    assert resolve(["--seed", str(value)])[0].seed == resolve(["--config", str(config)])[0].seed == value
