"""Draws the pictures of docs/concepts.md: numbers in, a matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from analysis.toys import CLUSTERS
from reference_trainer.evaluation.boxes import GREY
from reference_trainer.plotting import new_figure
from robustcm.losses import Rho

TEAL, RED, BLUE = "#1b7f79", "#c4453c", "#2f6fb3"


@dataclass(frozen=True)
class Compared:
    """A sample ``x [2]``, its noise ``z [2]``, two neighbours of ``num_levels`` levels, and f at both, ``[1, 2]``."""

    num_levels: int
    x: Tensor
    z: Tensor
    hi: float
    lo: float
    student: Tensor
    teacher: Tensor

    @property
    def r(self) -> float:
        """Norm of the temporal difference."""
        return float((self.student - self.teacher).norm())


@dataclass(frozen=True)
class Descent:
    """The way of a student down the loss, ``[n, 2]``, and c at each step."""

    name: str
    way: Tensor
    c: Sequence[float]


@dataclass(frozen=True)
class Paths:
    """Pairs of data and noise ``[n, 2]``, the cluster of each ``[n]``, and paths ``[m, levels, 2]``."""

    x: Tensor
    z: Tensor
    cluster: Tensor
    paths: Tensor
    left_open: float
    """Share of the variance of x."""

    @property
    def detour(self) -> float:
        """Length of the paths over the distance of their ends, all together."""
        length = self.paths.diff(dim=1).norm(dim=2).sum()
        return float(length / (self.paths[:, -1] - self.paths[:, 0]).norm(dim=1).sum())


@dataclass(frozen=True)
class AtLevel:
    """What inputs at level ``t`` leave open of x, and their variance over that of inputs met in sampling."""

    t: float
    left_open: float
    spread: float


def four_panels() -> tuple[Figure, list[Axes]]:
    """Two by two: on a telephone a picture is no wider than a page."""
    figure, axes = new_figure(2, width=8.6, height=8.6, rows=2)
    return figure, list(axes.flat)


def plane(ax: Axes, title: str, low: float, high: float) -> None:
    """Places matter in it, numbers do not."""
    ax.set(xlim=(low, high), ylim=(low, high), aspect="equal", xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(False)


def dots(ax: Axes, points: Tensor, **style: Any) -> None:
    """Scatters ``points [n, 2]`` or ``[2]``."""
    x, y = points.reshape(-1, 2).T.numpy()
    ax.scatter(x, y, **style)


def line(ax: Axes, points: Tensor, **style: Any) -> None:
    """Joins ``points [n, 2]``."""
    x, y = points.T.numpy()
    ax.plot(x, y, **style)


def place(point: Tensor) -> tuple[float, float]:
    """For matplotlib."""
    return float(point[0]), float(point[1])


def note(ax: Axes, words: str, at: tuple[float, float], offset: tuple[int, int], ha: str = "left") -> None:
    """Small words beside a place."""
    ax.annotate(words, at, xytext=offset, textcoords="offset points", ha=ha, fontsize=9, color="0.35")


def draw_td(
    data: Tensor,
    close: Sequence[Compared],
    by_level: Mapping[int, Sequence[tuple[float, Tensor]]],
    clean: Tensor,
    spoilt: Tensor,
) -> Figure:
    """(a), (b) one sample between levels far apart and close; (c) residuals by level; (d) the tail of one level."""
    figure, axes = four_panels()
    for ax, one, letter in zip(axes, close, "ab", strict=False):
        plane(ax, f"({letter}) {one.num_levels} levels: r = {one.r:.2f}", -0.95, 1.9)
        dots(ax, data, s=4, color="0.85", zorder=0)
        line(ax, torch.stack([one.x, one.x + 3 * one.z]), color="0.8", linewidth=1, zorder=0)
        dots(ax, one.x, s=40, color="black", zorder=3)
        ax.annotate("x", place(one.x), xytext=(7, -12), textcoords="offset points")
        for t, y, colour, name in ((one.hi, one.student, RED, "student"), (one.lo, one.teacher, BLUE, "teacher")):
            point = one.x + t * one.z
            dots(ax, point, s=45, facecolor="white", edgecolor=colour, zorder=3)
            ax.annotate(f"x + {t:.2g} z", place(point), xytext=(9, -4), textcoords="offset points", color=colour)
            arrow = {"arrowstyle": "-", "color": colour, "alpha": 0.5, "linestyle": ":"}
            ax.annotate("", place(y[0]), xytext=place(point), arrowprops=arrow)
            dots(ax, y[0], s=45, color=colour, zorder=4, label=f"{name} f(x + {t:.2g} z)")
        ends = torch.cat([one.student, one.teacher])
        line(ax, ends, color="black", linewidth=2.5, zorder=3, label="temporal difference")
        ax.legend(frameon=False, fontsize=9, loc="upper left")
    ax = axes[2]
    for (n, found), colour in zip(by_level.items(), (GREY, TEAL), strict=True):
        low, middle, high = np.array([np.quantile(r.numpy(), (0.05, 0.5, 0.95)) for _, r in found]).T
        levels = [t for t, _ in found]
        ax.fill_between(levels, low, high, color=colour, alpha=0.25, linewidth=0)
        ax.plot(levels, middle, color=colour, marker=".", label=f"{n} levels")
    ax.set(xscale="log", yscale="log", xlabel="noise level t of the student", title="(c) r by level: median, 5 to 95 %")
    ax.legend(frameon=False)
    ax = axes[3]
    for r, colour, name in ((clean, TEAL, "clean data"), (spoilt, RED, "2 % of the data 10 times as far out")):
        ordered = r.sort().values.numpy()
        ax.plot(ordered, 1 - np.arange(len(ordered)) / len(ordered), color=colour, label=name)
    ax.set(xscale="log", yscale="log", xlabel="r", title="(d) share of residuals above r, one level")
    ax.set(ylim=(1e-4, 2))
    ax.legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def draw_c(targets: Tensor, start: Tensor, rho: Rho, shown: Sequence[Descent]) -> Figure:
    """(a) influence of the residuals under each c; (b) to (d) the loss over the plane and the way down."""
    figure, axes = four_panels()
    colours = (RED, TEAL, BLUE)
    ax = axes[0]
    at_start = (start - targets).norm(dim=1).numpy()
    ax.hist(at_start, bins=28, range=(0, 7), weights=np.full(len(targets), 0.06), color="0.85")
    r = torch.linspace(1e-3, 7, 700).requires_grad_()
    for one, colour in zip(shown, colours, strict=True):
        (slope,) = torch.autograd.grad(rho(r * r, one.c[0]).sum(), r)
        ax.plot(r.detach(), 2 * one.c[0] ** 2 * slope, color=colour, label=f"c {one.name}", linewidth=2)
    ax.text(1.5, 0.08, "residuals\nat the start", fontsize=9, color="0.35")
    ax.set(xlabel="r", title="(a) how hard a residual pulls at the start", ylim=(0, 3.2), xlim=(0, 7))
    ax.legend(frameon=False, loc="upper right")
    grid = torch.linspace(-2.4, 4.4, 160)
    place = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), 2).reshape(-1, 2)
    r2 = torch.cdist(place, targets).square()
    for ax, one, colour, letter in zip(axes[1:], shown, colours, "bcd", strict=True):
        loss = rho(r2, one.c[-1]).mean(1).reshape(160, 160)
        ax.imshow(loss, extent=(-2.4, 4.4, -2.4, 4.4), origin="lower", cmap="Greys", alpha=0.45)
        ax.contour(grid, grid, loss, levels=14, colors="white", linewidths=0.6)
        dots(ax, targets, s=9, color="black", zorder=2)
        line(ax, one.way, color=colour, linewidth=2, zorder=3)
        dots(ax, start, s=50, facecolor="white", edgecolor=colour, zorder=4)
        dots(ax, one.way[-1], s=130, marker="*", color=colour, edgecolor="white", linewidth=0.7, zorder=5)
        plane(ax, f"({letter}) c {one.name}", -2.4, 4.4)
    return figure


def draw_coupling(columns: Sequence[Paths]) -> Figure:
    """Above pairs, below the paths of the flow; left independent, right coupled."""
    figure, axes = four_panels()
    colours = matplotlib.colormaps["hsv"](np.arange(CLUSTERS) / CLUSTERS) * [0.85, 0.85, 0.85, 1]
    for j, (column, name) in enumerate(zip(columns, ("independent", "coupled"), strict=True)):
        above, below = axes[j], axes[2 + j]
        ends = column.paths[:, -1]
        nearest = (torch.atan2(ends[:, 1], ends[:, 0]) / (2 * np.pi) * CLUSTERS).round().long() % CLUSTERS
        lines = torch.stack([column.z, column.x], 1)
        for ax, paths, cluster in ((above, lines, column.cluster), (below, column.paths, nearest)):
            shade = colours[cluster.numpy()]
            ax.add_collection(LineCollection(list(paths.numpy()), colors=shade, linewidths=0.9))
            dots(ax, paths[:, 0], s=7, color=GREY, zorder=3)
            dots(ax, paths[:, -1], s=14, color=shade, zorder=3)
        plane(above, f"({'ab'[j]}) pairs of noise and data, {name}", -2.4, 2.4)
        plane(below, f"({'cd'[j]}) paths from noise to data, {name}", -2.4, 2.4)
    return figure


def draw_gate(
    alone: Sequence[AtLevel], coupled: Sequence[AtLevel], level: float, trained_on: Tensor, met: Tensor, second: float
) -> Figure:
    """(a) what inputs leave open; (b) their spread against sampling's; (c), (d) the inputs of both at one level."""
    figure, axes = four_panels()
    gated = [[p for p in alone if p.t <= 1.001 * level], [p for p in coupled if p.t >= 0.999 * level]]
    for ax, field, title in (
        (axes[0], "left_open", "(a) of x left open by the input"),
        (axes[1], "spread", "(b) spread of inputs, training : sampling"),
    ):
        for points, colour, style, name in (
            (alone, GREY, "-", "independent"),
            (coupled, RED, "-", "coupled everywhere"),
            (gated[0], TEAL, "--", "coupled above the gate"),
            (gated[1], TEAL, "--", None),
        ):
            y = [getattr(p, field) for p in points]
            ax.plot([p.t for p in points], y, style, color=colour, label=name, linewidth=3 if style == "--" else 2)
        ax.axvline(level, color="0.8", zorder=0)
        ax.set(xscale="log", xlabel="noise level t", title=title)
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.3 * (high - low))
        note(ax, "gate", (level, high), (4, 0))
    axes[1].axvline(second, color="0.8", linestyle=":", zorder=0)
    note(axes[1], "second\nevaluation", (second, 2.0), (-4, 0), ha="right")
    axes[0].legend(frameon=False, fontsize=9, loc="upper left")
    for ax, cloud, colour, title in (
        (axes[2], trained_on, RED, f"(c) inputs in coupled training, t = {second}"),
        (axes[3], met, GREY, f"(d) inputs met in sampling, t = {second}"),
    ):
        dots(ax, cloud[:1500], s=3, color=colour)
        plane(ax, title, -2, 2)
    return figure


def draw_norms(
    x: Tensor,
    scaled: Tensor,
    plain: Tensor,
    sizes: Sequence[float],
    largest: Sequence[float],
    scale: float,
    bound: float,
) -> Figure:
    """(a) features of two samples, (b) behind learned scales, (c) behind NsLN; (d) the outlier by its size."""
    figure, axes = four_panels()
    shown = (("(a) features", x), (f"(b) normalised, learned scales 1 and {scale:g}", scaled), ("(c) NsLN", plain))
    for ax, (title, features) in zip(axes, shown, strict=False):
        for sample, colour, name in zip(features, (GREY, RED), ("a sample", "one with an outlier"), strict=True):
            dots(ax, sample.T, s=8, color=colour, label=name)
        outlier = features[1, :, 0]
        ax.annotate(f"{float(outlier[1]):.1f}", place(outlier), xytext=(7, -4), textcoords="offset points", color=RED)
        ax.set(title=title, xlabel="channel 1", ylabel="channel 2", xlim=(-12, 12), ylim=(-9, 42))
    axes[0].legend(frameon=False, loc="upper left")
    ax = axes[3]
    ax.plot(sizes, [scale * y for y in largest], color=RED, label=f"learned scale {scale:g}", linewidth=2)
    ax.plot(sizes, largest, color=TEAL, label="NsLN", linewidth=2)
    ax.axhline(bound, color="0.8", zorder=0)
    note(ax, "the most that NsLN lets through", (sizes[-1], bound), (0, 4), ha="right")
    ax.set(xscale="log", xlabel="the outlier, in front of the norm", title="(d) the outlier, behind it", ylim=(0, None))
    ax.legend(frameon=False, loc="center right")
    return figure
