"""The consistency function, the temporal difference of student and teacher, and the sampler.

Axes: b = batch, ... = one sample. x = clean data, z = standard noise, x_t = x + t z, f = the consistency function,
F = the network inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from robustcm.schedules import SIGMA_MAX, SIGMA_MIN

Network: TypeAlias = Callable[..., Tensor]
"""``F(c_in x_t [b, ...], c_noise [b], **conditions) -> [b, ...]``."""

ConsistencyFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``f(x_t [b, ...], t [b]) -> [b, ...]``: the clean sample at the end of the path through x_t."""


@dataclass(frozen=True, kw_only=True)
class Preconditioning:
    """The coefficients around the network, each a function of ``t [b]``, so that f(x, sigma_min) = x bit-exactly.

    Source: Song et al. 2023, arXiv 2303.01469, appendix C, on Karras et al. 2022, Table 1; checked in the sLCT code.
    """

    sigma_data: float = 0.5
    sigma_min: float = SIGMA_MIN

    def c_skip(self, t: Tensor) -> Tensor:
        # Not sigma_data^2 / (... + sigma_data^2): torch takes the reciprocal first, which need not give 1 at sigma_min.
        return 1 / (((t - self.sigma_min) / self.sigma_data) ** 2 + 1)

    def c_out(self, t: Tensor) -> Tensor:
        return (t - self.sigma_min) * self.sigma_data / torch.sqrt(t**2 + self.sigma_data**2)

    def c_in(self, t: Tensor) -> Tensor:
        return 1 / torch.sqrt(t**2 + self.sigma_data**2)

    def c_noise(self, t: Tensor) -> Tensor:
        return 1000 * 0.25 * torch.log(t)


@dataclass(frozen=True)
class Preconditioned:
    """``f(x_t, t) = c_skip(t) x_t + c_out(t) F(c_in(t) x_t, c_noise(t))``; the same object trains and samples.

    Args:
        network: F. Its output may be of lower precision (autocast); the sum is at least float32.
        preconditioning: the coefficients.
    """

    network: Network
    preconditioning: Preconditioning = Preconditioning()

    def __call__(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """``x_t [b, ...]``, ``t [b]`` in sigma_min .. sigma_max -> ``[b, ...]``; ``conditions`` go to the network.

        Raises:
            ValueError: ``t`` is not one level a sample.
        """
        if t.shape != x_t.shape[:1]:
            raise ValueError(f"t must be one noise level a sample, [{len(x_t)}], got {list(t.shape)}")
        p, spread = self.preconditioning, (-1, *[1] * (x_t.dim() - 1))
        output = self.network(p.c_in(t).reshape(spread) * x_t, p.c_noise(t), **conditions)
        return p.c_skip(t).reshape(spread) * x_t + p.c_out(t).reshape(spread) * output


def add_noise(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """``x_t = x + t z``: ``[b, ...], [b, ...], [b] -> [b, ...]``."""
    return x + t.reshape(-1, *[1] * (x.dim() - 1)) * z


def temporal_difference(
    f: ConsistencyFunction, x: Tensor, z: Tensor, t_hi: Tensor, t_lo: Tensor
) -> tuple[Tensor, Tensor]:
    """Student ``f(x + t_hi z, t_hi)`` and teacher ``stopgrad f(x + t_lo z, t_lo)``, each ``[b, ...]``.

    The teacher is the same f without gradient: no copy of the weights. Noise and dropout mask are shared, on any
    device. The device's random state afterwards is that after one forward pass.

    Source: Song and Dhariwal 2023, arXiv 2310.14189 (teacher without EMA); mask sharing checked in the sLCT code.
    """
    with replayed_rng(x.device), torch.no_grad():
        teacher = f(add_noise(x, z, t_lo), t_lo)
    student = f(add_noise(x, z, t_hi), t_hi)
    return student, teacher


@contextmanager
def replayed_rng(device: torch.device) -> Iterator[None]:
    """Restore torch's random state (CPU and, if ``device`` is an accelerator, its own) on leaving the block.

    What follows the block then draws the same numbers as the block did: two passes share their dropout mask.
    """
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=kind):
        yield


@torch.no_grad()
def sample(
    f: ConsistencyFunction,
    z: Tensor,
    *,
    sigmas: Sequence[float] = (SIGMA_MAX,),
    sigma_min: float = SIGMA_MIN,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw samples with ``len(sigmas)`` network evaluations (NFE).

    ``x = f(sigmas[0] z, sigmas[0])``; then for each further t: ``x = f(x + sqrt(t^2 - sigma_min^2) z', t)`` with
    fresh noise z'.

    Args:
        f: the consistency function.
        z: standard noise ``[b, ...]``; the samples have its shape, dtype and device.
        sigmas: falling noise levels, the first sigma_max; iCT's two-step sampler has (80, 0.821).
        generator: draws the fresh noise on its own device; needed for more than one evaluation, so that no
            sample depends on an ambient generator.
    Source: Song et al. 2023, arXiv 2303.01469, Algorithm 1.
    """
    if not sigmas or any(a <= b for a, b in pairwise(sigmas)) or sigmas[-1] < sigma_min:
        raise ValueError(f"sigmas must fall and stay at or above sigma_min = {sigma_min}, got {list(sigmas)}")
    if len(sigmas) > 1 and generator is None:
        raise ValueError("more than one evaluation draws fresh noise: pass a torch.Generator as generator=")
    x = f(sigmas[0] * z, z.new_full((len(z),), sigmas[0]))
    for t in sigmas[1:]:
        assert generator is not None
        fresh = torch.randn(z.shape, generator=generator, device=generator.device, dtype=z.dtype).to(z.device)
        x = f(x + (t**2 - sigma_min**2) ** 0.5 * fresh, z.new_full((len(z),), t))
    return x
