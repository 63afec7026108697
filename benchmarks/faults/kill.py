"""kill -9 at random moments: are the final weights and logs those of a run that nobody touched, bit for bit?

    python benchmarks/faults/kill.py [--kills 50] [--processes 1 2] [--seed 0]

A tiny network is trained on noise for 60 steps with a checkpoint every second step, by one process and then by two that
share its micro-batches as torchrun starts them. One of them or both are killed at a random moment, every third time
while a checkpoint is being written, and started again, until the run is through; then in a new folder, until there were
as many kills as asked. A line for each number of processes; exit status 1 if any finished run differs. Ctrl-C and
SIGTERM end it with the line of what was done.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[2] / "analysis" / "needed.py"))

import numpy as np
import torch
from PIL import Image
from torch.utils import tensorboard as _tensorboard
from tqdm import tqdm

from reference_trainer.__main__ import main as command_line
from reference_trainer.errors import Terminated, sigterm_raises
from reference_trainer.run import RunFolder
from reference_trainer.training import loop as _loop

assert _loop, _tensorboard  # imported once, not in every process

STEPS = 60
RUN = f"pixels steps={STEPS} save_every=2 log_every=5 batch_size=16 micro_batches=2 data.resolution=16"
PARTS = ("objective.coupler=exact", "network=DiT(width=64,layers=2,heads=2,patch=8)")
LEFT = 3.0
"""Seconds that a process whose fellow was killed has to end by itself; torchrun, too, kills it in the end."""


@dataclass
class Tally:
    """What became of all starts."""

    kills: int = 0
    both: int = 0
    """Kills of two processes at once."""
    in_a_save: int = 0
    """Of which an unfinished checkpoint was left."""
    before_a_save: int = 0
    """That came before the first checkpoint of their start."""
    bereft: int = 0
    """Processes whose fellow was killed."""
    said_so: int = 0
    """Those of them that ended by themselves, with status 2."""
    same: list[bool] = field(default_factory=list)
    """Of each finished run, whether it is as if nobody had touched it."""

    def line(self, processes: int) -> str:
        """For a person."""
        plural = "es" * (processes > 1)
        both = f", {self.both} of both" if processes > 1 else ""
        left = f"; left alone, {self.said_so} of {self.bereft} ended by themselves" if self.bereft else ""
        return (
            f"{processes} process{plural}: {self.kills} kills ({self.in_a_save} in a save, {self.before_a_save} before "
            f"the first save of a start{both}): {sum(self.same)} of {len(self.same)} finished runs of {STEPS} steps "
            f"bit-identical with an undisturbed one{left}"
        )


def start(root: Path, images: Path, processes: int) -> list[BaseProcess]:
    """The training, as the command line does it, in processes of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    about = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=train, args=(root, images, about | {"RANK": str(r)})) for r in range(processes)]
    for process in started:
        process.start()
    return started


def train(root: Path, images: Path, environment: dict[str, str]) -> None:
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    os.environ |= environment
    words = ["train", *RUN.split(), *PARTS, f"--data={images}", f"--out={root}", "--device=cpu", "--brief"]
    os._exit(command_line(words))


def wait(processes: list[BaseProcess], seconds: float | None = None) -> bool:
    """Until all have ended, or so long; returns whether they have."""
    end = None if seconds is None else time.monotonic() + seconds
    for process in processes:
        process.join(None if end is None else max(0.0, end - time.monotonic()))
    return all(process.exitcode is not None for process in processes)


def kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
        process.join()


def unfinished(run: RunFolder) -> set[str]:
    """Checkpoints being written, or left so; each process names its own."""
    return {file.name for file in (run.root / "checkpoints").glob(".*.tmp")}


def disturb(run: RunFolder, processes: list[BaseProcess], after: float, rng: random.Random, tally: Tally) -> None:
    """Kill one or all of ``processes`` when ``after`` seconds are over, and one in three times amid the next save."""
    victims = rng.choice([*([process] for process in processes), processes])
    in_a_save, before, left_before = rng.random() < 1 / 3, newest(run), unfinished(run)
    if wait(processes, after):
        return
    while in_a_save and unfinished(run) <= left_before and any(process.is_alive() for process in processes):
        time.sleep(1e-4)
    kill(victims)
    left = [process for process in processes if process not in victims]
    wait(left, LEFT)
    kill(left)
    if any(process.exitcode == -signal.SIGKILL for process in victims):
        tally.kills += 1
        tally.both += len(victims) > 1
        tally.in_a_save += not unfinished(run) <= left_before
        tally.before_a_save += newest(run) == before
        tally.bereft += len(left)
        tally.said_so += sum(process.exitcode == 2 for process in left)


def newest(run: RunFolder) -> str:
    return max((file.name for file in run.checkpoints()), default="")


def same_end(one: RunFolder, two: RunFolder) -> bool:
    """Weights, averages, moments, counts and logged numbers."""
    (step, tensors), (also, others) = one.latest_checkpoint(), two.latest_checkpoint()
    equal = step == also == STEPS and tensors.keys() == others.keys()
    equal = equal and all(torch.equal(tensors[name], others[name]) for name in tensors)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.metrics()] for run in (one, two)]
    return equal and rows[0] == rows[1] and one.evaluations() == two.evaluations()


def campaign(scratch: Path, images: Path, processes: int, kills: int, rng: random.Random, tally: Tally) -> None:
    """Until there were so many ``kills`` and the last run is through."""
    whole, started = RunFolder(scratch / "whole"), time.monotonic()
    untouched = start(whole.root, images, processes)
    wait(untouched)
    if any(process.exitcode for process in untouched):
        raise SystemExit(f"the run that nobody touched ended with {[process.exitcode for process in untouched]}")
    longest, run, running = time.monotonic() - started, RunFolder(scratch / "run-0"), list[BaseProcess]()
    bar = tqdm(total=kills, desc=f"kills, {processes} process{'es' * (processes > 1)}", unit="kill")
    try:
        while True:
            running = start(run.root, images, processes)
            if tally.kills < kills:
                disturb(run, running, rng.uniform(0, longest / 2), rng, tally)
            wait(running)
            bar.update(tally.kills - bar.n)
            if not any(process.exitcode for process in running):
                tally.same.append(same_end(whole, run))
                tqdm.write(f"{run.root.name}, {tally.kills} kills: {'same' if tally.same[-1] else 'DIFFERENT'}")
                if tally.kills >= kills:
                    return
                run = RunFolder(scratch / f"run-{len(tally.same)}")
            elif not any(process.exitcode == -signal.SIGKILL for process in running):
                raise SystemExit(f"{run.root.name} ended with {[process.exitcode for process in running]}")
    finally:
        kill(running)
        bar.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="for each number of processes (default 50)")
    parser.add_argument("--processes", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tallies = {processes: Tally() for processes in options.processes}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        os.environ["ROBUSTCM_CACHE"] = f"{scratch}/cache"
        (scratch / "images").mkdir()
        for i, picture in enumerate(np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)):
            Image.fromarray(picture).save(scratch / "images" / f"{i:02}.png")
        try:
            with sigterm_raises():
                for processes, tally in tallies.items():
                    rng = random.Random(options.seed)
                    campaign(scratch / f"{processes}", scratch / "images", processes, options.kills, rng, tally)
        except (KeyboardInterrupt, Terminated):
            print("interrupted")
    for processes, tally in tallies.items():
        print(tally.line(processes))
    return int(not all(tally.same and all(tally.same) for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
