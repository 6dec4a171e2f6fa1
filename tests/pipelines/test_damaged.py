"""Files that cannot be decoded: by default they stop whoever comes to them, on request they are left out."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amimv import InputError
from amimv.pipelines import load_store
from amimv.pipelines.sources.encoded import CHUNK

DAMAGED = {"empty.png": b"", "text.jpg": b"no image at all", "cut.png": None, "header.tif": b"II*\0\xff\xff\xff\xff"}


def png(number: int, bits: int = 8) -> bytes:
    pixels = np.full((9, 9), number * (256 if bits == 16 else 1), dtype=np.uint16 if bits == 16 else np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def draw(top: Path, images: int, bits: int = 8) -> Path:
    """Good files, class by class, with the damaged ones scattered among them."""
    for i in range(images):
        path = top / ("a", "b")[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i, bits))
    for i, (name, content) in enumerate(DAMAGED.items()):
        (top / ("a", "b")[i % 2] / f"{20 * i:03}{name}").write_bytes(
            png(7, bits)[:-30] if content is None else content
        )
    return top


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("cache", [False, True])
def test_damaged_files_are_listed_and_left_out(
    tmp_path: Path, bits: int, cache: bool, caplog: pytest.LogCaptureFixture
) -> None:
    top = draw(tmp_path / "set", images=CHUNK + 20, bits=bits)
    where = {"cache": tmp_path / "kept"} if cache else {"resident": False}
    store = load_store(f"folder:{top}", size=9, channels=1, skip_damaged=True, **where)
    names = sorted(f"{('a', 'b')[i % 2]}/{20 * i:03}{name}" for i, name in enumerate(DAMAGED))
    assert sorted(store.left_out) == names
    told = [line for record in caplog.records if "left out" in (line := record.getMessage())]
    assert told == [
        f"set, train: left out 4 of {CHUNK + 24} files, which cannot be decoded: {', '.join(store.left_out)}"
    ]
    expected = [*range(0, CHUNK + 20, 2), *range(1, CHUNK + 20, 2)]
    found = store.gather(torch.arange(len(store)))[:, 4, 4, 0].long() // (256 if bits == 16 else 1)
    assert found.tolist() == expected
    assert store.known_labels("").tolist() == [i % 2 for i in expected]
    assert store.subset(torch.arange(3)).left_out == store.left_out


def test_by_default_they_stop_the_load(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be decoded as an image"):
        load_store(f"folder:{draw(tmp_path / 'set', 20)}", size=9)


def test_good_files_are_all_kept_and_none_that_are_good_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    top = draw(tmp_path / "set", 20)
    for path in top.rglob("*"):
        if path.name[3:] in DAMAGED:
            path.unlink()
    with caplog.at_level("INFO", "amimv"):
        store = load_store(f"folder:{top}", size=9, skip_damaged=True)
    assert (len(store), store.left_out) == (20, ())
    assert "set, train: all 20 files can be decoded" in caplog.text
    for path in top.rglob("*.png"):
        path.write_bytes(b"gone")
    with pytest.raises(InputError, match="set, train: none of 20 files can be decoded"):
        load_store(f"folder:{top}", size=9, skip_damaged=True)


def test_a_split_is_the_same_with_damaged_files_left_out(tmp_path: Path) -> None:
    top = draw(tmp_path / "set", 30)
    seen: list[str] = []
    for split in ("train", "val", "test"):
        store = load_store(f"folder:{top}", split, size=9, shares=(0.6, 0.2, 0.2), skip_damaged=True)
        seen += [*store.left_out, *(str(Path(path).relative_to(top)) for path in store.images.paths)]
    assert sorted(seen) == sorted(str(path.relative_to(top)) for path in top.rglob("*.*"))


def test_without_dali_no_file_is_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise InputError("a folder of images needs NVIDIA DALI")

    top = draw(tmp_path / "set", 4)
    monkeypatch.setattr("amimv.pipelines.sources.encoded._dali", missing)
    with pytest.raises(InputError, match="needs NVIDIA DALI"):
        load_store(f"folder:{top}", size=9, skip_damaged=True)
