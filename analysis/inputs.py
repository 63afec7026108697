"""What is looked at: the configuration that training would have, its images, its autoencoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from reference_trainer.config import Data, TrainConfig
from reference_trainer.data.codecs import Codec
from reference_trainer.data.from_diffusers import looks_like_one
from reference_trainer.data.images import ImageFolder, ImageSet, to_unit
from reference_trainer.data.stored import LatentStore
from reference_trainer.errors import UserError, one_line
from reference_trainer.model import load_model
from reference_trainer.options import autoencoder_option, override
from reference_trainer.presets import PRESETS, on_data, photographs
from reference_trainer.run import RunFolder


class GivenAutoencoder:
    """An autoencoder that exists already, in the place of a configuration that would be fitted."""

    def __init__(self, name: str, codec: Codec) -> None:
        self.name, self.codec = name, codec

    def __repr__(self) -> str:  # goes into config.json
        return f"GivenAutoencoder({self.name!r})"

    def fit(self, images: ImageSet, device: torch.device, cache: Path) -> Codec:
        """It as it is, which two of ``images`` are tried on.

        Raises:
            UserError: it does not take them: it was made for others, such as grey ones.
        """
        try:
            self.codec.encode(to_unit(images.train[:2]).to(device))
        except RuntimeError as error:
            shape = " x ".join(map(str, images.pixels.shape[1:]))
            raise UserError(
                f"--autoencoder {self.name} does not take the images of {images.name}, which are {shape} "
                f"({one_line(error)[:200]}): give that of a run on such images"
            ) from error
        return self.codec

    def build(self, image_channels: int, tensors: dict[str, Tensor]) -> Codec:
        return self.codec


def configuration(
    data: str | None, resolution: int | None, autoencoder: str | None, device: torch.device
) -> TrainConfig:
    """What `train --data DATA` trains with, in the default preset; ``resolution`` and ``autoencoder`` exchanged in it.

    ``photographs`` is the preset of this name, unless there is something else that is called so.

    ``autoencoder`` is a part such as ``KLAutoencoder``, ``module:function``, a hub name or folder of diffusers', or a
    run folder.

    Raises:
        UserError: none of the three, or a resolution that does not work.
    """
    shipped = data == photographs.__name__ and not Path(data).exists()
    config = photographs() if shipped else on_data(PRESETS[0](), data)
    if resolution is not None:
        config = replace(config, data=at_resolution(config.data, resolution))
    if autoencoder is None:
        return config
    if Path(autoencoder).is_dir() and not looks_like_one(Path(autoencoder)):
        codec = load_model(RunFolder(Path(autoencoder)), device).space.codec
        # In all that is used here it is as good as a part.
        return replace(config, autoencoder=cast(Any, GivenAutoencoder(autoencoder, codec)))
    try:
        return override(config, autoencoder_option(autoencoder))
    except UserError as error:
        where = f"--autoencoder {autoencoder}: no run folder of this name, no module:function"
        raise UserError(f"{where}; {error}") from error


def at_resolution(data: Data, resolution: int) -> ImageFolder:
    """``data``, a folder, at another ``resolution``.

    Raises:
        UserError: one that does not work.
    """
    if isinstance(data, LatentStore):
        raise UserError("--resolution is of images: the latents of a store have the one they were encoded at")
    if not isinstance(data, ImageFolder):
        raise UserError("--resolution is of a folder of images: those that packages ship have their own")
    try:
        return replace(data, resolution=resolution)
    except ValueError as error:
        raise UserError(f"--resolution: {error}") from error


def load_images(data: Data) -> ImageSet:
    """The images of ``data``.

    Raises:
        UserError: no image set there, a store, or images that are all one colour, the same for each.
    """
    if isinstance(data, LatentStore):
        raise UserError(f"{data.path} is a store of latents: give the folder of images that was encoded")
    images = data.load()
    if bool((images.train == images.train[:1, :, :1, :1]).all()):
        raise UserError(f"all images of {images.name} are one colour, the same: constant data have no tails to look at")
    return images


def some_of_images(images: ImageSet, limit: int) -> ImageSet:
    """At most ``limit`` of the training images of ``images`` (a fixed random choice, in order); none held out."""
    chosen = torch.nonzero(~images.is_held_out).squeeze(1)
    if len(chosen) <= limit:
        return images
    keep = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:limit].sort().values
    chosen = chosen[keep]
    labels = None if images.labels is None else images.labels[chosen]
    return ImageSet(images.name, images.pixels[chosen], labels, torch.zeros(limit, dtype=torch.bool))
