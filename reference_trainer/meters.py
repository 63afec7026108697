"""Sums over steps, kept on the device and read only when logging: losses and residuals by noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustcm.objective import Terms
from robustcm.schedules import RHO, SIGMA_MAX, SIGMA_MIN, LevelPairs


@dataclass(frozen=True)
class LevelMeter:
    """Means per range of noise levels. The state is float64 ``[bins, quantities]``, to be passed in and out."""

    bins: int = 12
    """Equal ranges of depth on the Karras ramp, from sigma_max to sigma_min."""

    QUANTITIES = ("samples", "consistency", "extra", "r")

    def init(self, device: torch.device) -> Tensor:
        return torch.zeros(self.bins, len(self.QUANTITIES), dtype=torch.float64, device=device)

    def add(self, state: Tensor, terms: Terms, pairs: LevelPairs) -> Tensor:
        """The state after one more step; no synchronisation."""
        ones = torch.ones_like(terms.r)
        rows = torch.stack([ones, terms.consistency.detach(), terms.extra.detach(), terms.r], dim=1).double()
        return state.index_add(0, (pairs.depth * self.bins).long().clamp(0, self.bins - 1), rows)

    def read(self, state: Tensor) -> dict[str, Any]:
        """Means, as numbers: over everything, and under ``by_level`` per bin (None where nothing fell)."""
        sums = state.cpu()
        total, mean = float(sums[:, 0].sum()), {}
        for i, name in enumerate(self.QUANTITIES[1:], 1):
            mean[name] = float(sums[:, i].sum()) / max(total, 1)
        by_level = {
            name: [float(s / n) if n > 0 else None for n, s in sums[:, [0, i]]]
            for i, name in enumerate(self.QUANTITIES[1:], 1)
        }
        return {**mean, "by_level": {"sigma": self.centres(), **by_level}}

    def centres(self) -> list[float]:
        """The noise level in the middle of each bin."""
        high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
        return [(high + (i + 0.5) / self.bins * (low - high)) ** RHO for i in range(self.bins)]
