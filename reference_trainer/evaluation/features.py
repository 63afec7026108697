"""Feature spaces in which samples are compared, each with a name that goes wherever its numbers go.

Axes: pixels uint8 [n, ch, h, w], features [n, k].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from reference_trainer.data.codecs import USERS_CODE, Codec
from reference_trainer.data.images import to_unit
from reference_trainer.data.latents import not_finite
from reference_trainer.errors import STOPS, UserError, type_and_message
from reference_trainer.evaluation.identity import Identity, digest_of

PROBED = 4
"""Images by which a network is known that has no weights to show."""


class Features(Protocol):
    """A named map from images to vectors.

    One may also have an ``identity``; without one (``identity_of``) it is known by what it makes of a few images.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 ``[n, ch, h, w]`` (CPU) -> float32 ``[n, k]`` (CPU)."""
        ...


@dataclass(frozen=True)
class PooledLatents:
    """The autoencoder's own latents, averaged over a 4x4 grid: there for any images, but blind to fine detail."""

    codec: Codec
    device: torch.device
    """Where the codec is."""
    name: str = "latents of the run's own autoencoder, pooled to 4x4"

    @property
    def identity(self) -> Identity | None:
        """Of the autoencoder's weights; None: it is one of the user's, which shows none."""
        weights = self.codec.tensors()
        return Identity(digest_of(weights, self.name), "none") if weights else None

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.cat([self._pooled(part).cpu() for part in pixels.split(250)])

    def _pooled(self, pixels: Tensor) -> Tensor:
        return pooled(self.codec.encode(to_unit(pixels).to(self.device)))


def pooled(latents: Tensor) -> Tensor:
    """``[n, ch, h, w]``, averaged over a 4x4 grid: ``[n, 16 ch]``."""
    return F.adaptive_avg_pool2d(latents, 4).flatten(1)


@dataclass(frozen=True)
class Imported:
    """A map from uint8 ``[n, ch, h, w]`` to features that is not ours: of ``module:function``, a package or a file.

    The map may give ``[n, k]`` or ``[n, k, 1, 1]`` of any type of number, as a tensor, an array, or the first of
    several.
    """

    name: str
    """What follows ``--features``."""
    function: Callable[[Tensor], Any]
    identity: Identity | None = None
    batch: int = 250
    """Images at a time."""
    scaled: bool = True
    """Kernel distances are of features divided by the root mean square of the reference's; False: as KID has them."""

    def __call__(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            parts = tqdm(pixels.split(self.batch), desc="features", unit="batch", leave=False, delay=2)
            return torch.cat([self._vectors(part) for part in parts])

    def _vectors(self, pixels: Tensor) -> Tensor:
        where = f"--features {self.name}: on images {list(pixels.shape)}"
        try:
            with USERS_CODE:
                output = self.function(pixels)
            given = output
            if isinstance(output, (tuple, list)) and len(output):
                output = output[0]
            vectors = torch.from_numpy(output) if isinstance(output, np.ndarray) else output
        except STOPS:
            raise
        except BaseException as error:  # whatever the user's code raises, SystemExit included
            raise UserError(f"{where} it failed: {type_and_message(error)}") from error
        if not isinstance(vectors, Tensor) or vectors.is_complex():
            raise UserError(f"{where} it gives a {type(given).__name__}, expected a tensor [n, k] of real numbers")
        if vectors.dim() == 4 and vectors.shape[2:] == (1, 1):
            vectors = vectors.flatten(1)
        if vectors.dim() != 2 or len(vectors) != len(pixels) or not vectors.shape[1]:
            raise UserError(f"{where} it gives {list(vectors.shape)}, expected [n, k] or [n, k, 1, 1]")
        return vectors.float().cpu()

    @staticmethod
    def of(name: str) -> Imported:
        """Import ``module:factory`` and call the factory.

        Raises:
            UserError: there is none, or it fails.
        """
        module, _, attribute = name.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except STOPS:
            raise
        except BaseException as error:  # whatever an import runs into
            raise UserError(
                f"--features {name}: expected an importable module:function ({type_and_message(error)})"
            ) from error
        try:
            function = factory()
        except STOPS:
            raise
        except BaseException as error:
            raise UserError(f"--features {name}: {attribute}() failed: {type_and_message(error)}") from error
        if not callable(function):
            raise UserError(
                f"--features {name}: {attribute}() must return a map from images to features, it returns a "
                f"{type(function).__name__}"
            )
        weights = function.state_dict() if isinstance(function, nn.Module) else {}
        return Imported(name, function, Identity(digest_of(weights, name)) if weights else None)


def scales_kernel(features: Features) -> bool:
    """Whether kernel distances in ``features`` are of scaled ones, see ``kernel_distance``."""
    return not isinstance(features, Imported) or features.scaled


def identity_of(features: Features, shape: Sequence[int]) -> Identity:
    """That which ``features`` states, else the digest of what it makes of noise images of ``shape`` (ch, h, w).

    Raises:
        UserError: the user's function fails.
    """
    stated = getattr(features, "identity", None)
    if isinstance(stated, Identity):
        return stated
    noise = torch.randint(0, 256, (PROBED, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Identity(digest_of({"": features(noise)}))


def vectors_of(pixels: Tensor, features: Features) -> Tensor:
    """``features`` of uint8 ``[n, ch, h, w]``, each of them finite: float32 ``[n, k]``.

    Raises:
        UserError: some are not; or the user's function fails.
    """
    vectors = features(pixels)
    if bad := not_finite(vectors):
        raise UserError(
            f"{len(bad)} of {len(vectors)} images have NaN or infinite features: {features.name} must give finite ones"
        )
    return vectors


def tried(features: Features, pixels: Tensor) -> Features:
    """``features``, called once on two of ``pixels [n, ch, h, w]``: what it cannot do is known before training.

    Raises:
        UserError: see ``vectors_of``.
    """
    vectors_of(pixels[:2], features)
    return features
