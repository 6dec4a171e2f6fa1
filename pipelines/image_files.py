"""What the first bytes of an image file say: bits per value, and whether DALI decodes it right."""

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from amimv import InputError

#: Images, evenly spaced, whose headers are looked at when a folder is loaded.
LOOKED_AT = 256
#: Of these, images of 16 bits that are decoded for the range of their values.
DECODED = 16
#: Grey levels that 8 bits must keep of an image of 16, or the folder is refused: twelve bits in sixteen keep 17.
LEAST_LEVELS = 64
#: TIFF's tags: bits, photometric interpretation, samples per pixel, planar configuration, sample format.
BITS, PHOTOMETRIC, SAMPLES, PLANAR, FORMAT = 258, 262, 277, 284, 339
#: PIL's modes of 8 bits at most; of others it would cut the values off.
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class Header(NamedTuple):
    """Of an image file.

    Attributes:
        bits: per value; 8 where the kind of file knows nothing else.
        unsigned: whether the values are whole numbers from 0.
        pages: images in the file, if more than one then 2.
        plain: whether DALI decodes it right.
    """

    bits: int = 8
    unsigned: bool = True
    pages: int = 1
    plain: bool = True


def read_header(content: np.ndarray) -> Header:
    """The header of a file (``uint8``), as far as it can be read: what is damaged is found when it is decoded."""
    start = content[:8].tobytes()
    try:
        if start == b"\x89PNG\r\n\x1a\n":
            return Header(bits=int(content[24]))
        if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff_header(content)
    except (struct.error, IndexError, KeyError):
        pass
    return Header()


def _tiff_header(content: np.ndarray) -> Header:
    """From the tags of the first page, of classic TIFF and of BigTIFF."""
    order = "<" if content[0] == ord("I") else ">"
    big = ord("+") in content[2:4]
    word, many, entry_length = ("Q", "Q", 20) if big else ("L", "H", 12)

    def read(kind: str, at: int) -> int:
        return int(struct.unpack_from(order + kind, content, at)[0])

    place = read(word, 8 if big else 4)
    first = place + struct.calcsize(f"={many}")
    entries = read(many, place)
    tags: dict[int, int] = {}
    for at in range(first, first + entries * entry_length, entry_length):
        tag = read("H", at)
        if tag not in (BITS, PHOTOMETRIC, SAMPLES, PLANAR, FORMAT):
            continue
        kind = {1: "B", 3: "H", 4: "L"}[read("H", at + 2)]
        value, room = at + 4 + struct.calcsize(f"={word}"), struct.calcsize(f"={word}")
        fits = read(word, at + 4) * struct.calcsize(f"={kind}") <= room
        tags[tag] = read(kind, value if fits else read(word, value))
    plain = BITS in tags and tags.get(PHOTOMETRIC) in (1, 2, 3, 6) and tags.get(PLANAR, 1) == 1
    return Header(
        bits=tags.get(BITS, 1),
        unsigned=tags.get(FORMAT, 1) == 1,
        pages=2 if read(word, first + entries * entry_length) else 1,
        plain=plain and tags.get(SAMPLES, 1) != 2,
    )


def check_header(header: Header, path: str, sixteen_bits: bool) -> None:
    """Raise an `InputError` for values that would be cut off or coarsened unseen."""
    if not header.unsigned or (header.bits > 8 and header.bits != 16):
        kind = "whole numbers" if header.unsigned else "signed numbers or floats"
        raise InputError(f"{path} has {kind} of {header.bits} bits: convert it to 8 bits, 0 to 255")
    if header.bits > 8 and not sixteen_bits:
        raise InputError(
            f"{path} has {header.bits} bits, which none of the images had that were looked at first: convert it to 8"
        )


def rewrite(content: np.ndarray) -> np.ndarray:
    """An image file of at most 8 bits, decoded by PIL, as a BMP (grey or RGB, turned as its EXIF says).

    Raises:
        ValueError: if PIL cannot decode it either.
    """
    try:
        with Image.open(io.BytesIO(content.tobytes())) as image:
            if image.mode not in EIGHT_BITS:
                raise ValueError(f"its pixels are of PIL's mode {image.mode}")
            turned = ImageOps.exif_transpose(image)
            buffer = io.BytesIO()
            turned.convert("L" if image.mode in ("1", "L", "LA") else "RGB").save(buffer, format="BMP")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def grey_levels(image: np.ndarray) -> tuple[int, int, int]:
    """Of the values of an image of 16 bits: lowest and highest, but for one in a thousand, and the levels 8 bits keep.

    Args:
        image: ``(H, W, C)`` ``uint16``; of a large one every so many pixels are looked at.
    """
    step = max(1, min(image.shape[:2]) // 256)
    low, high = np.percentile(image[::step, ::step], [0.1, 99.9])
    return int(low), int(high), int((high - low) / 257) + 1


def sixteen_bits_told(images: list[np.ndarray]) -> tuple[str, bool]:
    """The range of images of 16 bits, as part of a line, and whether 8 bits keep enough of it; at least one image."""
    lows, highs, levels = zip(*map(grey_levels, images), strict=True)
    kept = sorted(levels)[len(levels) // 2]
    told = f"values {min(lows)} to {max(highs)} of 65535, of which 8 bits keep {kept} grey levels in most images"
    return told, kept >= LEAST_LEVELS
