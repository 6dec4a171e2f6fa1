"""What the first bytes of an image file say: bits per value, and whether DALI decodes it right."""

import io
import struct
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from amimv import InputError
from amimv.pipelines.sources.dicom import first_frame, is_dicom, samples_and_frames

#: Images, evenly spaced, whose headers are looked at when a folder is loaded.
LOOKED_AT = 256
#: TIFF's tags: bits, photometric interpretation, samples per pixel, planar configuration, sample format.
BITS, PHOTOMETRIC, SAMPLES, PLANAR, FORMAT = 258, 262, 277, 284, 339
#: Values a pixel of PNG's colour types.
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
#: PIL's modes of 8 bits at most; of others it would cut the values off.
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class Header(NamedTuple):
    """Of an image file.

    Attributes:
        bits: per value; 8 where the kind of file knows nothing else.
        unsigned: whether the values are whole numbers from 0.
        pages: images in the file, if more than one then 2.
        plain: whether DALI decodes it right.
        samples: values a pixel, where PNG, TIFF or DICOM say so.
    """

    bits: int = 8
    unsigned: bool = True
    pages: int = 1
    plain: bool = True
    samples: int = 1


def read_header(content: np.ndarray) -> Header:
    """The header of a file (``uint8``), as far as it can be read: what is damaged is found when it is decoded."""
    start = content[:8].tobytes()
    try:
        if start == b"\x89PNG\r\n\x1a\n":
            return Header(bits=int(content[24]), samples=PNG_SAMPLES[int(content[25])])
        if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff_header(content)
        if is_dicom(content):
            return _dicom_header(content)
    except (struct.error, IndexError, KeyError):
        pass
    return Header()


def _dicom_header(content: np.ndarray) -> Header:
    try:
        samples, frames = samples_and_frames(content)
    except ValueError:
        return Header(16, plain=False)
    return Header(16 if samples == 1 else 8, pages=min(frames, 2), plain=False, samples=samples)


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
        samples=tags.get(SAMPLES, 1),
    )


def check_header(header: Header, path: str) -> None:
    """Raise an `InputError` for values that would be cut off or coarsened unseen."""
    if not header.unsigned or (header.bits > 8 and header.bits != 16):
        kind = "whole numbers" if header.unsigned else "signed numbers or floats"
        raise InputError(f"{path} has {kind} of {header.bits} bits: convert it to 8 bits or 16, from 0 on")


def check_depth(header: Header, path: str, dtype: torch.dtype) -> None:
    """Raise an `InputError` for an image that is not of ``dtype``'s bits."""
    if (header.bits > 8) != (dtype == torch.uint16):
        got, others = (16, 8) if header.bits > 8 else (8, 16)
        raise InputError(f"{path} has {got} bits, while the images looked at first have {others}: convert it")


def rewrite(content: np.ndarray) -> np.ndarray:
    """An image file that DALI does not decode, decoded and turned as its EXIF says, as one that it does.

    Raises:
        ValueError: if it cannot be decoded so either.
    """
    buffer = io.BytesIO()
    if is_dicom(content):
        Image.fromarray(first_frame(content)).save(buffer, format="TIFF")
        return np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    try:
        with Image.open(io.BytesIO(content.tobytes())) as image:
            if image.mode.startswith("I;16"):
                _sixteen_bits(image).save(buffer, format="TIFF")
            elif image.mode in EIGHT_BITS and read_header(content).bits <= 8:  # else PIL cuts colours to 8
                turned = ImageOps.exif_transpose(image)
                turned.convert("L" if image.mode in ("1", "L", "LA") else "RGB").save(buffer, format="BMP")
            else:
                raise ValueError(f"its pixels are of PIL's mode {image.mode}")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def _sixteen_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits, turned; PIL leaves a TIFF in which 0 is white as it is."""
    inverted = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)
    return Image.fromarray(65535 - values if inverted else values)
