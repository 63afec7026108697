"""Where does the time of a training step of the preset `digits` go, and what does keeping freed memory save?

    python benchmarks/step_time.py [--preset digits] [--latents 2 4 4] [--threads 1]
    python benchmarks/step_time.py --preset photographs --latents 8 8 8

Each part is timed alone on the same batch, on random latents, as CPU time and as a share of the first: the floor,
which is teacher, student, backward and AdamW. Adam and Muon are both timed. `step_floor.py` has the trainer itself
beside it. The whole step runs twice, each time in a process of its own: as the trainer runs it, and with glibc's own
way with freed memory.
"""

from __future__ import annotations

import argparse
import math
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import torch
from _timing import Timing, measure, write_json

from reference_trainer.config import TrainConfig
from reference_trainer.machine import describe_machine, keep_freed_memory
from reference_trainer.optimizers import Adam, Muon
from reference_trainer.presets import PRESETS, photographs
from reference_trainer.training.bad_steps import not_finite
from reference_trainer.training.batches import with_measured_parts
from reference_trainer.training.meters import LevelMeter, TailMeter
from reference_trainer.training.state import TrainState
from robustcm.averages import Exponential, PowerFunction
from robustcm.consistency import add_noise
from robustcm.couplers import exact, independent
from robustcm.objective import Batch, Objective, draw

CPU = torch.device("cpu")
FLOOR = "floor"
TIMED = (*PRESETS, photographs)
FURTHER = (
    *(Exponential(decay=0.9), Exponential(decay=0.999)),
    *(PowerFunction(sigma_rel=0.05), PowerFunction(sigma_rel=0.1)),
)


def parts(config: TrainConfig, shape: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    """The parts of a step, and the step."""
    state = TrainState.create(config, shape, CPU)
    plain = TrainState.create(replace(config, optimizer=Adam()), shape, CPU)
    averaging = TrainState.create(replace(config, averages=FURTHER), shape, CPU)
    f, step = config.preconditioned(state.network), config.steps - 1
    of_plain = config.preconditioned(plain.network)
    x = 0.5 * torch.randn(config.batch_size, *shape, generator=torch.Generator().manual_seed(0))
    objective = with_measured_parts(config.objective, x)
    draws = draw(0, step, x.shape)
    batch: Batch = objective.prepare(x, draws, step, config.steps)
    terms = objective(f, batch, state.c)
    x_hi = add_noise(x, batch.z, batch.pairs.t_hi)

    def teacher() -> None:
        with torch.no_grad():
            f(x_hi, batch.pairs.t_hi)

    def backward() -> None:
        f(x_hi, batch.pairs.t_hi).sum().backward()

    def floor() -> None:
        with torch.no_grad():
            of_plain(x_hi, batch.pairs.t_hi)
        of_plain(x_hi, batch.pairs.t_hi).sum().backward()
        plain.optimizer.step()
        plain.optimizer.zero_grad(set_to_none=True)

    leaf = terms.student.detach().requires_grad_()

    def distance() -> None:
        distances = objective.distance(leaf, terms.teacher, terms.c)
        (objective.weight(batch.pairs.t_hi, batch.pairs.t_lo) * distances).mean().backward()

    good = torch.tensor(False)

    def bookkeeping() -> None:
        bad = not_finite(terms).any()
        for value in (state.c, state.meter, state.tails):
            torch.where(bad, value, value)

    def measured_c() -> object:
        depth, n = batch.pairs.depth, batch.pairs.num_levels
        seen = objective.c.count(terms.r, depth, n)
        return objective.c(state.c, seen, depth, n, x[0].numel()), objective.c.observe(state.c, seen)

    def whole() -> None:
        prepared = objective.prepare(x, draw(0, step, x.shape), step, config.steps)
        done = objective(f, prepared, state.c)
        done.loss.backward()
        state.optimizer_step(config.optimizer, 1e-4)
        state.update_ema(config.ema_decay)
        state.meter = LevelMeter().add(state.meter, done, prepared.pairs)
        state.tails = tails.add(state.tails, done, prepared.pairs)

    def optimise(optimizer: Adam) -> Callable[[], object]:
        own = TrainState.create(replace(config, optimizer=optimizer), shape, CPU)
        gradients = [torch.randn_like(parameter) for parameter in own.network.parameters()]

        def step() -> None:
            for parameter, gradient in zip(own.network.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            own.optimizer_step(optimizer, 1e-4)

        return step

    tails = TailMeter()
    tails.add(state.tails, terms, batch.pairs)  # builds its histogram
    return {
        FLOOR: floor,
        "draw noise and levels (beside)": partial(draw, 0, step, x.shape),
        "exact coupling (beside)": partial(exact, x, draws.z),
        "levels and gate (beside)": partial(objective.prepare, x, draws, step, config.steps, coupled=draws.z),
        "teacher": teacher,
        "student and backward": backward,
        "distance, forward and backward": distance,
        "measured c": measured_c,
        **{f"clip and {type(optimizer).__name__}": optimise(optimizer) for optimizer in (Adam(), Muon())},
        "is the step bad": bookkeeping,
        "EMA": partial(state.update_ema, config.ema_decay, good),
        "EMA and four further averages": partial(averaging.update_ema, config.ema_decay, good),
        "level meter": partial(LevelMeter().add, state.meter, terms, batch.pairs),
        "tail meter": partial(tails.add, state.tails, terms, batch.pairs),
        "whole step": whole,
    }


def has_all(config: TrainConfig) -> bool:
    """Whether a step of it has all parts that are timed."""
    return isinstance(config.objective, Objective) and config.coupler is not independent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=[p.__name__ for p in TIMED if has_all(p())], default="digits")
    parser.add_argument("--latents", type=int, nargs=3, default=[2, 4, 4], metavar=("CH", "H", "W"))
    parser.add_argument("--threads", type=int, help="of torch; without it those of the preset")
    parser.add_argument("--whole", choices=["kept", "given back"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = next(preset() for preset in TIMED if preset.__name__ == options.preset)
    shape = (options.latents[0], options.latents[1], options.latents[2])
    torch.set_num_threads(options.threads or config.threads)
    if options.whole:
        if options.whole == "kept":
            keep_freed_memory()
        timing = measure(parts(config, shape)["whole step"], min_seconds=10)
        print(timing.median, timing.q1, timing.q3, timing.cpu, timing.runs)
        return
    about, rows = describe_machine(), []
    keep_freed_memory()
    floor = math.nan
    for name, call in parts(config, shape).items():
        timing = measure(call, max_runs=1000)
        floor = timing.cpu if name == FLOOR else floor
        rows.append({"part": name, "seconds": timing, "cpu_over_floor": timing.cpu / floor})
        print(f"{name:32} {timing.cpu / floor:7.2%}   {timing}", flush=True)
    for memory in ("kept", "given back"):
        command = [sys.executable, __file__, f"--preset={options.preset}", f"--whole={memory}"]
        command += [f"--threads={torch.get_num_threads()}", "--latents"]
        ran = subprocess.run([*command, *map(str, shape)], check=True, capture_output=True, text=True)
        *seconds, runs = ran.stdout.split()
        rows.append({"part": f"whole step, freed memory {memory}", "seconds": Timing(*map(float, seconds), int(runs))})
        print(f"{rows[-1]['part']:40} {rows[-1]['seconds']}", flush=True)
    kept, given_back = (row["seconds"].median for row in rows[-2:])
    print(
        f"keeping freed memory: {given_back / kept:.2f} times faster; wrote {write_json('step_time', rows, about).name}"
    )


if __name__ == "__main__":
    main()
