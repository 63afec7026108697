"""Box statistics of each channel and the covariance of whole latents, from parts: of any number, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_trainer.data.shards import layout_of, read_rows
from robustcm.tails import TailStream

MOST_ELEMENTS = 4096
"""Of a latent whose covariance is kept: 134 MB of float64; 8192 would be 537 MB, and eight times the work."""
SLOW = 1000
"""Rows of a covariance above which its components take seconds, and the trainer says what it is doing."""
ROWS = 1024
"""Latents looked at together; another number changes the last bits."""


@dataclass(frozen=True)
class Statistics:
    """What is added up to know quartiles, fences, tails and covariance; float64, whatever the latents are stored as."""

    centres: Tensor
    """``[ch]``, the values around which the histograms are finest: medians of the first latents."""
    histograms: Tensor
    """``[ch, k]``, states of a ``TailStream`` each."""
    count: int
    """Latents."""
    mean: Tensor
    """``[d]``, of each element; empty where d is above ``MOST_ELEMENTS``."""
    products: Tensor
    """``[d, d]``, sums of the products of deviations from ``mean``."""

    @staticmethod
    def begun(latents: Tensor) -> Statistics:
        """Of nothing yet, made for more such as ``latents [n, ch, h, w]``, n >= 1, which are not counted."""
        centres = latents.double().transpose(0, 1).flatten(1).median(1).values
        d = elements if (elements := latents[0].numel()) <= MOST_ELEMENTS else 0
        empty = torch.cat([TailStream(centre=float(centre)).empty() for centre in centres])
        mean, products = (torch.zeros(shape, dtype=torch.float64) for shape in ((d,), (d, d)))
        return Statistics(centres, empty, 0, mean, products)

    def with_latents(self, latents: Tensor) -> Statistics:
        """Behind ``latents [n, ch, h, w]``, too; n may be 0.

        Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", with products for
        squares.
        """
        histograms = [
            TailStream(centre=float(centre)).update(state[None], latents[:, ch].flatten())
            for ch, (centre, state) in enumerate(zip(self.centres, self.histograms, strict=True))
        ]
        count, mean, products = self.count + len(latents), self.mean, self.products
        if len(mean) and len(latents):
            rows = latents.flatten(1).double()
            own = rows.mean(0)
            rows -= own
            gap, share = own - mean, len(latents) / count
            products = torch.addmm(products, rows.T, rows).addr_(gap, gap, alpha=self.count * share)
            mean = mean + share * gap
        return Statistics(self.centres, torch.cat(histograms), count, mean, products)

    def covariance(self) -> Tensor | None:
        """``[d, d]``, with the n - 1 of ``torch.cov``; None where d is above ``MOST_ELEMENTS``."""
        return self.products / max(1, self.count - 1) if len(self.mean) else None

    def summary(self) -> dict[str, Any]:
        """For an index.json: ``boxes``, a ``BoxStatistics`` a channel, and ``eigenvalues``, falling, or None."""
        boxes = [
            TailStream(centre=float(centre)).statistics(state[None])[0].as_dict()
            for centre, state in zip(self.centres, self.histograms, strict=True)
        ]
        found = self.covariance()
        values = None if found is None else torch.linalg.eigvalsh(found).clamp(min=0).flip(0).tolist()
        left_out = None if values else f"more than {MOST_ELEMENTS} elements: no eigenvalues and no covariance"
        return {"boxes": boxes, "eigenvalues": values, "left_out": left_out}


def pieces_of(file: Path, key: str, before: int, held_out_every: int) -> Iterator[Tensor]:
    """The latents of one shard that are trained on, ``ROWS`` entries at a time, behind ``before`` entries of others."""
    place = layout_of(file)[key]
    for start in range(0, place.shape[0], ROWS):
        piece = read_rows(file, place, start, start + ROWS)
        entries = torch.arange(before + start, before + start + len(piece))
        yield piece[entries % held_out_every != held_out_every - 1]
