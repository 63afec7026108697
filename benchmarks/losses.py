"""What does a robust distance cost, forward and backward, beside one pass over its input and other libraries' losses?

    python benchmarks/losses.py [--quick] [--large] [--eager]

Latents of 256 x 4 x 32 x 32, with ``--large`` of 256 x 16 x 32 x 32, float32, on as many threads as torch takes. All
calls are timed in turns, in one process: the distances of ``robustcm`` on whole samples, tokens and elements, as they
are and through ``torch.compile``; kornia's elementwise Charbonnier, Cauchy and Geman-McClure (their scale is 1);
Barron's general loss as one writes it down from the paper, elementwise. Each takes the sum over the batch and its
gradient in the student. One pass is ``student * teacher``: it reads both and writes as much as a gradient is. The ratio
is that of a round: its median and quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))
    if find_spec("kornia") is None:
        sys.exit("error: kornia, whose losses are compared, is missing: pip install -e '.[dev]' in a clone")

import kornia
import torch
from _timing import measure_in_turns, write_json
from torch import Tensor

from reference_trainer.machine import describe_machine, keep_freed_memory
from robustcm.barron import Barron, BarronOfR2
from robustcm.losses import (
    PerElement,
    PerToken,
    cauchy,
    cauchy_of_r2,
    fair,
    geman_mcclure,
    geman_mcclure_of_r2,
    pseudo_huber,
    pseudo_huber_of_r2,
    squared_l2,
)

ONE_PASS = "one pass: student * teacher"
SMALL, LARGE = (256, 4, 32, 32), (256, 16, 32, 32)
Loss = Callable[[Tensor, Tensor], Tensor]


def written_down(student: Tensor, teacher: Tensor, alpha: float = 0.5, c: float = 1.0) -> Tensor:
    """Barron's loss of each element by its formula, without a care for the ends of its range."""
    b = abs(alpha - 2)
    return b / alpha * ((((student - teacher) / c) ** 2 / b + 1) ** (alpha / 2) - 1)


def with_c(distance: Callable[[Tensor, Tensor, Tensor], Tensor], c: Tensor) -> Loss:
    return lambda student, teacher: distance(student, teacher, c)


def losses(b: int, device: torch.device, compiled: bool) -> dict[str, Loss]:
    """Every loss by the name it is printed under; c is one a sample, as ``MeasuredC`` gives it."""
    c = torch.full((b,), 0.5, device=device)
    samples = {"squared_l2": squared_l2, "pseudo_huber": pseudo_huber, "cauchy": cauchy}
    samples |= {"geman_mcclure": geman_mcclure, "fair": fair, "Barron(0.5)": Barron(0.5)}
    ours = {
        **samples,
        "PerToken(cauchy_of_r2)": PerToken(cauchy_of_r2),
        "PerElement(pseudo_huber_of_r2)": PerElement(pseudo_huber_of_r2),
        "PerElement(cauchy_of_r2)": PerElement(cauchy_of_r2),
        "PerElement(geman_mcclure_of_r2)": PerElement(geman_mcclure_of_r2),
        "PerElement(BarronOfR2(0.5))": PerElement(BarronOfR2(0.5)),
    }
    found = {name: with_c(distance, c) for name, distance in ours.items()}
    if compiled:
        found |= {
            f"compiled {name}": torch.compile(with_c(distance, c), fullgraph=True, dynamic=False)
            for name, distance in ours.items()
        }
    return found | {
        "kornia charbonnier": kornia.losses.charbonnier_loss,
        "kornia cauchy": kornia.losses.cauchy_loss,
        "kornia geman_mcclure": kornia.losses.geman_mcclure_loss,
        "Barron written down": written_down,
    }


def step(loss: Loss, student: Tensor, teacher: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(student, teacher).sum(), student)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five rounds")
    parser.add_argument("--large", action="store_true", help="four times the channels, too")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which takes a minute to begin")
    options = parser.parse_args()
    keep_freed_memory()  # as in a run; else a pass pays for pages of memory that are new each time
    torch._dynamo.config.recompile_limit = 64  # all distances go through one line
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about, rows = describe_machine(), list[dict[str, Any]]()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for shape in (SMALL, LARGE) if options.large else (SMALL,):
        generator = torch.Generator().manual_seed(0)
        student, teacher = torch.randn(2, *shape, generator=generator).to(device)
        student.requires_grad_()
        calls: dict[str, Callable[[], object]] = {ONE_PASS: partial(torch.mul, student.detach(), teacher)}
        calls |= {
            name: step(loss, student, teacher) for name, loss in losses(len(student), device, not options.eager).items()
        }
        timings, ratios = measure_in_turns(calls, ONE_PASS, 0.0 if options.quick else 30.0)
        print(f"\n{'x'.join(map(str, shape)):36}{'wall':>10} {'IQR':>8}   passes over the input (IQR)")
        for name, timing in timings.items():
            low, passes, high = sorted(1 / ratio for ratio in ratios[name])
            rows.append({"what": name, "shape": shape, "seconds": timing, "passes": (low, passes, high)})
            print(
                f"{name:36}{1e3 * timing.median:7.2f} ms {1e3 * (timing.q3 - timing.q1):5.2f} ms   {passes:6.1f} "
                f"({low:.1f} .. {high:.1f})"
            )
    print(f"\nwrote {write_json('losses-quick' if options.quick else 'losses', rows, about).name}")


if __name__ == "__main__":
    main()
