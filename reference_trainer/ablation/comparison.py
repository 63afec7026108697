"""Arms of an ablation side by side: paired statistics, the Markdown table, the picture; functions of the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats is slow to import

from reference_trainer.evaluation.manifest import unlike
from reference_trainer.evaluation.rows import in_digits
from reference_trainer.plotting import new_figure

ONE, TWO = "1 evaluation", "2 evaluations"
IMAGES, RECONSTRUCTIONS = "frechet", "frechet_rec"
"""Distance to the training images, and to their reconstructions; of a row of evaluation.json."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of the ablation."""

    suite: str
    arm: str
    seed: int
    steps: int
    seconds: float
    """Of training, wall time."""
    rows: dict[str, dict[str, float]]
    """Of evaluation.json; empty where the run failed."""
    failure: str = ""
    manifest: dict[str, Any] | None = None
    """Of evaluation.json: how the rows were measured; None where an earlier version measured them."""
    latents: dict[str, Any] = field(default_factory=dict)
    """Of evaluation.json: samples and bounds in the latent space; empty where they were not measured."""
    autoencoder: dict[str, Any] = field(default_factory=dict)
    """Of evaluation.json: what is known of it."""
    learned: dict[str, Any] = field(default_factory=dict)
    """Of evaluation.json: what f does by noise level, measured where the bounds are."""


@dataclass(frozen=True)
class Ratio:
    """A ratio to the baseline over paired seeds: geometric mean and 95 % interval (None with fewer than two pairs)."""

    mean: float
    low: float | None
    high: float | None
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ({self.low:.2f} .. {self.high:.2f})" if self.low is not None else "")


def paired_ratio(values: dict[int, float], baseline: dict[int, float]) -> Ratio | None:
    """``values / baseline`` over the seeds both have; a t interval on the log of the ratio.

    Args:
        values, baseline: one positive figure a seed.
    Returns:
        None without a common seed.
    """
    pairs = [(values[seed], baseline[seed]) for seed in sorted(values.keys() & baseline.keys())]
    logs = [math.log(value / base) for value, base in pairs if value > 0 and base > 0]  # rounding may pass 0
    if not logs:
        return None
    mean = statistics.fmean(logs)
    if len(logs) == 1:
        return Ratio(math.exp(mean), None, None, 1)
    half = stdtrit(len(logs) - 1, 0.975) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


def by_seed(results: Sequence[Result], suite: str, arm: str, row: str, metric: str = "frechet") -> dict[int, float]:
    """One metric of one arm, a value a seed; runs that failed are left out."""
    chosen = [r for r in results if (r.suite, r.arm) == (suite, arm) and row in r.rows and metric in r.rows[row]]
    return {r.seed: r.rows[row][metric] for r in chosen}


def judged_by(results: Sequence[Result], suite: str) -> str:
    """The metric, at 1 evaluation, that arms of ``suite`` are ranked and stopped by.

    The distance to the reconstructions: through a lossy autoencoder that to the images is mostly the autoencoder's,
    which no arm changes, and can turn the order round. To the images where a run, of an earlier version or whose
    decoder failed, lacks it: never two measures in one order.
    """
    rows = [r.rows[ONE] for r in results if r.suite == suite and ONE in r.rows]
    return RECONSTRUCTIONS if rows and all(RECONSTRUCTIONS in row for row in rows) else IMAGES


def ranking(results: Sequence[Result], suite: str, baseline: str) -> list[tuple[str, float]]:
    """Arms and their ratio to the baseline's by ``judged_by``, the best first; those without a seed it has are out."""
    metric = judged_by(results, suite)
    own = by_seed(results, suite, baseline, ONE, metric)
    arms = distinct([r.arm for r in results if r.suite == suite])
    ratios = ((arm, paired_ratio(by_seed(results, suite, arm, ONE, metric), own)) for arm in arms)
    return sorted(((arm, ratio.mean) for arm, ratio in ratios if ratio), key=lambda found: found[1])


def as_markdown(results: Sequence[Result], baseline: str, stopped: Sequence[tuple[str, str]] = ()) -> str:
    """A table a suite. ``stopped``: (suite, arm) whose further seeds were skipped by the rule."""
    parts = []
    for suite in distinct([r.suite for r in results]):
        parts += [f"### {suite}", "", *_HEAD]
        for arm in distinct([r.arm for r in results if r.suite == suite]):
            parts.append(_line(results, suite, arm, baseline, (suite, arm) in stopped))
        parts += [
            "",
            *unlike_of([r for r in results if r.suite == suite]),
            *_ranks(results, suite, baseline),
            *_bounds([r for r in results if r.suite == suite]),
            "",
        ]
    return "\n".join(parts)


_COLUMNS = (
    *("arm", "FD, 1 evaluation", "ratio to the baseline", "FD, 2 evaluations", "ratio to the baseline"),
    *("FD rec, 1 evaluation", "ratio to the baseline", "FD rec, 2 evaluations", "ratio to the baseline"),
    *("p >= .9", "precision", "recall", "kernel x1000", "FD to held-out", "steps", "s"),
)
_HEAD = ("| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS))


def _line(results: Sequence[Result], suite: str, arm: str, baseline: str, stopped: bool) -> str:
    own = [r for r in results if (r.suite, r.arm) == (suite, arm)]
    cells = [arm]
    for metric, row in product((IMAGES, RECONSTRUCTIONS), (ONE, TWO)):
        values = by_seed(results, suite, arm, row, metric)
        ratio = paired_ratio(values, by_seed(results, suite, baseline, row, metric)) if arm != baseline else None
        cells += [spread_of(values, 1), str(ratio) if ratio else "-"]
    cells += [spread_of(by_seed(results, suite, arm, ONE, name), 3, each=False) for name in _SHARES]
    cells.append(spread_of(by_seed(results, suite, arm, ONE, "kernel_x1000"), 1, each=False))
    cells.append(spread_of(by_seed(results, suite, arm, ONE, "frechet_held_out"), 1, each=False))
    cells += [str(own[0].steps), f"{statistics.fmean(r.seconds for r in own):.0f}"]
    failures = [f"seed {r.seed} failed: {r.failure}" for r in own if r.failure]
    notes = "; ".join([*failures, *(["further seeds skipped by the rule"] if stopped else [])])
    cells[0] += f" ({notes})" if notes else ""
    return "| " + " | ".join(cells) + " |"


_SHARES = ("sure_digits", "precision", "recall")


def spread_of(values: dict[int, float], digits: int, each: bool = True) -> str:
    """Mean and, behind it, each seed's value; with three digits behind the point where they are below 1."""
    if not values:
        return "-"
    mean_value = statistics.fmean(values.values())
    digits = max(digits, 3) if abs(mean_value) < 1 else digits
    mean = f"{mean_value:.{digits}f}"
    shown = ", ".join(f"{values[seed]:.{digits}f}" for seed in sorted(values))
    return f"{mean} ({shown})" if each and len(values) > 1 else mean


def unlike_of(results: Sequence[Result]) -> list[str]:
    """A warning for a table of ``results`` that were not measured alike, as lines; none where they were."""
    found = unlike({f"{r.arm}, seed {r.seed}": r.manifest for r in results if r.rows})
    return (
        [f"**Warning: not measured alike, so that these figures do not compare.** {'. '.join(found)}.", ""]
        if found
        else []
    )


def _ranks(results: Sequence[Result], suite: str, baseline: str) -> list[str]:
    ranked = ranking(results, suite, baseline)
    if len(ranked) < 2:
        return []
    measure = {RECONSTRUCTIONS: "FD rec", IMAGES: "FD (not every run has FD rec)"}[judged_by(results, suite)]
    order = "; ".join(f"{arm} {ratio:.2f}" for arm, ratio in ranked)
    return [f"Ranked by {measure} at 1 evaluation, as ratios to the baseline: {order}.", ""]


def _bounds(results: Sequence[Result]) -> list[str]:
    """What bounds the figures of a suite: the reference rows of its first run that has them."""
    rows = max((r.rows for r in results), key=len, default={})
    bounds = {name: row for name, row in rows.items() if name not in (ONE, TWO)}
    said = []
    for title, metric in (("FD", IMAGES), ("FD rec", RECONSTRUCTIONS)):
        if named := [f"{name} {in_digits(row[metric], 1)}" for name, row in bounds.items() if metric in row]:
            said.append(f"{title} of the bounds: {'; '.join(named)}.")
    return said


def draw_comparison(results: Sequence[Result], baseline: str) -> Figure:
    """A panel a suite, a line an arm: the distance it is judged by at 1 (filled) and 2 evaluations (open)."""
    suites = distinct([r.suite for r in results])
    arms = distinct([r.arm for r in results])
    figure, axes = new_figure(len(suites), width=3.4 + 3.6 * len(suites), height=1.3 + 0.34 * len(arms))
    for ax, suite in zip(axes[0], suites, strict=True):
        metric = judged_by(results, suite)
        for position, arm in enumerate(arms):
            for row, shift, colour, face in ((ONE, -0.13, "#1f5fa8", "#1f5fa8"), (TWO, 0.13, "#d1731b", "white")):
                values = list(by_seed(results, suite, arm, row, metric).values())
                if not values:
                    continue
                y = position + shift
                ax.plot(values, [y] * len(values), "|", color=colour, markersize=7, alpha=0.7)
                label = row if position == 0 else None
                centre = float(np.exp(np.mean(np.log(values))))
                ax.plot(centre, y, "o", color=colour, markerfacecolor=face, markersize=6, label=label)
            if any(r.failure for r in results if (r.suite, r.arm) == (suite, arm)):
                ax.annotate("failed", (0.99, position), xycoords=("axes fraction", "data"), ha="right", va="center")
        if values := list(by_seed(results, suite, baseline, ONE, metric).values()):
            ax.axvline(float(np.exp(np.mean(np.log(values)))), color="0.6", linestyle=":", linewidth=1.2, zorder=0)
        to = "the reconstructions" if metric == RECONSTRUCTIONS else "the images"
        ax.set(title=suite, xscale="log", ylim=(len(arms) - 0.5, -0.5))
        ax.set_xlabel(f"Frechet distance to {to} (lower is better)")
        ax.set_yticks(range(len(arms)), arms if ax is axes[0, 0] else [""] * len(arms))
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(axis="x", which="both", labelsize=8)
        ax.grid(axis="y", color="0.93")
    axes[0, 0].legend(loc="lower right", bbox_to_anchor=(0, 1), fontsize=8, frameon=False)
    return figure


def distinct(names: Sequence[str]) -> list[str]:
    """Each once, in the order of ``names``."""
    return list(dict.fromkeys(names))
