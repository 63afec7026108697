"""kill -9 at random moments: are the final weights and logs those of a run that nobody touched, bit for bit?

    python benchmarks/faults/kill.py [--kills 50] [--seed 0]

A tiny network is trained on noise for 60 steps with a checkpoint every second step, each time in a process of its own
that is killed at a random moment and started again, until it is through; then in a new folder, until there were as many
kills as asked. Prints how many kills met a save (its unfinished file is still there), and how many came before the
first step of a start; exit status 1 if any finished run differs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from reference_trainer.__main__ import main as command_line
from reference_trainer.run import RunFolder
from reference_trainer.training import loop as _loop  # imported once, not in every process

assert _loop

STEPS = 60
RUN = f"pixels steps={STEPS} save_every=2 log_every=5 batch_size=16 data.resolution=16 objective.coupler=exact"
NETWORK = "network=DiT(width=64,layers=2,heads=2,patch=8)"


def start(root: Path, images: Path) -> multiprocessing.process.BaseProcess:
    """The training, as the command line does it, in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(root, images))
    process.start()
    return process


def train(root: Path, images: Path) -> None:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        words = ["train", *RUN.split(), NETWORK, f"--data={images}", f"--run={root}", "--device=cpu", "--brief"]
        os._exit(command_line(words))


def same_end(one: RunFolder, two: RunFolder) -> bool:
    """Weights, averages, moments, counts and logged numbers."""
    (step, tensors), (also, others) = one.latest_checkpoint(), two.latest_checkpoint()
    equal = step == also == STEPS and tensors.keys() == others.keys()
    equal = equal and all(torch.equal(tensors[name], others[name]) for name in tensors)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.metrics()] for run in (one, two)]
    return equal and rows[0] == rows[1] and one.evaluations() == two.evaluations()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    in_a_save = before_a_step = different = 0
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ROBUSTCM_CACHE"] = f"{scratch}/cache"
        images = Path(scratch) / "images"
        images.mkdir()
        for i, picture in enumerate(np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)):
            Image.fromarray(picture).save(images / f"{i:02}.png")
        whole, runs = RunFolder(Path(scratch) / "whole"), [RunFolder(Path(scratch) / "run-0")]
        started = time.monotonic()
        untouched = start(whole.root, images)
        untouched.join()
        if untouched.exitcode:
            raise SystemExit(f"the run that nobody touched ended with status {untouched.exitcode}")
        longest = time.monotonic() - started
        with tqdm(total=options.kills, desc="kills", unit="kill") as bar:
            while True:
                run = runs[-1]
                step = newest(run)
                process = start(run.root, images)
                if bar.n < options.kills:
                    process.join(rng.uniform(0, longest / 2))
                    if process.exitcode is None:
                        process.kill()
                process.join()
                if process.exitcode == -9:
                    bar.update()
                    in_a_save += any((run.root / "checkpoints").glob(".*.tmp"))
                    before_a_step += newest(run) == step
                elif process.exitcode:
                    raise SystemExit(f"{run.root.name} ended with status {process.exitcode}")
                else:
                    different += not same_end(whole, run)
                    if bar.n >= options.kills:
                        break
                    runs.append(RunFolder(Path(scratch) / f"run-{len(runs)}"))
    print(
        f"{options.kills} kills over {len(runs)} runs of {STEPS} steps: {in_a_save} in a save, {before_a_step} before "
        f"the first checkpoint of a start; {len(runs) - different} runs bit-identical, {different} different"
    )
    return int(different > 0)


def newest(run: RunFolder) -> str:
    return max((file.name for file in run.checkpoints()), default="")


if __name__ == "__main__":
    sys.exit(main())
