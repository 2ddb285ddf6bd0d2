"""What becomes of the memory that a gradient step on a CPU needs, and frees again."""

import ctypes
import os

# Of the C library's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# A block of as many bytes is the largest that it may keep; all blocks together
MAX_BLOCK_BYTES, MAX_KEPT_BYTES = 32 << 20, 1 << 30
# With these a user has chosen already
ENVIRONMENT_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """
    Have the process keep what it frees, for the next gradient step.

    PyTorch has no allocator of its own on a CPU. Linux's C library (glibc) returns feature maps to the system as soon as they
    are freed, and a gradient step that asks for them anew spends a quarter of its time on page faults. What is kept is
    about what a gradient step needs, up to 1 GiB; the most memory that the process ever has is a little more (``SEERSAC`` with
    ``PixelEncoder`` and batches of 128: 875 MB, not 820).

    It is for the whole process. Nothing is done with another C library, or where the environment says what to do: with
    ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_`` or ``GLIBC_TUNABLES``, see ``man mallopt``.

    :return: whether it will
    """
    mallopt = _glibc("mallopt")
    if mallopt is None or any(name in os.environ for name in ENVIRONMENT_VARIABLES):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAX_BLOCK_BYTES) and mallopt(M_TRIM_THRESHOLD, MAX_KEPT_BYTES))


def return_freed_memory() -> None:
    """Return to the system what the process has kept until now. It does not keep less from now on."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> "ctypes._NamedFuncPointer | None":
    """:return: a function of the C library, None if it is not glibc"""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
