"""The range of noise levels that grid, preconditioning, sampler and plots share, and the axes t can be measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from robustcm.checks import LARGEST, SMALLEST, need_order, need_real, need_whole

Axis: TypeAlias = Callable[[Tensor], Tensor]
"""``axis(t [b]) -> depth [b]``: 0 at the largest noise, 1 at the smallest."""


@dataclass(frozen=True, kw_only=True)
class NoiseRange:
    """Noise levels from ``sigma_max`` down to ``sigma_min``, in units of the data (std sigma_data = 0.5).

    ``f(x, sigma_min) = x``, sampling starts at ``sigma_max``, and between the two lies Karras' ramp of equal steps in
    ``sigma^(1 / rho)``. A ``depth`` is a place on that ramp: 0 at ``sigma_max``, 1 at ``sigma_min``.

    Source: Karras et al. 2022 (EDM), arXiv 2206.00364, Table 1 and Eq. (5); kept by CM, iCT, sLCT (checked).
    """

    sigma_min: float = 0.002
    """Smallest noise level, above 0: there f is the identity."""
    sigma_max: float = 80.0
    """Largest noise level, at which sampling starts."""
    rho: float = 7.0
    """Bends the ramp: the larger, the more levels at small noise; 1 or more."""

    def __post_init__(self) -> None:
        need_real(self, "sigma_min", "sigma_max", least=SMALLEST, most=LARGEST)
        need_order(self, "sigma_min", "sigma_max", ratio=2)  # else neighbours are one number in float32
        need_real(self, "rho", least=1, most=1000)

    def levels(self, num_levels: int) -> Tensor:
        """``[num_levels]``, float64, falling from exactly ``sigma_max`` to exactly ``sigma_min``.

        Raises:
            ValueError: fewer than two levels.
        """
        if num_levels < 2:
            raise ValueError(f"num_levels must be at least 2 (a student and a teacher level), got {num_levels}")
        levels: Tensor = self.at(torch.linspace(0, 1, num_levels, dtype=torch.float64))
        levels[0], levels[-1] = self.sigma_max, self.sigma_min  # the powers round; f(x, sigma_min) = x needs it exact
        return levels

    def at(self, depth: Tensor) -> Tensor:
        """The level at ``depth``, any shape."""
        high, low = self._ends
        level: Tensor = (high + depth * (low - high)) ** self.rho
        return level

    def depth(self, t: Tensor) -> Tensor:
        """Where ``t`` lies on the ramp, any shape: the inverse of ``at``, and an ``Axis`` for t in sigma."""
        high, low = self._ends
        depth: Tensor = (t ** (1 / self.rho) - high) / (low - high)
        return depth

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)


def flow_time(t: Tensor) -> Tensor:
    """The ``Axis`` of flow matching, ``x_t = (1 - t) x + t z``: 1 is pure noise, so depth is ``1 - t``."""
    return 1 - t


@dataclass(frozen=True)
class FlowRange:
    """The levels of flow time, ``x_t = (1 - t) x + t z``: all of [0, 1]; a depth is ``1 - t``, see ``flow_time``."""

    sigma_min: ClassVar[float] = 0.0
    sigma_max: ClassVar[float] = float("inf")

    def at(self, depth: Tensor) -> Tensor:
        """The noise at ``depth`` in sigma, any shape."""
        return sigma_of_flow_time(1 - depth)


def data_time(t: Tensor) -> Tensor:
    """The ``Axis`` of flow matching the other way round, ``x_t = t x + (1 - t) z``, t = 1 at the data (torchcfm)."""
    return t


@dataclass(frozen=True)
class TimestepIndex:
    """The ``Axis`` of an index 0 .. num_timesteps - 1 of a diffusion schedule, 0 the least noise (DDPM, diffusers)."""

    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        need_whole(self, "num_timesteps", least=1)

    def __call__(self, t: Tensor) -> Tensor:
        return 1 - (t + 0.5) / self.num_timesteps


def sigma_of_flow_time(t: Tensor) -> Tensor:
    """``t / (1 - t)``: x_t = (1 - t) x + t z is ``(1 - t)`` times data with noise of this level."""
    return t / (1 - t)
