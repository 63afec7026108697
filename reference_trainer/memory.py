"""Memory of the process: freed blocks are kept for the next step instead of going back to the system."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory() -> bool:
    """Tell glibc not to hand large freed blocks back to the system.

    By default every tensor above 32 MB, and at first above 128 KB, is mapped anew and paid for in page faults: a
    third of a training step's CPU time here (`benchmarks/step_time.py`). Changes no number.

    Returns:
        Whether the C library took it; False (no harm done) where it is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
