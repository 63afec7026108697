"""The picture of an autoencoder: images above their reconstructions, from the worst to the best, and its latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reference_trainer.data.latents import spread
from reference_trainer.evaluation.boxes import Column, draw_boxes, outliers_of
from reference_trainer.plotting import new_figure, tile
from robustcm.tails import BoxStatistics

SHOWN = 12
"""Images of a set, evenly over the ranks of their PSNR."""
COLOURS = ("#1b7f79", "#b8860b")
LATENTS = "#c4453c"


@dataclass(frozen=True)
class Seen:
    """Some images, there and back."""

    name: str
    of: int
    """How many there are."""
    images: Tensor
    """uint8 ``[n, ch, h, w]``."""
    reconstructed: Tensor
    """The same shape."""
    psnr: Tensor
    """float64 ``[n]``, dB."""

    def in_words(self) -> str:
        """Mean and range of the PSNR."""
        return (
            f"images {self.name}: {float(self.psnr.mean()):.2f} dB, the mean over {len(self.psnr)} of {self.of} "
            f"(worst {float(self.psnr.min()):.1f}, best {float(self.psnr.max()):.1f})"
        )


def draw_look(sets: Sequence[Seen], columns: Sequence[Column], title: str) -> Figure:
    """A panel for each set of images; below, box plots of the latents' channels and histograms of the PSNR.

    Args:
        columns: of the channels, in standard deviations from their means.
    """
    figure, axes = new_figure(1, width=13, height=3.0 * len(sets) + 5.2, rows=len(sets) + 1)
    figure.suptitle(title, fontsize=11)
    axes[0, 0].get_gridspec().set_height_ratios([3.0] * len(sets) + [5.2])
    for ax, one in zip(axes[:, 0], sets, strict=False):
        _draw_set(ax, one)
    below = axes[-1, 0].get_subplotspec().subgridspec(1, 2, width_ratios=(3, 1))
    axes[-1, 0].remove()
    boxes, histogram = (figure.add_subplot(place) for place in below)
    for ax in (boxes, histogram):
        ax.spines[["top", "right"]].set_visible(False)
    draw_boxes(boxes, columns, "latents by channel, (value - mean) / std", shares=len(columns) <= 8)
    bins = np.histogram_bin_edges(np.concatenate([one.psnr.numpy() for one in sets]), 24).tolist()
    for one, colour in zip(sets, COLOURS, strict=False):
        histogram.hist(one.psnr.numpy(), bins=bins, density=True, color=colour, alpha=0.5, label=one.name)
        histogram.axvline(float(one.psnr.mean()), color=colour, linewidth=1.5)
    histogram.set(title="PSNR by image; lines: means", xlabel="dB", yticks=[])
    histogram.spines["left"].set_visible(False)
    histogram.legend(frameon=False, fontsize=9)
    return figure


def column_of(label: str, values: Tensor, box: BoxStatistics) -> Column:
    """A channel's box, in the colour of latents."""
    return Column(label, box, outliers_of(values.numpy(), box), LATENTS)


def _draw_set(ax: Axes, one: Seen) -> None:
    """Images above, reconstructions below, from the worst to the best, the PSNR of each under it."""
    chosen = spread(one.psnr.argsort(), SHOWN)
    rows = [tile(pixels[chosen], len(chosen)) for pixels in (one.images, one.reconstructed)]
    gap = np.full((max(1, len(rows[0]) // 24), *rows[0].shape[1:]), 255, np.uint8)
    ax.imshow(np.concatenate([rows[0], gap, rows[1]]), interpolation="nearest")
    side, height = rows[0].shape[1] / len(chosen), len(rows[0])
    labels = [f"{float(one.psnr[i]):.1f}" for i in chosen]
    ax.set_xticks([side * (i + 0.5) for i in range(len(chosen))], labels, fontsize=9)
    ax.set_yticks(
        [height / 2, 1.5 * height + len(gap)], ["images", "reconstructed"], fontsize=9, rotation=90, va="center"
    )
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(f"PSNR of {one.in_words()}", fontsize=11)
