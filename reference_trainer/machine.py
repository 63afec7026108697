"""What a process finds on its machine: a device, a folder for caches, memory that stays, a description."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
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
    """The device asked for, or the best there is; of several processes that torchrun starts each has a GPU."""
    try:
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
        rank = os.environ.get("LOCAL_RANK", "")
        device = torch.device(f"cuda:{rank}" if name == "cuda" and rank.isdecimal() else name)
        float(torch.zeros(1, device=device))  # one without memory, such as meta, is none to train on
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def cores() -> int:
    """That this process may use: of a machine shared by a scheduler not all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Where fitted autoencoders and classifiers are kept: $ROBUSTCM_CACHE, or robustcm in the user's cache folder."""
    if chosen := os.environ.get("ROBUSTCM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robustcm"


def describe_machine() -> dict[str, Any]:
    """What measured figures depend on; no host name."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        name = found[1]
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "date": datetime.date.today().isoformat(),
        "load_average": os.getloadavg()[0],  # above the number of cores: somebody else was computing too
    }
