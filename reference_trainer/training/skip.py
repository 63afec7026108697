"""An optimizer step, or nothing at all, as a flag on the device says; nobody waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def step_unless(skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()``; where ``skipped`` (0-dim bool) is true, weights, moments and step count stay as they are.

    A fused optimizer looks at the flag in its kernel (``found_inf``, which torch's GradScaler sets, too). For others
    the step is taken and put back, which holds a copy of weights and moments meanwhile.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        optimizer.step()
        return
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = [(p.clone(), {name: moment.clone() for name, moment in optimizer.state[p].items()}) for p in weights]
    optimizer.step()
    for p, (weight, moments) in zip(weights, before, strict=True):
        p.copy_(torch.where(skipped, weight, p))
        for name, moment in optimizer.state[p].items():
            old = moments.get(name, torch.zeros_like(moment))  # nothing there: this was the first step
            moment.copy_(torch.where(skipped, old, moment))
