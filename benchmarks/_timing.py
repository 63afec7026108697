"""Repeated timing, memory of one call, machine metadata and the JSON file of a benchmark."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference_trainer.machine import describe_machine
from reference_trainer.run import RunFolder

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds a call, wall clock: median and quartiles over ``runs`` calls; CPU seconds of all threads, median.

    On a busy machine the wall clock measures the neighbours too; the CPU seconds do so less.
    """

    median: float
    q1: float
    q3: float
    cpu: float
    runs: int

    def __str__(self) -> str:
        return f"{self.median:.3g} s (IQR {self.q3 - self.q1:.2g}, {self.runs} runs, cpu {self.cpu:.3g} s)"


def measure(call: Callable[[], object], min_seconds: float = 2.0, min_runs: int = 3, max_runs: int = 200) -> Timing:
    """Times ``call`` until ``min_seconds`` and ``min_runs`` are reached, after one unmeasured warm-up."""
    call()
    _wait()
    runs: list[tuple[float, float]] = []
    while len(runs) < min_runs or (sum(wall for wall, _ in runs) < min_seconds and len(runs) < max_runs):
        runs.append(_timed(call))
    return _summary(runs)


def measure_in_turns(
    calls: dict[str, Callable[[], object]], reference: str, min_seconds: float = 6.0, min_rounds: int = 5
) -> tuple[dict[str, Timing], dict[str, tuple[float, float, float]]]:
    """Times the calls one after the other, round by round: a machine that is slow for a while is so for all of them.

    Returns:
        The timings, and of each call the quartiles over the rounds of wall time of ``reference`` / wall time of it.
    """
    for call in calls.values():
        call()
    _wait()
    rounds: list[dict[str, tuple[float, float]]] = []
    while len(rounds) < min_rounds or sum(wall for row in rounds for wall, _ in row.values()) < min_seconds:
        rounds.append({name: _timed(call) for name, call in calls.items()})
    ratios = {}
    for name in calls:
        q1, median, q3 = np.quantile([row[reference][0] / row[name][0] for row in rounds], [0.25, 0.5, 0.75]).tolist()
        ratios[name] = (q1, median, q3)
    return {name: _summary([row[name] for row in rounds]) for name in calls}, ratios


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    start, start_cpu = time.perf_counter(), time.process_time()
    call()
    _wait()  # inside the timed region: a GPU call returns before its work is done
    return time.perf_counter() - start, time.process_time() - start_cpu


def _summary(runs: list[tuple[float, float]]) -> Timing:
    q1, median, q3 = np.quantile([wall for wall, _ in runs], [0.25, 0.5, 0.75]).tolist()
    return Timing(median, q1, q3, statistics.median(cpu for _, cpu in runs), len(runs))


def extra_memory(script: Path, *arguments: str) -> float:
    """MB a call needs beyond what was there before it: runs ``script arguments`` alone, reads the last line it prints.

    The script prints ``peak_beyond(call)`` of the call in question; a process of its own, so that nothing that was
    freed earlier is reused unseen.
    """
    done = subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def peak_beyond(call: Callable[[], object]) -> float:
    """MB by which the resident memory of this process peaked during ``call`` (Linux; NaN elsewhere)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    reset.write_text("5")  # sets the high-water mark to the present size
    before = _field(status, "VmRSS")
    call()
    return (_field(status, "VmHWM") - before) / 1e3


class Unsaved(RunFolder):
    """A run that keeps no checkpoint: the trainer saves what it is about to evaluate, and here that is every round."""

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], keep: int) -> None:
        """Nothing."""


def write_json(theme: str, rows: list[dict[str, Any]], about: dict[str, Any] | None = None) -> Path:
    """Writes ``results/<theme>_<machine>_<date>.json``, or ``..._2.json`` where that is there, and so on.

    Args:
        about: ``describe_machine()`` from before the work.
    """
    about = about or describe_machine()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{about['gpu'] or about['cpu']} {about['cores']}c".lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    names = chain([""], (f"_{number}" for number in count(2)))
    paths = (RESULTS / f"{theme}_{slug}_{about['date']}{name}.json" for name in names)
    path = next(path for path in paths if not path.exists())  # the same theme may have been asked something else
    plain = [{k: asdict(v) if isinstance(v, Timing) else v for k, v in row.items()} for row in rows]
    path.write_text(json.dumps({"machine": about, "rows": plain}, indent=1) + "\n")
    return path


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _field(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))
