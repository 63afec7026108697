"""How gradients become steps: Adam, RAdam, Muon; and a step that a flag on the device takes back."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reference_trainer.errors import require
from reference_trainer.networks import blocks

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that ``orthogonal`` applies; checked in Jordan's code."""


@dataclass(frozen=True, kw_only=True)
class Adam:
    """torch's fused AdamW, with gradients clipped at ``max_norm``.

    On a CPU the fused kernel is several times faster than RAdam's many passes over the weights; behind a warm-up the
    two update alike. ``eps`` and ``max_norm`` differ from torch's 1e-8 and the authors' 100; on the digits that
    changes nothing measurable (docs/log.md).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of gradient and squared gradient, each in [0, 1)."""
    eps: float = 1e-5
    """Added to the root of the averaged squared gradient, above 0, at most 1."""
    weight_decay: float = 0.0
    """Share by which weights shrink a step, times the learning rate; 0 to 100."""
    max_norm: float = 1.0
    """Norm at which the gradient is clipped, above 0; inf: not at all."""
    on_nonfinite: Literal["skip", "zero", "stop"] = "skip"
    """What a step with NaN or infinite data, loss or gradient does. ``skip``: nothing; weights, averages and c stay,
    the next log names it, and ``most_bad_steps`` of them in a row end the run. ``zero`` is what the authors do: such
    elements of the gradient count as 0 before clipping. ``stop``: the next log ends the run."""

    def __post_init__(self) -> None:
        require(
            all(0 <= beta < 1 for beta in self.betas) and 0 < self.eps <= 1 and 0 <= self.weight_decay <= 100,
            f"need betas in [0, 1), eps in (0, 1], weight_decay in [0, 100], got {self}",
        )
        require(self.max_norm > 0, f"max_norm must be positive, got {self.max_norm}; inf switches clipping off")
        require(
            self.on_nonfinite in ("skip", "zero", "stop"),
            f"on_nonfinite is 'skip', 'zero' or 'stop', got {self.on_nonfinite!r}",
        )

    @property
    def skips(self) -> bool:
        """Whether a bad step changes nothing."""
        return self.on_nonfinite != "zero"

    def build(self, weights: Sequence[Tensor], network: nn.Module) -> torch.optim.Optimizer:
        """Of ``weights``, which are those of ``network``, or of each this process's shard, in its order.

        The learning rate is set anew at every step.
        """
        return torch.optim.AdamW(
            weights, lr=0.0, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


@dataclass(frozen=True, kw_only=True)
class RAdam(Adam):
    """torch's RAdam with decoupled weight decay: the authors' choice, with lr 1e-4 and weight decay up to 1e-4."""

    eps: float = 1e-8
    max_norm: float = 100.0

    def build(self, weights: Sequence[Tensor], network: nn.Module) -> torch.optim.Optimizer:
        """The learning rate is set anew at every step."""
        return torch.optim.RAdam(
            weights,
            lr=0.0,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled_weight_decay=True,
            foreach=True,
            capturable=any(p.is_cuda for p in weights),  # else it counts its steps on the CPU, see step_unless
        )


@dataclass(frozen=True, kw_only=True)
class Muon(Adam):
    """Muon for the matrices of the backbone's blocks, AdamW for all other weights.

    Muon makes the averaged gradient of a matrix orthogonal: a step moves it as far in the directions whose gradient is
    small as in those whose gradient is large. Source: Jordan et al. (2024), "Muon: an optimizer for hidden layers in
    neural networks".

    Matrices are the weights of linear layers in blocks (``matrices``). Biases, norms, convolutions, what embeds the
    time, the first and the last layer are AdamW's. ``betas`` and ``eps`` are of AdamW alone. An update of a matrix has
    its size however small the gradient is, and so it does not end when gradients do.

    The product of a step grows with the weights and not with the batch, and each process computes all of it.
    """

    eps: float = 1e-8
    momentum: float = 0.95
    """Decay of the averaged gradient of a matrix, in [0, 1)."""
    size: float = 8.0
    """Spectral norm of an update over the learning rate, above 0; of a matrix with more rows than columns
    sqrt(rows / columns) times as much. Behind Adam's 3e-3, 7 is Muon's usual 0.02."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, f"momentum must be in [0, 1), got {self.momentum}")
        require(0 < self.size <= 1000, f"size must be in (0, 1000], got {self.size}")

    def build(self, weights: Sequence[Tensor], network: nn.Module) -> torch.optim.Optimizer:
        """``weights`` are those of ``network``, whole; the learning rate is set anew at every step."""
        inside = matrices(network)
        assert inside <= {id(weight) for weight in weights}, "weights of another network, or shards"
        return MuonAndAdam(
            weights,
            [id(weight) in inside for weight in weights],
            momentum=self.momentum,
            size=self.size,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


def matrices(network: nn.Module) -> set[int]:
    """The ids of the weights of the linear layers in the blocks of ``network``, but for those used elsewhere, too."""
    inside = {id(layer): layer for block in blocks(network) for layer in block.modules()}
    elsewhere = {id(p) for m in network.modules() if id(m) not in inside for p in m.parameters(recurse=False)}
    linear = (layer for layer in inside.values() if isinstance(layer, nn.Linear))
    return {id(layer.weight) for layer in linear} - elsewhere


def said_of_muon(network: nn.Module) -> str:
    """How much of ``network`` it moves, in one line."""
    inside = matrices(network)
    if not inside:
        return "Muon has nothing to move here: no linear layer in a ModuleList; all weights are AdamW's"
    sizes = {id(p): p.numel() for p in network.parameters()}
    share = sum(sizes[key] for key in inside) / sum(sizes.values())
    return f"Muon moves {len(inside)} matrices, {share:.0%} of the weights; AdamW moves the others"


class MuonAndAdam(torch.optim.AdamW):
    """AdamW, but for those of its ``weights`` that are ``inside``, matrices, to which it does as Muon.

    torch has a Muon of its own from 2.9 on. It computes in bfloat16, for which a CPU without such instructions takes
    20 times as long as for float32, and it does not know ``found_inf``.
    """

    def __init__(
        self, weights: Sequence[Tensor], inside: Sequence[bool], *, momentum: float, size: float, **adam: Any
    ) -> None:
        super().__init__(weights, lr=0.0, fused=True, **adam)
        (group,) = self.param_groups
        group |= {"inside": list(inside), "momentum": momentum, "size": size}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; nothing changes where ``found_inf`` (0-dim, set by whoever knows) is not 0."""
        (group,) = self.param_groups
        inside = [w for w, inside in zip(group["params"], group["inside"], strict=True) if inside]
        gradients = {weight: weight.grad for weight in inside if weight.grad is not None}
        for weight in gradients:
            weight.grad = None  # AdamW passes over what has none
        super().step()
        same_shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for weight, gradient in gradients.items():
            weight.grad = gradient
            same_shapes[weight.shape].append(weight)
        for weights in same_shapes.values():
            self._move(weights, [gradients[weight] for weight in weights], group)

    def _move(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """One step of matrices of one shape, together: a few kernels in the place of a few each."""
        skipped = getattr(self, "found_inf", None)
        for weight in weights:
            if not self.state[weight]:  # AdamW looks for steps in what it loads
                self.state[weight] = {"step": weight.new_zeros(()), "momentum": torch.zeros_like(weight)}
            self.state[weight]["step"] += 1 if skipped is None else skipped == 0
        gradient = torch.stack(gradients)
        average = torch.stack([self.state[weight]["momentum"] for weight in weights])
        average = average.lerp(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(average, group["momentum"]))  # Nesterov's: a step ahead
        rows, columns = update.shape[-2:]
        size = group["lr"] * group["size"] * math.sqrt(max(1.0, rows / columns))
        for weight, momentum, direction in zip(weights, average, update, strict=True):
            moved = weight * (1 - group["lr"] * group["weight_decay"]) - size * direction
            for old, new in ((self.state[weight]["momentum"], momentum), (weight, moved)):
                old.copy_(new if skipped is None else torch.where(skipped > 0, old, new))


def orthogonal(gradients: Tensor) -> Tensor:
    """Matrices ``[..., rows, columns]`` with their singular values moved to about 1 (0.68 to 1.21), vectors kept.

    Five steps of Newton and Schulz with coefficients of Jordan et al., which take singular values of 0.0015 of the norm
    or more there. 0 stays 0. On a GPU in bfloat16, as theirs is.
    """
    wide = gradients.shape[-2] <= gradients.shape[-1]
    x = gradients if wide else gradients.mT
    # twice, as squares of small gradients are 0 in float32
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1.0)
    x = x.bfloat16() if x.is_cuda else x
    much_wider = not x.is_cuda and x.shape[-1] >= 2 * x.shape[-2]
    x = _by_squares(x) if much_wider else _by_steps(x)
    return (x if wide else x.mT).to(gradients.dtype)


def _by_steps(x: Tensor) -> Tensor:
    """Five times ``a x + b (x x^T) x + c (x x^T)^2 x``; x ``[..., rows, columns]``, no higher than wide."""
    first, third, fifth = NEWTON_SCHULZ
    for _ in range(5):
        squared = x @ x.mT
        x = first * x + (third * squared + fifth * squared @ squared) @ x
    return x


def _by_squares(x: Tensor) -> Tensor:
    """The same of x ``[..., rows, columns]`` much wider than high, at half the cost: its factor follows from ``x x^T``.

    All factors are polynomials in it, so they commute. For float32: in bfloat16 small singular values drown.
    """
    first, third, fifth = NEWTON_SCHULZ
    squared = x @ x.mT
    one = torch.eye(squared.shape[-1], dtype=x.dtype, device=x.device)
    by = factor = first * one + third * squared + fifth * squared @ squared
    for _ in range(4):
        squared = factor @ (squared @ factor)
        factor = first * one + third * squared + fifth * squared @ squared
        by = factor @ by
    return by @ x


def moments_like(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """What ``optimizer`` keeps of each of its ``weights`` once it has had a gradient: names, and tensors so shaped."""
    (group,) = optimizer.param_groups
    inside = group.get("inside", [False] * len(weights))
    names = [("momentum",) if muon else ("exp_avg", "exp_avg_sq") for muon in inside]
    return [
        {"step": torch.tensor(0.0)} | dict.fromkeys(own, weight) for own, weight in zip(names, weights, strict=True)
    ]


@torch.no_grad()
def step_unless(skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()``; where ``skipped`` (0-dim bool) is true, weights, moments and step count stay as they are.

    A fused optimizer looks at the flag in its kernel (``found_inf``, which torch's GradScaler sets, too), and so does
    ``MuonAndAdam``. For others the step is taken and put back, which holds a copy of weights and moments meanwhile.
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
