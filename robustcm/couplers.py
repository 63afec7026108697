"""Pairings of noise and data inside a batch (technique 3), and what they gain; `robustcm.gates` confines them.

A coupler maps ``x [b, ...]`` and ``z [b, ...]`` to a permutation ``[b]`` (int64): ``z[perm]`` is the coupled noise.
The data stays put, so labels and shapes cannot get lost, and every noise is used exactly once. Couplers solve on the
CPU: call them where the batch is prepared, before it travels to the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


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
    inner = torch.einsum("if,jf->ij", x.detach().flatten(1).double(), z.detach().flatten(1).double())
    _, perm = linear_sum_assignment(inner.cpu().numpy(), maximize=True)
    return torch.as_tensor(perm, device=x.device)


@dataclass(frozen=True, kw_only=True)
class Entropic:
    """A permutation drawn from the entropic plan: optimal transport at a temperature.

    Sinkhorn (POT, in the log domain) on ``||x - z||^2 / mean cost``; then each sample, in random order, draws its
    noise from its row of the plan among those still free. As ``reg -> 0`` this is ``exact``, as ``reg -> inf`` a
    uniformly random permutation.

    Source: Cuturi 2013, arXiv 1306.0895; the draw without replacement is ours.
    """

    reg: float = 0.01
    """Temperature as a share of the mean cost."""
    max_iterations: int = 1000
    """Of Sinkhorn, at most."""

    def __post_init__(self) -> None:
        if not self.reg > 0:
            raise ValueError(f"reg must be positive, got {self.reg}; for no regularisation use the coupler `exact`")

    def __call__(
        self, x: Tensor, z: Tensor, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        _check(x, z)
        if generator is None:
            raise ValueError("the coupler Entropic draws its permutation: pass a torch.Generator as generator=")
        import ot.bregman  # slow to import: it brings scikit-learn

        b = len(x)
        cost = _cost(x, z)
        weights = np.full(b, 1 / b)
        plan = ot.bregman.sinkhorn_log(
            weights, weights, cost / cost.mean(), self.reg, numItermax=self.max_iterations, warn=False
        )
        order = torch.randperm(b, generator=generator).numpy()
        uniform = torch.rand(b, generator=generator, dtype=torch.float64).numpy()
        free = np.ones(b, dtype=bool)
        perm = np.empty(b, dtype=np.int64)
        for i in order:
            row = np.where(free, plan[i], 0.0)
            if not row.sum() > 0:  # all of its mass went to others (underflow at small reg): the cheapest left
                row = np.where(free & (cost[i] == cost[i][free].min()), 1.0, 0.0)
            cdf = np.cumsum(row)
            perm[i] = np.searchsorted(cdf, uniform[i] * cdf[-1], side="right")
            free[perm[i]] = False
        return torch.as_tensor(perm, device=x.device)


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
        perm = torch.empty(len(x), dtype=torch.int64, device=x.device)
        for label in torch.unique(labels):
            members = torch.nonzero(labels == label).squeeze(1)
            inside = self.coupler(x[members], z[members], labels=labels[members], generator=generator)
            perm[members] = members[inside]
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


def _cost(x: Tensor, z: Tensor) -> np.ndarray:
    x, z = x.detach().flatten(1).double().cpu(), z.detach().flatten(1).double().cpu()
    squared = x.square().sum(1)[:, None] + z.square().sum(1)[None, :] - 2 * x @ z.T
    return squared.clamp(min=0).numpy()


def _check(x: Tensor, z: Tensor) -> None:
    if x.shape != z.shape or x.dim() < 2:
        raise ValueError(
            f"x and z must have one shape [b, ...], got {tuple(x.shape)} and {tuple(z.shape)}; "
            "pair the noise before any broadcasting"
        )
