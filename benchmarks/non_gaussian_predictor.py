"""Does non-Gaussianity of the latents, measured before any training, foretell what the coupling gains?

    python benchmarks/non_gaussian_predictor.py OUT [OUT ...]

Each OUT is a folder of `ablate` with runs without the coupling and with it: 'iLCT' and 'iLCT + gated coupling', or
'ours, no coupling' and 'ours'. A suite in it is one set. Its measure is that of `analysis/non_gaussian.py` at the level
of the gate, the error of a mixture's denoiser over the linear one's, on the latents of the first run with the coupling;
it is kept as OUT/non_gaussian_SUITE_ARM.json. Its gain is the ratio of the distances with and without the coupling,
geometric mean over seeds, at one evaluation; below 1 is better. A measure that foretells gives a rank correlation near
1: the less Gaussian, the smaller both. The p-value counts all orders of the sets: the share that correlates as much
or more, either way. What the set's measure is was fixed before: other levels (--at) are another question.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _timing import write_json
from scipy.stats import rankdata

from analysis import non_gaussian
from reference_trainer.ablation.ablate import run_root
from reference_trainer.ablation.comparison import ONE, Result, by_seed, distinct, judged_by, paired_ratio
from reference_trainer.errors import UserError, exit_status
from reference_trainer.machine import describe_machine

PAIRS = (("iLCT", "iLCT + gated coupling"), ("ours, no coupling", "ours"))
"""Arms without the coupling and with it."""
MOST = 16
"""Sets for which all orders can be counted: 2^16 parts of them."""
ENOUGH = 10
"""Sets, from which the answer is one."""


@dataclass(frozen=True)
class Point:
    """A set of one pair of arms."""

    name: str
    measure: float
    log_gain: float
    seeds: int


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Spearman's rho of ``x [n]`` and ``y [n]`` and its exact two-sided p-value over all n! orders; ties share ranks.

    Raises:
        UserError: fewer than three, more than ``MOST``, or one of them constant.
    """
    n = len(x)
    if not 3 <= n <= MOST:
        raise UserError(f"{n} sets: a rank correlation with all orders counted takes 3 to {MOST}")
    first, second = ((2 * rankdata(of)).astype(int) for of in (x, y))  # whole numbers, ties or not
    spread = math.sqrt(float(first.var() * second.var()))
    if not spread > 0:
        raise UserError("the measure or the gain is the same for all sets: there is no correlation")
    centre = int(first.sum()) * int(second.sum())
    counts = orders_by_product(first, second)
    away = np.abs(n * np.arange(len(counts)) - centre)  # n times the product's distance from its mean
    seen = abs(n * int(first @ second) - centre)
    rho = (float(first @ second) / n - float(first.mean() * second.mean())) / spread
    return rho, float(counts[away >= seen].sum()) / math.factorial(n)


def orders_by_product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``[most + 1]``: how many orders pi of ``second`` have each value of ``sum_i first[i] second[pi(i)]``.

    The first i of ``first`` with each subset of i of ``second``, subset by subset: 2^n of them in the place of n!.
    """
    n, most = len(first), int(np.sort(first) @ np.sort(second))
    counts = {0: np.eye(1, most + 1, dtype=np.int64)[0]}
    for i in range(n):
        wider: dict[int, np.ndarray] = {}
        for used, count in counts.items():
            for j in range(n):
                if not used >> j & 1:
                    by = int(first[i] * second[j])
                    into = wider.setdefault(used | 1 << j, np.zeros(most + 1, dtype=np.int64))
                    into[by:] += count[: most + 1 - by]
        counts = wider
    return counts[2**n - 1]


def points_of(out: Path, without: str, with_it: str, at: float | None) -> list[Point]:
    """The sets of the ablation in ``out`` that have both arms.

    Raises:
        UserError: no ablation there, or neither a measure nor a run to measure on.
    """
    file = out / "ablation.json"
    if not file.is_file():
        raise UserError(f"no ablation.json in {out}: give the --out of an ablate that is finished")
    results = [Result(**run) for run in json.loads(file.read_text())["runs"]]
    points = []
    for suite in distinct([r.suite for r in results]):
        metric = judged_by(results, suite)
        ratio = paired_ratio(*(by_seed(results, suite, arm, ONE, metric) for arm in (with_it, without)))
        if ratio is not None:
            runs = [r for r in results if (r.suite, r.arm) == (suite, with_it) and not r.failure]
            measure = measure_of(out, suite, min(runs, key=lambda r: r.seed), at)
            points.append(Point(f"{out.name}, {suite}", measure, math.log(ratio.mean), ratio.pairs))
    return points


def measure_of(out: Path, suite: str, result: Result, at: float | None) -> float:
    """The measure on the latents of the run of ``result``, at the level ``at`` or the gate's; kept in ``out``."""
    run = run_root(out, suite, result.arm, result.seed)
    kept = out / f"non_gaussian_{run.parents[1].name}_{run.parents[0].name}.json"
    if not kept.is_file():
        if not run.is_dir():
            raise UserError(f"neither {kept} nor the run {run}: a set needs one of them")
        report, lines = non_gaussian.measured(non_gaussian.parser().parse_args(["--run", str(run)]))
        print("\n".join(lines), flush=True)
        kept.write_text(json.dumps(report, indent=1) + "\n")
    (space,) = json.loads(kept.read_text()).values()
    level = space["gate"] if at is None else at
    by_level = {one["t"]: one["ratio"] for one in space["levels"]}
    if level not in by_level:
        raise UserError(f"{kept} has no measure at t = {level}: there are {', '.join(f'{t:g}' for t in by_level)}")
    return float(by_level[level])


def report_on(points: Sequence[Point], pair: tuple[str, str]) -> dict[str, Any]:
    """Print and return what is known of ``pair``."""
    print(f"\n{pair[1]} over {pair[0]}\n{'measure':>8} {'gain':>6} {'seeds':>6}  set")
    for point in sorted(points, key=lambda p: p.measure):
        print(f"{point.measure:8.3f} {math.exp(point.log_gain):6.2f} {point.seeds:6}  {point.name}")
    report = {"pair": pair, "points": [asdict(point) for point in points]}
    try:
        rho, p = rank_correlation([p.measure for p in points], [p.log_gain for p in points])
    except UserError as error:  # the other pair may have more
        print(f"no correlation: {error}")
        return report
    few = "" if len(points) >= ENOUGH else f"; fewer than {ENOUGH} sets: no answer yet"
    print(f"Spearman's rho {rho:.2f}, exact p {p:.3g} (two-sided), sets: {len(points)}{few}")
    return report | {"rho": rho, "p": p}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outs", type=Path, nargs="+", metavar="OUT")
    parser.add_argument("--at", type=float, metavar="T", help="the measure at this level (default: at the gate's)")
    options = parser.parse_args(arguments)

    def work() -> int:
        about, rows = describe_machine(), []
        for pair in PAIRS:
            points = [point for out in options.outs for point in points_of(out, *pair, options.at)]
            if points:
                rows.append(report_on(points, pair))
        if not rows:
            raise UserError(f"none of these has both arms of a pair: {' or '.join(map(' and '.join, PAIRS))}")
        print(f"wrote {write_json('non_gaussian_predictor', rows, about).name}")
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
