"""Do memory and open files stay flat over a run, and how long does a save stop it?

    python benchmarks/faults/flat.py [--steps 2000] [--mib 256] [--most 120]

Trains a tiny network on the digits' pixels, with a log every 10 steps and a save every 20, and prints resident memory,
open files and threads ten times on the way; it stops behind --most seconds, and judges what it has. Then saves tensors
of --mib as a checkpoint is saved: seconds, and how far memory rose above what is held. Exit status 1, and "not flat",
if from the second tenth to the end memory grows by more than 2 %, open files or threads grow at all, or the save takes
more than a tenth of the tensors' size.
"""

from __future__ import annotations

import argparse
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[2] / "analysis" / "needed.py"))

import torch
from torch import Tensor

from reference_trainer.files import save_tensors
from reference_trainer.machine import keep_freed_memory
from reference_trainer.model import TrainedModel
from reference_trainer.networks import DiT
from reference_trainer.presets import pixels
from reference_trainer.run import RunFolder
from reference_trainer.training.loop import train


@dataclass(frozen=True)
class Timed(RunFolder):
    """Remembers how long its saves took."""

    seconds: tuple[list[float]] = ([],)

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], keep: int) -> None:
        started = time.monotonic()
        super().save_checkpoint(step, tensors, keep)
        self.seconds[0].append(time.monotonic() - started)


class Watch:
    """Stands where a run is evaluated, and looks at the process instead; asks to stop behind ``most`` seconds."""

    def __init__(self, most: float) -> None:
        self.rows: list[tuple[int, float, int, int]] = []
        self.until = time.monotonic() + most

    def prepare(self, model: TrainedModel) -> None:
        print(f"{'step':>6}{'memory, MiB':>14}{'open files':>12}{'threads':>9}")

    def __call__(self, model: TrainedModel) -> None:
        files, threads = (len(list(Path("/proc/self", name).iterdir())) for name in ("fd", "task"))
        self.rows.append((model.step, mib("VmRSS"), files, threads))
        print(f"{model.step:6}{self.rows[-1][1]:14.1f}{files:12}{threads:9}", flush=True)
        if time.monotonic() > self.until and len(self.rows) > 2:
            signal.raise_signal(signal.SIGINT)


def mib(name: str) -> float:
    """Of this process: VmRSS what it holds, VmHWM the most it held since the last ``forget_peak``."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--most", type=float, default=120, metavar="SECONDS")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    config = replace(
        pixels(),
        network=DiT(width=16, layers=1, heads=2, patch=8),
        batch_size=64,
        steps=options.steps + 1,  # the last step is not watched
        log_every=10,
        save_every=20,
        evaluate_every=max(1, options.steps // 10),
    )
    watch, started = Watch(options.most), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        run = Timed(Path(scratch) / "run")
        run.root.mkdir()
        run.claim(config)
        train(config, run, config.data.load(), Path(scratch) / "cache", torch.device("cpu"), watch)
        took, size = time.monotonic() - started, run.checkpoints()[0].stat().st_size / 2**20
        saves = sorted(run.seconds[0])
        print(
            f"{took:.0f} s; {len(saves)} saves of {size:.2f} MiB: median {1e3 * saves[len(saves) // 2]:.1f} ms, ",
            end="",
        )
        print(f"longest stop {1e3 * saves[-1]:.1f} ms")
        tensors = {f"{i}": torch.ones(2**18) for i in range(options.mib)}  # 1 MiB each
        forget_peak()
        before, started = mib("VmHWM"), time.monotonic()
        save_tensors(Path(scratch) / "x.safetensors", tensors, {})
        seconds, more = time.monotonic() - started, mib("VmHWM") - before
        print(f"a save of {options.mib} MiB: {seconds:.2f} s, {more:.1f} MiB of memory more than is held")
    (step, first, *then), (end, last, *now) = watch.rows[1], watch.rows[-1]
    files, threads = (b - a for a, b in zip(then, now, strict=True))
    grown = last > 1.02 * first or files > 0 or threads > 0 or more > options.mib / 10
    print(
        f"{'not flat' if grown else 'flat'}: from step {step} to {end} memory {100 * (last / first - 1):+.2f} %, open "
        f"files {files:+}, threads {threads:+}"
    )
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
