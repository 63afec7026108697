"""Box plots: boxes with their fences, and the values beyond them; numbers in, drawn on axes that are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from robustcm.tails import BoxStatistics

GREY = "0.55"
MOST_POINTS = 1200  # drawn a column, at most


@dataclass(frozen=True)
class Column:
    """One box: its statistics and the values beyond its inner fences."""

    label: str
    box: BoxStatistics
    outliers: np.ndarray
    """``[k]``, as ``outliers_of`` gives them."""
    colour: str = GREY


def outliers_of(values: np.ndarray, box: BoxStatistics) -> np.ndarray:
    """The finite values strictly beyond the inner fences, ``[k]``; of many the farthest, thinned towards the box."""
    flat = values.reshape(-1)
    low, high = box.inner_fences
    far = flat[((flat < low) | (flat > high)) & np.isfinite(flat)]
    if len(far) <= MOST_POINTS:
        return far
    # Evenly spaced in the logarithm of the rank: no edge between all of the farthest and some of the rest.
    ranks = np.unique(np.geomspace(1, len(far), MOST_POINTS).astype(int)) - 1
    return far[np.argsort(-np.abs(far - box.median), kind="stable")[ranks]]


def draw_boxes(ax: Axes, columns: Sequence[Column], title: str, shares: bool = True) -> None:
    """Boxes with whiskers, inner (dashed) and outer (dotted) fences, outliers jittered.

    Args:
        shares: write below each which share of its values lies beyond the fences.
    """
    rng = np.random.default_rng(0)
    for i, column in enumerate(columns):
        box, colour = column.box, column.colour
        points = column.outliers
        extreme = (points < box.outer_fences[0]) | (points > box.outer_fences[1])
        for chosen, size, alpha in ((~extreme, 4, 0.25), (extreme, 9, 0.6)):
            jitter = rng.uniform(-0.22, 0.22, int(chosen.sum()))
            ax.scatter(i + jitter, points[chosen], s=size, color=colour, alpha=alpha, linewidths=0, rasterized=True)
        for fences, style in ((box.inner_fences, "--"), (box.outer_fences, ":")):
            ax.hlines(fences, i - 0.36, i + 0.36, color="0.25", linestyle=style, linewidth=1.1)
        ax.bxp(
            [{"med": box.median, "q1": box.q1, "q3": box.q3, "whislo": box.whiskers[0], "whishi": box.whiskers[1]}],
            positions=[i],
            widths=0.5,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": colour, "alpha": 0.45},
            medianprops={"color": "black"},
            manage_ticks=False,
        )
    labels = [f"{column.label}\n{_shares(column.box)}" if shares else column.label for column in columns]
    ax.set_xticks(range(len(columns)), labels, fontsize=9)
    ax.set_xlim(-0.6, len(columns) - 0.4)
    ax.set(title=title, xlabel=f"{'share beyond the fences; ' * shares}points are thinned")
    ax.axhline(0, color="0.9", zorder=0)
    ax.plot([], [], "--", color="0.25", linewidth=1.1, label="inner fences (1.5 IQR)")
    ax.plot([], [], ":", color="0.25", linewidth=1.1, label="outer fences (3 IQR)")
    ax.legend(loc="upper left", frameon=False, fontsize=8)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.12 * (high - low))  # room for the legend


def _shares(box: BoxStatistics) -> str:
    if box.iqr == 0:
        return "IQR = 0:\nall others\ncount as\noutliers"
    return f"inner {_percent(box.beyond_inner)}\nouter {_percent(box.beyond_outer)}\nmax|z| {box.max_z:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share == 0 or share >= 1e-5 else "~0 %"
