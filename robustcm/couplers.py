"""Pairings of noise and data inside a batch (technique 3), and what they gain; `robustcm.gates` confines them.

A coupler maps ``x [b, ...]`` and ``z [b, ...]`` to a permutation ``[b]`` (int64): ``z[perm]`` is the coupled noise.
The data stays put, so labels and shapes cannot get lost, and every noise is used exactly once. Couplers solve on the
CPU: call them where the batch is prepared, before it travels to the device.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from robustcm.checks import need_finite, need_real, need_whole
from robustcm.shapes import same_shape


class Coupler(Protocol):
    """Gives the permutation of the noise."""

    def __call__(
        self, x: Tensor, z: Tensor, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """
        Args:
            x: data ``[b, ...]``.
            z: noise, the shape of ``x``.
            labels: classes ``[b]`` int64, for couplers that need them.
            generator: for couplers that draw; a CPU generator.
        """
        ...


def independent(
    x: Tensor, z: Tensor, *, labels: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The identity permutation: noise and data stay independent."""
    _check(x, z)
    return torch.arange(len(x), device=x.device)


def exact(x: Tensor, z: Tensor, *, labels: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The permutation that minimises ``sum ||x - z[perm]||^2``: exact optimal transport inside the batch.

    Source: Dao et al. 2025; Pooladian et al. 2023, arXiv 2304.14772. The norms being fixed, minimising the cost is
    maximising the sum of inner products.
    # Differs: a permutation; torchcfm's sampler draws pairs with replacement and leaves about 37 % of a batch of
    # 128 unused.
    """
    _check(x, z)
    return torch.as_tensor(_best(_in_rows(x), _in_rows(z)), device=x.device)


class Plan(NamedTuple):
    """An entropic transport plan between the samples of a batch and their noises."""

    weights: np.ndarray[Any, np.dtype[np.float64]]
    """``[b, b]``, of data i and noise j; rows and columns sum to 1 / b as far as ``error`` says."""
    error: float
    """Largest deviation of a column sum from 1 / b, times b."""
    converged: bool
    """Whether ``error`` is below the tolerance."""
    iterations: int
    gain: np.ndarray[Any, np.dtype[np.float64]]
    """``[b, b]``, the inner products it is the plan of, in units of their spread."""

    def draw(self, generator: torch.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
        """A permutation ``[b]``: each row, in random order, draws a column among those still free."""
        b = len(self.weights)
        order = torch.randperm(b, generator=generator).numpy()
        uniform = torch.rand(b, generator=generator, dtype=torch.float64).numpy()
        free = np.ones(b, dtype=bool)
        perm = np.empty(b, dtype=np.int64)
        left = []
        for i in order:
            cdf = np.cumsum(np.where(free, self.weights[i], 0.0))
            if cdf[-1] > 0:
                perm[i] = np.searchsorted(cdf, uniform[i] * cdf[-1], side="right")
                free[perm[i]] = False
            else:  # all of its mass went to others (underflow at small reg)
                left.append(i)
        if left:  # to be paired best among what is left
            perm[left] = np.flatnonzero(free)[linear_sum_assignment(self.gain[left][:, free], True)[1]]
        return perm


@dataclass(frozen=True, kw_only=True)
class Entropic:
    """A permutation drawn from the entropic plan: optimal transport at a temperature.

    Only inner products matter to a pairing, so the plan is that of ``exp(<x_i, z_j> / (reg * spread))``, with x and z
    centred and ``spread`` the standard deviation of these inner products over all pairs: ``reg`` means the same for any
    d, scale and mean of the data. Each sample, in random order, then draws its noise from its row of the plan among
    those still free. As ``reg -> 0`` this is ``exact``, as ``reg -> inf`` a uniformly random permutation.

    Sinkhorn's iterations (POT, in the log domain) start at temperature 1 and halve it, each from the potentials of the
    one before. Where they do not converge within ``max_iterations`` a warning says so; ``plan`` reports it. Cost: two
    log-sum-exps of ``[b, b]`` an iteration, of which some 150 to 250 at 0.1 and 400 to 1200 at 0.01 (b = 64, 256).

    Source: Cuturi 2013, arXiv 1306.0895; the scaling and the draw without replacement are ours.
    """

    reg: float = 0.1
    """Temperature, in standard deviations of the inner products."""
    max_iterations: int = 2000
    """Over all temperatures."""
    tolerance: float = 0.01
    """Of ``Plan.error``."""

    def __post_init__(self) -> None:
        if not self.reg > 0:
            raise ValueError(f"reg must be positive, got {self.reg}; for no regularisation use the coupler `exact`")
        need_real(self, "reg", least=1e-12, most=1e12)
        need_whole(self, "max_iterations", least=1)
        need_real(self, "tolerance", above=0, below=1)

    def plan(self, x: Tensor, z: Tensor) -> Plan:
        """The plan between ``x [b, ...]`` and ``z [b, ...]``."""
        from ot.bregman import sinkhorn_log  # slow to import: it brings scikit-learn

        _check(x, z)
        gain = _inner_products(x, z)
        spread, b = float(gain.std()), len(x)
        gain = gain / spread if spread > 0 else gain
        uniform = np.full(b, 1 / b)
        halvings = max(0, math.ceil(-math.log2(self.reg)))
        temperatures = [self.reg * 2.0**k for k in range(halvings, -1, -1)]
        potentials, iterations, solved = None, 0, math.inf
        for temperature in temperatures:
            if iterations >= self.max_iterations:
                break
            allowed = max(1, (self.max_iterations - iterations) // (1 if temperature == self.reg else 4))
            with np.errstate(over="ignore"):  # POT also returns the potentials' exponentials
                weights, log = sinkhorn_log(
                    uniform,
                    uniform,
                    -gain,
                    temperature,
                    numItermax=allowed,
                    stopThr=self.tolerance / b / 2,
                    warn=False,
                    log=True,
                    warmstart=potentials,
                )
            iterations, solved = iterations + log["niter"] + 1, temperature
            potentials = 2 * log["log_u"], 2 * log["log_v"]  # in units of a temperature that is about to halve
        error = float(np.abs(b * weights.sum(0) - 1).max())
        return Plan(weights, error, solved == self.reg and error <= self.tolerance, iterations, gain)

    def __call__(
        self, x: Tensor, z: Tensor, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        _check(x, z)
        if generator is None:
            raise ValueError("the coupler Entropic draws its permutation: pass a torch.Generator as generator=")
        if not len(x):
            return independent(x, z)
        plan = self.plan(x, z)
        if not plan.converged:
            warnings.warn(
                f"{self}: not converged after {plan.iterations} iterations (columns off by {plan.error:.0%}); raise "
                "reg or max_iterations, or use the coupler exact",
                stacklevel=2,
            )
        return torch.as_tensor(plan.draw(generator), device=x.device)


@dataclass(frozen=True)
class WithinClasses:
    """Another coupler, applied to each class by itself: a sample never takes the noise of another class.

    Coupling across classes makes the noise carry the label and hurts class-conditional training (the authors' own
    log: FID 56.3 -> 60.5).
    """

    coupler: Coupler = exact
    """What pairs the samples of one class."""

    def __call__(
        self, x: Tensor, z: Tensor, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        _check(x, z)
        if labels is None or labels.shape != x.shape[:1]:
            got = None if labels is None else list(labels.shape)
            raise ValueError(f"the coupler WithinClasses needs labels [{len(x)}], got {got}")
        if not len(x):
            return independent(x, z)
        by_class = labels.argsort(stable=True)  # each class's samples in their order
        sizes = torch.unique_consecutive(labels[by_class], return_counts=True)[1].tolist()
        classes = torch.split(by_class, sizes)
        perm = torch.empty(len(x), dtype=torch.int64, device=x.device)
        if self.coupler is exact:  # many small problems: checked, sorted and brought to the CPU once for all
            parts = zip(*(torch.split(_in_rows(v[by_class]), sizes) for v in (x, z)), strict=True)
            paired = [members[_best(*part)] for members, part in zip(classes, parts, strict=True)]
        else:
            paired = [
                members[self.coupler(x[members], z[members], labels=labels[members], generator=generator)]
                for members in classes
            ]
        perm[by_class] = torch.cat(paired)
        return perm


def coupling_gain(x: Tensor, z: Tensor, perm: Tensor) -> Tensor:
    """The share of the random pairing's cost that ``perm`` saves: ``1 - sum ||x - z[perm]||^2 / E[random]``, 0-dim.

    0 for a pairing no better than random, 1 for a pairing at no cost. The expected cost of a random permutation is
    the mean over all pairs, so no drawing is needed.
    """
    _check(x, z)
    x, z = x.flatten(1).double(), z.flatten(1).double()
    paired = (x - z[perm]).square().sum(1).mean()
    # mean_ij ||x_i - z_j||^2, without the [b, b] matrix
    random = x.square().sum(1).mean() + z.square().sum(1).mean() - 2 * x.mean(0) @ z.mean(0)
    return 1 - paired / random


def _in_rows(x: Tensor) -> Tensor:
    """``[b, ...] -> [b, d]``, float64, on the CPU."""
    return x.detach().flatten(1).double().cpu()


def _best(x: Tensor, z: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The permutation ``[b]`` of the rows of ``z [b, d]`` with the largest sum of inner products with ``x``'s."""
    perm: np.ndarray[Any, np.dtype[np.int64]] = linear_sum_assignment((x @ z.T).numpy(), maximize=True)[1]
    return perm


def _inner_products(x: Tensor, z: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``<x_i, z_j>`` of the centred samples, ``[b, b]``: what a permutation can gain."""
    x, z = (v.detach().flatten(1).double().cpu() for v in (x, z))
    product: np.ndarray[Any, np.dtype[np.float64]] = ((x - x.mean(0)) @ (z - z.mean(0)).T).numpy()
    return product


def _check(x: Tensor, z: Tensor) -> None:
    same_shape(x=x, z=z)
    need_finite(x=x, z=z)
