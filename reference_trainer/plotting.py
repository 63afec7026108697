"""A figure to draw on, images laid side by side, and both on disk; for the trainer, the ablation and the analysis."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor

from reference_trainer.files import write_atomically

OWN_PICTURE = {"Software": "robustcm reference_trainer"}
"""Text in every PNG of the trainer: by it a folder of images knows which are none of the user's."""


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


def save_figure(figure: Figure, file: Path) -> Path:
    """PNG, whole or not at all; returns the file.

    Raises:
        UserError: it cannot be written.
    """
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata=OWN_PICTURE)
    write_atomically(file, picture.getvalue())
    return file
