"""A folder's images, held as fast as they fit: decoded once, mapped from a cache, or decoded batch by batch."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from amimv import InputError
from amimv.pipelines.images import RESIDENT_SHARE, HostImages, Images, ResidentImages
from amimv.pipelines.sources.cache import Cached, Decoded, cached, fingerprint
from amimv.pipelines.sources.encoded import CHUNK, EncodedImages, can_decode, inspect_files
from amimv.pipelines.sources.labels import shortened
from amimv.signals import rank_of

#: Share of the host's free memory that decoded images may take, all processes of this machine together.
HOST_SHARE = 0.5
#: Where Linux says how much a container may have: a number, or "max" (cgroups of version 2 and 1).
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
#: Images that are decoded at a time: few, as the files of three such parts are held (a mammogram's has 27 MB).
PART = 32
#: From how many images on a bar shows how far it is.
MANY = 2000

_log = logging.getLogger("amimv")


@dataclass(frozen=True)
class Folder:
    """What is read of a folder.

    Attributes:
        paths: of the files of a split, at least one.
        folder: that they lie in.
        title: of the split, for the log.
        name: of its cache file.
        size: height and width in pixels.
        channels: 1, 3, or None: what the files have, 3 of 8 bits.
        device: where batches are wanted.
    """

    paths: tuple[str, ...]
    folder: Path
    title: str
    name: str
    size: int
    channels: int | None
    device: torch.device

    def only(self, indices: Tensor) -> "Folder":
        """The files ``indices``, ``(M,)`` ``int64``."""
        return replace(self, paths=tuple(self.paths[i] for i in indices.tolist()))

    def encoded(self) -> tuple[EncodedImages, list[str]]:
        """The images in their files, and remarks on them."""
        dtype, channels, remarks = inspect_files(self.paths, self.title)
        return EncodedImages(self.paths, self.size, self.channels or channels, self.device, dtype), remarks


def hold(folder: Folder, resident: bool | None, cache: Path | None) -> Images:
    """The images of a folder: mapped from their cache if there shall be one, else decoded now if they fit, else later.

    Args:
        folder: which files.
        resident: True decodes them now whatever they take, False batch by batch; with a cache, whether they are
            brought to the device. None: if they fit.
        cache: the folder of cache files; None for none.

    Raises:
        InputError: a file that is looked at cannot be read or decoded, or a cache file is of other images.
    """
    if cache is not None and (kept := _from_cache(folder, cache)):
        _remark(kept.remarks)
        return _mapped(kept.images, folder, resident)
    images, remarks = folder.encoded()
    _remark(remarks)
    place = _place(images, resident)
    if place is None:
        return images
    on_device = place.type == folder.device.type  # a CPU may be called cpu:0
    tensor = torch.empty(images.shape, dtype=images.dtype, device=place, pin_memory=not on_device)
    at = 0
    for part in decode(images, folder.title):
        tensor[at : at + len(part)] = part
        at += len(part)
    return ResidentImages(tensor, folder.paths) if on_device else HostImages(tensor, folder.device, folder.paths)


def find_damaged(folder: Folder) -> tuple[Tensor, tuple[str, ...]]:
    """Try every file, in parts as large as are decoded at once.

    Returns:
        Which can be read and decoded, ``(M,)`` sorted ``int64``, and the names of the others, which the log lists.

    Raises:
        InputError: none can.
    """
    n, bad = len(folder.paths), list[int]()
    with _bar(n, f"checking {folder.title}") as bar:
        for part in torch.arange(n).split(CHUNK):
            if not can_decode(folder.only(part).paths, folder.device):
                bad += [i for i in part.tolist() if not can_decode((folder.paths[i],), folder.device)]
            bar.update(len(part))
    names = tuple(os.path.relpath(folder.paths[i], folder.folder) for i in bad)
    if len(bad) == n:
        raise InputError(f"{folder.title}: none of {n} files can be decoded ({shortened(names, 3)}): are they images?")
    if bad:
        told = shortened(names)
        _log.warning("%s: left out %d of %d files, which cannot be decoded: %s", folder.title, len(bad), n, told)
    else:
        _log.info("%s: all %d files can be decoded", folder.title, n)
    return torch.tensor(sorted(set(range(n)) - set(bad))), names


def _bar(n: int, what: str) -> "tqdm[Any]":
    """On a terminal, if the images are many; it looks for a terminal itself if `disable` is None."""
    quiet = None if n > MANY and rank_of(os.environ) == 0 else True
    return tqdm(total=n, desc=what, unit="image", leave=False, disable=quiet)


def decode(images: EncodedImages, title: str) -> Iterator[Tensor]:
    """All images in order, in parts; with a bar on a terminal if they are many."""
    n = len(images.paths)
    _log.info("%s: decoding %d images once, %.2f GiB", title, n, images.nbytes / 2**30)
    with _bar(n, f"decoding {title}") as bar:
        for part in images.stream(torch.arange(n).split(PART)):
            yield part
            bar.update(len(part))


def fits(n_bytes: int, free: int, share: float, processes: int = 1) -> bool:
    """Whether each of so many processes may hold ``n_bytes`` in a share of what is free."""
    return n_bytes * processes <= share * free


def _fits_device(n_bytes: int, device: torch.device) -> bool:
    return fits(n_bytes, torch.cuda.mem_get_info(device)[0], RESIDENT_SHARE)


def _place(images: EncodedImages, resident: bool | None) -> torch.device | None:
    """Where the images are held once decoded; None where they are not."""
    if resident is not None:
        return images.device if resident else None
    if images.device.type == "cuda" and _fits_device(images.nbytes, images.device):
        return images.device
    free, processes = free_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if fits(images.nbytes, free, HOST_SHARE, processes):
        return torch.device("cpu")
    _log.warning(
        "%d images take %.2f GiB decoded, more than %.0f %% of the free memory (%.2f GiB): decoded batch by batch",
        images.shape[0],
        images.nbytes * processes / 2**30,
        100 * HOST_SHARE,
        free / 2**30,
    )
    return None


def free_memory(limits: tuple[Path, ...] = CONTAINER_LIMITS) -> int:
    """Bytes of host memory that are free, of a container at most what it may have at all."""
    told = [path.read_text().strip() for path in limits if path.is_file()]
    return min([psutil.virtual_memory().available, *(int(limit) for limit in told if limit.isdigit())])


def _from_cache(folder: Folder, cache: Path) -> Cached | None:
    def decoded() -> Decoded:
        images, remarks = folder.encoded()
        return Decoded(images.shape, images.dtype, remarks, decode(images, folder.title))

    # A GPU decodes JPEG a little differently.
    how = (folder.size, folder.channels, folder.device.type)
    return cached(cache, folder.name, fingerprint(folder.paths, folder.folder, how), decoded)


def _mapped(images: Tensor, folder: Folder, resident: bool | None) -> Images:
    device = folder.device
    if device.type == "cpu":
        return ResidentImages(images, folder.paths)
    if _fits_device(images.nbytes, device) if resident is None else resident:
        return ResidentImages(images.to(device), folder.paths)
    return HostImages(images, device, folder.paths)


def _remark(remarks: list[str]) -> None:
    for line in remarks:
        _log.warning(line)
