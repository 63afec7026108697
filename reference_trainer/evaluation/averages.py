"""The samples of a run by the average of its weights: a line for each, and a picture over the length of the average."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from reference_trainer.averages import averages_of
from reference_trainer.config import TrainConfig
from reference_trainer.data.images import ImageSet
from reference_trainer.errors import UserError
from reference_trainer.evaluation.features import Features
from reference_trainer.evaluation.manifest import Manifest, in_words, manifest_of
from reference_trainer.evaluation.metrics import frechet_distance
from reference_trainer.evaluation.reference import Reference
from reference_trainer.evaluation.rows import Missing, attempt, known
from reference_trainer.evaluation.sets import SAMPLES, Drawn, samplers
from reference_trainer.evaluation.statistics import Statistics
from reference_trainer.evaluation.training_set import TrainingSet
from reference_trainer.files import as_json, write_atomically
from reference_trainer.model import TrainedModel, averaged_network, number_of
from reference_trainer.options import literal
from reference_trainer.plotting import new_figure, save_figure
from reference_trainer.run import RunFolder
from robustcm.averages import Average, Exponential, PowerFunction

LADDER = (0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25)
"""sigma_rel of the power functions that are looked at where any is kept."""
NAME = 32
"""Width of the first column."""
NONE = Exponential(decay=0.0)
"""The weights themselves."""
COLUMNS = (*SAMPLES, *(f"{name}, rec" for name in SAMPLES))
Row = dict[str, Any]


def candidates(config: TrainConfig) -> list[Average]:
    """What the run keeps, and of power functions the ladder; by kind and length."""
    found = {*averages_of(config)}
    if config.power_functions:
        found |= {PowerFunction(sigma_rel=sigma_rel) for sigma_rel in LADDER}
    return sorted(found, key=lambda average: (isinstance(average, PowerFunction), relative_length(average, 1)))


def relative_length(average: Average, steps: int) -> float:
    """Standard deviation of what the average counts as a share of ``steps``; the ramp of an exponential left out."""
    if isinstance(average, PowerFunction):
        return average.sigma_rel
    return average.decay**0.5 / (1 - average.decay) / steps


def evaluate_averages(
    run: RunFolder, model: TrainedModel, images: ImageSet, features: Features, seed: int
) -> Iterator[str]:
    """Frechet distances of the samples of each of ``candidates``, as lines to print while they come.

    Noise and reference are the same for all, those of ``evaluate``. Writes averages.json, the rows and how they were
    measured, and averages.png. What cannot be had, or measured, stands with the reason.

    Args:
        model: of this run; its averaged weights are those of one row.
    Raises:
        UserError: no readable checkpoint, or nothing to compare with.
    """
    checkpoint, config = run.latest_checkpoint(), model.config
    assert checkpoint is not None  # or there would be no model
    step, rows = checkpoint[0], list[Row]()
    train = TrainingSet.of(images, seed, device=model.device)
    reference = Reference.of(model, train, features)
    known(reference.images)
    manifest = manifest_of(model, train, features)
    manifest["samples"]["average"] = "each row's own"
    yield (
        f"step {step}, {reference.count} samples each, Frechet distance in {features.name} to the training images, and "
        "to their reconstructions (rec):"
    )
    yield " " * NAME + "".join(f"{heading:>20}" for heading in COLUMNS)
    for average in tqdm(candidates(config), desc="averages", unit="average", leave=False, delay=2):
        row: Row = {"average": literal(average), "sigma_rel": relative_length(average, step)}
        try:
            classes = number_of(model.classes)
            network, row["about"] = averaged_network(run, config, model.shape, checkpoint, average, classes)
            shown = replace(model, network=network.to(model.device), step=step)
            row |= _distances(shown, reference, seed)
        except UserError as error:
            row["left_out"] = str(error)
        rows.append(row)
        yield _line(row)
    found = {"step": step, "manifest": manifest, "rows": rows}
    write_atomically(run.root / "averages.json", (as_json(found, indent=1) + "\n").encode())
    picture = save_figure(draw_averages(rows, manifest), run.root / "averages.png")
    yield f"look at {picture}"


def _distances(model: TrainedModel, reference: Reference, seed: int) -> Row:
    vectors = Drawn.of(model, reference.features, samplers(model, reference.count, seed)).vectors
    row = Row()
    for real, mark in ((reference.images, ""), (reference.reconstructions, ", rec")):
        for name in SAMPLES:
            row[name + mark] = _distance(real, vectors[name])
    return row


def _distance(real: Statistics | Missing, others: Statistics | Missing) -> float | None:
    """None: nothing to measure, or nothing finite."""
    found = attempt(lambda: frechet_distance(known(real), known(others)))
    return None if isinstance(found, Missing) or not math.isfinite(found) else found


def _line(row: Mapping[str, Any]) -> str:
    if "left_out" in row:
        return f"{row['average']:{NAME}} left out: {row['left_out']}"
    shown = "".join(f"{'-':>20}" if row[name] is None else f"{row[name]:20.2f}" for name in COLUMNS)
    made = row["about"].removeprefix(row["average"]).removeprefix(", ")
    return f"{row['average']:{NAME}}{shown}  {made}".rstrip()


def draw_averages(rows: Sequence[Mapping[str, Any]], manifest: Manifest) -> Figure:
    """Frechet distance over the length of the average: power functions as a line, exponential ones as squares.

    The weights themselves, of no length, as a dotted line; below, how it was measured.
    """
    figure, axes = new_figure(1, width=6.4, height=4.2)
    ax = axes[0, 0]
    for name, colour in zip(SAMPLES, ("#2f6fb3", "#c4453c"), strict=True):
        measured = [row for row in rows if row.get(name) is not None]
        for kind, style in ((PowerFunction, "-o"), (Exponential, "s")):
            points = [
                (row["sigma_rel"], row[name])
                for row in measured
                if row["average"].startswith(kind.__name__) and row["sigma_rel"] > 0
            ]
            if points:
                ax.plot(*zip(*points, strict=True), style, color=colour, markersize=4, label=f"{name}, {kind.__name__}")
        for row in measured:
            if row["average"] == literal(NONE):
                ax.axhline(row[name], color=colour, linestyle=":", linewidth=1.2, label=f"{name}, no average")
    ax.set(xscale="log", yscale="log", xlabel="sigma_rel of the average", ylabel="Frechet distance")
    about = textwrap.fill(f"in {manifest['features']['name']}; {in_words(manifest)}", 105)
    figure.supxlabel(about, fontsize=7, parse_math=False)  # there are names of the user's in it
    ax.legend(fontsize=8)
    return figure
