"""What the average velocity u of a flow map is compared with: MeanFlow's derivative, alpha-Flow's two points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustcm.checks import LARGEST, SMALLEST, need_real
from robustcm.shapes import over_samples

FlowMap: TypeAlias = Callable[..., Tensor]
"""``u(z_t [b, ...], t [b], r [b], **conditions) -> [b, ...]``: the average velocity from t down to r."""


class FlowPoint(NamedTuple):
    """Where u is asked, and what is known there."""

    z_t: Tensor
    """``[b, ...]``, ``(1 - t) x + t z``."""
    v: Tensor
    """``[b, ...]``, the velocity ``z - x``."""
    t: Tensor
    """``[b]``"""
    r: Tensor
    """``[b]``, ``r <= t``."""
    student: Tensor
    """``u(z_t, t, r) [b, ...]`` of the student, detached."""
    progress: Tensor | float
    """Share of the training done, 0-dim."""
    conditions: Mapping[str, Any]
    """Keyword arguments of u."""


FlowTarget: TypeAlias = Callable[[FlowMap, FlowPoint], Tensor]
"""``target(u, at) -> [b, ...]``, u being the teacher; called without gradient. At r = t it is v, exactly."""


@dataclass(frozen=True)
class Derivative:
    """``v - (t - r) (v d_z u + d_t u)``: MeanFlow's target, the total derivative by ``torch.func.jvp``.

    It costs a pass in forward mode, about two without, and every operation of u has to have one: fused attention has
    none, so attention is computed by its formula there. u of the student is a pass of its own, with any attention.

    Source: Geng et al. 2025, arXiv 2505.13447; checked in public code.
    """

    def __call__(self, u: FlowMap, at: FlowPoint) -> Tensor:
        """See ``FlowTarget``."""

        def along(z_t: Tensor, t: Tensor) -> Tensor:
            return u(z_t, t, at.r, **at.conditions)

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            slope: Tensor = torch.func.jvp(along, (at.z_t, at.t), (at.v, torch.ones_like(at.t)))[1]
        target: Tensor = at.v - over_samples(at.t - at.r, at.z_t) * slope
        return target


@dataclass(frozen=True, kw_only=True)
class ConstantShare:
    """The same share at every step; 1 is flow matching."""

    share: float = 0.1
    """1e-6 to 1; the limit 0 is ``Derivative()``."""

    def __post_init__(self) -> None:
        need_real(self, "share", least=SMALLEST, most=1)

    def __call__(self, progress: Tensor) -> Tensor:
        return torch.full_like(progress, self.share)


@dataclass(frozen=True, kw_only=True)
class SigmoidShare:
    """1 at the start, ``smallest`` at the end, a falling sigmoid of the progress between: flow matching first.

    Source: Zhang et al. 2026 (alpha-Flow), arXiv 2510.20771; steepness and smallest from memory, and there the share
    is 0, the derivative, below the smallest.
    """

    steepness: float = 25.0
    """Of the sigmoid at its middle, above 0: the larger, the shorter the passage."""
    middle: float = 0.5
    """The progress at which the share is one half, 0 to 1."""
    smallest: float = 0.005
    """1e-6 to 0.49; also how near to 1 the share may come before it is 1."""

    def __post_init__(self) -> None:
        need_real(self, "steepness", above=0, most=LARGEST)
        need_real(self, "middle", least=0, most=1)
        need_real(self, "smallest", least=SMALLEST, most=0.49)

    def __call__(self, progress: Tensor) -> Tensor:
        share = torch.sigmoid(self.steepness * (self.middle - progress))
        return torch.where(share > 1 - self.smallest, 1.0, share.clamp(min=self.smallest))


@dataclass(frozen=True, kw_only=True)
class TwoPoint:
    """alpha-Flow's target from two points of the path, ``share v + (1 - share) u(z_s, s, r)``: a temporal difference.

    s = t - share (t - r), z_s = z_t - (t - s) v. No derivative, so any attention, compile, any device. ``share`` 1 is
    flow matching; as it goes to 0 the target goes to u itself, and the residual D / share to MeanFlow's.

    That quotient is what is compared here: the target returned is ``u - D / share = v - (1 - share) / share
    (u(z_t, t, r) - u(z_s, s, r))``. For the squared error that is the paper's weight 1 / share; and as residuals stay
    in units of velocity for every share, so does c. (The adaptive weight of the authors' code, ``share / (D^2 + eps)``,
    is the gradient of Cauchy in these units with eps / share^2 in the place of eps.)

    Source: Zhang et al. 2026, arXiv 2510.20771; target and weight checked in the authors' code.
    """

    share: Callable[[Tensor], Tensor] = SigmoidShare()
    """Of the progress, 0-dim; in (0, 1]."""

    def __call__(self, u: FlowMap, at: FlowPoint) -> Tensor:
        """See ``FlowTarget``."""
        progress = at.progress
        progress = progress.to(at.t) if isinstance(progress, Tensor) else at.t.new_full((), progress)
        share = self.share(progress)
        step = share * (at.t - at.r)
        there = at.z_t - over_samples(step, at.z_t) * at.v
        with torch.no_grad():
            target = at.v - (1 - share) / share * (at.student - u(there, at.t - step, at.r, **at.conditions))
        return torch.where(over_samples(at.t > at.r, at.z_t), target, at.v)
