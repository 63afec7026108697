"""How much of the data's variance will samples have? Foretold in closed form, beside what trained runs have."""

from __future__ import annotations

import argparse
import json
import math
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).with_name("needed.py")))

import torch
from torch import Tensor

from analysis.command import add_data, add_images, require_writable, run_command
from analysis.drawing import draw_variance
from analysis.inputs import GivenAutoencoder, configuration, load_images, some_of_images
from reference_trainer.command import Parser
from reference_trainer.config import TrainConfig
from reference_trainer.data.stored import StoredImages
from reference_trainer.errors import UserError
from reference_trainer.evaluation.latent_space import GROUPS
from reference_trainer.files import write_atomically
from reference_trainer.machine import cache_folder, device_of
from reference_trainer.plotting import save_figure
from reference_trainer.run import RunFolder
from reference_trainer.training.batches import Batches, check_batch_size
from reference_trainer.training.start import new_latents
from robustcm.gates import Gate, everywhere
from robustcm.objective import Objective
from robustcm.schedules import LevelGrid
from robustcm.teacher_input import CovarianceKept, KeepCovariance

LEVELS = (11, 21, 41, 81, 161, 641)
"""Numbers of noise levels, N."""

EPILOG = """
A step of consistency training is a regression: what comes out of a chain of N - 1 of them varies less than the data.
Coupled noise that ends at a gate makes it vary more. Of Gaussian data with the covariance of the latents, and of noise
that goes with them as in training, both are known before anything is trained (robustcm/teacher_input.py). Printed for
each N: the variance of samples at one evaluation over that of the data, in the first 4 principal components, the next
12, and the rest. KeepCovariance makes all of them 1. What is not: latents that are not Gaussian, and a network that has
not learned all.

With RUNs their measured variances stand beside it.

Writes OUT/variance.png and OUT/variance.json.

examples:
  python analysis/variance.py                        the digits
  python analysis/variance.py runs/digits runs/ilct  ... and what these runs came to
  python analysis/variance.py --data photographs
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(parser(), look, arguments)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="trained and evaluated runs")
    add_data(p, "a folder of images, or photographs (default: the digits)")
    add_images(p)
    return p


def look(options: argparse.Namespace) -> int:
    """Measure, foretell, draw, say."""
    if options.images < 2:
        raise UserError(f"--images must be at least 2, got {options.images}")
    require_writable(options.out)
    names = [root.name for root in options.runs]
    measured = {
        name if names.count(name) == 1 else str(root): measured_of(RunFolder(root))
        for name, root in zip(names, options.runs, strict=True)
    }
    device = device_of(options.device)
    config = configuration(options.data, options.resolution, options.autoencoder, device)
    covariance, gate = covariance_of(config, options.images, device)
    foretold = {
        name: {n: in_groups(covariance, gate_or_none, n, config) for n in LEVELS}
        for name, gate_or_none in (("no coupling", None), ("above the gate", gate), ("everywhere", everywhere))
    }
    print(table(foretold, measured))
    files = options.out / "variance.png", options.out / "variance.json"
    save_figure(draw_variance(foretold, measured), files[0])
    report = {"gate": repr(gate), "foretold": foretold, "measured": measured}
    write_atomically(files[1], (json.dumps(report, indent=1) + "\n").encode())
    print(f"look at {files[0]}")
    return 0


def covariance_of(config: TrainConfig, limit: int, device: torch.device) -> tuple[CovarianceKept, Gate]:
    """How the latents of ``config`` vary, how their coupled noise goes with them, and where its gate lies."""
    check_batch_size(config, limit)
    all_images = load_images(config.data)
    images = some_of_images(all_images, limit)
    check_batch_size(config, images.num_train)  # before the autoencoder is fitted
    if not isinstance(images, StoredImages):  # fitted to all of them, as training has it
        codec = config.autoencoder.fit(all_images, device, cache_folder())
        config = replace(config, autoencoder=cast(Any, GivenAutoencoder(repr(config.autoencoder), codec)))
    latents, _ = new_latents(config, images, cache_folder(), device)
    assert isinstance(config.objective, Objective)
    asked = replace(config.objective, teacher_input=KeepCovariance(components=math.prod(latents.shape)))
    batches = Batches(replace(config, objective=asked), latents, images.train_labels)
    found = batches.objective
    assert isinstance(found, Objective)
    assert isinstance(found.teacher_input, CovarianceKept)
    return found.teacher_input, found.gate


def in_groups(covariance: CovarianceKept, gate: Gate | None, n: int, config: TrainConfig) -> dict[str, float]:
    """Variance of samples over that of the data in each of ``GROUPS``, trained at ``n`` levels with ``gate``."""
    levels = config.objective.noise.levels(n)
    shares = torch.zeros_like(levels) if gate is None else gate(levels, 1.0)
    ratio, variances = covariance.spread_of_samples(levels, shares), covariance.variances
    return {name: weighted(ratio[group], variances[group]) for name, group in GROUPS.items() if len(variances[group])}


def weighted(ratio: Tensor, variances: Tensor) -> float:
    """Of a group of components, all alike: variance of the samples over that of the data; NaN where it has none.

    A component that is constant has no ratio, and no part in it.
    """
    varies = variances > 0
    return float((ratio * variances)[varies].sum() / variances.sum())


def measured_of(run: RunFolder) -> dict[str, Any]:
    """What a run came to at one evaluation, and with how many levels and which coupling.

    Raises:
        UserError: it is not evaluated, or has no consistency function on a grid.
    """
    config, file = run.config(), run.root / "evaluation.json"
    if not file.exists():
        raise UserError(f"no evaluation.json in {run.root}: python -m reference_trainer evaluate {run.root}")
    objective = config.objective
    if not isinstance(objective, Objective) or not isinstance(objective.levels, LevelGrid):
        raise UserError(f"{run.root} is not trained as a consistency function on a grid of levels")
    row = json.loads(file.read_text()).get("latents", {}).get("rows", {}).get("1 evaluation")
    if row is None:
        raise UserError(f"{file} has no figures of latents: python -m reference_trainer evaluate {run.root}")
    n = objective.levels.curriculum(config.steps - 1, config.steps)
    kept = objective.teacher_input is not None
    about = {"levels": n, "coupler": str(getattr(objective.coupler, "__name__", objective.coupler)), "kept": kept}
    return about | {name: row[name] for name in GROUPS if name in row}


def table(foretold: dict[str, dict[int, dict[str, float]]], measured: dict[str, dict[str, Any]]) -> str:
    """Both, as lines."""
    heads = [name.removeprefix("variance_").replace("_", " ") for name in GROUPS]
    lines = [f"{'coupling':<16}{'N':>5}" + "".join(f"{head:>10}" for head in heads)]
    for name, by_levels in foretold.items():
        for n, groups in by_levels.items():
            lines.append(f"{name:<16}{n:>5}" + "".join(f"{groups[key]:>10.2f}" for key in GROUPS if key in groups))
    for name, row in measured.items():
        what = f"{name}: {row['coupler']}, covariance {'kept' if row['kept'] else 'not kept'}"
        lines += [what, f"{'measured':<16}{row['levels']:>5}" + "".join(f"{row[k]:>10.2f}" for k in GROUPS if k in row)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
