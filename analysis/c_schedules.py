"""Does c follow the residuals? c of every schedule at every N beside the measured spread; runs compared (Fig. 3)."""

from __future__ import annotations

import argparse
import json
import math
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).with_name("needed.py")))

import torch

from analysis.baselines import BASELINE, baseline_of_digits
from analysis.command import add_common, check_common, run_command
from analysis.drawing import RunCurves, draw_c_schedules
from analysis.runs import trained_run
from analysis.values import Trained
from reference_trainer.command import Parser
from reference_trainer.errors import UserError
from reference_trainer.evaluation.evaluate import brief
from reference_trainer.evaluation.manifest import unlike
from reference_trainer.files import write_atomically
from reference_trainer.machine import device_of
from reference_trainer.plotting import save_figure
from reference_trainer.run import METRICS, RunFolder
from robustcm.scales import ConstantC, CSchedule, MeasuredC, PowerLawC

LOGGED = ("step", "r", "c", "consistency")
STAGES = (11, 21, 41, 81, 161, 321, 641)

EPILOG = """
Panels: (a) c of ConstantC, PowerLawC and MeasuredC at every N of the doubling curriculum, and the median and MAD of r,
measured at each of these N with the last weights of each run; (b) r and c as logged in training; (c) the loss;
(d, e) Frechet distance and recall over training, from evaluations.jsonl (train with evaluate_every=STEPS for more than
the last point) or else evaluation.json; (f) the last of them. Compare only runs evaluated in the same features.
MeasuredC is drawn from the residuals of the first run; c of a schedule scales with sqrt(d) as it does in training.

Writes OUT/c_schedules.png and OUT/c_schedules.json.

examples:
  python analysis/c_schedules.py                                 the digits baseline of td_outliers.py
  python analysis/c_schedules.py runs/digits runs/ilct runs/paper
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(parser(), look, arguments)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="trained runs (default: the digits baseline)")
    p.add_argument("--levels", type=int, metavar="N", help="number of noise levels of the baseline (default 21)")
    p.add_argument("--steps", type=int, default=300, help="training steps of the baseline (default 300)")
    add_common(p, samples=1024)
    return p


def look(options: argparse.Namespace) -> int:
    """Measure, draw, say."""
    check_common(options)
    if options.runs:
        device = device_of(options.device)
        runs = [RunFolder(root) for root in options.runs]
        looked_at = [(run, trained_run(run, options.images, device), run.root.name) for run in runs]
    else:
        looked_at = [(*baseline_of_digits(options), BASELINE)]
    curves, notes = [], []
    for run, trained, name in looked_at:
        found, said = curves_of(run, trained, name, options.samples)
        curves.append(found)
        notes += said
    d = looked_at[0][1].data[0].numel()
    schedules = {
        name: [(n, c_at(schedule, n, d, r)) for n, r, _ in curves[0].spread or [(n, 1.0, 0.0) for n in STAGES]]
        for name, schedule in (("ConstantC", ConstantC()), ("PowerLawC", PowerLawC()), ("MeasuredC", MeasuredC()))
        if curves[0].spread or not isinstance(schedule, MeasuredC)  # which follows the residuals
    }
    files = options.out / "c_schedules.png", options.out / "c_schedules.json"
    save_figure(draw_c_schedules(schedules, curves), files[0])
    report = {"d": d, "c": schedules, "runs": [vars(run) for run in curves]}
    write_atomically(files[1], (json.dumps(report, indent=1) + "\n").encode())
    print("\n".join([*table(schedules, curves), *notes]))
    print(f"look at {files[0]}")
    return 0


def curves_of(run: RunFolder, trained: Trained, name: str, samples: int) -> tuple[RunCurves, list[str]]:
    """What the figure shows of one run; and what it cannot show, and why, as lines."""
    notes, spread = [], []
    try:
        for n in STAGES:
            r = trained.residuals(n, samples).r
            r = r[r.isfinite()]
            median = r.median()
            spread.append((n, float(median), float((r - median).abs().median())))
    except UserError as error:  # too few images, or a network that gives NaN
        spread = []
        notes.append(f"{name}: no residuals: {error}")
    rows = [row for row in run.metrics() if all(is_finite(row.get(key)) for key in LOGGED)]
    if len(rows) < 2:
        notes.append(
            f"{name}: {len(rows) or 'no'} logged row{'s' * (len(rows) != 1)} in {run.root / METRICS}: no curve"
        )
    logged = [(row["step"], row["r"], row["c"]) for row in rows]
    loss = [(row["step"], row["consistency"]) for row in rows]
    return RunCurves(name, spread, logged, loss, evaluations_of(run)), notes


def is_finite(value: Any) -> bool:
    """Whether ``value`` of a log is a finite number: one that was NaN stands there as null."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def evaluations_of(run: RunFolder) -> list[dict[str, Any]]:
    """The rows of evaluations.jsonl in the features of its last; without any, the samples' part of evaluation.json."""
    rows = run.evaluations()
    if not rows:
        try:
            rows = [brief(json.loads((run.root / "evaluation.json").read_text()))]
        except (OSError, ValueError, KeyError):
            return []
    return [row for row in rows if row["features"] == rows[-1]["features"]]


def c_at(schedule: CSchedule, num_levels: int, d: int, r: float) -> float:
    """c of ``schedule`` at N for samples of ``d`` elements whose residual norms are all ``r``."""
    depth = torch.zeros(1)
    seen = schedule.count(torch.full((1,), r), depth, num_levels)
    return float(torch.as_tensor(schedule(schedule.init(), seen, depth, num_levels, d)).reshape(-1)[0])


def table(schedules: dict[str, list[tuple[int, float]]], runs: Sequence[RunCurves]) -> list[str]:
    """c and spread at each N, as lines; and whether the runs' metrics cannot be compared."""
    lines = [f"{'N':>5}" + "".join(f"{name:>12}" for name in schedules) + "   median r +- MAD of each run"]
    for i, n in enumerate(STAGES):
        scales = "".join(f"{points[i][1]:12.4g}" for points in schedules.values())
        spread = "   ".join(f"{run.spread[i][1]:.3g} +- {run.spread[i][2]:.2g}" if run.spread else "-" for run in runs)
        lines.append(f"{n:5}{scales}   {spread}")
    if len(names := {run.evaluations[-1]["features"] for run in runs if run.evaluations}) > 1:
        lines.append(f"not comparable: Frechet distance and recall are in {' / '.join(sorted(names))}")
    manifests = {run.name: run.evaluations[-1].get("manifest") for run in runs if run.evaluations}
    lines += [f"not measured alike: {difference}" for difference in unlike(manifests)]
    return lines


if __name__ == "__main__":
    sys.exit(main())
