"""Folders held decoded: the same pixels resident, streamed and cached; when a cache is made, used or refused."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amimv import InputError
from amimv.pipelines import ImageStore, PairLoader, load_store
from amimv.pipelines.images import HostImages, ResidentImages
from amimv.pipelines.sources import cache as cache_module
from amimv.pipelines.sources import encoded as encoded_module
from amimv.pipelines.sources import folder as folder_module
from amimv.pipelines.sources.encoded import EncodedImages

pytest.importorskip("nvidia.dali.experimental.dynamic")


def write(top: Path, n: int = 10, ending: str = ".png", top_value: int = 255, size: int = 14) -> str:
    """A folder of two classes."""
    rng = np.random.default_rng(0)
    kind, shape = (np.uint8, (size, size, 3)) if top_value < 256 else (np.uint16, (size, size))
    for i in range(n):
        place = top / "train" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, top_value + 1, shape, dtype=kind)).save(place / f"{i:03}{ending}")
    return f"folder:{top}"


def all_of(store: ImageStore) -> torch.Tensor:
    return store.gather(torch.arange(len(store)))


def files_in(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.images"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The image files that are read."""
    paths: list[str] = []
    read_file = encoded_module._read_file
    monkeypatch.setattr(encoded_module, "_read_file", lambda path: (paths.append(path), read_file(path))[1])
    return paths


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write(tmp_path / "x")


# The same pixels however they are held


@pytest.mark.parametrize(("ending", "top_value"), [(".png", 255), (".jpg", 255), (".tif", 4095)])
def test_resident_streamed_and_cached_are_equal(tmp_path: Path, ending: str, top_value: int) -> None:
    data = write(tmp_path / "x", 21, ending, top_value)
    streamed = load_store(data, size=9, resident=False)
    assert isinstance(streamed.images, EncodedImages)
    others = [load_store(data, size=9)] + [load_store(data, size=9, cache=tmp_path / "kept") for _ in range(2)]
    expected = list(PairLoader(streamed, "two-view", 8, seed=3).epoch(1))
    for store in others:
        assert isinstance(store.images, ResidentImages)
        assert store.images.decoded
        assert store.images.paths == streamed.images.paths
        assert all_of(store).dtype == all_of(streamed).dtype
        assert torch.equal(all_of(store), all_of(streamed))
        assert (store.mean, store.std, store.value_range) == (streamed.mean, streamed.std, streamed.value_range)
        assert (store.class_names, store.class_counts()) == (streamed.class_names, streamed.class_counts())
        for pair, other in zip(PairLoader(store, "two-view", 8, seed=3).epoch(1), expected, strict=True):
            assert torch.equal(pair.sides[0][0], other.sides[0][0])
        part = store.subset(torch.tensor([4, 1]))
        assert part.images.paths == (store.images.paths[4], store.images.paths[1])
        assert torch.equal(all_of(part), all_of(streamed)[[4, 1]])


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # as Accelerate calls it where there are several processes
def test_a_folder_that_fits_is_decoded_once(data: str, device: str, opened: list[str]) -> None:
    store = load_store(data, size=8, device=device)
    assert isinstance(store.images, ResidentImages)
    assert len(opened) == 20  # headers, then pixels
    list(store.stream(torch.arange(10).view(2, 5)))
    assert len(opened) == 20


@pytest.mark.parametrize("resident", [None, True, False])
def test_what_does_not_fit_is_streamed_and_said(
    data: str, resident: bool | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folder_module, "HOST_SHARE", 1e-9)
    store = load_store(data, size=8, resident=resident)
    assert isinstance(store.images, ResidentImages if resident else EncodedImages)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (resident is None)
    assert all("10 images take 0.00 GiB decoded, more than" in line and "batch by batch" in line for line in said)


def test_what_fits() -> None:
    assert folder_module.fits(50, 100, 0.5)
    assert not folder_module.fits(51, 100, 0.5)
    assert folder_module.fits(25, 100, 0.5, processes=2)
    assert not folder_module.fits(26, 100, 0.5, processes=2)


def test_a_container_has_no_more_than_its_limit(tmp_path: Path) -> None:
    two, one, none = (tmp_path / name for name in ("memory.max", "memory.limit_in_bytes", "missing"))
    two.write_text("max\n")
    free = folder_module.free_memory((two, none))
    assert free > 2**20
    one.write_text(f"{2**20}\n")
    assert folder_module.free_memory((two, one)) == 2**20


@pytest.mark.parametrize(
    ("terminal", "many", "rank", "drawn"), [(1, 1, 0, 1), (0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 1, 0)]
)
def test_a_bar_on_a_terminal_if_they_are_many(
    data: str,
    terminal: bool,
    many: bool,
    rank: int,
    drawn: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(folder_module, "MANY", 9 if many else 10)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(terminal), raising=False)
    load_store(data, size=8)
    assert ("decoding x, train" in capsys.readouterr().err) == drawn


# When the cache is used


def test_a_start_from_the_cache_opens_no_image(data: str, tmp_path: Path, opened: list[str]) -> None:
    first = load_store(data, size=8, cache=tmp_path / "kept")
    assert len(opened) == 20
    again = load_store(data, size=8, cache=str(tmp_path / "kept"))
    assert len(opened) == 20
    assert torch.equal(all_of(again), all_of(first))
    (tmp_path / "x").rename(tmp_path / "moved")  # the same names in it, and times
    (file,) = files_in(tmp_path / "kept")
    file.rename(file.with_name(file.name.replace("x-", "moved-")))
    load_store(f"folder:{tmp_path / 'moved'}", size=8, cache=tmp_path / "kept")
    assert len(opened) == 20


def test_it_is_used_whatever_the_memory(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "HOST_SHARE", 1e-9)
    for _ in range(2):
        assert load_store(data, size=8, cache=tmp_path / "kept").images.decoded


def test_writing_to_its_images_does_not_change_the_file(data: str, tmp_path: Path) -> None:
    store = load_store(data, size=8, cache=tmp_path)
    before = all_of(store)
    store.images.tensor.zero_()
    assert torch.equal(all_of(load_store(data, size=8, cache=tmp_path)), before)


def test_remarks_on_the_files_are_said_at_every_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write(tmp_path / "x", ending=".tif")
    page = Image.fromarray(np.full((9, 9), 7, np.uint8))
    page.save(tmp_path / "x" / "train" / "a" / "stack.tif", save_all=True, append_images=[page])
    said = []
    for _ in range(2):
        caplog.clear()
        load_store(data, size=8, cache=tmp_path / "kept")
        said.append([record.getMessage() for record in caplog.records])
    assert said[0] == said[1]
    assert "1 of 11 files looked at have more than one page" in " ".join(said[0])


def change(path: Path) -> None:
    Image.fromarray(np.zeros((14, 14, 3), np.uint8)).save(path)


def same_size(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(0, 12345))


@pytest.mark.parametrize(
    "alter",
    [
        change,
        same_size,
        Path.unlink,
        lambda path: path.rename(path.with_name("999.png")),
        lambda path: path.rename(path.parent.parent / "b" / path.name),
        lambda path: change(path.with_name("more.png")),
    ],
    ids=["changed", "touched", "removed", "renamed", "of another class", "added"],
)
def test_a_changed_folder_makes_a_new_file(data: str, tmp_path: Path, alter: object, opened: list[str]) -> None:
    load_store(data, size=8, cache=tmp_path / "kept")
    alter(tmp_path / "x" / "train" / "a" / "004.png")  # type: ignore[operator]
    del opened[:]
    store = load_store(data, size=8, cache=tmp_path / "kept")
    assert len(opened) == 2 * len(store)
    assert len(files_in(tmp_path / "kept")) == 2
    assert torch.equal(all_of(store), all_of(load_store(data, size=8, resident=False)))


def test_another_size_or_other_channels_are_another_file(data: str, tmp_path: Path) -> None:
    for how in ({"size": 8}, {"size": 9}, {"size": 8, "channels": 1}, {"size": 8}):
        store = load_store(data, cache=tmp_path / "kept", **how)  # type: ignore[arg-type]
        assert store.images.shape == (10, how["size"], how["size"], how.get("channels", 3))
    assert len(files_in(tmp_path / "kept")) == 3


def test_another_version_of_a_decoder_is_another_file(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_store(data, size=8, cache=tmp_path / "kept")
    monkeypatch.setattr(cache_module, "_version", lambda name: "99")
    load_store(data, size=8, cache=tmp_path / "kept")
    assert len(files_in(tmp_path / "kept")) == 2


def damages() -> dict[str, object]:
    return {
        "empty": lambda content: b"",
        "start only": lambda content: content[:100],
        "truncated": lambda content: content[:-1],
        "longer": lambda content: content + b"\0",
        "one pixel": lambda content: content[:-7] + bytes([content[-7] ^ 1]) + content[-6:],
        "no header": lambda content: bytes(4096) + content[4096:],
        "other header": lambda content: content[:30] + b"?" + content[31:],
        "text": lambda content: b"images!",
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_file_is_made_anew_with_a_line(
    data: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = all_of(load_store(data, size=8, cache=tmp_path / "kept"))
    (file,) = files_in(tmp_path / "kept")
    whole = file.read_bytes()
    file.write_bytes(damages()[damage](whole))  # type: ignore[operator]
    assert torch.equal(all_of(load_store(data, size=8, cache=tmp_path / "kept")), expected)
    assert [record.getMessage() for record in caplog.records] == [f"{file} is damaged: it is made anew"]
    assert file.read_bytes() == whole


def test_a_cache_of_another_folder_is_refused(data: str, tmp_path: Path) -> None:
    load_store(data, size=8, cache=tmp_path / "kept")
    other = write(tmp_path / "y", n=12)
    load_store(other, size=8, cache=tmp_path / "kept")
    first, second = files_in(tmp_path / "kept")
    second.write_bytes(first.read_bytes())
    with pytest.raises(InputError, match=f"{second} is the cache of another folder.*: delete it") as caught:
        load_store(other, size=8, cache=tmp_path / "kept")
    assert "\n" not in str(caught.value)


# When it cannot be written


@pytest.mark.parametrize("place", ["file", "file/below", "full"])
def test_without_a_place_for_it_the_folder_is_read_all_the_same(
    data: str, tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    if place == "full":
        monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: Full())
    expected = all_of(load_store(data, size=8))
    assert torch.equal(all_of(load_store(data, size=8, cache=tmp_path / place)), expected)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"no cache of decoded images: {tmp_path / place.split('/')[0]}")
    assert line.endswith(": goes on without")


class Full:
    free = 4096


def test_a_folder_that_cannot_be_written_is_still_read_from(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    load_store(data, size=8, cache=tmp_path / "kept")
    del opened[:]

    def refuse(path: Path, **how: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache_module, "locked", refuse)
    monkeypatch.setattr(cache_module, "replacing", refuse)
    load_store(data, size=8, cache=tmp_path / "kept")
    assert not opened
    assert load_store(data, size=9, cache=tmp_path / "kept").images.decoded
    assert opened


def test_a_damaged_image_leaves_no_file(data: str, tmp_path: Path) -> None:
    bad = tmp_path / "x" / "train" / "b" / "003.png"
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match=f"{bad} cannot be decoded"):
        load_store(data, size=8, cache=tmp_path / "kept")
    assert not files_in(tmp_path / "kept")
    assert not list((tmp_path / "kept").glob("*.partial"))


SCRIPT = """
import sys, torch
from amimv.pipelines import load_store
from amimv.pipelines.sources import folder
torch.set_num_threads(1)
def slow(images, title, decode=folder.decode):
    for part in decode(images, title):
        yield part
        print("decoded", flush=True)
        sys.stdin.read()
folder.decode = slow
load_store(sys.argv[1], size=8, cache=sys.argv[2])
"""


@pytest.mark.slow
def test_a_second_process_waits_and_takes_over_from_one_that_is_killed(
    data: str, tmp_path: Path, opened: list[str]
) -> None:
    expected = all_of(load_store(data, size=8))
    del opened[:]
    command = [sys.executable, "-c", SCRIPT, data, str(tmp_path / "kept")]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first,
        ThreadPoolExecutor(1) as pool,
    ):
        assert first.stdout is not None
        assert first.stdout.readline() == "decoded\n"
        waiting = pool.submit(load_store, data, size=8, cache=tmp_path / "kept")
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        assert not opened
        assert not files_in(tmp_path / "kept")
        first.kill()
        assert torch.equal(all_of(waiting.result(timeout=60)), expected)
    assert len(files_in(tmp_path / "kept")) == 1
    assert not list((tmp_path / "kept").glob("*.partial"))


def test_of_several_at_once_one_decodes(data: str, tmp_path: Path, opened: list[str]) -> None:
    """Locks are of open files, so that threads stand for processes."""
    expected = all_of(load_store(data, size=8))
    del opened[:]
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: load_store(data, size=8, cache=tmp_path / "kept"), range(4)))
    assert all(torch.equal(all_of(store), expected) for store in stores)
    assert len(opened) == 20


# What is said of its own, and how it is held elsewhere


def test_the_header_can_be_read_by_people(data: str, tmp_path: Path) -> None:
    load_store(data, size=8, cache=tmp_path / "kept")
    (file,) = files_in(tmp_path / "kept")
    assert file.name.startswith("x-train-8-")
    mark, line = file.read_bytes()[:4096].rstrip(b"\0").split(b"\n")
    assert mark + b"\n" == cache_module.MAGIC
    told = json.loads(line)
    assert (told["shape"], told["dtype"], told["remarks"]) == ([10, 8, 8, 3], "uint8", [])


def test_for_another_device_a_mapped_file_stays_in_host_memory(data: str, tmp_path: Path) -> None:
    store = load_store(data, size=8, cache=tmp_path / "kept")
    away = torch.device("meta")
    files = folder_module.Folder(store.images.paths, tmp_path, "x", "x", 8, None, away)
    held = folder_module._mapped(store.images.tensor, files, resident=False)
    assert isinstance(held, HostImages)
    assert (held.tensor.data_ptr(), held.device, held.paths) == (
        store.images.tensor.data_ptr(),
        away,
        store.images.paths,
    )
    assert folder_module._mapped(store.images.tensor, files, resident=True).tensor.device == away
