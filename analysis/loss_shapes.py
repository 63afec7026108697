"""How hard does each distance pull? The losses and their derivatives, and their pull on measured residuals (Fig. 2)."""

from __future__ import annotations

import argparse
import json
import math
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).with_name("needed.py")))

import torch
from torch import Tensor

from analysis.baselines import baseline_of_digits
from analysis.command import add_common, check_common, run_command
from analysis.drawing import Curve, draw_loss_shapes
from analysis.runs import trained_run
from analysis.values import Residuals, last_stage
from reference_trainer.command import Parser
from reference_trainer.files import write_atomically
from reference_trainer.machine import device_of
from reference_trainer.plotting import save_figure
from reference_trainer.run import RunFolder
from robustcm.losses import Rho, squared_l2_of_r2
from robustcm.scales import ConstantC
from robustcm.tails.advice import CANDIDATES, Advice, advise

RHOS: dict[str, Rho] = {"squared_l2": squared_l2_of_r2} | {x.distance.__name__: x.rho for x in CANDIDATES}
BENDS = {x.distance.__name__: x.bend for x in CANDIDATES}

EPILOG = """
Panels: (a) the losses and (b) their influence |d/dr|, by autograd, against r / c; (c) which share of the pull comes
from which samples of one noise level, the smallest residuals first: on the diagonal all samples pull alike; (d) how
the pull, loss weight included, is spread over the noise levels. Solid: c as `td_outliers.py` advises, each bend at the
clean bound. Dashed: iCT's constant c = 0.00054 sqrt(d), usually far below the residuals, where it has no effect on
the shape.

Writes OUT/loss_shapes.png and OUT/loss_shapes.json.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(parser(), look, arguments)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--run",
        type=Path,
        metavar="RUN",
        help="take the residuals of this trained run (default: the digits baseline in latents of td_outliers.py)",
    )
    p.add_argument("--levels", type=int, metavar="N", help="number of noise levels (default 21, or the run's)")
    p.add_argument("--steps", type=int, default=300, help="training steps of the baseline (default 300)")
    add_common(p)
    return p


def look(options: argparse.Namespace) -> int:
    """Measure, draw, say."""
    check_common(options)
    found = residuals_for(options)
    advice, missing = None, ""
    by_sample: list[Curve] = []
    by_level: list[Curve] = []
    try:
        advice = advise(found.r, found.level, found.num_levels, found.d)
        by_sample, by_level = pulls(found, advice)
    except ValueError as error:  # the losses themselves need no residuals
        missing = f"no pull on the residuals of {found.origin}: {error}"
    files = options.out / "loss_shapes.png", options.out / "loss_shapes.json"
    save_figure(draw_loss_shapes(*shapes(), by_sample, by_level, origin=found.origin), files[0])
    report = {
        "origin": found.origin,
        "advice": None if advice is None else advice.as_dict(),
        "pull_by_sample": [curve.as_dict() for curve in by_sample],
        "pull_by_level": [curve.as_dict() for curve in by_level],
    }
    write_atomically(files[1], (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    print("\n".join([missing] if missing else table(by_sample, found.origin)))
    print(f"look at {files[0]}")
    return 0


def residuals_for(options: argparse.Namespace) -> Residuals:
    """Residuals of ``options.run``, or of the digits baseline.

    Raises:
        UserError: no run or checkpoint, or too few samples for a network or its gate.
    """
    if options.run is None:
        trained = baseline_of_digits(options)[1]
    else:
        trained = trained_run(RunFolder(options.run), options.images, device_of(options.device))
    return trained.residuals(options.levels or last_stage(trained.config), options.samples)


def table(by_sample: Sequence[Curve], origin: str) -> list[str]:
    """Which share of the pull comes from the largest residuals, as lines."""
    lines = [
        f"residuals of {origin}; share of the pull within a noise level that comes from",
        f"{'':16}{'c':>9}  the largest 5 % of residuals   the largest 1 %",
    ]
    for curve in by_sample:
        top = [1 - curve.at(1 - share) for share in (0.05, 0.01)]
        scale = f"{curve.c:9.3g}" if math.isfinite(curve.c) else f"{'-':>9}"
        lines.append(f"{curve.name:16}{scale}{top[0]:16.1%}{top[1]:30.1%}{'   (iCT c)' if curve.dashed else ''}")
    return lines


def influence(rho: Rho, r: Tensor, c: float) -> Tensor:
    """``d rho / d r`` by autograd: ``[n] -> [n]``, in units of rho over those of r."""
    r = r.double().detach().requires_grad_()
    (slope,) = torch.autograd.grad(rho(r * r, c).sum(), r)
    return slope


def shapes() -> tuple[list[Curve], list[Curve]]:
    """Losses and influences against r / c, c = 1; squared L2 halved, so that its slope at 0 is Cauchy's."""
    x = torch.linspace(0, 6, 601, dtype=torch.float64)
    losses, slopes = [], []
    for name, rho in RHOS.items():
        half = 0.5 if name == "squared_l2" else 1.0
        losses.append(Curve(name, x.tolist(), (half * rho(x * x, 1.0)).tolist()))
        slopes.append(Curve(name, x.tolist(), (half * influence(rho, x, 1.0)).tolist()))
    return losses, slopes


def pulls(found: Residuals, advice: Advice) -> tuple[list[Curve], list[Curve]]:
    """Share of the pull by sample within a level (cumulated, smallest residual first), and by noise level.

    The pull of a sample is the norm of its loss's gradient in the student's output; by level it includes the weight.
    """
    r = found.r.double()
    usable = r.isfinite() & (r > 0)
    r, level, weight = r[usable], found.level[usable], found.weight[usable].double()
    labels, index = level.unique(return_inverse=True)
    medians = torch.stack([r[level == i].median() for i in labels])
    normalised, order = r / medians[index], (r / medians[index]).argsort()
    constant = ConstantC().per_sqrt_d * math.sqrt(found.d)
    by_sample, by_level = [], []
    shares = torch.linspace(0, 1, len(r) + 1)[1:].tolist()
    sigmas = found.sigmas[labels].tolist()
    thinned = slice(None, None, max(1, len(r) // 500))
    for name, rho in RHOS.items():
        scales = [(advice.clean_bound / BENDS[name], False), (constant / advice.median, True)] if name in BENDS else []
        for scale, dashed in scales or [(math.nan, False)]:
            within = influence(rho, normalised, scale if name in BENDS else 1.0)[order].cumsum(0)
            cumulated = (within / within[-1]).tolist()
            c = scale * advice.median
            by_sample.append(
                Curve(name, [0.0, *shares[thinned], 1.0], [0.0, *cumulated[thinned], 1.0], c=c, dashed=dashed)
            )
            pull = weight * influence(rho, r, c if name in BENDS else 1.0)
            total = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, index, pull)
            by_level.append(Curve(name, sigmas, (total / total.sum()).tolist(), c=c, dashed=dashed))
    return by_sample, by_level


if __name__ == "__main__":
    sys.exit(main())
