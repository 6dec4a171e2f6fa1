"""Files that are written whole or not at all, and locks that die with their process."""

import errno
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from amimv import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("amimv")

#: What ``flock`` says where the file system knows no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` in here names the file: a write that fails does not know where it wrote."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path, mode: str = "w", **how: Any) -> Iterator[IO[Any]]:
    """A file to write, which takes the place of ``path`` in the end: synced to the disk and renamed.

    Whatever goes wrong leaves what was there before, and no partial file. One writer at a time.

    Args:
        path: its folder exists.
        mode, how: as for `open`.

    Raises:
        OSError: the disk is full, the folder cannot be written, ...; it names the file.
    """
    partial = path.with_name(f"{path.name}.partial")
    with naming(path):
        try:
            with partial.open(mode, **how) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":  # which cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, busy: str = "") -> Iterator[int]:
    """Held by one process at a time, and by the children that inherit the file descriptor that it gives; the system
    lets go of it when the last of them is dead, however it died. The file stays, empty.

    Over NFS (Linux 2.6.12 or later) ``flock`` is a lock of the server's, so it holds between machines, unless the
    folder is mounted with ``nolock`` or ``local_lock``; of a machine that crashed, the server keeps it until its lease
    ends. Where there are no locks (Windows, Lustre without ``flock``) nothing is held back, and a line says so.

    Args:
        path: of the lock; its folder is made.
        busy: refuse with this line, which is followed by who holds the lock, instead of waiting.

    Raises:
        InputError: someone else holds it, and ``busy`` is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no flock")
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(f"{busy} ({file.read().strip() or 'unknown'})") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: there are no locks here, so see to it that one process at a time runs there", path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield file.fileno()
        finally:
            file.truncate(0)
