"""Images that stay in their files: read and decoded batch by batch with NVIDIA DALI.

For images that do not fit into memory, and to decode those that do: only the paths are held. The files are read by a
few threads, decoded by DALI's (on a GPU by the GPU), and `EncodedImages.stream` does so ahead of whoever takes the
batches.
"""

import math
import os
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from amimv import InputError, first_line
from amimv.pipelines.images import Parts, on_the_host, spaced
from amimv.pipelines.sources.dicom import is_dicom
from amimv.pipelines.sources.image_files import LOOKED_AT, check_depth, check_header, read_header, rewrite
from amimv.threads import local_processes, usable_cores

#: Batches that are read and decoded before they are asked for.
AHEAD = 2
#: Images that are decoded at once: a part of a batch, as each is held in its full size until it is resized.
CHUNK = 64
#: Threads that read files; they wait for the disk or the network, not for a core.
READERS = 8


def _dali() -> tuple[Any, Any]:
    """DALI's dynamic mode and its types; it takes seconds to import, so only who decodes with it does."""
    try:
        import nvidia.dali.experimental.dynamic as ndd
        from nvidia.dali import types
    except ImportError as error:
        raise InputError(
            f"a folder of images needs NVIDIA DALI 2 or later ({error}): pip install nvidia-dali-cuda130, "
            "or pack the images into an .npz"
        ) from error
    return ndd, types


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Images that lie in files, and how they are decoded.

    JPEG, PNG, TIFF (of several pages the first), BMP or WebP; what DALI does not decode, PIL does, and pydicom DICOM
    (see `sources.dicom`). Each is decoded to RGB, or to grey where ``channels`` is 1 (transparency is dropped), turned
    as its EXIF orientation says, resized to ``size`` along its shorter side (linear, antialiased) and cropped to the
    square in the middle.

    Attributes:
        paths: of the files, N.
        size: height and width of the decoded images in pixels.
        channels: 1 or 3.
        device: where the decoded images are wanted; on a CUDA device they are decoded there.
        dtype: ``uint16`` of files of 16 bits, ``uint8`` of all others; a file of the other kind is refused.
    """

    paths: tuple[str, ...] = field(repr=False)
    size: int
    channels: int
    device: torch.device
    dtype: torch.dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, size, size, channels)``, as of the tensor of all images."""
        return (len(self.paths), self.size, self.size, self.channels)

    @property
    def nbytes(self) -> int:
        """Of all images, decoded."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def decoded(self) -> bool:
        return False

    def subset(self, indices: Tensor) -> "EncodedImages":
        """The images ``indices`` (``(M,)`` ``int64``, on any device)."""
        return replace(self, paths=tuple(self.paths[i] for i in indices.tolist()))

    def gather(self, indices: Tensor) -> Tensor:
        """The images ``indices``: ``(...)`` ``int64``, on any device, to ``(..., size, size, C)``; read and
        decoded while the caller waits.

        Raises:
            InputError: DALI is not installed, or a file cannot be read or decoded.
        """
        return next(self.stream(indices[None]))

    def stream(self, parts: Parts) -> Iterator[Tensor]:
        """The images of one part after the other, ``AHEAD`` of them read and decoded while the last one is used.

        Memory holds so many batches, their files, and ``CHUNK`` images in full size. The threads behind it end with
        the iterator, or when that is closed or dropped.

        Args:
            parts: see `Images.stream`.

        Yields:
            ``(..., size, size, C)`` on ``device``, in the order of the parts.

        Raises:
            InputError: DALI is not installed, or a file cannot be read or decoded.
        """
        with _borrowed(self.device) as engine, _threads(1, "decode") as decoder, _threads(READERS, "read") as readers:
            coming: deque[Future[_Decoded]] = deque()
            for part in on_the_host(parts):
                paths = [self.paths[i] for i in part.flatten().tolist()]
                files = [readers.submit(_read_file, path) for path in paths]
                shape = (*part.shape, *self.shape[1:])
                coming.append(decoder.submit(self._decode, engine, paths, files, shape))
                if len(coming) > AHEAD:
                    yield _handed_over(coming.popleft().result(), self.device)
            while coming:
                yield _handed_over(coming.popleft().result(), self.device)

    def _decode(
        self, engine: "_Engine", paths: list[str], files: "list[Future[np.ndarray]]", shape: tuple[int, ...]
    ) -> "_Decoded":
        with torch.cuda.stream(engine.stream), _dali()[0].EvalMode.sync_cpu, engine.context:
            out = torch.empty((len(paths), *self.shape[1:]), dtype=self.dtype, device=self.device)
            for start in range(0, len(paths), CHUNK):
                stop = start + CHUNK
                encoded = [file.result() for file in files[start:stop]]
                out[start:stop] = self._decode_chunk(paths[start:stop], encoded)
            event = engine.stream.record_event() if engine.stream else None
        return _Decoded(out.view(shape), event)

    def _decode_chunk(self, paths: list[str], encoded: list[np.ndarray]) -> Tensor:
        for i, (path, file) in enumerate(zip(paths, encoded, strict=True)):
            header = read_header(file)
            check_header(header, path)
            check_depth(header, path, self.dtype)
            if not header.plain:
                encoded[i] = _rewritten(path, file)
        try:
            return self._decode_files(encoded)
        except RuntimeError:
            # DALI does not say which it was.
            return torch.cat([self._decode_file(path, file) for path, file in zip(paths, encoded, strict=True)])

    def _decode_file(self, path: str, file: np.ndarray) -> Tensor:
        try:
            return self._decode_files([file])
        except RuntimeError:
            return self._decode_files([_rewritten(path, file)])

    def _decode_files(self, encoded: list[np.ndarray]) -> Tensor:
        ndd, types = _dali()
        where, side = "gpu" if self.device.type == "cuda" else "cpu", self.size
        colour = types.GRAY if self.channels == 1 else types.RGB
        kind = types.UINT16 if self.dtype == torch.uint16 else types.UINT8
        files = ndd.as_batch(encoded)
        # A header that DALI cannot read must fail here: in its decoder the rest of the batch would outlive the failure
        # and write where it may no longer.
        ndd.peek_image_shape(files)
        images = ndd.decoders.image(files, device=where, output_type=colour, dtype=kind)
        return ndd.resize_crop_mirror(images, resize_shorter=side, crop=(side, side), antialias=True).torch()


def _rewritten(path: str, file: np.ndarray) -> np.ndarray:
    try:
        return rewrite(file)
    except ValueError as error:
        reason = f" ({first_line(error)[:100]})" if is_dicom(file) else ""
        raise InputError(
            f"{path} cannot be decoded as an image{reason}: "
            "it is damaged or of another kind than JPEG, PNG, TIFF, BMP, WebP, DICOM"
        ) from error


class _Decoded(NamedTuple):
    """Images, and on a GPU when they are there."""

    images: Tensor
    ready: torch.cuda.Event | None


def _handed_over(decoded: _Decoded, device: torch.device) -> Tensor:
    """What is queued next on the current stream waits for these images, but not for those decoded after them."""
    if decoded.ready is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(decoded.ready)
        # Else the allocator could hand the memory out on the decoder's stream while the current one still reads it.
        decoded.images.record_stream(current)
    return decoded.images


class _Engine(NamedTuple):
    """DALI's operators and threads, and on a GPU the stream that they and torch's copies share."""

    context: Any
    stream: torch.cuda.Stream | None


#: Engines that no one uses now, by process and device; setting up a decoder on a GPU takes longer than a batch.
_idle: defaultdict[tuple[int, torch.device], list[_Engine]] = defaultdict(list)


@contextmanager
def _borrowed(device: torch.device) -> Iterator[_Engine]:
    """An engine for one thread at a time; apart from the contexts of the dali backend, which the caller may be in."""
    idle = _idle[os.getpid(), device]  # threads do not survive a fork
    try:
        engine = idle.pop()
    except IndexError:
        engine = _build_engine(device)
    try:
        yield engine
    finally:
        idle.append(engine)


def _build_engine(device: torch.device) -> _Engine:
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    gpu = device.index if stream else None
    context = _dali()[0].EvalContext(num_threads=_share_of_cores(), device_id=gpu, cuda_stream=stream)
    return _Engine(context, stream)


def _share_of_cores() -> int:
    """This process's share of the cores it may run on; its launcher says how many processes there are."""
    share = usable_cores() // local_processes(os.environ)
    return min(max(share, 1), CHUNK)


@contextmanager
def _threads(n: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that are gone at the end, with whatever they have not begun."""
    pool = ThreadPoolExecutor(n, thread_name_prefix=f"amimv-{name}")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _read_file(path: str) -> np.ndarray:
    """The bytes of a file, ``uint8``."""
    try:
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def can_decode(paths: tuple[str, ...], device: torch.device) -> bool:
    """Whether all of these files, a few, can be read and decoded, all of them as 8 bits or all as 16.

    Raises:
        InputError: DALI is not installed.
    """
    _dali()
    for dtype in (torch.uint8, torch.uint16):
        try:
            EncodedImages(paths, 8, 3, device, dtype).gather(torch.arange(len(paths)))
        except InputError:
            continue
        return True
    return False


def inspect_files(paths: tuple[str, ...], title: str) -> tuple[torch.dtype, int, list[str]]:
    """Look at the headers of an evenly spaced sample of at most ``LOOKED_AT`` image files.

    Args:
        paths: of at least one file.
        title: begins the remarks.

    Returns:
        The type that holds their values, the channels to decode them to (3 of 8 bits, as these may mean anything; of
        16 bits what the files have), and remarks on what would be lost unseen.

    Raises:
        InputError: some have 16 bits and others 8, a file cannot be read, or its values are none that a store holds.
    """
    chosen = [paths[i] for i in spaced(len(paths), LOOKED_AT).tolist()]
    with _threads(READERS, "read") as readers:
        headers = [read_header(file) for file in readers.map(_read_file, chosen)]
    for path, header in zip(chosen, headers, strict=True):
        check_header(header, path)
    remarks = []
    if pages := sum(header.pages > 1 for header in headers):
        remarks.append(
            f"{title}: {pages} of {len(chosen)} files looked at have more than one page, of which the first is taken"
        )
    deep = sum(header.bits > 8 for header in headers)
    if 0 < deep < len(chosen):
        raise InputError(
            f"{title}: {deep} of {len(chosen)} images looked at have 16 bits, the others 8, "
            "so that their values cannot be compared: convert one kind to the other"
        )
    grey = deep and all(header.samples < 3 for header in headers)
    return torch.uint16 if deep else torch.uint8, 1 if grey else 3, remarks
