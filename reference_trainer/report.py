"""Progress while training (bar, metrics.jsonl, TensorBoard) and pictures at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import matplotlib
import numpy as np
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from reference_trainer.errors import UserError
from reference_trainer.run import METRICS, RunFolder


class Logger:
    """One row a log: to the bar, to metrics.jsonl and to TensorBoard."""

    def __init__(self, run: RunFolder, start: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.run = run
        # In a file, where every state of the bar stays, one a while is enough.
        interval = 0.5 if sys.stderr.isatty() else 20.0
        self.bar = tqdm(total=steps, initial=start, desc="training", unit="step", mininterval=interval)
        self.started = time.monotonic()
        try:
            self.events = SummaryWriter(str(run.root / "tensorboard"), purge_step=start + 1)
        except OSError as error:
            raise UserError(f"cannot write {run.root / 'tensorboard'}: {error.strerror}") from error

    def __enter__(self) -> Logger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.events.close()

    def advance(self) -> None:
        """One step done."""
        self.bar.update()

    def log(self, step: int, row: dict[str, Any]) -> None:
        """``row``: numbers, and ``by_level`` with one list a quantity."""
        self.run.append_row(METRICS, {"step": step, **row, "seconds": round(time.monotonic() - self.started, 2)})
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self.events.add_scalar(f"train/{name}", value, step)
        for sigma, loss in zip(row["by_level"]["sigma"], row["by_level"]["consistency"], strict=True):
            if loss is not None:
                self.events.add_scalar(f"loss_at_sigma/{sigma:.3g}", loss, step)
        shown = {"loss": f"{row['consistency'] + row['extra']:.3g}", "N": row["num_levels"], "c": f"{row['c']:.2g}"}
        self.bar.set_postfix(shown, refresh=False)


def tile(pixels: Tensor, columns: int) -> np.ndarray:
    """uint8 ``[n, ch, h, w]`` -> one picture ``[rows h, columns w, 3]``, a white line between."""
    n = len(pixels) // columns * columns
    framed = torch.nn.functional.pad(pixels[:n].expand(-1, 3, -1, -1), (0, 1, 0, 1), value=255)
    picture: np.ndarray = rearrange(framed, "(r k) ch h w -> (r h) (k w) ch", k=columns).numpy()
    return picture


def new_figure(columns: int, width: float, height: float, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """A light figure with ``rows x columns`` axes; no window, whatever backend is set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def save_figure(figure: Figure, file: Path) -> None:
    """PNG, or a ``UserError`` that says why not."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def draw_sheet(panels: Sequence[tuple[str, Tensor]], columns: int = 8) -> Figure:
    """Titled panels of images side by side; each ``uint8 [n, ch, h, w]``."""
    figure, axes = new_figure(len(panels), width=3.2 * len(panels), height=3.6)
    for ax, (title, pixels) in zip(axes[0], panels, strict=True):
        ax.imshow(tile(pixels, columns), interpolation="nearest")
        ax.set_title(title)
        ax.axis("off")
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


def _lines_by_level(ax: Axes, rows: Sequence[dict[str, Any]], name: str, title: str, group: str = "by_level") -> None:
    sigmas = rows[0][group]["sigma"]
    norm = matplotlib.colors.LogNorm(min(sigmas), max(sigmas))
    for i, sigma in enumerate(sigmas):
        points = [(row["step"], value) for row in rows if (value := row[group][name][i])]
        if points:
            ax.plot(*zip(*points, strict=True), color=matplotlib.colormaps["viridis"](norm(sigma)), linewidth=1.2)
    ax.set(title=title, xlabel="step", yscale="log")
