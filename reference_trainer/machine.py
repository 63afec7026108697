"""What a process finds on its machine: a device, a folder for caches, memory that stays."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from reference_trainer.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory() -> bool:
    """Tell glibc not to hand large freed blocks back to the system.

    By default every tensor above 32 MB, and at first above 128 KB, is mapped anew and paid for in page faults;
    `benchmarks/step_time.py` measures both ways. Changes no number.

    Returns:
        Whether the C library took it; False (no harm done) where it is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))


def device_of(name: str | None) -> torch.device:
    """The device asked for, or the best there is."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def cache_folder() -> Path:
    """Where fitted autoencoders and classifiers are kept: $ROBUSTCM_CACHE, or robustcm in the user's cache folder."""
    if chosen := os.environ.get("ROBUSTCM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robustcm"
