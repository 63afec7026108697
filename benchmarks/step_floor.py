"""How much does a step of the trainer cost beside its floor, and beside the step as the authors built theirs?

    python benchmarks/step_floor.py [--quick] [--only "one token"] [--rounds 10]

The trainer itself trains, ``reference_trainer.training.loop.train`` with all it does between two steps. Every few
steps it is stopped, and as many steps are taken of the floor, which no recipe can leave out (teacher forward, student
forward and backward, fused AdamW), and of the authors' (``authors_step.py``): same network, same batch size, random
latents, the trainer's number of threads. Printed are ratios of such a round, median and quartiles over the rounds: by
the clock, which on two quiet cores counts, and by the CPU time of the main thread, which on a busy machine says more
but does not see the waiting. The first of the trainer's steps in a round finds its batch made while the others had
their turns. Beside them the bytes that ours and theirs hold between two steps.
"""

from __future__ import annotations

import argparse
import runpy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import numpy as np
import torch
from _timing import Unsaved, write_json
from authors_step import AuthorsStep, num_bytes
from torch import Tensor

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.images import ImageSet
from reference_trainer.machine import describe_machine, keep_freed_memory
from reference_trainer.model import TrainedModel
from reference_trainer.networks import DiT, UNet
from reference_trainer.presets import digits
from reference_trainer.published import DIT_S2
from reference_trainer.training.loop import train
from reference_trainer.training.state import TrainState
from robustcm.consistency import add_noise
from robustcm.gates import Above
from robustcm.objective import draw
from robustcm.schedules import DoublingCurriculum, LevelGrid

CPU = torch.device("cpu")
N = 40
"""Intervals of noise levels; constant, so that all steps of a run cost the same."""


@dataclass(frozen=True)
class Case:
    """A network, and how many steps make a round."""

    name: str
    network: DiT | UNet
    shape: tuple[int, int, int]
    batch_size: int
    steps: int


CASES = (
    Case("one token", DiT(), (2, 4, 4), 256, 40),
    Case("DiT, 16 tokens", DiT(patch=2), (4, 8, 8), 64, 10),
    Case("U-Net", UNet(), (4, 8, 8), 64, 10),
    Case("DiT-S/2", DIT_S2, (4, 32, 32), 4, 1),
)
"""Three as small as the digits', and one as latents of 256 px have it."""
Clocks = tuple[float, float]


def clocks() -> Clocks:
    """Seconds of the wall and of this thread's work."""
    return time.perf_counter(), time.thread_time()


def config_of(case: Case, rounds: int) -> TrainConfig:
    """The default recipe on random latents, evaluated once a round; the first is a warm-up."""
    config = digits()
    objective = replace(config.objective, gate=Above(1.0), levels=LevelGrid(curriculum=DoublingCurriculum(s0=N, s1=N)))
    return replace(
        config,
        autoencoder=PixelSpace(),
        clip=None,
        network=case.network,
        objective=objective,
        batch_size=case.batch_size,
        steps=(rounds + 2) * case.steps,
        evaluate_every=case.steps,
        save_every=10**6,
    )


def random_images(case: Case) -> ImageSet:
    """Noise, which in pixel space is latents of the same shape."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2000, *case.shape), generator=generator, dtype=torch.uint8)
    return ImageSet("noise", pixels, None, torch.zeros(len(pixels), dtype=torch.bool))


def floor_step(config: TrainConfig, case: Case) -> tuple[Callable[[], None], TrainState]:
    """A function that takes a step of the floor, and the state it does so on."""
    state = TrainState.create(config, case.shape, CPU)
    f = config.preconditioned(state.network.train())
    x = 0.5 * torch.randn(case.batch_size, *case.shape, generator=torch.Generator().manual_seed(0))
    plain = replace(config.objective, teacher_input=None)
    x, z, pairs = plain.prepare(x, draw(0, 0, x.shape), 0, config.steps)[:3]
    for group in state.optimizer.param_groups:
        group["lr"] = 1e-4

    def step() -> None:
        with torch.no_grad():
            teacher = f(add_noise(x, z, pairs.t_lo), pairs.t_lo)
        (f(add_noise(x, z, pairs.t_hi), pairs.t_hi) - teacher).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)

    return step, state


@dataclass
class Turns:
    """Is shown the trainer's model once a round, and then has the others take their turns."""

    others: dict[str, Callable[[], object]]
    steps: int
    rounds: list[dict[str, Clocks]] = field(default_factory=list)
    since: Clocks | None = None

    def prepare(self, model: TrainedModel) -> None:
        """Nothing to try."""

    def __call__(self, model: TrainedModel) -> None:
        row: dict[str, Clocks] = {} if self.since is None else {"trainer": self._spent(self.since)}
        for name, step in self.others.items():
            began = clocks()
            for _ in range(self.steps):
                step()
            row[name] = self._spent(began)
        if self.since is not None:  # the first round warms up
            self.rounds.append(row)
        self.since = clocks()

    def _spent(self, began: Clocks) -> Clocks:
        wall, cpu = (now - then for now, then in zip(clocks(), began, strict=True))
        return wall / self.steps, cpu / self.steps

    def ratio(self, above: str, below: str) -> dict[str, list[float]]:
        """Quartiles over the rounds, by wall clock and by CPU time."""
        return {
            clock: np.quantile([row[above][i] / row[below][i] for row in self.rounds], [0.25, 0.5, 0.75]).tolist()
            for i, clock in enumerate(("wall", "cpu"))
        }

    def milliseconds(self, name: str) -> dict[str, float]:
        """Of a step, medians."""
        return {
            clock: 1e3 * float(np.median([row[name][i] for row in self.rounds]))
            for i, clock in enumerate(("wall", "cpu"))
        }


def held(state: TrainState) -> list[Tensor]:
    """What the trainer has in memory between two steps."""
    moments = [value for found in state.optimizer.state.values() for value in found.values()]
    return [*moments, *state.weights, *state.averages, state.c, state.meter, state.tails]


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    config, images = config_of(case, rounds), random_images(case)
    floor, state = floor_step(config, case)
    authors = AuthorsStep(TrainState.create(config, case.shape, CPU).network, N + 1)
    x = 0.5 * torch.randn(case.batch_size, *case.shape, generator=torch.Generator().manual_seed(0))
    turns = Turns({"floor": floor, "authors": lambda: authors(x)}, case.steps)
    with TemporaryDirectory() as folder:
        run = Unsaved(Path(folder) / "run")
        with run.locked():
            run.claim(config)
            train(config, run, images, Path(folder), CPU, turns)
    return {
        "network": case.name,
        "parameters": sum(weight.numel() for weight in state.weights),
        "shape": case.shape,
        "batch": case.batch_size,
        "rounds": len(turns.rounds),
        "milliseconds": {name: turns.milliseconds(name) for name in ("floor", "trainer", "authors")},
        "trainer_over_floor": turns.ratio("trainer", "floor"),
        "authors_over_trainer": turns.ratio("authors", "trainer"),
        "bytes": {"trainer": num_bytes(held(state)), "authors": num_bytes(authors.held())},
    }


def in_words(ratio: list[float]) -> str:
    low, median, high = ratio
    return f"{median:.3f} ({low:.3f} .. {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps, nothing written")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], metavar="NETWORK")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    about, rows = describe_machine(), []
    keep_freed_memory()
    torch.set_num_threads(digits().threads)
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        case = replace(case, steps=2) if options.quick else case
        row = measured(case, 2 if options.quick else options.rounds)
        rows.append(row)
        times = ", ".join(f"{name} {ms['wall']:.1f}" for name, ms in row["milliseconds"].items())
        ours, theirs = row["bytes"]["trainer"], row["bytes"]["authors"]
        print(
            f"{case.name}, {row['parameters']} weights, batch {case.batch_size}: ms a step: {times} (of the trainer's "
            f"{case.steps} a round the first has its batch made during the others' turns)"
        )
        for clock in ("wall", "cpu"):
            print(
                f"  {clock:4}  trainer / floor {in_words(row['trainer_over_floor'][clock])}   "
                f"authors / trainer {in_words(row['authors_over_trainer'][clock])}"
            )
        copies = (theirs - ours) / 4 / row["parameters"]
        print(f"  bytes held: {ours} against {theirs}: {copies:.2f} copies of the weights less", flush=True)
    if not options.quick:
        print(f"wrote {write_json('step_floor', rows, about).name}")


if __name__ == "__main__":
    main()
