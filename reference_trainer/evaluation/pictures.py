"""Pictures at the end of a run: sheets of images, losses and tails over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reference_trainer.plotting import new_figure, tile


def draw_sheet(panels: Sequence[tuple[str, Tensor]], columns: int = 8) -> Figure:
    """Titled panels of images side by side; each ``uint8 [n, ch, h, w]``."""
    figure, axes = new_figure(len(panels), width=3.2 * len(panels), height=3.6)
    for ax, (title, pixels) in zip(axes[0], panels, strict=True):
        ax.imshow(tile(pixels, min(columns, len(pixels))), interpolation="nearest")
        ax.set_title(title)
        ax.axis("off")
    return figure


def draw_classes(names: Sequence[str], panels: Sequence[tuple[str, Tensor]], columns: int) -> Figure:
    """Titled panels side by side, each ``uint8 [n, ch, h, w]``: of each of ``names`` a row of ``columns`` images."""
    figure, axes = new_figure(len(panels), width=3.4 * len(panels), height=0.6 + 3.2 * len(names) / columns)
    for i, (ax, (title, pixels)) in enumerate(zip(axes[0], panels, strict=True)):
        side = pixels.shape[-2] + 1
        ax.imshow(tile(pixels, columns), interpolation="nearest")
        ax.set(title=title, xticks=[])
        ax.set_yticks([(row + 0.5) * side for row in range(len(names))], names if i == 0 else [""] * len(names))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    return figure


def draw_losses(rows: Sequence[dict[str, Any]]) -> Figure:
    """From metrics.jsonl: consistency loss and residual norm over training, one line a range of noise levels."""
    figure, axes = new_figure(2, width=11, height=4.2)
    _lines_by_level(axes[0, 0], rows, "consistency", "weighted consistency loss")
    _lines_by_level(axes[0, 1], rows, "r", "residual norm r (latent units), dashed: c")
    steps = [row["step"] for row in rows]
    axes[0, 1].plot(steps, [row["c"] for row in rows], color="black", linestyle="--", linewidth=1.5)
    changes = [b["step"] for a, b in pairwise(rows) if a["num_levels"] != b["num_levels"]]
    for ax in axes[0]:
        for step in changes if len(changes) < 12 else []:
            ax.axvline(step, color="0.85", linewidth=0.8, zorder=0)
    _level_colours(figure, axes[0, 1], rows[0]["by_level"]["sigma"])
    return figure


def _level_colours(figure: Figure, ax: Axes, sigmas: Sequence[float]) -> None:
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.LogNorm(min(sigmas), max(sigmas)), "viridis")
    figure.colorbar(scale, ax=ax, label="noise level sigma")


GAUSSIAN_BEYOND_INNER = 0.00698  # share of a Gaussian beyond Tukey's inner fences, and beyond the outer ones
GAUSSIAN_BEYOND_OUTER = 2.35e-6


def draw_tails(rows: Sequence[dict[str, Any]]) -> Figure:
    """From metrics.jsonl: spread and outliers of the temporal difference over training, by noise level."""
    figure, axes = new_figure(3, width=14, height=4.2)
    _lines_by_level(axes[0, 0], rows, "iqr", "IQR of the temporal difference", "td")
    for ax, fence, gaussian in zip(
        axes[0, 1:], ("inner", "outer"), (GAUSSIAN_BEYOND_INNER, GAUSSIAN_BEYOND_OUTER), strict=True
    ):
        _lines_by_level(ax, rows, f"beyond_{fence}", f"share of elements beyond the {fence} fences", "td")
        if fence == "inner":
            ax.axhline(gaussian, color="black", linestyle=":", linewidth=1.2)
            ax.annotate("Gaussian", (0.01, gaussian), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axes[0, 2].annotate(
        f"Gaussian: {GAUSSIAN_BEYOND_OUTER:.1e}", (0.01, 0.01), xycoords="axes fraction", va="bottom", fontsize=8
    )
    _level_colours(figure, axes[0, 2], rows[0]["td"]["sigma"])
    return figure


def draw_learned(learned: Mapping[str, Any]) -> Figure:
    """From ``compared``: error by noise level over the linear denoiser's, and where outputs leave the data."""
    figure, axes = new_figure(3, width=15, height=4.2)
    rows, start = learned["levels"], "held-out latents" if learned["held_out"] else "training latents"
    sigmas = [row["sigma"] for row in rows]
    for ax, ours, gaussian in (
        (axes[0, 0], "error", "error_gaussian"),
        (axes[0, 1], "precision", "precision_gaussian"),
        (axes[0, 2], "kernel_x1000", "kernel_gaussian_x1000"),
    ):
        ax.plot(sigmas, [row[ours] for row in rows], color="C0", marker="o", markersize=3, label="f")
        ax.plot(sigmas, [row[gaussian] for row in rows], color="C1", label="a Gaussian's consistency function")
        ax.set(xscale="log", xlabel="noise level t")
    axes[0, 0].axhline(1, color="black", linestyle=":", linewidth=1.2, label="best linear denoiser")
    axes[0, 0].set(title=f"error of f(x + t z, t), x: {start}", ylabel="mean square, over the linear denoiser's")
    axes[0, 1].axhline(learned["floor_precision"], color="black", linestyle=":", linewidth=1.2, label="x themselves")
    axes[0, 1].set(title="do outputs lie among the data?", ylabel="precision, latents")
    floor, wide = learned["floor"], 2 * learned["noise"]
    axes[0, 2].axhline(floor, color="black", linestyle=":", linewidth=1.2, label="x themselves")
    axes[0, 2].axhspan(floor - wide, floor + wide, color="0.9", zorder=0, label="noise of such a distance")
    axes[0, 2].set(title="distance of outputs to the data", ylabel="kernel distance x1000, latents")
    for ax in axes[0]:
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        ax.legend(fontsize=8, frameon=False)
    return figure


def _lines_by_level(ax: Axes, rows: Sequence[dict[str, Any]], name: str, title: str, group: str = "by_level") -> None:
    sigmas = rows[0][group]["sigma"]
    norm = matplotlib.colors.LogNorm(min(sigmas), max(sigmas))
    for i, sigma in enumerate(sigmas):
        points = [(row["step"], value) for row in rows if (value := row[group][name][i])]
        if points:
            ax.plot(*zip(*points, strict=True), color=matplotlib.colormaps["viridis"](norm(sigma)), linewidth=1.2)
    ax.set(title=title, xlabel="step", yscale="log")
