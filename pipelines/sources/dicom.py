"""DICOM files, read by pydicom: what is in them, and their first frame as an image that is looked at."""

import io
from typing import Any

import numpy as np

from amimv import InputError

#: Hounsfield units that a CT without a window is shown over: those of 12 bits, the same for every file.
HOUNSFIELD = (-1024.0, 3071.0)
HEADER = ("SamplesPerPixel", "NumberOfFrames", "PhotometricInterpretation")


def is_dicom(content: np.ndarray) -> bool:
    """Whether a file (``uint8``, at least its first 132 bytes) has DICOM's mark; its name may be anything."""
    return content[128:132].tobytes() == b"DICM"


def samples_and_frames(content: np.ndarray) -> tuple[int, int]:
    """Values a pixel (3 of a palette) and frames of a DICOM file.

    Raises:
        ValueError: it is damaged, or holds no image.
    """
    dataset = _read(content, stop_before_pixels=True, specific_tags=list(HEADER))
    if "PhotometricInterpretation" not in dataset:
        raise ValueError("it holds no image")
    grey = str(dataset.PhotometricInterpretation).startswith("MONOCHROME")
    return 1 if grey else 3, int(dataset.get("NumberOfFrames") or 1)


def first_frame(content: np.ndarray) -> np.ndarray:
    """The first frame: grey ``(H, W)`` ``uint16``, or of colour ``(H, W, 3)`` ``uint8``.

    Grey values are rescaled as the file says (slope and intercept, or a table), and its first window, else all that
    its bits can hold (of a CT `HOUNSFIELD`), becomes 0 to 65535; where it says that low is bright, it is inverted.

    Raises:
        ValueError: it cannot be decoded.
    """
    from pydicom.pixels import apply_color_lut, pixel_array

    dataset = _read(content)
    try:
        stored = pixel_array(dataset, index=0)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            stored = apply_color_lut(stored, dataset)
            return (stored >> 8).astype(np.uint8) if stored.dtype == np.uint16 else stored
        if stored.ndim == 2:
            return _grey(stored, dataset)
    except (AttributeError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    if stored.dtype != np.uint8:
        raise ValueError(f"its colours have {8 * stored.itemsize} bits")
    return stored


def _read(content: np.ndarray, **how: Any) -> Any:
    try:
        from pydicom import dcmread
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise InputError("DICOM files are read by pydicom, which is not installed: pip install pydicom") from error
    try:
        return dcmread(io.BytesIO(content.tobytes()), **how)
    except (InvalidDicomError, OSError, AttributeError, KeyError, NotImplementedError) as error:
        raise ValueError(str(error)) from error


def _grey(stored: np.ndarray, dataset: Any) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut

    values = apply_modality_lut(stored, dataset).astype(np.float64)
    share = _windowed(values, dataset)
    if share is None:
        low, high = HOUNSFIELD
        if dataset.get("Modality") != "CT":
            ends = np.array([_stored_range(dataset)], dtype=stored.dtype)
            low, high = np.sort(apply_modality_lut(ends, dataset).astype(np.float64).ravel())
        share = (values - low) / max(high - low, 1e-9)
    grey = (share.clip(0, 1) * 65535).round().astype(np.uint16)
    return 65535 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _windowed(values: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Values as shares of the first window (DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3); None without one."""
    centre, width = (_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None or width <= 0:
        return None
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    if function == "SIGMOID":
        return (1 + np.tanh(2 * (values - centre) / width)) / 2
    if function == "LINEAR":
        centre, width = centre - 0.5, max(width - 1, 1e-9)
    return (values - centre) / width + 0.5


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value if isinstance(value, int | float | str) else value[0])


def _stored_range(dataset: Any) -> tuple[int, int]:
    """The least and the most that the file's bits can hold."""
    bits = int(dataset.BitsStored)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)
