"""Settings of the whole process that make training on a CPU faster. The package never changes them by itself."""

import ctypes
import os
from typing import Any

# Parameters of glibc's mallopt(), see malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_BLOCK_BYTES, MAX_KEPT_BYTES = 32 << 20, 1 << 30
# With these a user has chosen already
ENVIRONMENT_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def tune_process() -> bool:
    """
    Let the process keep freed memory for the next gradient step. Programs call it once, before they train on a CPU.

    PyTorch has no allocator of its own on a CPU. Linux's C library (glibc) returns feature maps to the system as soon
    as they are freed, and a gradient step that needs them again spends a quarter of its time on page faults. At most
    1 GiB is kept, in blocks of up to 32 MiB: about what a gradient step needs (``SEERSAC`` with ``PixelEncoder`` and batches
    of 128: a peak of 875 MB, not 820).

    Another C library is left as it is, and so is a process whose environment sets ``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_MMAP_THRESHOLD_`` or ``GLIBC_TUNABLES`` (see ``man mallopt``).

    :return: whether freed memory is kept from now on
    """
    mallopt = _glibc("mallopt")
    if mallopt is None or any(name in os.environ for name in ENVIRONMENT_VARIABLES):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAX_BLOCK_BYTES) and mallopt(M_TRIM_THRESHOLD, MAX_KEPT_BYTES))


def return_freed_memory() -> None:
    """Return memory that was freed until now to the system. No setting changes."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> Any:
    """:return: a function of the C library, None if that is not glibc"""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
