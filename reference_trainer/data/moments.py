"""Mean and variance of each channel of latents, from parts: of any number, in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each channel, of parts that can be merged: float64, whatever the latents are stored as."""

    count: int
    """Elements a channel."""
    mean: Tensor
    """``[ch]``."""
    squares: Tensor
    """``[ch]``, sum of the squared deviations from ``mean``."""

    @staticmethod
    def of(latents: Tensor) -> Moments:
        """Of ``[n, ch, h, w]``; n may be 0."""
        channels = latents.shape[1]
        count = latents.numel() // channels
        values = latents.to(torch.float64, copy=True)
        mean = values.mean((0, 2, 3)) if count else values.new_zeros(channels)
        values -= mean[:, None, None]
        return Moments(count, mean, values.square_().sum((0, 2, 3)))

    def merged(self, other: Moments) -> Moments:
        """Of both together.

        Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
        """
        count = self.count + other.count
        gap, share = other.mean - self.mean, other.count / max(1, count)
        return Moments(count, self.mean + share * gap, self.squares + other.squares + self.count * share * gap.square())

    @property
    def std(self) -> Tensor:
        """``[ch]``, with the n - 1 of ``torch.std``."""
        return (self.squares / max(1, self.count - 1)).sqrt()

    def makes_sense(self, channels: int) -> bool:
        """Whether they are of so many channels, and of numbers at all."""
        fit = self.mean.shape == self.squares.shape == (channels,)
        return fit and bool(self.mean.isfinite().all() and self.squares.isfinite().all() and (self.squares >= 0).all())

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which keeps every digit of a float64."""
        return {"count": self.count, "mean": self.mean.tolist(), "std": self.std.tolist()} | {
            "squares": self.squares.tolist()
        }

    @staticmethod
    def from_dict(found: dict[str, Any]) -> Moments:
        """The inverse of ``as_dict``."""
        mean, squares = (torch.tensor(found[name], dtype=torch.float64) for name in ("mean", "squares"))
        return Moments(int(found["count"]), mean, squares)
