"""At which noise level should the second evaluation be? Runs are sampled at many, trained levels and between them.

`python benchmarks/second_sigma.py RUN [RUN ...]`: for each run the Frechet distance to the training images at 1
evaluation, then at 2 with the second at every trained level around the one up to which latents are recognised
(marked <-: what `second_sigma=None` takes) and, "between", half-way to the next. Several runs, trained at the same
levels: their mean and range, and how many of them would take a level.
"""

from __future__ import annotations

import argparse
import math
import runpy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import torch
from _timing import write_json
from tqdm import tqdm

from reference_trainer.evaluation.evaluate import choose_features, training_images
from reference_trainer.evaluation.metrics import frechet_distance
from reference_trainer.machine import describe_machine
from reference_trainer.model import TrainedModel, load_model
from reference_trainer.run import RunFolder


def nearest(model: TrainedModel, t: float) -> float:
    """The level next to ``t`` that was trained at in the last step."""
    return model.config.objective.levels.nearest(t, model.config.steps - 1, model.config.steps)


def levels_around(models: Sequence[TrainedModel], factor: float) -> list[tuple[str, float]]:
    """("trained" or "between", t), falling: within ``factor`` of where the latents of any of them are recognised.

    Raises:
        ValueError: they were trained at different levels.
    """
    asked = [(model, model.space.recognised_at * factor ** (1 - i / 50)) for model in models for i in range(101)]
    trained = sorted({nearest(model, t) for model, t in asked}, reverse=True)
    if any(nearest(model, t) != t for model in models for t in trained):
        raise ValueError("the runs were trained at different levels: ask for each alone")
    found = [("trained", trained[0])]
    for high, low in pairwise(trained):
        found += [("between", math.sqrt(high * low)), ("trained", low)]
    return found


def distances(model: TrainedModel, levels: Sequence[float], n: int) -> list[float]:
    """Frechet distance at 1 evaluation, then with the second at each of ``levels``."""
    features = choose_features(None, model)
    real = features(training_images(model.config.data.load(), seed=0)[:n])
    largest = model.config.objective.noise.sigma_max
    bar = tqdm([(largest,), *((largest, t) for t in levels)], leave=False)
    return [frechet_distance(real, features(model.images(len(real), sigmas, 0))) for sigmas in bar]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--factor", type=float, default=4.0, help="how far around that level to look (default 4)")
    parser.add_argument("--n", type=int, default=5000, help="samples, at most (default 5000)")
    options = parser.parse_args()
    models = [load_model(RunFolder(run), torch.device("cpu")) for run in options.runs]
    torch.set_num_threads(models[0].config.threads)
    try:
        levels, about = levels_around(models, options.factor), describe_machine()
    except ValueError as error:
        parser.error(str(error))
    found = [distances(model, [t for _, t in levels], options.n) for model in models]
    defaults = [nearest(model, model.space.recognised_at) for model in models]
    recognised = ", ".join(f"{model.space.recognised_at:.3g}" for model in models)
    print(f"recognised up to {recognised}; FD, mean (smallest .. largest of the runs)")
    rows, theme = [], f"second_sigma_d{math.prod(models[0].shape)}"
    for (kind, t), values in zip([("1 evaluation", math.nan), *levels], zip(*found, strict=True), strict=True):
        takes = defaults.count(t)
        mark = "" if not takes else "<-" if takes == len(models) else f"<- {takes} of {len(models)} runs"
        mean = sum(values) / len(values)
        print(f"{kind:14}{t:8.3f}{mean:9.2f}  ({min(values):.2f} .. {max(values):.2f}) {mark}", flush=True)
        rows.append({"kind": kind, "t": None if math.isnan(t) else t, "frechet": values, "default": takes})
    print(f"wrote {write_json(theme, rows, about).name}")


if __name__ == "__main__":
    main()
