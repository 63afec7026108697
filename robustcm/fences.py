"""Impulsive outliers taken out of the latents themselves, before they are normalised: clipping them.

The five techniques make training on outliers bearable; a model that fits its data still draws them. What an
autoencoder's decoder does not need is better taken out of the data, and the fences say what is out of line without
being moved by it (``TukeyClip``): less than a quarter of a channel's values on either side may be arbitrarily wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustcm.checks import LARGEST, need_finite, need_real, need_whole
from robustcm.tails import box_statistics_along

ROWS, COLUMNS = 2048, 256
"""Of a sample that a clip is fitted on, taken to float64 at a time."""


@dataclass(frozen=True, kw_only=True)
class TukeyClip:
    """Latents clipped, channel by channel, to ``[Q1 - k IQR, Q3 + k IQR]``.

    Applied to raw latents: mean and standard deviation for the normalisation are then those of the bulk, which
    outliers would inflate (1 % of the elements ten times as far from the mean shrink all others by 1.4). Clipping
    twice is clipping once, but where a quartile is interpolated from a value that is clipped: of few values, or with
    nearly a quarter of them wild. A channel of IQR 0 is left as it is: its fences say nothing.

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
        if empty := [channel for channel, box in enumerate(boxes) if not box.count]:
            raise ValueError(f"channel {empty[0]} of the latents has no finite value to clip it by: leave it out")
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

    def fit(self, raw_latents: Tensor) -> FittedClip:
        """What it does to samples such as ``raw_latents [n, ch, ...]``, as a function of each sample by itself.

        For data that are not held at once: fit it on some of them. Of those it makes nearly what ``__call__`` makes.

        Raises:
            ValueError: fewer than ``SAMPLES_AN_ELEMENT`` samples for each latent element, more than ``MOST_ELEMENTS``
                of these, or values that are not finite.
        """
        x = raw_latents.flatten(1)
        n, d = x.shape
        if d > self.MOST_ELEMENTS or n < self.SAMPLES_AN_ELEMENT * d:
            raise ValueError(
                f"clip=ConditionalClip is fitted on {self.SAMPLES_AN_ELEMENT} samples an element or more, of up to "
                f"{self.MOST_ELEMENTS} elements, got {n} of {d}: use TukeyClip"
            )
        need_finite(raw_latents=raw_latents)
        low, high = torch.cat([_inner_fences(columns.double()) for columns in torch.split(x, COLUMNS, 1)], 1)
        fitted = FittedClip(low, high, ())
        clipped = torch.cat([part.double().clamp(low, high).to(x.dtype) for part in torch.split(x, ROWS)])
        groups = min(self.groups, n // (self.SAMPLES_AN_ELEMENT * d))
        for count in [1] * self.rounds + ([groups] * self.rounds if groups > 1 else []):
            found = self._round(clipped, count)
            fitted = FittedClip(low, high, (*fitted.rounds, found))
            parts = zip(torch.split(x, ROWS), torch.split(clipped, ROWS), strict=True)
            clipped = torch.cat([found(part.double(), was.double()).to(x.dtype) for part, was in parts])
        return fitted

    def _round(self, clipped: Tensor, count: int) -> Round:
        """What one round knows of ``clipped [n, d]``, in ``count`` groups or fewer."""
        n, d = clipped.shape
        centres = _centres(clipped.double(), count) if count > 1 else None
        group = _nearest(clipped.double(), centres) if centres is not None else torch.zeros(n, dtype=torch.long)
        members = [torch.nonzero(group == g)[:, 0] for g in range(count)]
        means = torch.zeros(count, d, dtype=torch.float64)
        spread = torch.zeros(count, d, d, dtype=torch.float64)
        for g, those in enumerate(members):
            parts = torch.split(those, ROWS)
            means[g] = sum(clipped[part].double().sum(0) for part in parts) / max(1, len(those))
            for part in parts:
                centred = clipped[part].double() - means[g]
                spread[g].addmm_(centred.T, centred)
        within = spread.sum(0) / max(1, n - 1)
        ridge = torch.diag(1e-6 * within.diagonal() + 1e-12)
        reach = torch.zeros(count, d, dtype=torch.float64)
        for g, those in enumerate(members):  # a place for each precision: that of its spread
            own = spread[g] / max(1, len(those) - 1)
            spread[g] = torch.linalg.inv(self.shared * within + (1 - self.shared) * own + ridge)
            # Samples that the Gaussian was not fitted to lie farther from it than those that it was: as residuals of a
            # regression left out, by 1 / (1 - h), the mean leverage h = d / n (Allen 1974, PRESS).
            leverage = d * (self.shared / n + (1 - self.shared) / max(1, len(those)))
            reach[g] = self.k * spread[g].diagonal().rsqrt() / (1 - min(0.8, leverage))
        return Round(centres, means, spread, reach)

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


@dataclass(frozen=True)
class Round:
    """One round of a ``FittedClip``, g groups of samples of d elements; float64."""

    centres: Tensor | None
    """``[g, d]``: a sample belongs to the nearest; None: all to one group."""
    means: Tensor
    """``[g, d]``."""
    precisions: Tensor
    """``[g, d, d]``, inverse covariances."""
    reach: Tensor
    """``[g, d]``, how far an element may be from where the others say."""

    def __call__(self, x: Tensor, clipped: Tensor) -> Tensor:
        """``x [n, d]`` where it fits the rest of ``clipped [n, d]``, else where that says."""
        group = _nearest(clipped, self.centres) if self.centres is not None else x.new_zeros(len(x), dtype=torch.long)
        out = torch.empty_like(x)
        for g in torch.unique(group).tolist():
            those, precision = torch.nonzero(group == g)[:, 0], self.precisions[g]
            likely = clipped[those] - (clipped[those] - self.means[g]) @ precision / precision.diagonal()
            out[those] = torch.where((x[those] - likely).abs() <= self.reach[g], x[those], likely)
        return out


@dataclass(frozen=True)
class FittedClip:
    """What ``ConditionalClip.fit`` found: a function of each sample by itself, on the CPU.

    Costs a product of each sample with a ``[d, d]`` matrix a round, in float64.
    """

    low: Tensor
    """``[d]``, Tukey's inner fences of each element."""
    high: Tensor
    """``[d]``."""
    rounds: tuple[Round, ...]

    def __call__(self, raw_latents: Tensor) -> Tensor:
        """``[n, ch, ...] -> [n, ch, ...]``, n may be 0; values must be finite."""
        x = raw_latents.flatten(1).double()
        clipped = x.clamp(self.low, self.high)
        for one in self.rounds:
            clipped = one(x, clipped)
        return clipped.to(raw_latents.dtype).reshape(raw_latents.shape)


def _inner_fences(x: Tensor) -> Tensor:
    """``[2, d]`` of each column of ``x [n, d]``."""
    q1, q3 = (x.kthvalue(max(1, round(q * len(x))), dim=0).values for q in (0.25, 0.75))
    return torch.stack([q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)])


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(x, centres).argmin(1)


def _similar(x: Tensor, groups: int, rounds: int = 15) -> Tensor:
    """The group ``[n]`` of each of ``x [n, d]``: k-means from evenly chosen samples, so a function of ``x`` alone."""
    if groups == 1:
        return torch.zeros(len(x), dtype=torch.long, device=x.device)
    return _nearest(x, _centres(x, groups, rounds))


def _centres(x: Tensor, groups: int, rounds: int = 15) -> Tensor:
    """The centres ``[groups, d]`` that the last of ``rounds`` of k-means goes to."""
    centres = x[torch.linspace(0, len(x) - 1, groups).long()]
    for _ in range(rounds - 1):
        group = _nearest(x, centres)
        count = group.bincount(minlength=groups)[:, None]
        total = torch.zeros_like(centres).index_add(0, group, x)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    return centres
