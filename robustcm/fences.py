"""Impulsive outliers taken out of the latents themselves, before they are normalised: clipping them.

The five techniques make training on outliers bearable; a model that fits its data still draws them. What an
autoencoder's decoder does not need is better taken out of the data, and the fences say what is out of line without
being moved by it (``TukeyClip``): up to a quarter of a channel's values on either side may be arbitrarily wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustcm.checks import LARGEST, need_real, need_whole
from robustcm.tails import box_statistics_along


@dataclass(frozen=True, kw_only=True)
class TukeyClip:
    """Latents clipped, channel by channel, to ``[Q1 - k IQR, Q3 + k IQR]``.

    Applied to raw latents: mean and standard deviation for the normalisation are then those of the bulk, which
    outliers would inflate (1 % of the elements ten times as far from the mean shrink all others by 1.4). Clipping
    twice is clipping once. A channel of IQR 0 is left as it is: its fences say nothing.

    Source: ours; the fences are Tukey's (Exploratory Data Analysis, 1977), his inner ones for k = 1.5, outer for 3.
    """

    k: float = 1.5
    """Of a Gaussian, 0.7 % of the values lie beyond k = 1.5 (2.7 standard deviations), 2e-6 beyond k = 3."""

    def __post_init__(self) -> None:
        need_real(self, "k", least=0, most=LARGEST)

    def __call__(self, raw_latents: Tensor) -> Tensor:
        """``[n, ch, ...] -> [n, ch, ...]``; NaN stays NaN."""
        low, high = self.bounds(raw_latents)
        shape = (1, -1, *[1] * (raw_latents.dim() - 2))
        return raw_latents.clamp(low.reshape(shape), high.reshape(shape))

    def bounds(self, raw_latents: Tensor) -> tuple[Tensor, Tensor]:
        """``(low [ch], high [ch])`` of ``raw_latents [n, ch, ...]``.

        Raises:
            ValueError: a channel without a finite value.
        """
        boxes = box_statistics_along(raw_latents, 1)
        reach = [self.k * box.iqr if box.iqr > 0 else float("inf") for box in boxes]
        low = [box.q1 - r for box, r in zip(boxes, reach, strict=True)]
        high = [box.q3 + r for box, r in zip(boxes, reach, strict=True)]
        return raw_latents.new_tensor(low), raw_latents.new_tensor(high)


@dataclass(frozen=True, kw_only=True)
class ConditionalClip:
    """Latents that do not fit the rest of their sample, put where the rest of it says.

    Every element has a mean and a standard deviation given all other elements of its sample, by a Gaussian fitted to
    the data. One farther than ``k`` of those from that mean is put there. This is done ``rounds`` times, the others
    taken as the round before left them, at first clipped at Tukey's inner fences; then as often again with a Gaussian
    for each of ``groups`` of similar samples, whose covariances share a part ``shared`` of the one within all groups.
    ``TukeyClip`` sees only what is out of line among all samples and leaves it at the edge; this also sees what is out
    of line in its sample, and puts there what is likely.

    The numbers were chosen on the latents of the digits with 0, 1 and 5 % of outliers put in. Elements that are nearly
    a function of the others are beyond this fit: too many of them get moved.

    Source: ours; the idea that cells, not samples, are deviant and are predicted by the others is that of Rousseeuw
    and Van den Bossche 2018, "Detecting deviating data cells".
    """

    k: float = 4.0
    """Standard deviations, given the rest of the sample, beyond which an element is moved; above 0."""
    rounds: int = 3
    """Of each kind, 1 or more."""
    groups: int = 20
    """At most; fewer where a group would have less than ``SAMPLES_AN_ELEMENT`` samples for each latent element."""
    shared: float = 0.3
    """Part of a group's covariance that all groups have in common, 0 to 1."""

    MOST_ELEMENTS: ClassVar[int] = 4096
    SAMPLES_AN_ELEMENT: ClassVar[int] = 5

    def __post_init__(self) -> None:
        need_real(self, "k", above=0, most=LARGEST)
        need_whole(self, "rounds", "groups", least=1)
        need_real(self, "shared", least=0, most=1)

    def __call__(self, raw_latents: Tensor) -> Tensor:
        """``[n, ch, ...] -> [n, ch, ...]``; latents with a NaN come back as they are.

        Raises:
            ValueError: samples of more than ``MOST_ELEMENTS`` elements, whose covariance would take long to invert.
        """
        x = raw_latents.flatten(1).double()
        n, d = x.shape
        if d > self.MOST_ELEMENTS:
            raise ValueError(
                f"clip=ConditionalClip is for up to {self.MOST_ELEMENTS} latent elements, got {d}: use TukeyClip"
            )
        if not x.isfinite().all():
            return raw_latents
        q1, q3 = (x.kthvalue(max(1, round(q * n)), dim=0).values for q in (0.25, 0.75))
        clipped = x.clamp(q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1))
        groups = min(self.groups, n // (self.SAMPLES_AN_ELEMENT * d))
        for count in [1] * self.rounds + ([groups] * self.rounds if groups > 1 else []):
            clipped = self._moved(x, clipped, _similar(clipped, count))
        return clipped.to(raw_latents.dtype).reshape(raw_latents.shape)

    def _moved(self, x: Tensor, clipped: Tensor, group: Tensor) -> Tensor:
        """One round: ``x [n, d]`` where it fits the rest of ``clipped [n, d]``, given each one's ``group [n]``."""
        members = [torch.nonzero(group == g)[:, 0] for g in range(int(group.max()) + 1) if (group == g).any()]
        means = [clipped[those].mean(0) for those in members]
        centred = [clipped[those] - mean for those, mean in zip(members, means, strict=True)]
        spread = [part.T @ part for part in centred]
        within = torch.stack(spread).sum(0) / max(1, len(x) - 1)
        # A little on the diagonal: few samples, or an element that never changes, leave it singular.
        ridge = torch.diag(1e-6 * within.diagonal() + 1e-12)
        out = torch.empty_like(x)
        for those, mean, own in zip(members, means, spread, strict=True):
            covariance = self.shared * within + (1 - self.shared) * own / max(1, len(those) - 1)
            precision = torch.linalg.inv(covariance + ridge)
            likely = clipped[those] - (clipped[those] - mean) @ precision / precision.diagonal()
            fits = (x[those] - likely).abs() <= self.k * precision.diagonal().rsqrt()
            out[those] = torch.where(fits, x[those], likely)
        return out


def _similar(x: Tensor, groups: int, rounds: int = 15) -> Tensor:
    """The group ``[n]`` of each of ``x [n, d]``: k-means from evenly chosen samples, so a function of ``x`` alone."""
    group = torch.zeros(len(x), dtype=torch.long, device=x.device)
    if groups == 1:
        return group
    centres = x[torch.linspace(0, len(x) - 1, groups).long()]
    for _ in range(rounds):
        group = torch.cdist(x, centres).argmin(1)
        count = group.bincount(minlength=groups)[:, None]
        total = torch.zeros_like(centres).index_add(0, group, x)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    return group
