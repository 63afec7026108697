"""An autoencoder of diffusers, by its name on the Hugging Face hub or from a folder, loaded whole or not at all.

Axes: images [n, ch, h, w] in -1 .. 1, latents [n, ch, h, w].
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reference_trainer.data.codecs import Codec, Foreign, check_codec
from reference_trainer.data.images import ImageSet, to_unit
from reference_trainer.data.posterior import need_latents, sampled
from reference_trainer.errors import UserError
from reference_trainer.loading import CONFIG, PIPELINE, Kind, Place, weights_sha256
from robustcm.checks import need_seed

KIND = Kind(
    noun="autoencoder",
    option="DiffusersAutoencoder",
    subfolder="vae",
    methods=("encode", "decode"),
    such_as="an AutoencoderKL, AutoencoderTiny, AutoencoderDC or the like",
)


@dataclass(frozen=True, kw_only=True)
class DiffusersAutoencoder:
    """An autoencoder of diffusers (AutoencoderKL, AutoencoderTiny, AutoencoderDC, ...), by hub name or from a folder.

    Diffusers' own loader of the class that its config.json names; safetensors only, since a pickle may run code.
    Weights that are missing, left over or of another shape are an error: diffusers only warns, and such an autoencoder
    blurs.

    Latents are kept as the encoder gives them. Its ``scaling_factor`` and ``shift_factor`` are not applied: training
    normalises channel by channel anyway. They stand in a store's index.json, for whoever hands the latents to a model
    that wants ``(latents - shift_factor) * scaling_factor``.

    It is not stored with a run, which keeps the name, a hash of the weights, and what it made of a few images.
    """

    name: str
    """As on the hub, ``stabilityai/sd-vae-ft-ema``, or a folder that ``save_pretrained`` wrote."""
    subfolder: str = ""
    """Below it; of a pipeline, ``vae``."""
    revision: str | None = None
    """On the hub: a branch, tag or commit. None: the newest."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What it computes in."""
    latents: Literal["mean", "sample"] = "mean"
    """Of an encoder that gives a distribution its mean, or a draw from it: always the same of the same image."""
    seed: int = 0
    """Of what ``latents='sample'`` draws."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"name must be one on the hub or a folder, got {self.name!r}")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype is 'float32', 'float16' or 'bfloat16', got {self.dtype!r}")
        need_latents(self.latents)
        need_seed(self)

    def fit(self, images: ImageSet, device: torch.device, cache: Path) -> Codec:
        """Load it, and see that it takes two of the images there and back.

        Raises:
            UserError: see ``build`` and ``check_codec``; an encoder without a distribution is asked for samples.
        """
        codec = self.build(images.pixels.shape[1], {}).to(device)
        check_codec(codec, to_unit(images.train[:2]).to(device))
        return codec

    def build(self, image_channels: int, tensors: dict[str, Tensor]) -> Codec:
        """Load it.

        Raises:
            UserError: it cannot be had, is none of diffusers' autoencoders, or its weights do not fit it.
        """
        network = self._place.load(getattr(torch, self.dtype))
        notes = {"class": type(network).__name__, "weights_sha256": weights_sha256(network)}
        config: Any = network.config
        notes |= {name: config.get(name) for name in ("scaling_factor", "shift_factor")}
        whole = Drawing(network, self.seed) if self.latents == "sample" else network
        return Foreign(self._place.shown, whole, notes)

    @property
    def _place(self) -> Place:
        return Place(KIND, self.name, self.subfolder, self.revision)


class Drawing:
    """An autoencoder whose latents are a draw from the distribution that its encoder gives; see ``sampled``."""

    def __init__(self, network: nn.Module, seed: int) -> None:
        self.network, self.seed = network, seed

    def encode(self, images: Tensor) -> Tensor:
        """``[n, ch, h, w]``.

        Raises:
            UserError: the encoder gives no distribution.
        """
        posterior: Any = getattr(self.network.encode(images), "latent_dist", None)  # type: ignore[operator]
        if not all(isinstance(getattr(posterior, name, None), Tensor) for name in ("mean", "std")):
            raise UserError(
                f"autoencoder {type(self.network).__name__}: its encoder gives latents, no distribution to draw them "
                "from: take latents='mean'"
            )
        return sampled(posterior.mean, posterior.std, images, self.seed)

    def decode(self, latents: Tensor) -> Any:
        """As the network's."""
        return self.network.decode(latents)  # type: ignore[operator]


def looks_like_one(folder: Path) -> bool:
    """Whether ``folder`` holds a configuration of diffusers, of a model or a pipeline."""
    for file in (folder / CONFIG, folder / PIPELINE):
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict) and "_class_name" in found:
            return True
    return False
