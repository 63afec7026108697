"""Impulsive outliers taken out of the latents themselves, before they are normalised: clipping at Tukey's fences.

The five techniques make training on outliers bearable; a model that fits its data still draws them. What an
autoencoder's decoder does not need is better taken out of the data, and the fences say what is out of line without
being moved by it: up to a quarter of a channel's values on either side may be arbitrarily wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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
        if not self.k >= 0:
            raise ValueError(f"k must be 0 or more, got {self.k}")

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
