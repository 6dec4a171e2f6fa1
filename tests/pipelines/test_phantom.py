import math

import pytest
import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.rng import Key, Stream
from amimv.pipelines.sources import phantom
from amimv.pipelines.sources.phantom import (
    CLASS_NAMES,
    TEST_PER_CLASS,
    TRAIN_COUNTS,
    VAL_PER_CLASS,
    draw_counts,
    generate_phantom,
)

FEW = (5,) * len(CLASS_NAMES)
PAIRS = (("train", "val"), ("train", "test"), ("val", "test"))
KEY = Key(100, Stream.PHANTOM, 0)


@pytest.fixture(scope="module")
def balanced() -> tuple[Tensor, Tensor]:
    return generate_phantom("train", 100, counts=(250,) * len(CLASS_NAMES))


def balanced_accuracy(labels: Tensor, predicted: Tensor) -> float:
    return sum((predicted[labels == c] == c).double().mean().item() for c in range(7)) / 7


def knn(train: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    nearest = torch.cdist(queries.flatten(1), train.flatten(1)).topk(20, largest=False).indices
    return labels[nearest].mode(dim=1).values


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_has_its_size_type_and_counts(split: str) -> None:
    images, labels = generate_phantom(split, 100, size=8)
    expected = {"train": TRAIN_COUNTS, "val": (VAL_PER_CLASS,) * 7, "test": (TEST_PER_CLASS,) * 7}[split]
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert images.shape == (sum(expected), 8, 8, 3)
    assert sorted(labels.bincount().tolist(), reverse=True) == list(expected)
    assert tuple(labels.bincount().tolist()) == draw_counts(split, 100)


def test_the_seed_permutes_which_class_is_rare() -> None:
    rarest = {min(range(7), key=draw_counts("train", seed).__getitem__) for seed in range(100, 160)}
    assert rarest == set(range(7))


def test_classes_are_in_random_order() -> None:
    _, labels = generate_phantom("val", 100, size=8)
    assert labels[:100].bincount(minlength=7).min() >= 4


def test_one_seed_is_one_data_set_and_another_seed_another() -> None:
    first, second = (generate_phantom("val", 100, counts=FEW) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    other = generate_phantom("val", 101, counts=FEW)
    assert not torch.equal(first[0], other[0])


def test_splits_share_no_numbers() -> None:
    def noise(split: str, index: int) -> Tensor:
        return phantom._noise(torch.tensor([index]), KEY._replace(epoch=phantom._split_number(split)), 28).flatten()

    same = [torch.dot(noise(a, i), noise(b, i)) / (28 * 28 * 3 * 0.025**2) for a, b in PAIRS for i in range(5)]
    assert torch.stack(same).abs().max() < 0.1
    everything = [generate_phantom(split, 100, counts=(9, 0, 0, 0, 0, 0, 0))[0] for split in ("train", "val", "test")]
    assert len(torch.cat(everything).flatten(1).unique(dim=0)) == 27


def test_an_image_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = generate_phantom("train", 100, counts=FEW)
    for i in range(0, 35, 5):
        alone = phantom._draw_images(int(labels[i]), torch.tensor([i]), KEY, 28)
        assert torch.equal(images[i], alone[0])
    monkeypatch.setattr(phantom, "_CHUNK_PIXELS", 2 * 56**2)
    assert torch.equal(images, generate_phantom("train", 100, counts=FEW)[0])


def test_a_frozen_checksum() -> None:
    """Results are published by seed: whoever changes a pixel must notice, and say so."""
    images, _ = generate_phantom("train", 100, counts=FEW)
    weights = torch.arange(images.numel()) % 251 + 1
    assert int((images.flatten().long() * weights).sum()) == 1728841245


def test_rounding_is_far_from_a_last_bit_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device may differ in a cosine's last bit: an error a thousand times as large moves nothing."""
    images, _ = generate_phantom("train", 100, counts=FEW)
    lesion = phantom._lesion
    monkeypatch.setattr(phantom, "_lesion", lambda *args: lesion(*args) * (1 + 1e-12))
    assert torch.equal(images, generate_phantom("train", 100, counts=FEW)[0])


@pytest.mark.parametrize("label", range(7), ids=CLASS_NAMES)
def test_every_form_takes_away_the_same_light(label: int) -> None:
    """The integral of every form is that of the unit disc."""
    side, count = 200, 100
    x = 1.7 * phantom._axis(side, torch.device("cpu")).expand(count, side, side)
    draws = phantom._uniforms(KEY, 99, torch.arange(count), 19)
    mask = phantom._FORMS[label](x, x.mT, torch.full((count, 1, 1), 0.12, dtype=torch.float64), draws)
    area = mask.sum((1, 2)) * (3.4 / side) ** 2
    assert mask.min() >= 0
    assert area.mean().item() == pytest.approx(math.pi, rel=0.02)
    assert area.std() < 0.12 * math.pi


def test_colour_follows_one_law_for_all_classes(balanced: tuple[Tensor, Tensor]) -> None:
    images, labels = balanced
    mean = images.double().mean((1, 2))
    for c in range(7):
        distance = (mean[labels == c].mean(0) - mean.mean(0)).abs()
        assert (distance < 0.25 * mean.std(0)).all(), CLASS_NAMES[c]
        assert (mean[labels == c].std(0) / mean.std(0) - 1).abs().max() < 0.25, CLASS_NAMES[c]


def test_mean_colour_does_not_give_the_class_away(balanced: tuple[Tensor, Tensor]) -> None:
    images, labels = generate_phantom("val", 100)
    predicted = knn(balanced[0].double().mean((1, 2)), balanced[1], images.double().mean((1, 2)))
    assert balanced_accuracy(labels, predicted) <= 1 / 7 + 0.05


def test_raw_pixels_do_not_solve_it_though_they_say_something() -> None:
    images, labels = generate_phantom("train", 100)
    queries, truth = generate_phantom("val", 100)
    assert 0.2 < balanced_accuracy(truth, knn(images.float(), labels, queries.float())) < 0.4


def test_hairs_lie_on_their_share_of_the_images() -> None:
    opacity = phantom._hairs(torch.arange(3000), KEY, 8)
    share = (opacity.amax((1, 2)) > 0.3).double().mean().item()
    assert share == pytest.approx(0.15, abs=0.03)


def test_noise_is_centred_and_has_its_deviation() -> None:
    noise = phantom._noise(torch.arange(200), KEY, 28)
    assert noise.mean().item() == pytest.approx(0, abs=3e-4)
    assert noise.std().item() == pytest.approx(0.025, rel=0.01)
    kurtosis = 3 - 1.2 / 4  # of the sum of four uniforms
    assert (noise / 0.025).pow(4).mean().item() == pytest.approx(kurtosis, abs=0.05)


@pytest.mark.parametrize("size", [64, 128, 224])
def test_another_size_shows_the_same_lesions(size: int) -> None:
    counts = (1,) * 7
    small, labels = generate_phantom("train", 100, counts=counts)
    large, same = generate_phantom("train", 100, size=size, counts=counts)
    assert large.shape == (7, size, size, 3)
    assert torch.equal(labels, same)
    shrunk = torch.nn.functional.adaptive_avg_pool2d(large.movedim(3, 1).double(), 14)
    expected = torch.nn.functional.adaptive_avg_pool2d(small.movedim(3, 1).double(), 14)
    assert (shrunk - expected).abs().mean() < 4  # the small image's noise, averaged over 2 x 2: 2.5


def test_nothing_is_clipped_often(balanced: tuple[Tensor, Tensor]) -> None:
    assert ((balanced[0] == 0) | (balanced[0] == 255)).double().mean() < 0.01


def test_a_class_may_be_left_out() -> None:
    _, labels = generate_phantom("train", 100, counts=(0, 3, 0, 0, 0, 0, 2))
    assert labels.bincount(minlength=7).tolist() == [0, 3, 0, 0, 0, 0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "expected one of train, val, test"),
        ({"split": "val", "size": 4}, "at least 8 pixels"),
        ({"split": "val", "counts": (1, 2)}, "one per class"),
        ({"split": "val", "counts": (0,) * 7}, "one per class"),
        ({"split": "val", "counts": (-1, 1, 1, 1, 1, 1, 1)}, "one per class"),
    ],
)
def test_bad_input_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_phantom(**arguments)
