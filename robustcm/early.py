"""The diffusion loss at early time steps (technique 2): where the noise is small, f is also told to denoise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustcm.checks import LARGEST, need_real
from robustcm.losses import element_r2
from robustcm.schedules import LevelPairs


@dataclass(frozen=True, kw_only=True)
class EarlyDiffusion:
    """``weight * reduce((f(x_t, t) - x)^2)`` for the samples on the smallest-noise part of the levels, else 0.

    ``reduction="mean"`` over the elements of a sample is what the authors do (checked); beside a distance on the
    norm of the whole sample its gradient is small (measured at d = 256: 1e-4 of Cauchy's). ``"sum"`` puts it in the
    units of r^2, like the distances. ``gradient_share`` measures which share it has.

    Source: Dao et al. 2025, arXiv 2502.01441; weight 5 and start 0.75 from the authors' run names (checked).
    """

    weight: float = 5.0
    """Of the term, 0 or more."""
    start: float = 0.75
    """First depth of the levels that get the term: 0.75 is the last quarter of the grid."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the elements of a sample."""

    def __post_init__(self) -> None:
        need_real(self, "weight", least=0, most=LARGEST)
        need_real(self, "start", least=0, most=1)
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum' over the elements of a sample, got {self.reduction!r}")

    def __call__(self, student: Tensor, x: Tensor, pairs: LevelPairs) -> Tensor:
        """``student = f(x_t, t_hi) [b, ...]``, clean ``x`` of the same shape -> ``[b]``, not weighted by the level."""
        squared = element_r2(student, x).flatten(1)
        per_sample = squared.mean(1) if self.reduction == "mean" else squared.sum(1)
        return self.weight * torch.where(pairs.depth >= self.start, per_sample, 0.0)


def gradient_share(term: Tensor, rest: Tensor, student: Tensor) -> Tensor:
    """The share of ``term`` in the gradient at the network's output: ``|g_term| / (|g_term| + |g_rest|)``, 0-dim.

    Both are scalars (or ``[b]``, summed here) that depend on ``student``. Costs no pass through the network, keeps
    the graph, so it can be called before ``backward``.
    """
    norms = []
    for loss in (term, rest):
        gradient: Tensor | None = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss.sum(), student, retain_graph=True, allow_unused=True)
        norms.append(student.new_zeros(()) if gradient is None else gradient.norm())
    return norms[0] / (norms[0] + norms[1]).clamp(min=torch.finfo(student.dtype).tiny)
