"""Feature spaces in which samples are compared, each with a name that goes wherever its numbers go.

Axes: pixels uint8 [n, ch, h, w], features float32 [n, k].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.codecs import Codec
from reference_trainer.data.images import to_unit
from reference_trainer.errors import UserError


class Features(Protocol):
    """A named map from images to vectors."""

    @property
    def name(self) -> str: ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 ``[n, ch, h, w]`` -> ``[n, k]``."""
        ...


@dataclass(frozen=True)
class PooledLatents:
    """The autoencoder's own latents, averaged over a 4x4 grid: there for any images, but blind to fine detail."""

    codec: Codec
    name: str = "latents of the run's own autoencoder, pooled to 4x4"

    def __call__(self, pixels: Tensor) -> Tensor:
        parts = [F.adaptive_avg_pool2d(self.codec.encode(to_unit(part)), 4).flatten(1) for part in pixels.split(250)]
        return torch.cat(parts)


@dataclass(frozen=True)
class Imported:
    """``module:function``, a function of the user's that returns uint8 ``[n, ch, h, w]`` -> ``[n, k]``."""

    name: str
    function: Callable[[Tensor], Tensor]

    def __call__(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            parts = tqdm(pixels.split(250), desc="features", unit="batch", leave=False, delay=2)
            return torch.cat([self.function(part) for part in parts])

    @staticmethod
    def of(name: str) -> Imported:
        """Import ``module:factory`` and call the factory."""
        module, _, attribute = name.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--features {name}: expected an importable module:function ({error})") from error
        return Imported(name, factory())
