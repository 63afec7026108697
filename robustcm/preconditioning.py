"""What stands around the network: coefficients by noise level, and a skip that may know the covariance of the data.

Axes: b = batch, ... = one sample. x_t = x + t z, f = the consistency function, F = the network inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from robustcm.checks import LARGEST, SMALLEST, need_real
from robustcm.noise import NoiseRange
from robustcm.shapes import one_a_sample, over_samples

Network: TypeAlias = Callable[..., Tensor]
"""``F(c_in x_t [b, ...], c_noise [b], **conditions) -> [b, ...]``."""

Skip: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``skip(x_t [b, ...], t [b]) -> [b, ...]``: what f is while F gives 0; x_t to the bit at sigma_min."""


@dataclass(frozen=True, kw_only=True)
class Preconditioning:
    """The coefficients around the network, each a function of ``t [b]``, so that f(x, sigma_min) = x bit-exactly.

    Source: Song et al. 2023, arXiv 2303.01469, appendix C, on Karras et al. 2022, Table 1; checked in the sLCT code.
    """

    sigma_data: float = 0.5
    """Standard deviation of the data, above 0."""
    noise: NoiseRange = NoiseRange()
    """The levels f is made for."""

    def __post_init__(self) -> None:
        need_real(self, "sigma_data", least=SMALLEST, most=LARGEST)

    def c_skip(self, t: Tensor) -> Tensor:
        # Not sigma_data^2 / (... + sigma_data^2): torch takes the reciprocal first, which need not give 1 at sigma_min.
        return 1 / (((t - self.noise.sigma_min) / self.sigma_data) ** 2 + 1)

    def c_out(self, t: Tensor) -> Tensor:
        return (t - self.noise.sigma_min) * self.sigma_data / torch.sqrt(t**2 + self.sigma_data**2)

    def c_in(self, t: Tensor) -> Tensor:
        return 1 / torch.sqrt(t**2 + self.sigma_data**2)

    def c_noise(self, t: Tensor) -> Tensor:
        return 1000 * 0.25 * torch.log(t)


@dataclass(frozen=True)
class ScalarSkip:
    """The usual ``Skip``, ``c_skip(t) x_t`` of ``Preconditioning``, by name."""

    noise: NoiseRange = NoiseRange()
    sigma_data: float = 0.5

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        usual = Preconditioning(sigma_data=self.sigma_data, noise=self.noise)
        return over_samples(usual.c_skip(t), x_t) * x_t

    def to(self, device: torch.device | str) -> ScalarSkip:
        """Itself: it holds no tensor."""
        return self


@dataclass(frozen=True)
class Preconditioned:
    """``f(x_t, t) = c_skip(t) x_t + c_out(t) F(c_in(t) x_t, c_noise(t))``; the same object trains and samples.

    Args:
        network: F. Its output may be of lower precision (autocast); the sum is at least float32.
        preconditioning: the coefficients.
        skip: in the place of ``c_skip(t) x_t``, such as ``LinearSkip``; None: that.
    Raises:
        ValueError: a skip that says it is made for other noise levels.
    """

    network: Network
    preconditioning: Preconditioning = Preconditioning()
    skip: Skip | None = None

    def __post_init__(self) -> None:
        made_for = getattr(self.skip, "noise", None)
        if isinstance(made_for, NoiseRange) and made_for != self.noise:  # x_t to the bit at another sigma_min
            raise ValueError(f"the skip is made for {made_for}, f for {self.noise}: give both the same")

    @property
    def noise(self) -> NoiseRange:
        """The noise levels f is made for."""
        return self.preconditioning.noise

    def __call__(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """``x_t [b, ...]``, ``t [b]`` in sigma_min .. sigma_max -> ``[b, ...]``; ``conditions`` go to the network.

        Raises:
            ValueError: ``t`` is not one level a sample.
        """
        p, t = self.preconditioning, one_a_sample("t", t, len(x_t))
        scaled = (over_samples(p.c_in(t), x_t) * x_t).to(x_t.dtype)  # t is float32 also where the network is not
        output = self.network(scaled, p.c_noise(t), **conditions)
        skipped = over_samples(p.c_skip(t), x_t) * x_t if self.skip is None else self.skip(x_t, t)
        return skipped + over_samples(p.c_out(t), x_t) * output
