"""How far a component of the data turns along the paths of the flow: where a Gaussian is right, and where not.

dx_t/dt = (x_t - D(x_t, t)) / t, D the best denoiser. In a principal component k it is D = l / (l + t^2) (x_t - mu) + n,
n the part of the best denoiser that no linear one has, uncorrelated with x_t. So as a vector in the space of random
variables x_t - mu grows and turns, and it turns by n alone, at right angles: by sqrt(E n^2 / (l + t^2)) for each step
of ln t. E n^2 is the error of the best linear denoiser minus that of the best one. What has turned by an angle theta
in all, measured along its way, has at least the correlation cos(theta) with what it was: the two ends of the paths,
x_t and f(x_t, t), have at least ``cos(integral of sqrt(E n^2 / (l + t^2)) d ln t)``.

Gaussian data have n = 0, nothing turns, and the linear consistency function is right at each level. A denoiser that is
better than the linear one on samples held out shows how much it turns at least; no network is trained.

Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustcm.checks import need_whole
from robustcm.clusters import ROUNDS, Clusters
from robustcm.gaussian import Gaussian, Turned
from robustcm.noise import NoiseRange

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(y_t [n, k], t [n]) -> [n, k]`` in principal components, the mean taken out."""


def turning(
    y: Tensor,
    variances: Tensor,
    levels: Tensor,
    denoiser: Denoiser,
    generator: torch.Generator,
    errors: float = 2.0,
    on_level: Callable[[], object] = lambda: None,
) -> Tensor:
    """By how much each component turns for each step of ln t, at each of ``levels``: ``[levels, k]``, radians.

    Args:
        y: principal components of samples that ``denoiser`` has not seen, ``[n, k]``.
        variances: of the Gaussian, ``[k]``: its best denoiser is what the other is compared with.
        levels: noise levels, ``[levels]``.
        generator: CPU; draws the noise.
        errors: so many standard errors of what is measured are taken off: what is not sure counts as nothing.
        on_level: called behind each.
    """
    out = []
    for t in levels.tolist():
        y_t = y + t * torch.randn(y.shape, generator=generator, dtype=y.dtype)
        linear = y_t * (variances / (variances + t * t))
        better = (y - linear).square() - (y - denoiser(y_t, y.new_full((len(y),), t))).square()
        sure = better.mean(0) - errors * better.std(0) / math.sqrt(len(y))
        on_level()
        out.append((sure.clamp(min=0) / (variances + t * t)).sqrt())
    return torch.stack(out)


@dataclass(frozen=True, kw_only=True)
class Turning:
    """``turning`` measured with a mixture of Gaussians fitted to one half of the samples, on the other half."""

    clusters: int = 32
    """Of the mixture, 2 to 1000."""
    levels: int = 25
    """Noise levels it is measured at, 2 to 1000, at equal steps of ln t."""
    components: int = 512
    """Principal components that are looked at, 1 or more; further ones turn as the last 64 of these do on average."""

    def __post_init__(self) -> None:
        need_whole(self, "clusters", least=2, most=1000)
        need_whole(self, "levels", least=2, most=1000)
        need_whole(self, "components", least=1)

    @property
    def steps(self) -> int:
        """Of which ``on`` takes so many."""
        return ROUNDS + self.levels

    def on(
        self,
        x: Tensor,
        gaussian: Gaussian,
        generator: torch.Generator,
        noise: NoiseRange = NoiseRange(),  # noqa: B008 (frozen)
        on_step: Callable[[], object] = lambda: None,
    ) -> Turned:
        """The gain that is right for data ``x [n, ...]`` whose Gaussian is ``gaussian``, both on the CPU.

        Half a minute for 5000 samples of 512 elements. What lies outside of the Gaussian's axes counts as a further
        component.

        Args:
            generator: CPU; which samples are held out, where clusters begin, the noise.
            on_step: called ``steps`` times, for a progress bar.
        Raises:
            ValueError: fewer than 4 samples, of which half would have no spread.
        """
        if len(x) < 4:
            raise ValueError(f"{len(x)} samples are too few to measure where they are Gaussian: 4 or more")
        m = len(gaussian.variances)
        seen = min(self.components, m - 1)
        y = gaussian.projected(x.detach())[torch.randperm(len(x), generator=generator), :seen]
        fitted, held_out = y[: len(y) // 2], y[len(y) // 2 :]
        mixture = Clusters.fit(fitted, self.clusters, generator, on_round=on_step)
        grid = torch.linspace(math.log(noise.sigma_min), math.log(noise.sigma_max), self.levels).exp()
        speeds = turning(held_out, gaussian.variances[:seen], grid, mixture.denoised, generator, on_level=on_step)
        speeds = torch.cat([speeds, speeds[:, -64:].mean(1, keepdim=True).expand(-1, m - seen)], 1)
        step = math.log(noise.sigma_max / noise.sigma_min) / (self.levels - 1)
        way = torch.cumsum((speeds[1:] + speeds[:-1]) / 2 * step, 0).clamp(max=math.pi / 2)
        return Turned(torch.cat([torch.zeros_like(speeds[:1]), way]))
