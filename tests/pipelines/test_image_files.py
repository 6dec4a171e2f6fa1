"""Headers of image files, and images of 16 bits: every level is kept, and what cannot be compared is refused."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amimv import InputError
from amimv.pipelines import ImageStore, PairLoader, load_store
from amimv.pipelines.sources import encoded
from amimv.pipelines.sources.encoded import EncodedImages
from amimv.pipelines.sources.image_files import Header, read_header, rewrite

pytest.importorskip("nvidia.dali.experimental.dynamic")
RNG = np.random.default_rng(0)


def content(image: Image.Image, kind: str, **settings: object) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def png16(image: np.ndarray) -> bytes:
    """A PNG of 16 bits and three colours, which PIL does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 16, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


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
    assert header == Header(bits[0], sample_format == 1, 1, True, len(bits))


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


KINDS = {
    "12 bits": (deep_images(8, 4095), (0, 4095)),
    "few of a signed scanner": (deep_images(8, 36000, 32000), (32000, 36000)),  # -768 to 3232, stored from 32768 on
    "16 bits": (deep_images(8, 65535), (0, 65535)),
}


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_sixteen_bits_keep_every_level(
    tmp_path: Path, kind: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    images, (low, high) = KINDS[kind]
    for resident in (None, False):
        store = load_store(write(tmp_path / f"x{resident}", images, ending), size=16, resident=resident)
        assert (store.images.dtype, store.channels) == (torch.uint16, 1)
        assert [len(caplog.records), store.value_range] == [0, (min(map(np.min, images)), max(map(np.max, images)))]
        found = store.gather(torch.arange(8))[..., 0].numpy()
        assert np.array_equal(found, np.stack(images[::2] + images[1::2]))  # class by class
    assert low <= store.value_range[0] < low + 200
    assert high - 200 < store.value_range[1] <= high
    assert load_store(f"folder:{tmp_path / 'xNone'}", size=16, value_range=(0, 9999)).value_range == (0, 9999)
    three = load_store(f"folder:{tmp_path / 'xNone'}", size=16, channels=3)
    assert torch.equal(three.gather(torch.arange(8)).int(), store.gather(torch.arange(8)).int().expand(-1, -1, -1, 3))


def test_twelve_bits_in_sixteen_are_trained_on_as_their_arrays_are(tmp_path: Path) -> None:
    images = deep_images(8, 4095)
    store = load_store(write(tmp_path / "x", images), size=16)
    arrays = ImageStore.from_arrays(np.stack(images[::2] + images[1::2]), [0] * 4 + [1] * 4)
    assert (store.mean, store.std) == (arrays.mean, arrays.std)
    pairs = zip(PairLoader(store, "mimv", 4), PairLoader(arrays, "mimv", 4), strict=True)
    for pair, other in pairs:
        for view, same in zip(pair.sides[0], other.sides[0], strict=True):
            assert torch.equal(view, same)
            assert view.std() > 0.5  # else 12 bits would be a sixteenth of the range


def test_values_with_white_at_0_are_inverted_and_turned(tmp_path: Path) -> None:
    (image,) = deep_images(1, 4095)
    for tags, expected in (
        ({262: 0}, 65535 - image),
        ({262: 1, 0x112: 6}, np.rot90(image, -1)),
        ({262: 0, 0x112: 6}, 65535 - np.rot90(image, -1)),
    ):
        file = tmp_path / "x.tif"
        Image.fromarray(image).save(file, tiffinfo=tags)
        images = EncodedImages((str(file),), 16, 1, torch.device("cpu"), torch.uint16)
        assert np.array_equal(images.gather(torch.tensor(0))[..., 0].numpy(), expected)


def test_colours_of_sixteen_bits_are_not_made_grey(tmp_path: Path) -> None:
    image = RNG.integers(0, 65536, (16, 16, 3), dtype=np.uint16)
    for name in ("a/0.png", "b/1.png"):
        (tmp_path / "x" / name).parent.mkdir(parents=True)
        (tmp_path / "x" / name).write_bytes(png16(image))
    store = load_store(f"folder:{tmp_path / 'x'}", size=16)
    assert np.array_equal(store.gather(torch.tensor(1)).numpy(), image)


def test_colours_of_sixteen_bits_plane_by_plane_are_refused(tmp_path: Path) -> None:
    """DALI decodes such a TIFF without a word into other colours."""
    entries = [(256, 16), (257, 16), (258, 16), (259, 1), (262, 2), (273, 8), (277, 3), (284, 2)]
    tags = b"".join(struct.pack("<HHLL", tag, 3, 1, value) for tag, value in entries)
    file = tmp_path / "x.tif"
    file.write_bytes(struct.pack("<2sHLH", b"II", 42, 8, len(entries)) + tags + bytes(4 + 3 * 512))
    images = EncodedImages((str(file),), 16, 3, torch.device("cpu"), torch.uint16)
    with pytest.raises(InputError, match=r"x\.tif cannot be decoded"):
        images.gather(torch.tensor(0))


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_8_and_16_bits_are_not_mixed(tmp_path: Path, ending: str) -> None:
    with pytest.raises(InputError, match="x, train: 5 of 8 images looked at have 16 bits, the others 8") as caught:
        load_store(write(tmp_path / "x", deep_images(5, 4095) + shallow_images(3), ending), size=16)
    assert len(str(caught.value)) < 200


def test_an_image_that_was_not_looked_at_is_refused_when_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "LOOKED_AT", 2)
    data = write(tmp_path / "x", shallow_images(7) + deep_images(1, 65535))
    with pytest.raises(InputError, match=r"007.png has 16 bits, while the images looked at first have 8"):
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
