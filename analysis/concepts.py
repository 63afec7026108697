"""What are a temporal difference, c, a coupling, a gate and NsLN? Pictures of data in the plane, in seconds."""

from __future__ import annotations

import argparse
import math
import runpy
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).with_name("needed.py")))

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from analysis import concept_pictures as pictures
from analysis.command import add_out, run_command
from analysis.toys import descent, flow_path, left_open, pairs, ring, trained
from reference_trainer.command import Parser
from reference_trainer.plotting import save_figure
from robustcm.consistency import Preconditioned, add_noise, temporal_difference
from robustcm.couplers import exact, independent
from robustcm.gates import AboveExplained
from robustcm.losses import cauchy, geman_mcclure_of_r2
from robustcm.noise import NoiseRange
from robustcm.norms import convert_norms
from robustcm.objective import Objective
from robustcm.randomness import step_generator
from robustcm.scales import ConstantC, CSchedule, MeasuredC
from robustcm.schedules import DoublingCurriculum, LevelGrid

EPILOG = """
Writes OUT/td.png, c.png, coupling.png, gate.png and norms.png, and prints the numbers that docs/concepts.md says. All
randomness is seeded; another machine rounds differently.
"""


class Picture(NamedTuple):
    """A figure, and what it shows."""

    figure: Figure
    numbers: dict[str, float]


def temporal_differences(steps: int = 600) -> Picture:
    """One sample between levels far apart and close; residuals by level; their tail where data lie far out."""
    x, _ = ring(4096, seed=0)
    levels = LevelGrid(curriculum=DoublingCurriculum(s0=8, s1=32))
    f = trained(Objective(distance=cauchy, c=MeasuredC(bins=8), levels=levels), x, seed=0, steps=steps)
    grids = {n: NoiseRange().levels(n) for n in (9, 33)}
    one, z = torch.tensor([0.7, 0.0]), torch.tensor([0.25, 0.6])
    hi = float(grids[9][4])
    below = {n: float(grid[grid < hi - 1e-6][0]) for n, grid in grids.items()}
    close = [pictures.Compared(n, one, z, hi, lo, *outputs(f, one[None], z[None], hi, lo)) for n, lo in below.items()]

    noise = torch.randn(x.shape, generator=step_generator(2, 0))
    by_level = {
        n: [(float(a), residuals(f, x, noise, float(a), float(b))) for a, b in pairwise(grid)]
        for n, grid in grids.items()
    }
    outlying = x.clone()
    outlying[::50] *= 10
    clean, spoilt = (residuals(f, data, noise, hi, below[33]) for data in (x, outlying))
    medians = [float(r.median()) for _, r in by_level[33]]
    typical = {n: float(torch.cat([r for _, r in found]).median()) for n, found in by_level.items()}
    tail = [float(r.quantile(0.99) / r.median()) for r in (clean, spoilt)]
    numbers = {
        "r in (a), 9 levels": close[0].r,
        "r in (b), 33 levels": close[1].r,
        "median r of all levels, 9 levels": typical[9],
        "median r of all levels, 33 levels": typical[33],
        "of 32 medians the largest over the smallest": max(medians) / min(medians),
        "99 % quantile of r over its median": tail[0],
        "the same where 2 % of the data lie far out": tail[1],
    }
    return Picture(pictures.draw_td(x[:400], close, by_level, clean, spoilt), numbers)


def outputs(f: Preconditioned, x: Tensor, z: Tensor, hi: float, lo: float) -> tuple[Tensor, Tensor]:
    """Student and teacher of ``x [n, 2]`` between two levels."""
    with torch.no_grad():
        return temporal_difference(f, x, z, x.new_full((len(x),), hi), x.new_full((len(x),), lo))


def residuals(f: Preconditioned, x: Tensor, z: Tensor, hi: float, lo: float) -> Tensor:
    """r of each of ``x [n, 2]``, ``[n]``."""
    student, teacher = outputs(f, x, z, hi, lo)
    return (student - teacher).norm(dim=1)


def scale_c() -> Picture:
    """How hard residuals pull under three c, and where each lets a student end, a tenth of its targets far out."""
    generator = step_generator(3, 0)
    targets = 0.5 * torch.randn(60, 2, generator=generator)
    targets[:6] = torch.tensor([3.2, 1.6]) + 0.4 * torch.randn(6, 2, generator=generator)
    middle, start = targets[6:].mean(0), torch.tensor([-1.3, -1.4])
    median = float((start - targets).norm(dim=1).median())
    scales: dict[str, CSchedule] = {
        "far below": ConstantC(per_sqrt_d=0.05 * median / 2**0.5),
        "measured": MeasuredC(multiple=0.7, halflife_steps=2.0),
        "far above": ConstantC(per_sqrt_d=20 * median / 2**0.5),
    }
    shown = [
        pictures.Descent(name, *descent(targets, start, geman_mcclure_of_r2, c, steps=400))
        for name, c in scales.items()
    ]
    numbers = {
        "median residual at the start": median,
        "distance from the middle of the bulk: start": float((start - middle).norm()),
        "mean of all targets": float((targets.mean(0) - middle).norm()),
        **{f"end, c {one.name}": float((one.way[-1] - middle).norm()) for one in shown},
    }
    return Picture(pictures.draw_c(targets, start, geman_mcclure_of_r2, shown), numbers)


def coupling() -> Picture:
    """Pairs of noise and data, and the paths that f shortens to one jump; independent and coupled."""
    x, cluster = ring(16384, seed=0)
    starts = torch.randn(96, 2, generator=step_generator(4, 0))
    columns = []
    for coupler in (independent, exact):
        z = pairs(x, 80.0, 0, coupler)
        paths = flow_path(x, z, starts, NoiseRange(sigma_min=0.02).levels(40))
        columns.append(pictures.Paths(x[:96], z[:96], cluster[:96], paths, left_open(x, z, 80.0)))
    numbers = {}
    for name, column in zip(("independent", "coupled"), columns, strict=True):
        numbers[f"length of the paths over the straight way, {name}"] = column.detour
        numbers[f"share of the variance of x that the noise leaves open, {name}"] = column.left_open
    return Picture(pictures.draw_coupling(columns), numbers)


def gate(second: float = 0.3) -> Picture:
    """What a coupling tells f about x at each level, and how far its inputs are then from those met in sampling."""
    x, _ = ring(4096, seed=0)
    level = AboveExplained().on(x).sigma
    sigmas = [
        *torch.logspace(-1.3, math.log10(level), 9).tolist(),
        *torch.logspace(math.log10(level), 1.9, 10)[1:].tolist(),
    ]

    def at(t: float, z: Tensor) -> pictures.AtLevel:
        met = add_noise(x, pairs(x, t, 1), torch.full((len(x),), t))
        seen = add_noise(x, z, torch.full((len(x),), t))
        return pictures.AtLevel(t, left_open(x, z, t), float(seen.var(0).mean() / met.var(0).mean()))

    alone = [at(t, pairs(x, t, 0)) for t in sigmas]
    coupled = [at(t, pairs(x, t, 0, exact)) for t in sigmas]
    at_second = (pairs(x, second, 0, exact), pairs(x, second, 1))
    seen, met = (add_noise(x, z, torch.full((len(x),), second)) for z in at_second)
    there = at(second, pairs(x, second, 0, exact))
    numbers = {
        "level of the gate": level,
        f"variance of inputs, coupled training over sampling, t = {second}": there.spread,
        "share of the variance of x left open at t = 80, independent": alone[-1].left_open,
        "the same, coupled": coupled[-1].left_open,
    }
    return Picture(pictures.draw_gate(alone, coupled, level, seen, met, second), numbers)


def norms(outlier: float = 25.0) -> Picture:
    """Features of two samples, one with an outlier, behind a norm with learned scales and behind NsLN."""
    positions, scales = 100, torch.tensor([1.0, 3.0])
    x = torch.randn(2, 2, positions, generator=step_generator(5, 0))
    x[1, :, 0] = torch.tensor([0.0, outlier])
    norm = nn.GroupNorm(1, 2)
    layers = nn.Sequential(norm)
    with torch.no_grad():
        norm.weight.copy_(scales)
        scaled = layers(x)
        convert_norms(layers)
        plain = layers(x)
        sizes = torch.logspace(0.5, 3, 40).tolist()
        largest = []
        for size in sizes:
            x[1, 1, 0] = size
            largest.append(float(layers(x)[1].max()))
    bound = math.sqrt(2 * positions - 1)  # of n numbers of mean 0 and variance 1 none is larger than sqrt(n - 1)
    numbers = {
        "outlier in front of the norm": outlier,
        "behind a learned scale of 3": float(scaled.max()),
        "behind NsLN": float(plain.max()),
        "the most that NsLN lets through": bound,
        "std of its sample's other features, behind NsLN": float(plain[1, :, 1:].std()),
        "std of the other sample": float(plain[0].std()),
    }
    x[1, 1, 0] = outlier
    return Picture(pictures.draw_norms(x, scaled, plain, sizes, largest, float(scales.max()), bound), numbers)


CONCEPTS: dict[str, Callable[[], Picture]] = {
    "td": temporal_differences,
    "c": scale_c,
    "coupling": coupling,
    "gate": gate,
    "norms": norms,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(parser(), look, arguments)


def parser() -> argparse.ArgumentParser:
    """The options."""
    names = list(CONCEPTS)
    p = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}")
    add_out(p)
    return p


def look(options: argparse.Namespace) -> int:
    """Draw, say."""
    for name in options.only:
        picture = CONCEPTS[name]()
        print(f"\n{name}")
        for what, value in picture.numbers.items():
            print(f"  {what:64} {value:6.2f}")
        print(f"look at {save_figure(picture.figure, options.out / f'{name}.png')}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
