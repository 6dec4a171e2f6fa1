"""Folders of images: pixels against PIL, order and classes, the stream, and one clear line for what can be wrong."""

import io
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from amimv import InputError
from amimv.pipelines import PairLoader, get_recipe, load_store
from amimv.pipelines.images import HostImages, ResidentImages
from amimv.pipelines.sources import encoded as encoded_module
from amimv.pipelines.sources import pixels as pixels_module
from amimv.pipelines.sources.encoded import AHEAD, EncodedImages
from amimv.pipelines.store import ImageStore

pytest.importorskip("nvidia.dali.experimental.dynamic")


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image whose neighbouring pixels are alike, as those of photographs are."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)


def write(folder: Path, counts: dict[str, int], size: int = 12, suffix: str = ".png") -> Path:
    """``counts["train/a"]`` images in ``folder/train/a``."""
    for place, n in counts.items():
        (folder / place).mkdir(parents=True)
        for i in range(n):
            smooth(size, size, 1000 * sum(place.encode()) + i).save(folder / place / f"{i:02}{suffix}")
    return folder


def pixels(path: Path | str, mode: str = "RGB") -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert(mode))


def encoded(*images: Image.Image | bytes, folder: Path, size: int, channels: int = 3) -> EncodedImages:
    """PNG files of these images, or files of these bytes."""
    for i, image in enumerate(images):
        if isinstance(image, bytes):
            (folder / f"{i}.png").write_bytes(image)
        else:
            image.save(folder / f"{i}.png")
    paths = tuple(str(folder / f"{i}.png") for i in range(len(images)))
    return EncodedImages(paths, size, channels, torch.device("cpu"))


def file_of(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def one(content: bytes, tmp_path: Path, size: int, channels: int = 3) -> np.ndarray:
    """The one image of a file, ``int64``."""
    images = encoded(content, folder=tmp_path, size=size, channels=channels)
    return images.gather(torch.tensor([0]))[0].numpy().astype(np.int64)


def refused(message: str, *args: object, **kwargs: object) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_store(*args, **kwargs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "lesions", {"train/a": 7, "train/b": 4, "train/c": 9, "val/a": 2, "val/b": 1, "val/c": 1})


@pytest.fixture
def store(folder: Path) -> ImageStore:
    return load_store(f"folder:{folder}", size=12, resident=False)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read, as they are."""
    paths: list[str] = []
    read_file = encoded_module._read_file

    def noted(path: str) -> np.ndarray:
        paths.append(path)
        return read_file(path)

    monkeypatch.setattr(encoded_module, "_read_file", noted)
    return paths


# Pixels


def test_a_png_that_needs_no_resizing_is_exact(store: ImageStore, folder: Path) -> None:
    files = [folder / "train" / c / f"{i:02}.png" for c, n in (("a", 7), ("b", 4), ("c", 9)) for i in range(n)]
    everything = store.gather(torch.arange(20))
    assert (everything.dtype, everything.device) == (torch.uint8, store.device)
    assert np.array_equal(everything.numpy(), np.stack([pixels(file) for file in files]))
    assert len({image.tobytes() for image in everything.numpy()}) == 20  # or order could not be seen


@pytest.mark.parametrize(("width", "height", "size"), [(80, 60, 60), (96, 64, 32), (64, 120, 32), (40, 40, 64)])
@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_resized_and_cropped_as_pil_does(
    tmp_path: Path, width: int, height: int, size: int, channels: int, mode: str
) -> None:
    image = smooth(width, height)
    got = one(file_of(image, "PNG"), tmp_path, size, channels)
    scale = size / min(width, height)
    wide, high = round(width * scale), round(height * scale)
    left, top = (wide - size) // 2, (high - size) // 2
    resized = image.convert(mode).resize((wide, high), Image.BILINEAR)  # PIL's is antialiased
    expected = np.asarray(resized.crop((left, top, left + size, top + size))).reshape(size, size, channels)
    # Rounded once or twice, the grey weights in integers or in floats.
    assert np.abs(got - expected).max() <= (1 if channels == 3 else 2)


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    got = one(file_of(Image.fromarray(checks.astype(np.uint8)), "PNG"), tmp_path, 16)
    assert np.abs(got - 127.5).max() < 10  # else 0 or 255


@pytest.mark.parametrize(("subsampling", "channels", "mode"), [(0, 3, "RGB"), (2, 3, "RGB"), (2, 1, "L")])
def test_a_jpeg_as_pil_decodes_it(tmp_path: Path, subsampling: int, channels: int, mode: str) -> None:
    content = file_of(smooth(48, 48), "JPEG", quality=95, subsampling=subsampling)
    expected = pixels(io.BytesIO(content), mode).reshape(48, 48, channels)  # type: ignore[arg-type]
    assert np.abs(one(content, tmp_path, 48, channels) - expected).max() <= 3


def test_every_kind_of_file(tmp_path: Path) -> None:
    """Of colour, grey, see-through, in few colours and of 1 bit; and what only some kinds of file can be."""
    image = smooth(20, 20)
    grey = image.convert("L")
    see_through, grey_see_through = image.copy(), grey.copy()
    see_through.putalpha(grey)
    grey_see_through.putalpha(grey)
    shapes = {"RGB": image, "L": grey, "RGBA": see_through, "LA": grey_see_through, "P": image.quantize(16)}
    shapes |= {"1": grey.convert("1"), "CMYK": image.convert("CMYK")}
    able = {"JPEG": ("RGB", "L", "1", "CMYK"), "BMP": ("RGB", "L", "RGBA", "P", "1"), "TIFF": tuple(shapes)}
    able |= {"PNG": ("RGB", "L", "RGBA", "LA", "P", "1"), "WEBP": ("RGB", "L", "RGBA", "LA", "P", "1")}
    exact = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True, "exact": True}}
    files = {
        (kind, mode): (file_of(shapes[mode], kind, **exact.get(kind, {})), shapes[mode])
        for kind, modes in able.items()
        for mode in modes
    }
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        files["TIFF", name] = (file_of(image, "TIFF", compression=name), image)
    files["TIFF", "fax"] = (file_of(shapes["1"], "TIFF", compression="group4"), shapes["1"])
    files["TIFF", "big-endian"] = (file_of(grey, "TIFF", big_tiff=True), grey)
    files["TIFF", "pages"] = (file_of(image, "TIFF", save_all=True, append_images=[image.rotate(90)]), image)
    files["TIFF", "JPEG inside"] = (file_of(image, "TIFF", compression="jpeg", quality=95), image)
    files["TIFF", "turned"] = (file_of(image, "TIFF", tiffinfo={0x112: 6}), image.rotate(-90))
    files["TIFF", "turned, 1 bit"] = (file_of(shapes["1"], "TIFF", tiffinfo={0x112: 6}), shapes["1"].rotate(-90))
    files["TIFF", "inverted"] = (file_of(grey, "TIFF", tiffinfo={262: 0}), grey)
    files["WEBP", "lossy"] = (file_of(image, "WEBP", quality=95), image)
    for (kind, what), (content, expected) in files.items():
        if kind == "JPEG" or what in ("lossy", "JPEG inside"):
            with Image.open(io.BytesIO(content)) as decoded:
                expected = decoded.convert("L" if decoded.mode == "L" else "RGB")
        for channels, mode in ((3, "RGB"), (1, "L")):
            wanted = np.asarray(expected.convert(mode)).reshape(20, 20, channels)
            off = np.abs(one(content, tmp_path, 20, channels) - wanted).max()
            assert off <= (6 if what in ("lossy", "JPEG inside") else 3), (kind, what, mode, off)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    content = file_of(smooth(24, 24), "JPEG", quality=95, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert np.abs(one(content, tmp_path, 24) - expected).max() <= 3


# Which files, which classes


def test_what_a_store_of_a_folder_knows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {"test/d": 1})  # a class of the set, though only test has it
    monkeypatch.setenv("HOME", str(folder.parent))
    store = load_store("folder:~/lesions/", "val", size=8, channels=1, resident=False)
    assert (store.name, store.split, store.task) == ("lesions", "val", "multi-class")
    assert (len(store), store.size, store.channels, store.n_classes) == (4, 8, 1, 4)
    assert store.class_names == ("a", "b", "c", "d")
    assert store.labels.tolist() == [0, 0, 1, 2]
    assert store.class_counts() == [2, 1, 1, 0]
    assert isinstance(store.images, EncodedImages)
    assert not store.multi_label
    assert "png" not in repr(store)
    assert store.gather(torch.tensor([3])).shape == (1, 8, 8, 1)
    assert load_store(f"folder:{folder}").size == 224
    assert load_store(f"folder:{folder}", task="ordinal-regression").task == "ordinal-regression"


def test_class_folders_without_splits_are_all_train(tmp_path: Path) -> None:
    store = load_store(f"folder:{write(tmp_path / 'x', {'yes': 2, 'no': 1})}", size=12)
    assert (store.class_names, store.class_counts(), store.task) == (("no", "yes"), [1, 2], "binary-class")
    for split in ("val", "test"):
        refused(f"has no split '{split}' .*expected PATH/train/CLASS", f"folder:{tmp_path / 'x'}", split)


# What can be wrong


def test_a_folder_that_is_none(tmp_path: Path, folder: Path) -> None:
    refused("there is no folder .*nowhere: expected PATH/train/CLASS", f"folder:{tmp_path / 'nowhere'}")
    refused("'folder:' names no folder", "folder:")
    refused(rf"unknown data set .*did you mean folder:{folder}\?", str(folder))
    refused("has no split 'test' .only train, val.: expected", f"folder:{folder}", "test")
    for name, counts, message in (
        ("empty", {"train": 0}, r"no class folders with images, at least two are needed: expected PATH/train/CLASS"),
        ("single", {"train": 2, "train/a": 2}, r"images \(a\) \(left out: 2 image.s. beside the folders\), at least"),
        ("bare", {"train/a": 0, "train/b": 0}, r"left out: 2 folder.s. without images \(a, b\)"),
    ):
        refused(message, f"folder:{write(tmp_path / name, counts)}")
    refused("size is 0", f"folder:{folder}", size=0)
    refused("'binary-class' needs 2 classes", f"folder:{folder}", task="binary-class")
    refused("'multi-label, binary-class' does not fit", f"folder:{folder}", task="multi-label, binary-class")


PNG, JPEG = file_of(smooth(12, 12), "PNG"), file_of(smooth(12, 12), "JPEG")


@pytest.mark.parametrize(
    "content",
    [b"", b"no image at all", PNG[:-60], PNG[:40], JPEG[: len(JPEG) * 2 // 3], JPEG[:100]],
    ids=["empty", "text", "short PNG", "PNG header", "short JPEG", "JPEG header"],
)
def test_a_damaged_file_is_named(folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    store = load_store(f"folder:{folder}", size=12, resident=False)
    good = store.gather(torch.arange(20))
    bad = folder / "train" / "b" / "02.png"
    bad.write_bytes(content)
    message = f"{bad} cannot be decoded as an image"
    refused(message, f"folder:{folder}", size=12)
    parts = torch.tensor([[0, 1], [2, 3], [8, 9], [10, 11]])
    given = []
    with pytest.raises(InputError, match=message) as caught:
        given.extend(store.stream(parts))
    assert "\n" not in str(caught.value)
    assert len(given) == 2
    with pytest.raises(InputError, match=message):
        store.gather(torch.arange(20))
    others = torch.tensor([0, 8, 10])
    assert torch.equal(store.gather(others), good[others])


@pytest.mark.parametrize(
    "content", [PNG[:-60], PNG[:40], JPEG[:100], b"no image"], ids=["PNG", "header", "JPEG", "text"]
)
def test_a_damaged_file_harms_no_other_of_its_batch(tmp_path: Path, content: bytes) -> None:
    """DALI's decoder, left to meet it, goes on with the others after the failure: a crash here or in what follows."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    images = encoded(*(smooth(40, 30, i) for i in range(60)), folder=tmp_path, size=12)
    good = images.gather(torch.arange(60))
    for place in (59, 0, 20, 40, 58):
        mixed = replace(images, paths=(*images.paths[:place], str(bad), *images.paths[place + 1 :]))
        with pytest.raises(InputError, match=f"{bad} cannot be decoded"):
            mixed.gather(torch.arange(60))
        assert torch.equal(images.gather(torch.arange(60)), good)


def test_a_file_that_cannot_be_read(store: ImageStore, folder: Path) -> None:
    gone = folder / "train" / "a" / "03.png"
    gone.unlink()
    with pytest.raises(InputError, match=f"{gone} cannot be read: No such file"):
        store.gather(torch.arange(5))
    gone.mkdir()
    with pytest.raises(InputError, match=f"{gone} cannot be read: Is a directory"):
        store.gather(torch.arange(5))


def test_without_dali(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali.experimental.dynamic", None)
    with pytest.raises(InputError, match=r"needs NVIDIA DALI 2 or later .*pip install") as caught:
        store.gather(torch.tensor([0]))
    assert "\n" not in str(caught.value)


# Statistics and subsets


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_are_those_of_the_images(folder: Path, channels: int) -> None:
    store = load_store(f"folder:{folder}", size=12, channels=channels)
    scaled = store.gather(torch.arange(20)).numpy().astype(np.float64) / 255
    assert store.mean == pytest.approx(scaled.mean((0, 1, 2)), rel=1e-12)
    assert store.std == pytest.approx(scaled.std((0, 1, 2)), rel=1e-12)


def test_statistics_are_of_an_evenly_spaced_sample(
    folder: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    monkeypatch.setattr(pixels_module, "SAMPLE", 8)
    monkeypatch.setattr(encoded_module, "LOOKED_AT", 3)
    store = load_store(f"folder:{folder}", size=12, resident=False)
    sample = [0, 2, 5, 7, 10, 12, 15, 17]
    assert isinstance(store.images, EncodedImages)
    looked_at, sampled = opened[:3], opened[3:]
    assert sorted(looked_at) == [store.images.paths[i] for i in (0, 6, 13)]
    assert sorted(sampled) == sorted(store.images.paths[i] for i in sample)
    scaled = np.stack([pixels(store.images.paths[i]) for i in sample]) / 255
    assert store.mean == pytest.approx(scaled.mean((0, 1, 2)), rel=1e-12)


def test_subset(store: ImageStore) -> None:
    chosen = torch.tensor([19, 3, 8, 3])
    part = store.subset(chosen)
    assert isinstance(part.images, EncodedImages)
    assert (len(part), part.class_counts()) == (4, [2, 1, 1])
    assert torch.equal(part.gather(torch.arange(4)), store.gather(chosen))
    scaled = store.gather(chosen).numpy() / 255
    assert part.mean == pytest.approx(scaled.mean((0, 1, 2)))
    assert part.std == pytest.approx(scaled.std((0, 1, 2)))
    with pytest.raises(InputError, match="reach from 0 to 20"):
        store.subset(torch.tensor([0, 20]))


# The stream


def test_any_shape_of_indices(store: ImageStore) -> None:
    every = store.gather(torch.arange(20))
    for indices in (torch.tensor([[3, 3, 0], [19, 7, 1]]), torch.tensor(5), torch.empty(2, 0, dtype=torch.int64)):
        assert torch.equal(store.gather(indices), every[indices])


def test_a_batch_of_many_chunks(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded_module, "CHUNK", 3)
    indices = torch.randint(0, 20, (2, 17), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([store.gather(i) for i in indices.flatten()]).view(2, 17, 12, 12, 3)
    assert torch.equal(store.gather(indices), expected)


def test_the_stream_gives_what_gather_gives_in_order(store: ImageStore) -> None:
    parts = torch.randint(0, 20, (12, 2, 5), generator=torch.Generator().manual_seed(0))
    given = list(store.stream(parts))
    assert len(given) == 12
    for batch, part in zip(given, parts, strict=True):
        assert torch.equal(batch, store.gather(part))
    for batch, expected in zip(store.stream(parts[7:]), given[7:], strict=True):  # resumed within an epoch
        assert torch.equal(batch, expected)
    assert list(store.stream(parts[:0])) == []


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "host"])
def test_stores_of_tensors_stream_too(resident: bool) -> None:
    store = load_store("phantom", "val", resident=resident)
    parts = torch.randint(0, len(store), (4, 2, 3), generator=torch.Generator().manual_seed(0))
    assert isinstance(store.images, ResidentImages if resident else HostImages)
    given = list(store.stream(parts))
    assert len(given) == 4
    for batch, part in zip(given, parts, strict=True):
        assert torch.equal(batch, store.images.tensor[part])


def test_the_stream_reads_a_few_batches_ahead_and_no_more(store: ImageStore, opened: list[str]) -> None:
    parts = torch.arange(20).repeat(40).view(100, 8)
    stream = store.stream(parts)
    assert not opened
    next(stream)
    threading.Event().wait(0.3)
    assert len(opened) == 8 * (1 + AHEAD)  # ahead, though no one asked for them yet
    next(stream)
    threading.Event().wait(0.3)
    assert len(opened) == 8 * (2 + AHEAD)


def test_no_thread_is_left(store: ImageStore, folder: Path) -> None:
    store.gather(torch.tensor([0]))
    before, native = set(threading.enumerate()), len(os.listdir("/proc/self/task"))
    parts = torch.arange(20).repeat(40).view(100, 8)
    stream = iter(store.stream(parts))
    next(stream)
    assert set(threading.enumerate()) > before
    stream.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) == before
    for _, _ in zip(range(3), store.stream(parts), strict=False):  # dropped
        pass
    list(store.stream(parts[:5]))  # exhausted
    (folder / "train" / "a" / "00.png").write_bytes(b"")
    with pytest.raises(InputError):
        list(store.stream(parts))
    assert set(threading.enumerate()) == before
    for _ in range(50):  # a thread that Python has joined may still be leaving
        if len(os.listdir("/proc/self/task")) <= native:
            break
        threading.Event().wait(0.1)
    assert len(os.listdir("/proc/self/task")) <= native  # DALI's own are kept for the next stream, not added to


def test_two_streams_at_once(store: ImageStore) -> None:
    parts = torch.arange(20).view(5, 4)
    for i, (a, b) in enumerate(zip(store.stream(parts), store.stream(parts.flip(0)), strict=True)):
        assert torch.equal(a, store.gather(parts[i]))  # a third reader between them
        assert torch.equal(b, store.gather(parts[4 - i]))


# What uses it


def as_tensors(store: ImageStore) -> ImageStore:
    """The same images, decoded."""
    return replace(store, images=ResidentImages(store.gather(torch.arange(len(store)))))


@pytest.mark.parametrize("backend", ["kornia", "dali"])
def test_pairs_are_those_of_the_decoded_images(store: ImageStore, backend: str) -> None:
    def loader(images: ImageStore) -> PairLoader:
        return PairLoader(images, get_recipe("amimv"), 8, "class-balanced", backend=backend, seed=3)

    expected = list(loader(as_tensors(store)).epoch(1))
    got = list(loader(store).epoch(1))
    assert len(got) == len(expected) == 2
    resumed = list(loader(store).epoch(1, start_step=1))
    for a, b in [*zip(got, expected, strict=True), *zip(resumed, expected[1:], strict=True)]:
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels)
        for side, other in zip(a.sides, b.sides, strict=True):
            for view, same in zip(side, other, strict=True):
                assert torch.equal(view, same)


def test_features_are_extracted(store: ImageStore) -> None:
    from amimv.models.backbones import BackboneSpec
    from amimv.trainers.evaluation import extract_features

    spec = BackboneSpec("small", store.channels, store.size, store.mean, store.std)
    features = extract_features(None, store, spec, chunk=7)
    assert torch.equal(features, extract_features(None, as_tensors(store), spec, chunk=7))


SCRIPT = """
import sys, torch
from amimv.pipelines import load_store
torch.set_num_threads(1)
store = load_store(sys.argv[1], size=12)
stream = store.stream(torch.arange(20).repeat(20).view(100, 4))
print(sum(int(next(stream).sum()) for _ in range(5)))
"""


@pytest.mark.slow
def test_two_processes_that_end_in_the_middle(store: ImageStore, folder: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, f"folder:{folder}"]
    environment = {**os.environ, "LOCAL_WORLD_SIZE": "2"}
    both = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    expected = str(int(store.gather(torch.arange(20)).sum()))
    for process in both:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out.strip()) == (0, expected), err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoded_on_a_gpu(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "photos", {"train/a": 40, "train/b": 40}, size=64, suffix=".jpg")
    for name, size, tolerance in (("lesions", 12, 0), ("lesions", 8, 1), ("photos", 64, 6)):
        on_host = load_store(f"folder:{tmp_path / name}", size=size)
        store = load_store(f"folder:{tmp_path / name}", size=size, device="cuda", resident=False)
        parts = torch.arange(len(store), device="cuda").repeat(8).view(-1, 2, 10)
        expected = on_host.gather(torch.arange(len(store)))
        total = torch.zeros((), device="cuda", dtype=torch.int64)
        for batch, part in zip(store.stream(parts), parts, strict=True):
            assert batch.is_cuda
            difference = batch.int() - expected.to("cuda")[part].int()
            total = torch.maximum(total, difference.abs().max())
        assert int(total) <= tolerance
        assert torch.equal(store.gather(parts[1]).cpu(), list(store.stream(parts[:2]))[1].cpu())
        assert store.mean == pytest.approx(on_host.mean, abs=0.01)
    bad = folder / "train" / "b" / "02.png"
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match=f"{bad} cannot be decoded"):
        load_store(f"folder:{folder}", size=12, device="cuda")
