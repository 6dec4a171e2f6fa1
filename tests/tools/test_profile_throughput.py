"""The throughput tool runs and counts what it times; no test asserts a speed."""

import pytest

from amimv.pipelines import PairLoader, get_recipe
from amimv.pipelines.phantom import generate_phantom
from amimv.pipelines.stores import ImageStore, channel_statistics
from amimv.tools.profile_throughput import PilViews, ProfileSettings, endless, measure, profile


def test_it_prints_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    profile(ProfileSettings(batch_size=16, workers=0, repeats=2, seconds=0.05))
    shown = capsys.readouterr().out
    for name in ("torchvision PIL", "PairLoader, kornia", "PairLoader, dali", "phantom (synthetic)"):
        assert name in shown


def test_views_are_counted() -> None:
    images, labels = generate_phantom("train", seed=1, counts=(3,) * 7)
    mean, std = channel_statistics(images)
    store = ImageStore(images, labels, "p", "train", tuple("abcdefg"), "multi-class", images.device, mean, std)
    batches = endless(PairLoader(store, get_recipe("amimv"), 10))
    assert [next(batches) for _ in range(5)] == [40] * 5
    first, second = PilViews(store)[0]
    assert first.shape == second.shape == (3, 28, 28)
    rates = measure(iter([1] * 10**6), ProfileSettings(repeats=3, seconds=0.01), lambda: None)
    assert len(rates) == 3
    assert min(rates) > 0
