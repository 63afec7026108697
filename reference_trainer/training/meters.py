"""Sums over steps, kept on the device and read only when logging: losses, residuals and tails by noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from robustcm.noise import FlowRange, NoiseRange
from robustcm.objective import Terms
from robustcm.schedules import LevelPairs
from robustcm.tails import TailStream


@dataclass(frozen=True)
class LevelMeter:
    """Means per range of noise levels. The state is float64 ``[bins, quantities]``, to be passed in and out."""

    bins: int = 12
    """Equal ranges of depth, from sigma_max to sigma_min on the Karras ramp, of flow time from 1 to 0."""
    noise: NoiseRange | FlowRange = NoiseRange()

    QUANTITIES = ("samples", "consistency", "extra", "r")

    def init(self, device: torch.device) -> Tensor:
        return torch.zeros(self.bins, len(self.QUANTITIES), dtype=torch.float64, device=device)

    def add(self, state: Tensor, terms: Terms, pairs: LevelPairs) -> Tensor:
        """The state after one more step; no synchronisation."""
        ones = torch.ones_like(terms.r)
        rows = torch.stack([ones, terms.consistency.detach(), terms.extra.detach(), terms.r], dim=1).double()
        return state.index_add(0, level_bin(pairs, self.bins), rows)

    def read(self, state: Tensor) -> dict[str, Any]:
        """Means, as numbers: over everything (NaN of nothing), and per bin under ``by_level`` (None of nothing)."""
        sums = state.cpu()
        total, mean = float(sums[:, 0].sum()), {}
        for i, name in enumerate(self.QUANTITIES[1:], 1):
            mean[name] = float(sums[:, i].sum()) / total if total else math.nan
        by_level = {
            name: [float(s / n) if n > 0 else None for n, s in sums[:, [0, i]]]
            for i, name in enumerate(self.QUANTITIES[1:], 1)
        }
        return {**mean, "by_level": {"sigma": level_centres(self.bins, self.noise), **by_level}}


@dataclass(frozen=True)
class TailMeter:
    """Box statistics of the temporal difference's elements per range of noise levels, streamed on the device.

    The state is that of a ``robustcm.tails.TailStream`` with one group a range.
    """

    bins: int = 12
    noise: NoiseRange | FlowRange = NoiseRange()

    @cached_property
    def stream(self) -> TailStream:
        return TailStream(groups=self.bins, smallest=1e-7, largest=1e5, relative_error=0.02)

    def init(self, device: torch.device) -> Tensor:
        return self.stream.empty(device)

    def add(self, state: Tensor, terms: Terms, pairs: LevelPairs) -> Tensor:
        """The state after one more step; no synchronisation."""
        td = terms.student.detach() - terms.teacher
        return self.stream.update(state, td, level_bin(pairs, self.bins))

    def read(self, state: Tensor) -> dict[str, Any]:
        """Per bin: quartiles, IQR, shares beyond the inner and outer fences, max |z|; None where nothing fell."""
        boxes = [box.as_dict() for box in self.stream.statistics(state)]
        names = ("q1", "median", "q3", "iqr", "beyond_inner", "beyond_outer", "max_z")
        return {"sigma": level_centres(self.bins, self.noise)} | {name: [box[name] for box in boxes] for name in names}


def level_bin(pairs: LevelPairs, bins: int) -> Tensor:
    """Which of ``bins`` equal ranges of depth each sample's student level lies in: ``[b]`` int64."""
    return (pairs.depth * bins).long().clamp(0, bins - 1)


def level_centres(bins: int, noise: NoiseRange | FlowRange) -> list[float]:
    """The noise level, in sigma, in the middle of each of ``bins`` equal ranges of depth."""
    centres: list[float] = noise.at((torch.arange(bins, dtype=torch.float64) + 0.5) / bins).tolist()
    return centres
