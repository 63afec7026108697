"""How much of the coupling does a training step wait for, and how long do the solvers take?

    python benchmarks/coupling_time.py [--quick] [--sizes 128 256 512 1024] [--network "DiT, 16 tokens"]

Steps of the digits' network with nothing but teacher, student, backward and optimizer, on the batches that the trainer
makes, in turns with the exact coupling and without: the network is the smallest there is, so the share is the largest;
others of ``step_floor.py`` by name. The trainer pairs the next batch in the background. Printed is the ratio of a turn,
with and without, median and quartiles, by the clock and by the CPU time of the thread that trains. Then the solvers
alone, on one such batch: scipy's (ours), POT's ``emd``, and within 10 and 100 classes.
"""

from __future__ import annotations

import argparse
import runpy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import numpy as np
import ot
import torch
from _timing import measure_in_turns, write_json
from step_floor import CASES, CPU, Case, clocks, config_of, in_words
from torch import Tensor

from reference_trainer.config import TrainConfig
from reference_trainer.machine import describe_machine, keep_freed_memory
from reference_trainer.training.batches import Batches
from reference_trainer.training.state import TrainState
from robustcm.consistency import add_noise
from robustcm.couplers import WithinClasses, exact, independent
from robustcm.objective import Batch

FILLING = 4
"""Steps before the clock: a pool that is solved ahead, and the batch of the next step, are work of steps before."""


def step_of(config: TrainConfig, case: Case) -> Callable[[Batch], None]:
    """A function that trains on a batch."""
    state = TrainState.create(config, case.shape, CPU)
    f = config.preconditioned(state.network.train())
    for group in state.optimizer.param_groups:
        group["lr"] = 1e-4

    def step(batch: Batch) -> None:
        x, z, pairs = batch[:3]
        with torch.no_grad():
            teacher = f(add_noise(x, z, pairs.t_lo), pairs.t_lo)
        (f(add_noise(x, z, pairs.t_hi), pairs.t_hi) - teacher).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)

    return step


def visible(case: Case, size: int, turns: int, steps: int) -> dict[str, Any]:
    """A row: what a step costs with and without the coupling of ``size`` samples."""
    config = replace(config_of(case, 1), batch_size=size)
    latents = 0.5 * torch.randn(8 * size, *case.shape, generator=torch.Generator().manual_seed(0))
    arms = {
        name: Batches(replace(config, objective=replace(config.objective, coupler=coupler)), latents)
        for name, coupler in {"coupled": exact, "not": independent}.items()
    }
    step, found = step_of(config, case), list[dict[str, tuple[float, float]]]()
    for turn in range(turns + 1):
        row = {}
        for name, batches in arms.items():
            for i in range(-FILLING, 0):  # not timed, nor waited for: the pipeline is as full as it stays
                step(batches((turn + 1) * FILLING + turn * steps + i))
            began = clocks()
            for i in range(steps):
                step(batches((turn + 1) * FILLING + turn * steps + i))
            wall, cpu = (now - then for now, then in zip(clocks(), began, strict=True))
            row[name] = wall / steps, cpu / steps
            batches.wait()
        found.append(row)
    found = found[1:]  # the first warms up
    ratios = {
        clock: np.quantile([row["coupled"][i] / row["not"][i] for row in found], [0.25, 0.5, 0.75]).tolist()
        for i, clock in enumerate(("wall", "cpu"))
    }
    milliseconds = 1e3 * float(np.median([row["not"][0] for row in found]))
    return {"network": case.name, "samples": size, "turns": turns, "step_ms": milliseconds, "coupled_over_not": ratios}


def solvers(case: Case, size: int, seconds: float) -> list[dict[str, Any]]:
    """Rows: the solvers on one batch, by the clock."""
    generator = torch.Generator().manual_seed(0)
    x, z = (std * torch.randn(size, *case.shape, generator=generator) for std in (0.5, 1.0))
    calls: dict[str, Callable[[], object]] = {"scipy": partial(exact, x, z), "POT emd": partial(emd, x, z)}
    for classes in (10, 100):
        labels = torch.randint(classes, (size,), generator=generator)
        calls[f"within {classes} classes"] = partial(WithinClasses(), x, z, labels=labels)
    timings, ratios = measure_in_turns(calls, "scipy", min_seconds=seconds)
    return [
        {"samples": size, "solver": name, "seconds": timing, "times_scipy": sorted(1 / r for r in ratios[name])}
        for name, timing in timings.items()
    ]


def emd(x: Tensor, z: Tensor) -> object:
    """The plan as torchcfm's OTPlanSampler has it solved."""
    cost = torch.cdist(x.flatten(1), z.flatten(1)) ** 2
    return ot.emd(ot.unif(len(x)), ot.unif(len(x)), (cost / cost.max()).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two turns of two steps, nothing written")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024], metavar="SAMPLES")
    parser.add_argument("--network", choices=[case.name for case in CASES], default=CASES[0].name)
    options = parser.parse_args()
    about, rows = describe_machine(), list[dict[str, Any]]()
    keep_freed_memory()
    torch.set_num_threads(1)
    started, case = time.monotonic(), next(case for case in CASES if case.name == options.network)
    for size in options.sizes:
        turns, steps = (2, 2) if options.quick else (10, max(4, case.steps * case.batch_size // size))
        rows.append(row := visible(case, size, turns, steps))
        ratio = {clock: in_words(found) for clock, found in row["coupled_over_not"].items()}
        print(f"{size:5} samples, step {row['step_ms']:.1f} ms: coupled / not {ratio['wall']}, cpu {ratio['cpu']}")
        for found in solvers(case, size, 0.0 if options.quick else 4.0):
            rows.append(found)
            times = in_words(found["times_scipy"])
            print(f"      {found['solver']:20} {found['seconds']}, {times} times scipy", flush=True)
    print(f"{time.monotonic() - started:.0f} s")
    if not options.quick:
        print(f"wrote {write_json('coupling_time', rows, about).name}")


if __name__ == "__main__":
    main()
