"""What is kept of a set of features of any size: what a Frechet distance needs of all, and the first few themselves.

Axes: features [n, k]. Memory: 8 k^2 bytes for the products and 4 k bytes for each of the first 5000; of the 2048
features of Inception 34 MB and 41 MB, whatever n is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

HELD = 5000
"""Vectors that are kept themselves, the first of a set; kernel distances, precision and recall are computed on them."""


@dataclass(frozen=True)
class Statistics:
    """Of features ``[n, k]`` that came in parts. How they were cut into parts changes no digit."""

    count: int
    """n."""
    total: Tensor
    """float64 ``[k]``, the sum."""
    products: Tensor
    """float64 ``[k, k]``, the sum of ``x x^T``."""
    some: Tensor
    """float32 ``[min(n, HELD), k]``, the first."""

    @staticmethod
    def of(vectors: Tensor) -> Statistics:
        """Of ``vectors [n, k]``."""
        return Statistics.gathered([vectors])

    @staticmethod
    def gathered(parts: Iterable[Tensor], held: int = HELD) -> Statistics:
        """Of the vectors in ``parts``, each ``[m, k]``, one after the other.

        They are summed in blocks of ``held``, so that the parts do not show and a set of up to that many has the
        digits of one sum.

        Raises:
            ValueError: no part at all.
        """
        found: Statistics | None = None
        waiting: list[Tensor] = []
        for part in parts:
            for piece in _cut(part, held - sum(map(len, waiting)), held):
                waiting.append(piece)
                if sum(map(len, waiting)) == held:
                    found, waiting = _joined(found, waiting, held), []
        if waiting:
            found = _joined(found, waiting, held)
        if found is None:
            raise ValueError("statistics of nothing")
        return found

    def merged(self, other: Statistics, held: int = HELD) -> Statistics:
        """Of both together, this one's first."""
        return Statistics(
            self.count + other.count,
            self.total + other.total,
            self.products + other.products,
            self.some if len(self.some) >= held else torch.cat([self.some, other.some])[:held],
        )

    @property
    def size(self) -> int:
        """k."""
        return self.some.shape[1]

    @property
    def mean(self) -> Tensor:
        """float64 ``[k]``."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """float64 ``[k, k]``, with n - 1."""
        mean = self.mean[None]
        return (self.products - self.count * mean.T.mm(mean)) / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {"total": self.total, "products": self.products, "some": self.some}


def _joined(before: Statistics | None, parts: list[Tensor], held: int) -> Statistics:
    block = torch.cat(parts)
    precise = block.double()
    new = Statistics(len(block), precise.sum(0), precise.T.mm(precise), block)
    return new if before is None else before.merged(new, held)


def _cut(part: Tensor, first: int, size: int) -> list[Tensor]:
    """``part`` in pieces: ``first`` vectors, then ``size`` each; the last may be shorter."""
    return [part[:first], *(part[first:].split(size) if len(part) > first else ())]
