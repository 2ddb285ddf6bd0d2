"""What makes training on a CPU faster: freed memory that is kept, no subnormal numbers, and bfloat16 where it pays."""

import ctypes
import os
from typing import Any

import torch as th

# Parameters of glibc's mallopt(), see malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_BLOCK_BYTES, MAX_KEPT_BYTES = 32 << 20, 1 << 30
# Where one of these is set, the user has chosen already
ENVIRONMENT_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def tune_process() -> bool:
    """
    Let the process keep freed memory for the next gradient step. Programs call it once, before they train on a CPU; the
    package itself never changes the process.

    PyTorch has no allocator on a CPU. Linux's C library (glibc) returns feature maps to the system as soon
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


def multiplies_bfloat16() -> bool:
    """:return: whether PyTorch has fast convolutions in bfloat16 on this CPU, True if it does not say"""
    is_supported = getattr(th.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return is_supported is None or is_supported()


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


def zero_subnormals(model: Any, optimizers: Any) -> None:
    """
    On a CPU, every 100 gradient steps: set subnormal numbers (below 1.2e-38) in the state of optimizers to zero. No weight
    changes.

    Adam multiplies the momentum of a weight without a gradient, such as all weights of a dead unit, by 0.9 in each step.
    It never becomes zero, as the smallest numbers are rounded to themselves, and a CPU may need a hundred times as long for
    one of these. After a thousand steps of ``SEERSAC`` without images, four momenta in ten were subnormal.

    :param model: an algorithm, at the start of its ``train()``
    :param optimizers: an optimizer of the algorithm, or a list of them
    """
    if model.device.type != "cpu" or model._n_updates < getattr(model, "_subnormals_due", 0):
        return
    model._subnormals_due = model._n_updates + 100
    for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, th.Tensor) and value.is_floating_point():
                    value.masked_fill_(value.abs() < th.finfo(value.dtype).tiny, 0.0)
