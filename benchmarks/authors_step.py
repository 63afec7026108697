"""A training step as the authors of the method built theirs, told again from its description.

The teacher is a second network into which the weights are copied at every step. The coupling is POT's ``emd`` on the
whole batch, on the main thread, with pairs drawn from its plan. Gradients go through ``nan_to_num`` and a clip at 100,
the optimizer is torch's RAdam, the average of the weights is updated tensor by tensor.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import ot
import torch
from torch import Tensor, nn

from robustcm.consistency import Preconditioned, Preconditioning, add_noise

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
P_MEAN, P_STD = -1.1, 2.0
EMA = 0.9999


class AuthorsStep:
    """Called with ``x [b, ch, h, w]`` it takes one step; holds what it needs between steps."""

    def __init__(self, network: nn.Module, num_levels: int, lr: float = 1e-4) -> None:
        self.network, self.numbers = network.train(), np.random.default_rng(0)
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.ema = copy.deepcopy(network).requires_grad_(False)
        self.optimizer = torch.optim.RAdam(network.parameters(), lr=lr, weight_decay=1e-4)
        ramp = torch.linspace(0, 1, num_levels, dtype=torch.float64)
        levels = (SIGMA_MAX ** (1 / RHO) + ramp * (SIGMA_MIN ** (1 / RHO) - SIGMA_MAX ** (1 / RHO))) ** RHO
        self.levels = levels.float()
        cumulative = torch.erf((levels.log() - P_MEAN) / (math.sqrt(2) * P_STD))
        self.probabilities = cumulative[:-1] - cumulative[1:]
        self.c = math.exp(-1.15 * math.log(num_levels - 1) - 0.85)

    def coupled(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs drawn, with replacement, from the exact plan at the normalised squared cost."""
        b = len(x)
        cost = torch.cdist(x.flatten(1), z.flatten(1)) ** 2
        plan = ot.emd(ot.unif(b), ot.unif(b), (cost / cost.max()).numpy())
        chosen = self.numbers.choice(b * b, b, p=plan.flatten() / plan.sum())
        pairs = torch.from_numpy(chosen)
        return x[pairs // b], z[pairs % b]

    def __call__(self, x: Tensor) -> None:
        """Everything, from the noise to the average."""
        preconditioning = Preconditioning()
        x, z = self.coupled(x, torch.randn_like(x))
        index = torch.multinomial(self.probabilities, len(x), replacement=True)
        t_hi, t_lo = self.levels[index], self.levels[index + 1]
        for copied, weight in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
            copied.data.copy_(weight.data)

        state = torch.get_rng_state()
        student = Preconditioned(self.network, preconditioning)(add_noise(x, z, t_hi), t_hi)
        torch.set_rng_state(state)  # the same dropout mask
        with torch.no_grad():
            target = Preconditioned(self.teacher, preconditioning)(add_noise(x, z, t_lo), t_lo)
        r2 = ((student - target) ** 2).flatten(1).sum(1)
        loss = torch.log(1 + r2 / (2 * self.c**2)) / (t_hi - t_lo)
        early = index >= 0.75 * len(self.levels)
        loss = loss + 5 * torch.where(early, ((student - x) ** 2).flatten(1).mean(1), 0)

        self.optimizer.zero_grad()
        loss.mean().backward()
        for weight in self.network.parameters():
            if weight.grad is not None:
                torch.nan_to_num(weight.grad, nan=0, posinf=1e5, neginf=-1e5, out=weight.grad)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 100)
        self.optimizer.step()
        for averaged, weight in zip(self.ema.parameters(), self.network.parameters(), strict=True):
            averaged.data.mul_(EMA).add_(weight.data, alpha=1 - EMA)

    def held(self) -> list[Tensor]:
        """What lies in memory between two steps."""
        moments = [value for found in self.optimizer.state.values() for value in found.values()]
        networks = (self.network, self.teacher, self.ema)
        return [*moments, *(weight for network in networks for weight in network.parameters())]


def num_bytes(tensors: list[Tensor]) -> int:
    """Of the numbers in them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
