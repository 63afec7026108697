"""Draws the figures: numbers in, a matplotlib Figure out, nothing measured, read or written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from reference_trainer.evaluation.boxes import GREY, Column, draw_boxes
from reference_trainer.evaluation.latent_space import GROUPS
from reference_trainer.evaluation.pictures import GAUSSIAN_BEYOND_INNER, GAUSSIAN_BEYOND_OUTER
from reference_trainer.plotting import new_figure
from robustcm.tails import BoxStatistics

COLOURS = {"pixels": "#1b7f79", "latents": "#c4453c"}


def gaussian_beside(values: np.ndarray, box: BoxStatistics) -> np.ndarray:
    """As many Gaussian values with the same median and IQR (or, where the IQR is 0, the same mean and std)."""
    centre, std = (box.median, box.iqr / 1.349) if box.iqr > 0 else (box.mean, box.std)
    drawn: np.ndarray = np.random.default_rng(0).standard_normal(box.count, dtype=np.float32) * std + centre
    return drawn


def draw_outliers(
    data: Sequence[Column], td: Sequence[Column], by_level: Mapping[str, Sequence[tuple[float, BoxStatistics]]]
) -> Figure:
    """Fig. 1: boxes of the data values and of the temporal differences, and shares beyond the fences by noise level.

    Args:
        data: columns of panel (a); a Gaussian belongs beside each.
        td: columns of panel (b); may be empty, then the figure has one panel.
        by_level: by space, (sigma, box) of each noise level.
    """
    if not td:
        figure, axes = new_figure(1, width=6.5, height=5.2)
        draw_boxes(axes[0, 0], data, "data values, std 0.5")
        return figure
    figure, axes = new_figure(3, width=13, height=5.4)
    draw_boxes(axes[0, 0], data, "(a) data values, std 0.5")
    draw_boxes(axes[0, 1], td, "(b) temporal differences, all levels pooled")
    draw_level_shares(axes[0, 2], by_level)
    return figure


def draw_level_shares(ax: Axes, by_level: Mapping[str, Sequence[tuple[float, BoxStatistics]]]) -> None:
    """Share of elements beyond the inner and the outer fences against sigma, one pair of lines a space."""
    floor = 1e-6
    if not any(by_level.values()):
        _empty(ax, "(c) too few residuals in every noise level")
        return
    for name, boxes in by_level.items():
        sigmas = [sigma for sigma, _ in boxes]
        for field, style in (("beyond_inner", "-"), ("beyond_outer", ":")):
            shares = [max(getattr(box, field), floor) for _, box in boxes]
            where = "inner" if style == "-" else "outer"
            colour = COLOURS.get(name, GREY)
            ax.plot(sigmas, shares, style, marker=".", color=colour, label=f"{name}, beyond {where}")
    for share, style, name in ((GAUSSIAN_BEYOND_INNER, "-", "inner"), (GAUSSIAN_BEYOND_OUTER, ":", "outer")):
        ax.axhline(share, color=GREY, linestyle=style, linewidth=1.5, label=f"Gaussian, beyond {name}")
    ax.set(xscale="log", yscale="log", xlabel="noise level sigma of the student", ylim=(floor / 1.5, 40))
    ax.set_title("(c) outliers within each noise level")
    ax.set_yticks([10.0**k for k in range(-6, 1)])
    ax.legend(fontsize=8, loc="upper center", ncols=2, frameon=False)
    ax.annotate("0", (0.01, floor), xycoords=("axes fraction", "data"), fontsize=8, va="bottom", color=GREY)


@dataclass(frozen=True)
class Curve:
    """One line of a figure."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    c: float = math.nan
    """The scale it was computed with; NaN where there is none."""
    dashed: bool = False

    def at(self, x: float) -> float:
        """y at x, interpolated."""
        return float(np.interp(x, self.x, self.y))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        scale = self.c if math.isfinite(self.c) else None
        return {"name": self.name, "c": scale, "x": list(self.x), "y": list(self.y)}


DISTANCES = {"squared_l2": "0.35", "pseudo_huber": "#2f6fb3", "cauchy": "#c4453c", "geman_mcclure": "#3a9a4c"}


def draw_loss_shapes(
    losses: Sequence[Curve], slopes: Sequence[Curve], by_sample: Sequence[Curve], by_level: Sequence[Curve], origin: str
) -> Figure:
    """Fig. 2: losses, derivatives, and the pull on residuals, if there are any, by sample and by noise level."""
    figure, axes = new_figure(2, width=11, height=8.6, rows=2)
    for ax, curves, title in (
        (axes[0, 0], losses, "(a) loss"),
        (axes[0, 1], slopes, "(b) influence: derivative of the loss"),
    ):
        _lines(ax, curves)
        ax.set(title=title, xlabel="r / c", xlim=(0, curves[0].x[-1]), ylim=(0, 3 if ax is axes[0, 0] else 1.6))
    axes[0, 0].legend(frameon=False)
    figure.supxlabel(f"(c), (d): residuals of {origin}", fontsize=9, color="0.3")
    if not by_sample:
        for ax in axes[1]:
            _empty(ax, "too few residuals that vary")
        return figure
    ax = axes[1, 0]
    _lines(ax, by_sample)
    ax.plot([0, 1], [0, 1], color="0.85", zorder=0)
    ax.set(title="(c) who pulls, within a noise level", xlabel="samples, smallest residual first")
    ax.set(ylabel="share of the pull, cumulated", xlim=(0, 1), ylim=(0, 1))
    ax = axes[1, 1]
    _lines(ax, by_level, marker=".")
    ax.set(title="(d) where the pull comes from", xlabel="noise level sigma", xscale="log")
    ax.set(ylabel="share of the pull, weights included", ylim=(0, None))
    ax.plot([], [], "-", color="0.4", label="c at the clean bound")
    ax.plot([], [], "--", color="0.4", label="iCT's constant c")
    ax.legend(frameon=False)
    return figure


def _empty(ax: Axes, why: str) -> None:
    """A word in the place of a panel."""
    ax.text(0.5, 0.5, why, ha="center", transform=ax.transAxes, color=GREY)
    ax.axis("off")


def _lines(ax: Axes, curves: Sequence[Curve], marker: str = "") -> None:
    for curve in curves:
        style, width = ("--", 1.1) if curve.dashed else ("-", 1.8)
        label = None if curve.dashed or marker else curve.name
        colour = DISTANCES.get(curve.name)
        ax.plot(curve.x, curve.y, style, linewidth=width, color=colour, label=label, marker=marker)


@dataclass(frozen=True)
class RunCurves:
    """What the figure of c schedules shows of one run."""

    name: str
    spread: Sequence[tuple[int, float, float]]
    """(N, median of r, MAD of r), measured with the run's last weights."""
    logged: Sequence[tuple[int, float, float]]
    """(step, mean r, c), from the log."""
    loss: Sequence[tuple[int, float]]
    """(step, consistency loss)."""
    evaluations: Sequence[Mapping[str, Any]]
    """Rows of evaluations.jsonl, oldest first, in one feature space; may be empty."""

    def metric(self, samples: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric ("frechet") of a set of samples ("1 evaluation"), where it was measured."""
        rows = [(row["step"], row["rows"].get(samples, {}).get(name)) for row in self.evaluations]
        found = [(step, value) for step, value in rows if value is not None]
        return [step for step, _ in found], [value for _, value in found]


def draw_c_schedules(schedules: Mapping[str, Sequence[tuple[int, float]]], runs: Sequence[RunCurves]) -> Figure:
    """Fig. 3: c against N beside the spread of the residuals; then r, c, loss and metrics over training, by run.

    Args:
        schedules: by name, (N, c).
        runs: at least one; whatever of it there is.
    """
    figure, axes = new_figure(2, width=12, height=13, rows=3)
    colours = ["#1b7f79", "#c4453c", "#2f6fb3", "#b8860b", "#7a4fa3", "0.4"]
    ax = axes[0, 0]
    for (name, points), style in zip(schedules.items(), ("-", "--", ":", "-."), strict=False):
        ax.plot(*zip(*points, strict=True), style, color="black", linewidth=1.5, label=name)
    for i, run in enumerate(runs):
        if run.spread:
            n, median, mad = (np.array(column) for column in zip(*run.spread, strict=True))
            n = n * 1.03 ** (i - (len(runs) - 1) / 2)  # side by side
            low = np.minimum(mad, 0.9 * median)  # the axis is logarithmic
            label = f"{run.name}: median r, bar: MAD"
            ax.errorbar(n, median, (low, mad), fmt="o", ms=5, color=colours[i % 6], capsize=3, label=label)
    ax.set(xscale="log", yscale="log", xlabel="noise levels N", title="(a) c, and the residuals it should follow")
    ticks = sorted({n for points in schedules.values() for n, _ in points})
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    axes[0, 1].set(yscale="log", xlabel="step", title="(b) mean residual norm r over training, dashed: c")
    axes[1, 0].set(yscale="log", xlabel="step", title="(c) consistency loss (comparable within one distance)")
    for i, run in enumerate(runs):
        if not run.logged:
            continue
        dot = "o" if len(run.logged) == 1 else ""  # of one point there is no line
        steps, r, c = zip(*run.logged, strict=True)
        axes[0, 1].plot(steps, r, color=colours[i % 6], marker=dot, label=run.name)
        axes[0, 1].plot(steps, c, "--", color=colours[i % 6], marker=dot)
        axes[1, 0].plot(*zip(*run.loss, strict=True), color=colours[i % 6], marker=dot, label=run.name)
    for ax in (axes[0, 1], axes[1, 0]):
        if ax.lines:
            ax.legend(frameon=False, fontsize=8)
        else:
            _empty(ax, "no run has logged anything")
    _draw_metrics(axes[1, 1], axes[2, 0], axes[2, 1], runs, [colours[i % 6] for i in range(len(runs))])
    return figure


SAMPLES = {"1 evaluation": ("o", "-"), "2 evaluations": ("s", "--")}  # marker and line of each


def _draw_metrics(frechet: Axes, recall: Axes, both: Axes, runs: Sequence[RunCurves], colours: Sequence[str]) -> None:
    """Frechet distance and recall over training, and the last of each against the other."""
    frechet.set(title="(d) Frechet distance over training", xlabel="step")
    recall.set(title="(e) recall over training", xlabel="step")
    both.set(title="(f) last evaluation: lower right is better", xlabel="recall", ylabel="Frechet distance")
    for run, colour in zip(runs, colours, strict=True):
        for name, (marker, line) in SAMPLES.items():
            distances, recalls = run.metric(name, "frechet"), run.metric(name, "recall")
            label = f"{run.name}, {name}"
            for ax, points in ((frechet, distances), (recall, recalls)):
                if points[0]:
                    ax.plot(*points, line, marker=marker, ms=5, color=colour, label=label)
            if distances[0] and distances[0][-1:] == recalls[0][-1:]:  # of one evaluation
                both.plot(recalls[1][-1:], distances[1][-1:], marker, color=colour, ms=8, label=label)
    for ax in (frechet, recall, both):
        if ax.lines:
            ax.legend(frameon=False, fontsize=8)
            ax.margins(0.1)
        else:
            _empty(ax, "no run was evaluated")
    found = [value for run in runs for name in SAMPLES for value in run.metric(name, "frechet")[1] if value > 0]
    if found and max(found) > 3 * min(found):
        frechet.set_yscale("log")  # it falls by orders of magnitude
        frechet.yaxis.set_major_formatter(LogFormatter())  # 600, not 6 x 10^2
        frechet.yaxis.set_minor_formatter(LogFormatter())


def draw_variance(
    foretold: Mapping[str, Mapping[int, Mapping[str, float]]], measured: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Variance of samples over that of the data against the number of levels, a panel for each group of components."""
    groups = list(GROUPS)
    figure, axes = new_figure(len(groups), 4.2 * len(groups), 3.8)
    colours = dict(zip(foretold, ("#4c72b0", "#c4453c", "#8a6d9e"), strict=False))
    for ax, group in zip(axes[0], groups, strict=True):
        for name, by_levels in foretold.items():
            points = [(n, found[group]) for n, found in by_levels.items() if group in found]
            if points:
                ax.plot(*zip(*points, strict=True), color=colours[name], label=f"{name}, foretold")
        for (name, row), marker in zip(measured.items(), "osD^vP*X" * len(measured), strict=False):
            if group in row:
                face = "black" if row["kept"] else "none"
                ax.plot(row["levels"], row[group], marker, color="black", markerfacecolor=face, label=name)
        ax.axhline(1, color=GREY, linewidth=0.8, zorder=0)
        ax.set(xscale="log", xlabel="noise levels N", title=group.removeprefix("variance_").replace("_", " "))
        ticks = sorted({n for by_levels in foretold.values() for n in by_levels})
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("variance of samples / of the data")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def draw_side_by_side(boxes: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Box plots of sets beside each other, each in units of its own IQR about its median.

    Args:
        boxes: by set, ``as_dict`` of a ``BoxStatistics`` or as much of it as is drawn: quartiles, whiskers, ends, IQR.
    """
    figure, axes = new_figure(1, width=max(6.0, 1.3 * len(boxes) + 1.5), height=4.6)
    ax = axes[0, 0]
    for i, box in enumerate(boxes.values()):
        q1, q3, whislo, whishi, *ends = (
            (value - box["median"]) / box["iqr"]
            for value in (box["q1"], box["q3"], *box["whiskers"], box["min"], box["max"])
        )
        stats = {"med": 0.0, "q1": q1, "q3": q3, "whislo": whislo, "whishi": whishi}
        colours: dict[str, Any] = {"boxprops": {"facecolor": COLOURS["latents"], "alpha": 0.45}}
        ax.bxp([stats], positions=[i], widths=0.5, showfliers=False, patch_artist=True, manage_ticks=False, **colours)
        ax.plot([i, i], ends, "o", color=COLOURS["latents"], markersize=5)
        for times, style in ((1.5, "--"), (3, ":")):
            ax.hlines([q1 - times, q3 + times], i - 0.36, i + 0.36, color="0.25", linestyle=style, linewidth=1.1)
    ax.set_xticks(range(len(boxes)), [name.replace("-", "\n", 1) for name in boxes], fontsize=9)
    ax.set(title="latents: box, whiskers, smallest and largest value", ylabel="IQR from the median")
    ax.plot([], [], "--", color="0.25", linewidth=1.1, label="1.5 IQR from the box")
    ax.plot([], [], ":", color="0.25", linewidth=1.1, label="3 IQR")
    ax.legend(loc="upper left", frameon=False, fontsize=8)
    return figure
