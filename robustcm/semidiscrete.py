"""A coupling of noise with the whole data set, fitted once: each noise then finds its sample alone (technique 3).

A pairing inside a batch is only as close as the batch is large. Semidiscrete transport from the normal law to n samples
needs one number a sample, its potential; noise z goes to the sample with the largest ``<z, x_j> + g_j``. No batch, no
other rank. What is drawn at random is then the noise, and the data follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustcm.checks import need_finite, need_order, need_real, need_whole

SCORES = 2**24  # computed at once: 64 MB


@dataclass(frozen=True)
class Pairing:
    """The samples and their potentials: a function from noise to samples."""

    x: Tensor
    """``[n, ...]``, less their mean: that changes no pairing, and leaves float32 what tells them apart."""
    potential: Tensor
    """``[n]``, in the units of ``<z, x>``; a constant added to all changes nothing."""
    marginal_error: float
    """chi^2 of the share of the noise that each sample gets, against 1 / n each: 0 where all get the same. Measured on
    fresh noise, its sampling error taken out (so it may come out below 0)."""

    def __call__(self, z: Tensor) -> Tensor:
        """Which sample each of the noises ``z [b, ...]`` goes to: ``[b]`` int64.

        Raises:
            ValueError: ``z`` has not the shape of samples, or is not finite.
        """
        if z.shape[1:] != self.x.shape[1:]:
            raise ValueError(f"z must be noise of the samples' shape {list(self.x.shape[1:])}, got {list(z.shape)}")
        need_finite(z=z)
        flat = self.x.flatten(1)
        parts = torch.split(z.flatten(1).to(flat.dtype), _rows(len(flat)))
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([(part @ flat.T + self.potential).argmax(1) for part in parts])


@dataclass(frozen=True, kw_only=True)
class Semidiscrete:
    """Fits a ``Pairing``: stochastic steps on the convex dual, each against fresh noise, the later half averaged.

    A sample that gets too much of the noise has its potential lowered, in units of the spread of the scores' maximum
    (``rms |x - mean| / sqrt(2 ln n)``). Cost: ``steps * draws_a_sample * n^2 d`` multiplications; at n = 4500, d = 32
    24 s of one core (docs/evidence.md).

    Source: the dual is that of Genevay et al. 2016, arXiv 1605.08527; for flow matching Mousavi-Hosseini et al. 2025,
    arXiv 2509.25519. Step sizes and averaging are ours.
    """

    steps: int = 100
    """Of the fit, 2 or more."""
    draws_a_sample: float = 2.0
    """Noises a step, as a multiple of n."""
    first_rate: float = 0.5
    """Size of the first step, in units of the scores' spread."""
    last_rate: float = 0.005
    """Of the last; between them it falls in equal ratios."""

    def __post_init__(self) -> None:
        need_whole(self, "steps", least=2)
        need_real(self, "draws_a_sample", least=1e-3, most=1e3)
        need_real(self, "first_rate", "last_rate", above=0, most=100)
        need_order(self, "last_rate", "first_rate")

    def fit(
        self, x: Tensor, generator: torch.Generator, on_step: Callable[[int], object] = lambda step: None
    ) -> Pairing:
        """The pairing of ``x [n, ...]``, on its device, in float32.

        Args:
            generator: of the device of ``x``; draws the noise.
            on_step: called behind each step, for a progress bar.
        Raises:
            ValueError: fewer than two samples, no axis beside theirs, or values that are not finite.
        """
        if len(x) < 2:
            raise ValueError(f"need at least two samples to pair with, got {len(x)}")
        if x.dim() < 2:
            raise ValueError(f"data to pair noise with must be [n, ...], got {list(x.shape)}")
        need_finite(x=x)
        x = x.detach()
        x = (x - x.double().mean(0)).float()
        n, unit = len(x), _unit(x)
        draws = max(1, round(self.draws_a_sample * n))
        potential, average = (torch.zeros(n, device=x.device) for _ in range(2))
        half = self.steps // 2
        for step in range(self.steps):
            rate = self.first_rate * (self.last_rate / self.first_rate) ** (step / (self.steps - 1))
            share = _shares(Pairing(x, potential, math.nan), draws, generator)
            # A sample never drawn is raised by rate, one drawn far too often lowered by no more than a few.
            potential = potential - rate * unit * (n * share - 1).clamp(max=5.0)
            potential = potential - potential.mean()
            if step >= half:
                average += potential / (self.steps - half)
            on_step(step)
        fitted = Pairing(x, average, math.nan)
        check = 20 * n
        share = _shares(fitted, check, generator)
        chi2 = n * (share - 1 / n).square().sum() - (n - 1) / check
        return Pairing(x, average, float(chi2))

    def __call__(self, x: Tensor, z: Tensor, **_: object) -> Tensor:
        """Not a coupling of a batch.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self} pairs with the whole data set: pairing = Semidiscrete().fit(data, generator) once, "
            "then x = data[pairing(z)]"
        )


def _shares(pairing: Pairing, draws: int, generator: torch.Generator) -> Tensor:
    """How much of ``draws`` noises each sample gets, ``[n]``, summing to 1."""
    counts = torch.zeros(len(pairing.x), device=pairing.x.device)
    rows = _rows(len(pairing.x))
    for start in range(0, draws, rows):
        shape = (min(rows, draws - start), *pairing.x.shape[1:])
        z = torch.randn(shape, generator=generator, device=pairing.x.device)
        counts += torch.bincount(pairing(z), minlength=len(counts))
    return counts / draws


def _unit(x: Tensor) -> float:
    """By how much a potential must rise for its sample to be chosen e times as often, roughly."""
    rms = float(x.flatten(1).square().sum(1).mean().sqrt())
    return max(rms, 1e-12) / math.sqrt(2 * math.log(len(x)))


def _rows(n: int) -> int:
    return max(1, SCORES // n)
