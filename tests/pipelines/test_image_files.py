"""Headers of image files, and images of 16 bits: reduced with a line, or refused, and never coarsened unseen."""

import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amimv import InputError
from amimv.pipelines import folders, load_store
from amimv.pipelines.image_files import Header, read_header, rewrite

pytest.importorskip("nvidia.dali.experimental.dynamic")
RNG = np.random.default_rng(0)


def content(image: Image.Image, kind: str, **settings: object) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def tiff(order: str, big: bool, bits: tuple[int, ...], sample_format: int = 1, photometric: int = 1) -> np.ndarray:
    """The header and first page's tags of a TIFF, by the standard; of no pixels."""
    word, many, room = ("Q", "Q", 8) if big else ("L", "H", 4)
    start = struct.pack(order + "2sH", b"II" if order == "<" else b"MM", 43 if big else 42)
    start += struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "L", 8)
    tags = {258: bits, 262: (photometric,), 277: (len(bits),), 339: (sample_format,) * len(bits)}
    entries, apart = b"", b""
    after = len(start) + struct.calcsize("=" + many) + len(tags) * (4 + 2 * room) + room
    for tag, values in tags.items():
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > room:
            place, apart = struct.pack(order + word, after + len(apart)), apart + packed
        else:
            place = packed.ljust(room, b"\0")
        entries += struct.pack(order + "HH" + word, tag, 3, len(values)) + place
    whole = start + struct.pack(order + many, len(tags)) + entries + struct.pack(order + word, 0) + apart
    return np.frombuffer(whole, dtype=np.uint8)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("bits", [(8,), (16,), (12,), (16, 16, 16), (8, 8, 8, 8, 8, 8)])
@pytest.mark.parametrize("sample_format", [1, 2, 3])
def test_a_tiffs_header(order: str, big: bool, bits: tuple[int, ...], sample_format: int) -> None:
    header = read_header(tiff(order, big, bits, sample_format))
    assert header == Header(bits[0], sample_format == 1, 1, True)


def test_headers_that_pil_writes() -> None:
    grey = Image.fromarray(RNG.integers(0, 256, (9, 8), dtype=np.uint8))
    deep = Image.fromarray(RNG.integers(0, 65536, (9, 8), dtype=np.uint16))
    for image, bits in ((grey, 8), (deep, 16), (grey.convert("1"), 1), (grey.convert("RGB"), 8)):
        assert read_header(content(image, "PNG")).bits == bits
        assert read_header(content(image, "TIFF")).bits == bits
    assert read_header(content(grey, "TIFF", save_all=True, append_images=[grey])).pages == 2
    for kind in ("JPEG", "BMP", "WEBP"):
        assert read_header(content(grey, kind)) == Header()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_what_is_damaged_has_some_header() -> None:
    whole = content(Image.fromarray(RNG.integers(0, 256, (9, 8), dtype=np.uint8)), "TIFF")
    for damaged in (*(whole[:n] for n in range(0, 60, 3)), np.where(np.arange(len(whole)) > 5, 255, whole)):
        read_header(damaged.astype(np.uint8))
        with pytest.raises(ValueError, match=r"."):
            rewrite(damaged.astype(np.uint8)[:100])


# Images of 16 bits


def deep_images(n: int, highest: int, lowest: int = 0) -> list[np.ndarray]:
    return [RNG.integers(lowest, highest + 1, (16, 16), dtype=np.uint16) for _ in range(n)]


def shallow_images(n: int) -> list[np.ndarray]:
    return [RNG.integers(0, 256, (16, 16), dtype=np.uint8) for _ in range(n)]


def write(top: Path, images: list[np.ndarray], ending: str = ".png") -> str:
    """A folder of two classes in which these images take turns."""
    for i, image in enumerate(images):
        place = top / "train" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:03}{ending}")
    return f"folder:{top}"


def told(data: str, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    load_store(data, size=16)
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (deep_images(8, 4095), r"8 of 8 images looked at have 16 bits, values \d+ to 40\d\d of 65535.* keep 16 grey"),
        (deep_images(5, 4095) + shallow_images(3), "5 of 8 images looked at have 16 bits"),
        (deep_images(8, 36000, 32000), r"values 320\d\d to 3\d{4} of 65535"),  # -768 to 3232, stored from 32768 on
        (deep_images(8, 9999), "keep 39 grey levels in most images: rescale them to 8 bits, or to 0..65535"),
        (deep_images(8, 255), "keep 1 grey levels"),
    ],
)
def test_a_few_bits_in_sixteen_are_refused(
    tmp_path: Path, images: list[np.ndarray], message: str, ending: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_store(write(tmp_path / "x", images, ending), size=16)
    assert str(caught.value).startswith("x, train: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 230


def test_one_bright_pixel_does_not_hide_them(tmp_path: Path) -> None:
    images = [RNG.integers(0, 4096, (64, 64), dtype=np.uint16) for _ in range(4)]
    for image in images:
        image[3, 4] = 65535
    with pytest.raises(InputError, match="keep 16 grey levels"):
        load_store(write(tmp_path / "x", images))


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_all_of_sixteen_bits_are_reduced_with_a_line(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = write(tmp_path / "x", deep_images(6, 65535) + shallow_images(2), ending)
    line = told(data, caplog)
    assert line.startswith("x, train: 6 of 8 images looked at have 16 bits, values ")
    assert re.search(r"8 bits keep 25\d grey levels in most images: they are reduced to 8 bits$", line)
    store = load_store(data, size=16, channels=1)
    first = np.asarray(Image.open(tmp_path / "x" / "train" / "a" / f"000{ending}")).astype(np.float64)
    assert np.abs(store.gather(torch.tensor(0))[..., 0].numpy() - first / 257).max() <= 1
    assert told(write(tmp_path / "y", shallow_images(8), ending), caplog) == ""


def test_an_image_that_was_not_looked_at_is_refused_when_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "LOOKED_AT", 2)
    data = write(tmp_path / "x", shallow_images(7) + deep_images(1, 65535))
    with pytest.raises(InputError, match=r"007.png has 16 bits, which none of the images had that were looked at"):
        load_store(data, size=16)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RNG.random((16, 16), dtype=np.float32), "has signed numbers or floats of 32 bits: convert it to 8 bits"),
        (RNG.integers(-999, 999, (16, 16), dtype=np.int32), "signed numbers or floats of 32 bits"),
    ],
)
def test_values_that_are_no_whole_numbers_from_0_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    data = write(tmp_path / "x", [array, array], ".tif")
    with pytest.raises(InputError, match=message):
        load_store(data, size=16)


def test_pages_that_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write(tmp_path / "x", shallow_images(5), ".tif")
    stack = [Image.fromarray(image) for image in shallow_images(3)]
    stack[0].save(tmp_path / "x" / "train" / "a" / "stack.tif", save_all=True, append_images=stack[1:])
    assert (
        told(data, caplog) == "x, train: 1 of 6 files looked at have more than one page, of which the first is taken"
    )
