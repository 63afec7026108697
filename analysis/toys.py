"""Data in the plane and a network that learns them in seconds, for pictures of what the techniques do."""

from __future__ import annotations

import math

import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from robustcm.consistency import Preconditioned, add_noise
from robustcm.couplers import Coupler, independent
from robustcm.gates import Gate, coupled_noise, everywhere
from robustcm.losses import LikeSquares, Rho
from robustcm.objective import Objective, draw
from robustcm.randomness import Stream, step_generator
from robustcm.robust import robust_distance
from robustcm.scales import CSchedule

CLUSTERS = 8


def ring(n: int, seed: int, *, radius: float = 0.7, spread: float = 0.06) -> tuple[Tensor, Tensor]:
    """``x [n, 2]``, std about 0.5 a channel, in ``CLUSTERS`` clusters on a circle, and the cluster of each, ``[n]``."""
    generator = step_generator(seed, 0)
    cluster = torch.randint(CLUSTERS, (n,), generator=generator)
    angle = 2 * math.pi * cluster / CLUSTERS
    centre = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + spread * torch.randn(n, 2, generator=generator), cluster


class Network(nn.Module):
    """F of a consistency function in the plane: it sees the point and waves of the logarithm of its level."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """``x [b, 2]``, ``c_noise [b] -> [b, 2]``."""
        phase = c_noise[:, None] / 250 * torch.tensor([0.25, 0.5, 1.0, 2.0])
        out: Tensor = self.out(self.layers(torch.cat([x, phase.sin(), phase.cos()], 1)))
        return out


def trained(objective: Objective, data: Tensor, *, seed: int, steps: int, batch: int = 128) -> Preconditioned:
    """The consistency function of a network after ``steps`` steps on ``data [n, 2]``."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = Network()
    f = objective.function_of(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    state = objective.init()
    for step in range(steps):
        x = data[torch.randint(len(data), (batch,), generator=step_generator(seed, step, Stream.ORDER))]
        terms = objective(f, objective.prepare(x, draw(seed, step, x.shape), step, steps), state)
        state = terms.state
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
    return f


def pairs(
    x: Tensor, t: float, seed: int, coupler: Coupler = independent, gate: Gate = everywhere, batch: int = 256
) -> Tensor:
    """The noise ``[n, 2]`` that each ``x [n, 2]`` meets in training at level ``t``, ``batch`` at a time."""
    z = torch.randn(x.shape, generator=step_generator(seed, 1))
    levels = torch.full((len(x),), t)
    parts = zip(*(v.split(batch) for v in (x, z, levels)), strict=True)
    return torch.cat([coupled_noise(a, b, c, coupler, gate) for a, b, c in parts])


def guess(x: Tensor, x_t: Tensor, at: Tensor, neighbours: int = 64) -> Tensor:
    """``E[x | x_t]`` at the points ``at [m, 2]``: the mean x of the nearest x_t."""
    _, index = cKDTree(x_t.numpy()).query(at.numpy(), neighbours)
    return x[torch.as_tensor(index)].mean(1)


def left_open(x: Tensor, z: Tensor, t: float) -> float:
    """The share of the variance of x that a look at ``x + t z`` leaves open."""
    x_t = add_noise(x, z, torch.full((len(x),), t))
    return float((x - guess(x, x_t, x_t)).square().sum() / (x - x.mean(0)).square().sum())


def flow_path(x: Tensor, z: Tensor, start: Tensor, levels: Tensor) -> Tensor:
    """The paths ``[m, n, 2]`` of the probability flow from noise ``start [m, 2]`` down ``levels [n]``, over 1 + t.

    ``dx_t / dt = (x_t - E[x | x_t]) / t`` (Song et al. 2021, arXiv 2011.13456), Euler's steps, under the joint law of
    the pairs. A perfect consistency function jumps to the end of the path it stands on. Divided by 1 + t noise and
    data have one size.
    """
    t, x_t = float(levels[0]), float(levels[0]) * start
    path = [x_t / (1 + t)]
    for lower in levels[1:].tolist():
        slope = (x_t - guess(x, add_noise(x, z, torch.full((len(x),), t)), x_t)) / t
        x_t = x_t + (lower - t) * slope
        t = lower
        path.append(x_t / (1 + t))
    return torch.stack(path, 1)


def descent(targets: Tensor, start: Tensor, rho: Rho, c: CSchedule, *, steps: int) -> tuple[Tensor, list[float]]:
    """The way ``[steps + 1, 2]`` of a student from ``start [2]`` down the mean distance to ``targets [n, 2]``; each c.

    The distance is brought to the height of squares, so that one rate suits every c.
    """
    way, scales, state = [start], [], c.init()
    depth = torch.zeros(len(targets))
    for _ in range(steps):
        at = way[-1].clone().requires_grad_()
        found = robust_distance(at.expand_as(targets), targets, state, depth=depth, distance=LikeSquares(rho), c=c)
        state = c.observe(state, found.seen)
        scales.append(float(torch.as_tensor(found.c).mean()))
        (slope,) = torch.autograd.grad(found.distance.mean(), at)
        way.append(way[-1] - 0.05 * slope)
    return torch.stack(way), scales
