"""The training subset: whole where nothing is asked for, else the long tail or the saved indices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amimv import InputError
from amimv.pipelines import load_store, long_tail, save_indices
from amimv.pipelines.sources import pixels
from amimv.trainers.data import check_readable, load_training_subset
from amimv.trainers.settings import PretrainSettings


def write(path: Path, labels: np.ndarray) -> str:
    """A data set in MedMNIST's layout, all splits alike but for the classes that train lacks."""
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8), dtype=np.uint8)
    every = {f"{split}_images": images for split in ("train", "val", "test")}
    full = labels if labels.ndim == 2 else np.arange(len(labels)) % 4
    np.savez(path, **every, train_labels=labels, val_labels=full, test_labels=full)
    return str(path)


@pytest.fixture
def skewed(tmp_path: Path) -> str:
    return write(tmp_path / "skewed.npz", np.repeat(np.arange(4), (20, 10, 6, 4)))


@pytest.mark.parametrize(
    ("profile", "rho", "total", "n"),
    [
        ("exp", 1.0, None, 40),
        ("natural", 100.0, None, 40),
        ("natural", 100.0, 20, 20),
        ("exp", 1.0, 16, 16),
        ("exp", 10.0, None, 20 + 9 + 4 + 2),
        ("step", 1.0, None, 40),
        ("step", 4.0, 20, 20),
    ],
)
def test_the_subset_asked_for(skewed: str, profile: str, rho: float, total: int | None, n: int) -> None:
    settings = PretrainSettings(data=skewed, profile=profile, rho=rho, total=total, data_seed=3)
    found = load_training_subset(settings, "cpu")
    store = load_store(skewed)
    expected = long_tail(store.labels, rho, profile, 3, total)
    assert torch.equal(found.indices, expected)
    assert len(found.indices) == len(found.store) == n
    assert torch.equal(found.store.gather(torch.arange(n)), store.gather(expected))


@pytest.mark.parametrize(
    "labels", [np.repeat(np.arange(3), 4), np.tri(5, 4, -1, dtype=int)], ids=["no class 3", "multi-hot"]
)
def test_the_whole_set_needs_no_long_tail(labels: np.ndarray, tmp_path: Path) -> None:
    data = write(tmp_path / "odd.npz", labels)
    found = load_training_subset(PretrainSettings(data=data), "cpu")
    assert found.indices.tolist() == list(range(len(labels)))
    with pytest.raises(InputError):
        load_training_subset(PretrainSettings(data=data, rho=2), "cpu")


def test_saved_indices_come_first(skewed: str, tmp_path: Path) -> None:
    save_indices(tmp_path / "some.npy", torch.tensor([2, 7, 33]))
    settings = PretrainSettings(data=skewed, rho=10, total=20, indices=str(tmp_path / "some.npy"))
    found = load_training_subset(settings, "cpu")
    assert found.indices.tolist() == [2, 7, 33]
    assert found.store.labels.tolist() == [0, 0, 2]


@pytest.mark.parametrize("damaged", [False, True])
def test_every_file_of_a_streamed_split_is_read_once(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that the look at the pixels has left out."""
    pytest.importorskip("nvidia.dali.experimental.dynamic", reason="nvidia.dali is not installed")
    monkeypatch.setattr(pixels, "SAMPLE", 2)
    for i in range(8):
        folder = tmp_path / f"class {i % 2}"
        folder.mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    last = tmp_path / "class 1" / "7.png"
    if damaged:
        last.write_bytes(last.read_bytes()[:60])
    store = load_store(f"folder:{tmp_path}", size=8, resident=False)
    if not damaged:
        check_readable(store, chunk=3)
        return
    with pytest.raises(InputError, match=r"7\.png"):
        check_readable(store, chunk=3)
