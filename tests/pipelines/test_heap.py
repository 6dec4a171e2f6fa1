"""Freed memory stays with the process, unless the user has said what should become of it."""

import os
import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, torch
from amimv.pipelines.heap import keep_freed_memory
kept = keep_freed_memory()
def use(times):
    for _ in range(times):
        buffers = [torch.ones(3_000_000) for _ in range(4)]
use(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use(20)
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


def count_faults(**variables: str) -> tuple[str, float]:
    """Whether memory is kept, and the pages that are mapped anew each time that 48 MB are used, in a new process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment = {**clean, **variables}
    found = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS], env=environment, capture_output=True, text=True, check=True
    )
    kept, faults = found.stdout.split()
    return kept, float(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.slow
def test_freed_memory_is_kept() -> None:
    kept, faults = count_faults()
    assert kept == "True"
    assert faults < 1000  # of 11,700 pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072"),
    ],
)
@pytest.mark.slow
def test_the_users_own_setting_stands(name: str, value: str) -> None:
    kept, faults = count_faults(**{name: value})
    assert kept == "False"
    assert faults > 5000
