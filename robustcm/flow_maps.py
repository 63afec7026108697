"""Flow maps: the average velocity u over a span of flow time (MeanFlow, alpha-Flow), trained with a robust distance.

z_t = (1 - t) x + t z, the velocity is v = z - x, and ``u(z_t, t, r)`` its average along the path from t down to r <= t:
z_r = z_t - (t - r) u(z_t, t, r). So one evaluation jumps any distance, u(z_1, 1, 0) from noise to data::

    objective = FlowMapObjective(distance=cauchy, c=MeasuredC(), target=TwoPoint())
    u = objective.function_of(network)                   # network(c_in z_t, c_noise(t), c_noise(t - r)): two times
    ...                                                  # the loop of `robustcm.objective`
    x = sample_flow_map(u, z, steps=2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustcm.checks import LARGEST, SMALLEST, need_real
from robustcm.consistency import Network, drawn_again, random_state
from robustcm.flow_targets import FlowMap, FlowPoint, FlowTarget, TwoPoint
from robustcm.gates import OfDataTime, OfFlowTime, of_flow_time
from robustcm.noise import FlowRange, flow_time
from robustcm.objective import Batch, FewStepObjective
from robustcm.randomness import two_of
from robustcm.schedules import LevelPairs, PairLaw, PairWeight, equal_weight
from robustcm.shapes import level_of_all, one_a_sample, over_samples, same_shape


@dataclass(frozen=True)
class PreconditionedFlowMap:
    """``u = c_skip(t, r) z_t + c_out(t) F(c_in(t) z_t, c_noise(t), c_noise(t - r))``; trains and samples.

    Made for data of std ``sigma_data``: with s(t) = (1 - t)^2 sigma_data^2 + t^2, the variance of z_t, c_in is
    ``1 / sqrt(s(t))``, c_skip the exact u of white Gaussian data, ``(1 - sqrt(s(r) / s(t))) / (t - r)``, and c_out =
    ``sigma_data / sqrt(s(t))`` the spread of v that z_t leaves open there: F starts from the right answer for the
    second moments, and its target has std 1. c_noise is ``250 t``, some radians of the network's Fourier features.

    Source: ours, after Karras et al. 2022, arXiv 2206.00364, appendix B.6; the second time t - r is MeanFlow's.
    # Differs: MeanFlow has no coefficients around its network, and latents of std 1.
    """

    network: Network
    sigma_data: float = 0.5

    noise: ClassVar[FlowRange] = FlowRange()

    def __post_init__(self) -> None:
        need_real(self, "sigma_data", least=SMALLEST, most=LARGEST)

    def __call__(self, z_t: Tensor, t: Tensor, r: Tensor, **conditions: Any) -> Tensor:
        """``z_t [b, ...]``, ``t [b]``, ``r [b]`` in [0, 1] -> ``[b, ...]``; ``conditions`` go to the network.

        Raises:
            ValueError: ``t`` or ``r`` is not one time a sample.
        """
        t, r = one_a_sample("t", t, len(z_t)), one_a_sample("r", r, len(z_t))
        at_t, at_r, sd2 = self._variance(t), self._variance(r), self.sigma_data**2
        # (s(t) - s(r)) / (t - r), divided out: finite at r = t
        c_skip = ((1 + sd2) * (t + r) - 2 * sd2) / (at_t + torch.sqrt(at_t * at_r))
        scale = torch.rsqrt(at_t)
        scaled = (over_samples(scale, z_t) * z_t).to(z_t.dtype)  # t is float32 also where the network is not
        output = self.network(scaled, 250 * t, 250 * (t - r), **conditions)
        return over_samples(c_skip, z_t) * z_t + over_samples(self.sigma_data * scale, z_t) * output

    def _variance(self, t: Tensor) -> Tensor:
        return ((1 - t) * self.sigma_data) ** 2 + t**2


@dataclass(frozen=True, kw_only=True)
class LogitNormalTimes:
    """Pairs (t, r): two logit-normal times, the larger is t; a share of the samples has r = t, flow matching.

    Source: Geng et al. 2025 (MeanFlow), arXiv 2505.13447: mean -0.4, std 1.0 and 75 % (from memory).
    """

    mean: float = -0.4
    """Of the logits of the times, -20 to 20: 0 centres them on 1/2."""
    std: float = 1.0
    """Of the logits, above 0, at most 100."""
    share_equal: float = 0.75
    """Share of the samples with r = t, 0 to 1; 1 is flow matching."""

    noise: ClassVar[FlowRange] = FlowRange()

    def __post_init__(self) -> None:
        need_real(self, "mean", least=-20, most=20)  # beyond, float32 has no other times than 0 and 1
        need_real(self, "std", above=0, most=100)
        need_real(self, "share_equal", least=0, most=1)

    def __call__(self, step: int, total_steps: int, uniform: Tensor) -> LevelPairs:
        """``t_hi`` is t, ``t_lo`` is r; ``uniform [b]`` in [0, 1), the caller's randomness."""
        share, uniform = self.share_equal, uniform.double()
        equal = uniform < share
        # Given which of the two it is, what is left is uniform again.
        left = torch.where(equal, uniform / max(share, 1e-12), (uniform - share) / max(1 - share, 1e-12))
        one, two = (torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)) for u in two_of(left))
        t, r = torch.where(equal, one, torch.maximum(one, two)), torch.where(equal, one, torch.minimum(one, two))
        return LevelPairs(t.float(), r.float(), flow_time(t).float(), 2)

    def nearest(self, sigma: float, step: int, total_steps: int) -> float:
        """The flow time of ``sigma``: all are trained at."""
        return sigma / (1 + sigma)


@dataclass(frozen=True, kw_only=True)
class FlowMapObjective(FewStepObjective):
    """Training u on batches of data, with the parts of ``Objective``: ``distance(u, target)`` at a measured scale.

    ``batch.pairs`` holds t and r as ``t_hi`` and ``t_lo``, depth is 1 - t, and there is no N that residuals shrink
    with. Data are seen at the scale of the latents, std 0.5.
    """

    levels: PairLaw = LogitNormalTimes()
    weight: PairWeight = equal_weight
    target: FlowTarget = TwoPoint()
    """What u is compared with."""

    num_times: ClassVar[int] = 2
    range_of_levels: ClassVar[type] = FlowRange

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gate, (OfFlowTime, OfDataTime)):
            raise ValueError("the gate of a flow map is given in sigma, gate=Above(1.0): flow time is its own business")
        if isinstance(self.levels, LogitNormalTimes) and self.levels.share_equal > 0:
            middle = torch.full((1,), 0.5)
            if not torch.as_tensor(self.weight(middle, middle)).isfinite().all():
                raise ValueError(
                    f"weight={self.weight} is not finite at r = t, where {self.levels.share_equal:.0%} of the samples "
                    "are: equal_weight is"
                )

    def function_of(self, network: Network) -> PreconditionedFlowMap:
        """u of ``network``, which is told two times: ``network(x, c_noise(t), c_noise(t - r))``."""
        return PreconditionedFlowMap(network)

    def sampling_levels(self, evaluations: int, second: float, step: int, total_steps: int) -> tuple[float, ...]:
        """Equal steps of flow time, from 1; ``second`` is not asked: nothing is lost between evaluations."""
        return tuple(1 - i / evaluations for i in range(evaluations))

    def sample(
        self,
        f: FlowMap,
        z: Tensor,
        levels: Sequence[float],
        generator: torch.Generator,
        conditions: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """See ``sample_flow_map``."""
        return sample_flow_map(f, z, times=(*levels, 0.0), conditions=conditions)

    def _compared(self, f: FlowMap, batch: Batch, teacher: FlowMap | None) -> tuple[Tensor, Tensor]:
        x, z, (t, r, _, _), conditions, progress = batch[:5]
        same_shape(x=x, z=z)
        way, dtype = over_samples(one_a_sample("t", t, len(x)), x), torch.promote_types(x.dtype, z.dtype)
        z_t, v = torch.lerp(x.to(dtype), z.to(dtype), way.to(dtype)), z - x
        before = random_state(f, x.device)
        student = f(z_t, t, r, **conditions)
        with drawn_again(before, x.device), torch.no_grad():
            target = self.target(teacher or f, FlowPoint(z_t, v, t, r, student.detach(), progress, conditions))
        return student, target

    def _coupled_at(self, t: Tensor, progress: float) -> Tensor:
        return of_flow_time(self.gate)(t, progress)


@torch.no_grad()
def sample_flow_map(
    u: FlowMap,
    z: Tensor,
    *,
    steps: int = 1,
    times: Sequence[float] | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """Samples out of noise, ``z_r = z_t - (t - r) u(z_t, t, r)`` from time to time; deterministic.

    Args:
        u: the average velocity.
        z: standard noise ``[b, ...]``; the samples have its shape, dtype and device.
        steps: evaluations, in equal steps of time.
        times: falling from 1 to 0, in the place of ``steps``: ``(1.0, 0.0)`` is one evaluation.
        conditions: keyword arguments of u.
    Raises:
        ValueError: no step, or times that do not fall from 1 to 0.
    Source: Geng et al. 2025, arXiv 2505.13447, Eq. (12) from memory.
    """
    if times is None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        times = [1 - i / steps for i in range(steps + 1)]
    if len(times) < 2 or times[0] != 1 or times[-1] != 0 or any(t <= r for t, r in pairwise(times)):
        raise ValueError(f"times must fall from 1 to 0, got {list(times)}")
    z_t = z
    for t, r in pairwise(times):
        u_t = u(z_t, level_of_all(t, z), level_of_all(r, z), **(conditions or {}))
        z_t = (z_t - (t - r) * u_t).to(z.dtype)
    return z_t
