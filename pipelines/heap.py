"""What the C library does with the memory of a batch once it is freed, on a CPU."""

import ctypes
import os
from functools import cache

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


@cache
def keep_freed_memory() -> bool:
    """Let this process keep freed buffers of up to 32 MiB for the next batch; True if it does from now on.

    glibc gives the top of its heap back to the system, and the system maps every page of the next batch's buffers anew
    and fills it with zeros: a good tenth of the time of 64-pixel views here. Memory that was used once stays with the
    process. Nothing is changed where the C library is another, or where the user has set one of its variables
    ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` or malloc's ``GLIBC_TUNABLES``.
    """
    if any(name in os.environ for name in _USERS_OWN) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
