"""Consistency trajectories (CTM): from any noise level t to any level s below it, trained with a robust distance.

``G(x_t, t, s)`` follows the path through x_t from t down to s; ``G(x_t, t, sigma_min)`` is the consistency function::

    objective = TrajectoryObjective(distance=cauchy, c=MeasuredC())
    G = objective.function_of(network)                   # network(c_in x_t, c_noise(t), c_noise(s)): two times
    ...                                                  # the loop of `robustcm.objective`
    x = sample_trajectory(G, z, levels=(80.0, 2.5))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from robustcm.checks import need_real
from robustcm.consistency import Network, Preconditioned, Preconditioning, temporal_difference
from robustcm.noise import NoiseRange
from robustcm.objective import Batch, Draws, FewStepObjective
from robustcm.randomness import two_of
from robustcm.schedules import LevelGrid, PairLaw, PairWeight, inverse_gap
from robustcm.shapes import level_of_all, one_a_sample, over_samples
from robustcm.teacher_input import TeacherInput

Trajectory: TypeAlias = Callable[..., Tensor]
"""``G(x_t [b, ...], t [b], s [b], **conditions) -> [b, ...]``: the point at s of the path through x_t."""


@dataclass(frozen=True)
class PreconditionedTrajectory:
    """``G(x_t, t, s) = (s / t) x_t + (1 - s / t) g(x_t, t, s)``, so that G(x, t, t) = x bit-exactly.

    g is ``Preconditioned`` with a network that is told s beside t: ``F(c_in(t) x_t, c_noise(t), c_noise(s))``.

    Source: Kim et al. 2023 (CTM), arXiv 2310.02279, Eq. (5) from memory; there g has EDM's coefficients, here those
    of the consistency function, which differ where t is near sigma_min.
    """

    network: Network
    preconditioning: Preconditioning = Preconditioning()

    @property
    def noise(self) -> NoiseRange:
        """The noise levels G is made for."""
        return self.preconditioning.noise

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor, **conditions: Any) -> Tensor:
        """``x_t [b, ...]``, ``t [b]``, ``s [b]`` in sigma_min .. t -> ``[b, ...]``; ``conditions`` go to the network.

        Raises:
            ValueError: ``t`` or ``s`` is not one level a sample.
        """
        t, s = one_a_sample("t", t, len(x_t)), one_a_sample("s", s, len(x_t))
        c_noise = self.preconditioning.c_noise(s)

        def told(x: Tensor, c_noise_t: Tensor, **conditions: Any) -> Tensor:
            return self.network(x, c_noise_t, c_noise, **conditions)

        g = Preconditioned(told, self.preconditioning)(x_t, t, **conditions)
        kept = over_samples(s / t, x_t)
        return kept * x_t + (1 - kept) * g


@dataclass(frozen=True, kw_only=True)
class UniformEnds:
    """The level s a trajectory ends at: sigma_min for a ``share_to_data``, else uniform in depth below the teacher.

    A share of 1 is consistency training. CTM draws s uniformly (from memory); the share is ours: s = sigma_min is what
    a single evaluation asks for.
    """

    share_to_data: float = 0.5
    """Share of the samples that go all the way down, 0 to 1."""

    def __post_init__(self) -> None:
        need_real(self, "share_to_data", least=0, most=1)

    def __call__(self, t: Tensor, noise: NoiseRange, uniform: Tensor) -> Tensor:
        """``t [b]``, ``uniform [b]`` in [0, 1) -> s ``[b]`` in sigma_min .. t, float32."""
        depth = noise.depth(t.double())
        way = (uniform / max(1 - self.share_to_data, 1e-12)).clamp(max=1)  # 1: down to the data
        s = noise.at(depth + way * (1 - depth)).clamp(min=noise.sigma_min)
        return torch.minimum(torch.where(way == 1, noise.sigma_min, s).float(), t)


@dataclass(frozen=True, kw_only=True)
class TrajectoryObjective(FewStepObjective):
    """Training G on batches of data: student ``G(x_t, t, s)`` against ``G(x_u, u, s)`` from the level u below t.

    x_t = x + t z and x_u = x + u z with the same noise, as in consistency training. ``reach`` moves u from one level
    below t (0, local consistency) towards s (1: the teacher is x_s itself, global consistency). s travels in
    ``batch.conditions``, t and u are ``batch.pairs``.

    # Differs: CTM maps both ends on to sigma_min with G before it compares them, one more pass through the network
    # for each. Here they are compared at s: the noise s z stands on both sides and cancels, so residuals are in units
    # of the data whatever s is, and where s = sigma_min the two are the same. CTM starts its teacher with an ODE
    # solver on a pretrained model, at a random u in [s, t); and adds a denoising and an adversarial loss.

    Source: Kim et al. 2023, arXiv 2310.02279 (soft consistency); Dao et al. 2025 name trajectories as their outlook.
    """

    levels: PairLaw = LevelGrid()
    weight: PairWeight = inverse_gap
    ends: Callable[[Tensor, NoiseRange, Tensor], Tensor] = UniformEnds()
    """Which level s each sample's trajectory ends at."""
    reach: float = 0.0
    """How far down towards s the teacher's level lies, 0 (one level below t) to 1 (s itself)."""
    teacher_input: TeacherInput | None = None
    """What the teacher is shown; None: ``x + u z``. Whatever s is, what keeps the variance is the same."""

    num_times: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        need_real(self, "reach", least=0, most=1)

    def function_of(self, network: Network) -> PreconditionedTrajectory:
        """G of ``network``, which is told two times: ``network(x, c_noise(t), c_noise(s))``."""
        return PreconditionedTrajectory(network, Preconditioning(noise=self.noise))

    def sampling_levels(self, evaluations: int, second: float, step: int, total_steps: int) -> tuple[float, ...]:
        """Equal steps of depth from sigma_max, each but the first the level nearest to that; ``second`` is not asked:
        without fresh noise nothing is lost between evaluations."""
        wanted = self.noise.at(torch.arange(evaluations, dtype=torch.float64) / evaluations).tolist()[1:]
        levels = (self.noise.sigma_max, *(self.levels.nearest(t, step, total_steps) for t in wanted))
        if any(a <= b for a, b in pairwise(levels)):
            raise ValueError(f"{evaluations} evaluations are more than there are trained noise levels")
        return levels

    def sample(
        self,
        f: Trajectory,
        z: Tensor,
        levels: Sequence[float],
        generator: torch.Generator,
        conditions: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """See ``sample_trajectory``; with gamma = 0."""
        return sample_trajectory(f, z, levels=levels, noise=self.noise, conditions=conditions)

    def _for_levels(self, draws: Draws) -> Tensor:
        return two_of(draws.uniform)[0]

    def _completed(self, batch: Batch, draws: Draws, progress: float, paired: bool) -> Batch:
        """Beside the levels t and u the samples get their s."""
        s = self.ends(batch.pairs.t_lo, self.noise, two_of(draws.uniform)[1])
        if self.reach:
            depth = torch.lerp(self.noise.depth(batch.pairs.t_lo), self.noise.depth(s), self.reach)
            t_lo = torch.minimum(torch.maximum(self.noise.at(depth), s), batch.pairs.t_lo)  # rounded: never above
            batch = batch._replace(pairs=batch.pairs._replace(t_lo=t_lo))
        batch = batch._replace(conditions={**batch.conditions, "s": s})
        return self._shown(batch, self.teacher_input, progress, paired)

    def _compared(self, f: Trajectory, batch: Batch, teacher: Trajectory | None) -> tuple[Tensor, Tensor]:
        x, z, pairs, conditions = batch[:4]
        return temporal_difference(
            f, x, z, pairs.t_hi, pairs.t_lo, teacher=teacher, x_lo=batch.x_lo, conditions=conditions
        )


@torch.no_grad()
def sample_trajectory(
    G: Trajectory,  # noqa: N803 (as in the paper)
    z: Tensor,
    *,
    levels: Sequence[float] | None = None,
    gamma: float = 0.0,
    noise: NoiseRange | None = None,
    generator: torch.Generator | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """Samples out of noise with ``len(levels)`` evaluations: from level to level, from the last to sigma_min.

    On the way to a level t it goes down to ``sqrt(1 - gamma^2) t`` and adds fresh noise up to t: gamma = 0 is
    deterministic, gamma = 1 goes to sigma_min each time, like the sampler of consistency models.

    Args:
        G: the trajectories.
        z: standard noise ``[b, ...]``; the samples have its shape, dtype and device.
        levels: falling; None: one, sigma_max.
        gamma: in [0, 1].
        noise: the range G is made for; None: its own (``G.noise``), else the default.
        generator: draws the fresh noise on its own device; needed where there is any.
        conditions: keyword arguments of G.
    Raises:
        ValueError: levels that do not fall or lie outside the range, gamma out of range, or no generator where one is
            needed.
    Source: Kim et al. 2023, arXiv 2310.02279, gamma-sampling.
    """
    noise = noise or getattr(G, "noise", None) or NoiseRange()
    low = noise.sigma_min
    levels = (noise.sigma_max,) if levels is None else levels
    if not levels or any(t <= s for t, s in pairwise((*levels, low))) or levels[0] > noise.sigma_max:
        raise ValueError(
            f"levels must fall, from at most sigma_max = {noise.sigma_max} to above sigma_min = {low}, got "
            f"{list(levels)}"
        )
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    if gamma > 0 and len(levels) > 1 and generator is None:
        raise ValueError("gamma above 0 draws fresh noise: pass a torch.Generator as generator=")
    given, x = conditions or {}, levels[0] * z
    for t, lower in pairwise((*levels, low)):
        s = max((1 - gamma**2) ** 0.5 * lower, low)
        x = G(x, level_of_all(t, z), level_of_all(s, z), **given).to(z.dtype)
        if s < lower:
            assert generator is not None
            fresh = torch.randn(z.shape, generator=generator, device=generator.device, dtype=z.dtype).to(z.device)
            x = x + (lower**2 - s**2) ** 0.5 * fresh
    return x
