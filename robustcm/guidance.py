"""Classifier-free guidance: some labels are hidden in training, and two outputs drawn apart in sampling.

A network told the class of its sample has one label more than there are classes, ``no_class``, which says nothing.
Where training hides some labels behind it, the same network is the conditional and the unconditional one::

    labels = hidden(labels, 0.1, no_class, generator)                          # training
    batch = objective.prepare(x, draws, step, total_steps, conditions={"labels": labels})
    x = sample(Guided(f, 1.5, no_class), z, conditions={"labels": labels})     # sampling
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustcm.checks import LARGEST, need_real
from robustcm.consistency import ConsistencyFunction


def hidden(labels: Tensor, share: float, no_class: int, generator: torch.Generator) -> Tensor:
    """``labels [b]`` int64 with each, independently with probability ``share``, replaced by ``no_class``.

    Pair noise and data by the labels from before: coupled within classes, the noise of every class is standard, and so
    is that of the samples whose label is hidden.

    Args:
        share: 0 to 1.
        generator: draws ``[b]`` numbers, whatever the share; on its own device.
    Raises:
        ValueError: a share out of range, or labels that are not ``[b]``.
    Source: Ho and Salimans 2022, arXiv 2207.12598, Algorithm 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be 0 to 1 of the labels, got {share}")
    if labels.dim() != 1:
        raise ValueError(f"labels must be [b], got {list(labels.shape)}")
    drawn = torch.rand(len(labels), generator=generator, device=generator.device, dtype=torch.float64)
    return torch.where((drawn < share).to(labels.device), no_class, labels)


@dataclass(frozen=True)
class Guided:
    """``f(without the label) + weight (f(with it) - f(without it))``, in the place of f where samples are drawn.

    Weight 1 is f itself and 0 the unconditional f, at the cost of f; all others evaluate f twice.

    What that means: of a diffusion model the outputs are scores or posterior means, and guidance tilts the density a
    little at each of many steps. A consistency function gives a *sample*, the end of the path through x_t; the paths of
    the two start at one noise and end at two images. Above weight 1 the output is extrapolated from one image beyond
    the other, no density is sampled, and no later step mends what goes too far. So it is a dial to try, not a part of
    the method: distilled students are told the weight instead, and learn the guided path of their teacher (Luo et al.
    2023, arXiv 2310.04378).

    Args:
        f: a consistency function, flow map or trajectory that takes ``labels [b]``.
        weight: 0 or more.
        no_class: the label that says nothing.
    Source: Ho and Salimans 2022, arXiv 2207.12598, with w = weight - 1; its use on outputs that are samples: ours.
    """

    f: ConsistencyFunction
    weight: float
    no_class: int

    def __post_init__(self) -> None:
        need_real(self, "weight", least=0, most=LARGEST)

    @property
    def noise(self) -> Any:
        """The range of noise levels that f is made for, if it says."""
        return getattr(self.f, "noise", None)

    def __call__(self, x_t: Tensor, *levels: Tensor, labels: Tensor, **conditions: Any) -> Tensor:
        """``x_t [b, ...]``, ``levels`` as f takes them, ``labels [b]`` -> ``[b, ...]``."""
        if self.weight == 1:
            return self.f(x_t, *levels, labels=labels, **conditions)
        nothing = self.f(x_t, *levels, labels=torch.full_like(labels, self.no_class), **conditions)
        if self.weight == 0:
            return nothing
        return nothing + self.weight * (self.f(x_t, *levels, labels=labels, **conditions) - nothing)
