"""DICOM files: rescaled, windowed, inverted, with and without an ending, and one clear line for what they can lack."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amimv import InputError
from amimv.pipelines import load_store
from amimv.pipelines.sources.dicom import first_frame, is_dicom

pytest.importorskip("nvidia.dali.experimental.dynamic")
pydicom = pytest.importorskip("pydicom")
RNG = np.random.default_rng(0)
STORED = RNG.integers(0, 4096, (16, 16), dtype=np.uint16)


def save(path: Path, pixels: np.ndarray, bits: int = 12, **tags: Any) -> Path:
    """A file of these stored values ``(H, W)``, ``(H, W, 3)`` or, with ``NumberOfFrames``, ``(frames, H, W)``."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    colour = pixels.shape[-1] == 3
    shape = pixels.shape[:2] if colour else pixels.shape[-2:]
    dataset.Rows, dataset.Columns = shape
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration, bits = 0, 8 * pixels.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * pixels.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def frame(path: Path) -> np.ndarray:
    return first_frame(np.fromfile(path, dtype=np.uint8))


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return (((values.astype(np.float64) - low) / (high - low)).clip(0, 1) * 65535).round()


def test_all_that_the_bits_can_hold_without_a_window(tmp_path: Path) -> None:
    whole = scaled(STORED, 0, 4095)
    assert np.array_equal(frame(save(tmp_path / "x", STORED)), whole)
    assert np.array_equal(frame(save(tmp_path / "x", STORED, RescaleSlope=0.5, RescaleIntercept=-7)), whole)
    assert np.array_equal(frame(save(tmp_path / "x", STORED, RescaleSlope=-2, RescaleIntercept=9)), 65535 - whole)
    signed = (STORED.astype(np.int16) - 2048).astype(np.int16)
    assert np.array_equal(frame(save(tmp_path / "x", signed)), whole)
    eight = (STORED >> 4).astype(np.uint8)
    assert np.array_equal(frame(save(tmp_path / "x", eight, bits=8)), eight * 257.0)


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    inverted = frame(save(tmp_path / "x", STORED, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(inverted, 65535 - scaled(STORED, 0, 4095))


def test_a_window_is_of_rescaled_values(tmp_path: Path) -> None:
    rescale = {"RescaleSlope": 2, "RescaleIntercept": -1024}
    values = STORED * 2.0 - 1024
    window = {"WindowCenter": 40, "WindowWidth": 400, **rescale}
    exact = scaled(values, 40 - 200, 40 + 200)
    linear = scaled(values, 39.5 - 399 / 2, 39.5 + 399 / 2)  # as the standard has it
    assert np.array_equal(frame(save(tmp_path / "x", STORED, **window)), linear)
    found = frame(save(tmp_path / "x", STORED, VOILUTFunction="LINEAR_EXACT", **window))
    assert np.abs(found - exact).max() <= 1  # halves are rounded either way
    several = window | {"WindowCenter": [40, 600], "WindowWidth": [400, 1500]}
    assert np.array_equal(frame(save(tmp_path / "x", STORED, **several)), linear)
    sigmoid = frame(save(tmp_path / "x", STORED, VOILUTFunction="SIGMOID", **window))
    assert np.abs(sigmoid - 65535 / (1 + np.exp(-4 * (values - 40) / 400))).max() < 1


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 300, "WindowWidth": 900}])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_as_pydicom_does(tmp_path: Path, window: dict[str, int], function: str) -> None:
    from pydicom.pixels import apply_modality_lut, apply_windowing

    path = save(tmp_path / "x", STORED, RescaleSlope=1.5, RescaleIntercept=-100, VOILUTFunction=function, **window)
    dataset = pydicom.dcmread(path)
    expected = apply_windowing(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    assert np.abs(frame(path) - scaled(expected, -100, 4095 * 1.5 - 100)).max() <= 1


def test_ct_without_a_window_is_in_hounsfield_units(tmp_path: Path) -> None:
    """The same tissue is the same grey, whatever a scanner's intercept and bits."""
    tissue = RNG.integers(-1000, 2000, (16, 16))
    expected = scaled(tissue, -1024, 3071)
    for intercept, bits in ((-1024, 12), (-8192, 16), (-2000, 13)):
        stored = (tissue - intercept).astype(np.uint16)
        path = save(tmp_path / "x", stored, bits, Modality="CT", RescaleSlope=1, RescaleIntercept=intercept)
        assert np.array_equal(frame(path), expected)


def test_the_first_of_several_frames_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = np.stack([STORED, STORED[::-1]])
    for name in ("a/0.dcm", "b/0.dcm"):
        save(tmp_path / "x" / name, frames, NumberOfFrames=2)
    store = load_store(f"folder:{tmp_path / 'x'}", size=16)
    assert np.array_equal(store.gather(torch.tensor(0))[..., 0].numpy(), scaled(STORED, 0, 4095))
    line = "x, train: 2 of 2 files looked at have more than one page, of which the first is taken"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_a_folder_of_files_with_and_without_an_ending(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("a/0.dcm", "a/IM0001", "a/IM.0002", "b/1.2.840.113619.2.55", "b/series/9.DCM", "b/10")
    for i, name in enumerate(names):
        save(tmp_path / "x" / name, np.roll(STORED, i))
    (tmp_path / "x" / "a" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "x" / "a" / "README").write_text("no image")
    store = load_store(f"folder:{tmp_path / 'x'}", size=16, cache=tmp_path / "kept")
    assert (len(store), store.class_counts(), store.channels, store.images.dtype) == (6, [3, 3], 1, torch.uint16)
    assert [record.getMessage() for record in caplog.records] == ["x, train: left out 2 without an ending"]
    wanted = {str(tmp_path / "x" / name): scaled(np.roll(STORED, i), 0, 4095) for i, name in enumerate(names)}
    for streamed in (store, load_store(f"folder:{tmp_path / 'x'}", size=16, resident=False)):
        found = streamed.gather(torch.arange(6))[..., 0].numpy()
        for path, image in zip(streamed.images.paths, found, strict=True):
            assert np.array_equal(image, wanted[path])
    assert load_store(f"folder:{tmp_path / 'x'}", size=8).gather(torch.tensor([0])).shape == (1, 8, 8, 1)


def test_colour_is_of_8_bits(tmp_path: Path) -> None:
    image = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in ("a/0.dcm", "b/0.dcm"):
        save(tmp_path / "x" / name, image)
    store = load_store(f"folder:{tmp_path / 'x'}", size=16)
    assert np.array_equal(store.gather(torch.tensor(1)).numpy(), image)
    save(tmp_path / "x" / "b" / "1.dcm", STORED)
    with pytest.raises(InputError, match="1 of 3 images looked at have 16 bits, the others 8"):
        load_store(f"folder:{tmp_path / 'x'}", size=16)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_mark(path: Path) -> None:
    path.write_bytes(bytes(128) + b"DICM")


def no_image(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)


def unknown_compression(path: Path) -> None:
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGLSLossless

    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([b"\1\2\3\4"])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.save_as(path)


@pytest.mark.parametrize("damage", [cut, only_mark, no_image, unknown_compression])
def test_what_cannot_be_decoded_is_one_line(tmp_path: Path, damage: Any) -> None:
    for name in ("a/0.dcm", "a/1.dcm", "b/0.dcm"):
        save(tmp_path / "x" / name, STORED)
    bad = tmp_path / "x" / "a" / "1.dcm"
    damage(bad)
    with pytest.raises(InputError, match=str(bad)) as caught:
        load_store(f"folder:{tmp_path / 'x'}", size=16)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.replace(str(bad), "")) < 220


def test_without_pydicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/0.dcm", "b/0.dcm"):
        save(tmp_path / "x" / name, STORED)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(InputError, match="DICOM files are read by pydicom, which is not installed: pip install"):
        load_store(f"folder:{tmp_path / 'x'}", size=16)


def test_the_mark() -> None:
    assert is_dicom(np.frombuffer(bytes(128) + b"DICM", dtype=np.uint8))
    assert not is_dicom(np.zeros(0, dtype=np.uint8))
    assert not is_dicom(np.zeros(200, dtype=np.uint8))
