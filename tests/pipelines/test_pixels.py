"""What is said of images whose values look like a mistake."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amimv.pipelines import load_store
from amimv.pipelines.sources.pixels import pixel_remark, summarise

RNG = np.random.default_rng(0)
GOOD = RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)


def remark_on(images: np.ndarray, part: int = 7) -> str:
    found = torch.from_numpy(images)
    return pixel_remark(summarise(found.split(part), images.shape[3]))


def one_colour(n: int) -> np.ndarray:
    """Images of one colour each, all of their own."""
    return np.broadcast_to(RNG.integers(0, 256, (n, 1, 1, 3), dtype=np.uint8), (n, 8, 8, 3)).copy()


def test_nothing_is_said_of_images_that_are_well() -> None:
    assert remark_on(GOOD) == ""
    assert remark_on((GOOD // 4 + 90).astype(np.uint8)) == ""  # little contrast, as radiographs may have


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (RNG.random((40, 8, 8, 3)).round().astype(np.uint8), "40 hold nothing but 0 and 1"),
        (np.concatenate([GOOD, GOOD[:3] % 2]), "of 43 images looked at, 3 hold nothing but 0 and 1"),
        (np.concatenate([one_colour(5), GOOD]), "of 45 images looked at, 5 are of one colour each"),
        (np.zeros((4, 8, 8, 3), np.uint8), "4 are of one colour each; all together have 1 distinct values, 0 to 0"),
        (GOOD // 16, "all together have 16 distinct values, 0 to 15"),
        (GOOD // 128 * 255, "all together have 2 distinct values, 0 to 255"),
    ],
)
def test_the_numbers_are_given(images: np.ndarray, expected: str) -> None:
    assert expected in remark_on(images)


def test_arrays_and_folders_say_it_once_a_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("nvidia.dali.experimental.dynamic")
    caplog.set_level(logging.INFO, "amimv")
    images, labels = np.concatenate([GOOD[:8] % 2, one_colour(2)]), np.arange(10) % 2
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels)
    for label, image in zip(labels, images, strict=True):
        place = tmp_path / "folder" / "train" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{len(list(place.iterdir()))}.png")
    for name, title in ((str(tmp_path / "x.npz"), "x"), (f"folder:{tmp_path / 'folder'}", "folder")):
        store = load_store(name, size=8)
        store.subset(torch.arange(4))
        (record,) = (record for record in caplog.records if record.levelno > logging.INFO)
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(f"{title}, train: of 10 images looked at, 2 are of one colour each; 8 ")
        caplog.clear()
