"""Where does the gradient come from: which noise levels, and which share does the early diffusion term have?

    python benchmarks/gradient_share.py RUN [--batches 40]

For a trained run, with the weights being trained and at the N they have reached, the norm of the loss's gradient at the
network's output is summed over the samples of each range of noise levels, for every distance, c and weight. c is iCT's
constant, or measured on these residuals: one for all levels, one for each of eight ranges, or the latter but nowhere
below the former. ``early`` is the early diffusion term's share (``gradient_share``) beside that distance, as published
and summed over the elements.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import torch
from _timing import write_json

from analysis.values import network_of
from reference_trainer.machine import describe_machine
from reference_trainer.model import TrainedModel, load_model
from reference_trainer.run import RunFolder
from reference_trainer.training.batches import Batches
from robustcm.early import EarlyDiffusion, gradient_share
from robustcm.losses import cauchy, geman_mcclure, pseudo_huber, squared_l2
from robustcm.objective import Batch, Objective
from robustcm.scales import ConstantC, MeasuredC
from robustcm.schedules import BoundedInverseGap, SnrPlusWeight, equal_weight, inverse_gap

EDGES = (0.05, 0.3, 1.0, 5.0)
RANGES = ("t < 0.05", "0.05 .. 0.3", "0.3 .. 1", "1 .. 5", "t > 5")
DISTANCES = (squared_l2, pseudo_huber, cauchy, geman_mcclure)
SCALES = {
    "constant": ConstantC(),
    "measured": MeasuredC(),
    "per level": MeasuredC(bins=8),
    "floored": MeasuredC(bins=8, at_least_pooled=True),
}
WEIGHTS = {"1/dt": inverse_gap, "bounded": BoundedInverseGap(), "snr+": SnrPlusWeight(), "equal": equal_weight}
EARLY = {"mean": EarlyDiffusion(), "sum": EarlyDiffusion(reduction="sum")}


def shares(model: TrainedModel, batches: list[Batch], objective: Objective) -> tuple[list[float], dict[str, float]]:
    """The share of the gradient of each range of levels, and that of either early term.

    c is settled on all batches before the first gradient is taken.
    """
    f, state = model.function, objective.init(model.device)
    with torch.no_grad():
        for batch in batches:
            state = objective(f, batch, state).state
    by_range, early = torch.zeros(len(RANGES), dtype=torch.float64), dict.fromkeys(EARLY, 0.0)
    for batch in batches:
        terms = objective(f, batch, state)
        (gradient,) = torch.autograd.grad(terms.consistency.sum(), terms.student, retain_graph=True)
        norms = gradient.flatten(1).norm(dim=1).double()
        by_range += torch.zeros_like(by_range).index_add(
            0, torch.bucketize(batch.pairs.t_hi, torch.tensor(EDGES)), norms
        )
        for name, term in EARLY.items():
            extra = term(terms.student, batch.x, batch.pairs)
            early[name] += float(gradient_share(extra, terms.consistency, terms.student)) / len(batches)
    return (by_range / by_range.sum()).tolist(), early


def variants(base: Objective) -> Iterator[tuple[str, Objective]]:
    """Distance, c and weight in all combinations that differ."""
    for distance in DISTANCES:
        for scale, c in SCALES.items() if distance is not squared_l2 else [("-", ConstantC())]:
            for weighting, weight in WEIGHTS.items():
                name = f"{distance.__name__:14} {scale:10} {weighting:8}"
                yield name, replace(base, distance=distance, c=c, weight=weight, extra=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--batches", type=int, default=40)
    options = parser.parse_args()
    run = RunFolder(options.run)
    model = load_model(run, torch.device("cpu"))
    model = replace(model, network=network_of(model.config, run, model.shape, model.device))
    torch.set_num_threads(model.config.threads)
    model.network.requires_grad_(True)
    # The last steps of the run: their noise, their levels.
    images, steps = model.config.data.load(), model.config.steps
    source = Batches(model.config, model.latents_of(images.train), images.train_labels, len(images.classes))
    batches = [source(step) for step in range(max(0, steps - options.batches), steps)]
    about, rows = describe_machine(), []
    print(f"N = {batches[0].pairs.num_levels}, {sum(len(b.x) for b in batches)} samples of {options.run}")
    print(f"{'distance':14} {'c':10} {'weight':8}" + "".join(f"{name:>13}" for name in RANGES) + "   early: mean, sum")
    for name, objective in variants(model.config.objective):
        by_range, early = shares(model, batches, objective)
        rows.append({"variant": name.split(), "share": dict(zip(RANGES, by_range, strict=True)), "early": early})
        print(
            name + "".join(f"{share:13.1%}" for share in by_range) + f"   {early['mean']:.2e}, {early['sum']:.2f}",
            flush=True,
        )
    print(f"wrote {write_json('gradient_share', rows, about).name}")


if __name__ == "__main__":
    main()
