"""Images that stay in their files: read and decoded batch by batch with NVIDIA DALI.

For images that do not fit into memory: only the paths are held. The files are read by a few threads, decoded by
DALI's (on a GPU by the GPU), and `EncodedImages.stream` does so ahead of whoever takes the batches.
"""

import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from amimv import InputError, usable_cores
from amimv.pipelines.image_files import (
    DECODED,
    LOOKED_AT,
    check_header,
    read_header,
    rewrite,
    sixteen_bits_told,
)

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

    JPEG, PNG, TIFF (of several pages the first), BMP or WebP; what DALI does not decode, PIL does. Each is decoded to
    RGB, or to grey where ``channels`` is 1 (transparency is dropped), turned as its EXIF orientation says, resized to
    ``size`` along its shorter side (linear, antialiased) and cropped to the square in the middle.

    Attributes:
        paths: of the files, N.
        size: height and width of the decoded images in pixels.
        channels: 1 or 3.
        device: where the decoded images are wanted; on a CUDA device they are decoded there.
        sixteen_bits: whether images of 16 bits are reduced to 8, or refused.
    """

    paths: tuple[str, ...] = field(repr=False)
    size: int
    channels: int
    device: torch.device
    sixteen_bits: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, size, size, channels)``, as of the tensor of all images."""
        return (len(self.paths), self.size, self.size, self.channels)

    def subset(self, indices: Tensor) -> "EncodedImages":
        """The images ``indices`` (``(M,)`` ``int64``, on any device)."""
        return replace(self, paths=tuple(self.paths[i] for i in indices.tolist()))

    def read(self, indices: Tensor) -> Tensor:
        """The images ``indices``: ``(...)`` ``int64``, on any device, to ``(..., size, size, C)`` ``uint8``.

        Raises:
            InputError: DALI is not installed, or a file cannot be read or decoded.
        """
        return next(self.stream([indices.cpu()]))

    def stream(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of one part after the other, ``AHEAD`` of them read and decoded while the last one is used.

        Memory holds so many batches, their files, and ``CHUNK`` images in full size. The threads behind it end with
        the iterator, or when that is closed or dropped.

        Args:
            parts: indices ``(...)`` ``int64``, on the host.

        Yields:
            ``(..., size, size, C)`` ``uint8`` on ``device``, in the order of the parts.

        Raises:
            InputError: DALI is not installed, or a file cannot be read or decoded.
        """
        with _borrowed(self.device) as engine, _threads(1, "decode") as decoder, _threads(READERS, "read") as readers:
            coming: deque[Future[_Decoded]] = deque()
            for part in parts:
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
            out = torch.empty((len(paths), *self.shape[1:]), dtype=torch.uint8, device=self.device)
            for start in range(0, len(paths), CHUNK):
                stop = start + CHUNK
                encoded = [file.result() for file in files[start:stop]]
                out[start:stop] = self._decode_chunk(paths[start:stop], encoded)
            event = engine.stream.record_event() if engine.stream else None
        return _Decoded(out.view(shape), event)

    def _decode_chunk(self, paths: list[str], encoded: list[np.ndarray]) -> Tensor:
        for i, (path, file) in enumerate(zip(paths, encoded, strict=True)):
            header = read_header(file)
            check_header(header, path, self.sixteen_bits)
            if not header.plain and header.bits <= 8:
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
        files = ndd.as_batch(encoded)
        # A header that DALI cannot read must fail here: in its decoder the rest of the batch would outlive the failure
        # and write where it may no longer.
        ndd.peek_image_shape(files)
        images = ndd.decoders.image(files, device=where, output_type=colour)
        return ndd.resize_crop_mirror(images, resize_shorter=side, crop=(side, side), antialias=True).torch()


def _rewritten(path: str, file: np.ndarray) -> np.ndarray:
    try:
        return rewrite(file)
    except ValueError as error:
        raise InputError(
            f"{path} cannot be decoded as an image: it is damaged or of another kind than JPEG, PNG, TIFF, BMP, WebP"
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
    """This process's share of the cores it may run on; torchrun says how many processes there are."""
    share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
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


def inspect_files(paths: tuple[str, ...], title: str) -> tuple[bool, list[str]]:
    """Look at the headers of an evenly spaced sample of at most ``LOOKED_AT`` image files.

    Args:
        paths: of at least one file.
        title: begins the remarks.

    Returns:
        Whether images of 16 bits are among them, and remarks on what would be lost unseen.

    Raises:
        InputError: if 8 bits would keep too little of them, or a file cannot be read.
    """
    n = len(paths)
    chosen = [paths[i * n // min(n, LOOKED_AT)] for i in range(min(n, LOOKED_AT))]
    deep: list[str] = []
    pages = 0
    with _threads(READERS, "read") as readers:
        for path, file in zip(chosen, readers.map(_read_file, chosen), strict=True):
            header = read_header(file)
            check_header(header, path, sixteen_bits=True)
            pages += header.pages > 1
            deep += [path] * (header.bits > 8)
    remarks = []
    if pages:
        remarks.append(
            f"{title}: {pages} of {len(chosen)} files looked at have more than one page, of which the first is taken"
        )
    if images := _decode_wide(deep[:: -(-len(deep) // DECODED) or 1]):
        told, enough = sixteen_bits_told(images)
        line = f"{title}: {len(deep)} of {len(chosen)} images looked at have 16 bits, {told}"
        if not enough:
            raise InputError(f"{line}: rescale them to 8 bits, or to 0..65535")
        remarks.append(f"{line}: they are reduced to 8 bits")
    return bool(deep), remarks


def _decode_wide(paths: list[str]) -> list[np.ndarray]:
    """Images of 16 bits as they are, ``(H, W, C)`` ``uint16``; what is damaged is left to whoever wants it."""
    if not paths:
        return []
    ndd, types = _dali()
    images = []
    with _borrowed(torch.device("cpu")) as engine, ndd.EvalMode.sync_cpu, engine.context:
        for path in paths:
            batch = ndd.as_batch([_read_file(path)])
            try:
                decoded = ndd.decoders.image(batch, device="cpu", output_type=types.ANY_DATA, dtype=types.UINT16)
                images.append(np.asarray(decoded.tensors[0]))
            except RuntimeError:
                continue
    return images
