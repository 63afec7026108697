"""The space a model is trained in: a small KL autoencoder fitted once and cached, one of the user's, or the pixels.

Axes: images [n, ch, h, w] in -1 .. 1, latents [n, ch, h, w].
"""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.images import ImageSet, to_unit
from reference_trainer.errors import UserError
from reference_trainer.files import load_tensors, save_tensors
from robustcm.randomness import step_generator

LOGIT_SCALE = 3.0  # logits reach +-10 quickly; the network's output stays of order 1


class Codec(Protocol):
    """Turns images into latents and back; deterministic."""

    def to(self, device: torch.device) -> Codec:
        """The same on ``device``."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """``[n, ch, h, w]`` in -1 .. 1 -> latents, not normalised."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents, not normalised -> ``[n, ch, h, w]``, about -1 .. 1."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored to build the codec again."""
        ...


@dataclass(frozen=True, kw_only=True)
class PixelSpace:
    """No autoencoder: consistency training on pixels, which are their own latents."""

    def fit(self, images: ImageSet, device: torch.device, cache: Path) -> Codec:
        return _Pixels()

    def build(self, image_channels: int, tensors: dict[str, Tensor]) -> Codec:
        return _Pixels()


class _Pixels:
    def to(self, device: torch.device) -> _Pixels:
        return self

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def tensors(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, kw_only=True)
class PretrainedAutoencoder:
    """An autoencoder of the user's, say a published VAE: what ``load``, ``module:function``, returns when called.

    That is a diffusers autoencoder, or any object with ``encode(images [n, ch, h, w] in -1 .. 1) -> [n, ch, h, w]`` and
    ``decode``; of a distribution the mean is taken. It is not fitted, and not stored with the run: config.json keeps
    the name, and whoever uses the run imports and calls the function of that name from their own ``PYTHONPATH``.
    """

    load: str
    """``module:function``; the function takes nothing and returns the autoencoder."""

    def __post_init__(self) -> None:
        module, colon, function = self.load.partition(":")
        if not (module and colon and function):
            raise ValueError(f"load must be module:function, got {self.load!r}")

    def fit(self, images: ImageSet, device: torch.device, cache: Path) -> Codec:
        return self.build(images.pixels.shape[1], {}).to(device)

    def build(self, image_channels: int, tensors: dict[str, Tensor]) -> Codec:
        """Import it.

        Raises:
            UserError: no such module or function, or what it returns cannot encode and decode.
        """
        module, _, function = self.load.partition(":")
        try:
            made = getattr(importlib.import_module(module), function)()
        except Exception as error:  # whatever the user's code raises
            raise UserError(
                f"autoencoder {self.load}: expected module:function, importable from PYTHONPATH, that returns an "
                f"object with encode and decode ({_in_a_line(error)})"
            ) from error
        if not (callable(getattr(made, "encode", None)) and callable(getattr(made, "decode", None))):
            raise UserError(f"autoencoder {self.load}: a {type(made).__name__} has no encode and decode")
        return Foreign(self.load, made)


class Foreign:
    """An object of the user's as a codec; a few images at a time, since its network may be large."""

    PIXELS = 2**20  # encoded at a time
    ELEMENTS = 2**16  # decoded at a time: 16 images of 256 x 256 where 8 x 8 pixels are 4 numbers

    def __init__(self, name: str, autoencoder: Any) -> None:
        self.name, self.autoencoder = name, autoencoder
        if isinstance(autoencoder, torch.nn.Module):
            autoencoder.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Foreign:
        if hasattr(self.autoencoder, "to"):
            self.autoencoder = self.autoencoder.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self._apply("encode", images, max(1, self.PIXELS // images[0, 0].numel()))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self._apply("decode", latents, max(1, self.ELEMENTS // latents[0].numel()))

    def _apply(self, method: str, values: Tensor, size: int) -> Tensor:
        bar = tqdm(values.split(size), desc=f"{method} by {self.name}", unit="batch", leave=False, delay=2)
        where = f"autoencoder {self.name}: {method}()"
        try:
            out = torch.cat([_tensor_in(getattr(self.autoencoder, method)(part)).float() for part in bar])
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            shape = ", ".join(map(str, values.shape[1:]))
            raise UserError(f"{where} failed on values [n, {shape}]: {_in_a_line(error)}") from error
        if out.dim() != 4 or len(out) != len(values):
            raise UserError(f"{where} must give [n, ch, h, w], got {list(out.shape)}")
        return out

    def tensors(self) -> dict[str, Tensor]:
        return {}


def _in_a_line(error: Exception) -> str:
    return " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _tensor_in(output: Any) -> Tensor:
    """The tensor in what a diffusers autoencoder returns: ``latent_dist``, ``latents`` or ``sample``."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "latent_dist"):
        return cast(Tensor, output.latent_dist.mean)
    return cast(Tensor, output.latents if hasattr(output, "latents") else output.sample)


@dataclass(frozen=True, kw_only=True)
class KLAutoencoder:
    """A small diffusers AutoencoderKL, fitted on the training images: reconstruction error + ``kl_weight`` * KL.

    It sees the image with its ``patch`` x ``patch`` squares laid into channels: full-resolution convolutions are what
    a small autoencoder spends its time on.

    Encoding takes the mean of the posterior. The fit is a function of (this configuration, the images) and is cached
    under a name made of both.
    """

    latent_channels: int = 2
    """Channels of the latents."""
    block_out_channels: tuple[int, ...] = (16, 32, 32)
    """One entry a resolution: three entries shrink the patched image four times in each direction."""
    patch: int = 2
    """Side of the squares of pixels that are laid into channels."""
    layers_per_block: int = 1
    """Residual blocks at each resolution."""
    attention: bool = False
    """Self-attention at the smallest resolution; without it the convolutions still see all of a small image."""
    norm_num_groups: int = 8
    """Groups of the group norms; a divisor of every entry of block_out_channels."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """``bernoulli``: the decoder gives logits of a pixel's brightness, the error is their cross entropy, which suits
    nearly black-and-white images;
    ``gaussian``: it gives the pixel, the error is squared."""
    kl_weight: float = 0.01
    """Of the Kullback-Leibler term beside the reconstruction error."""
    steps: int = 1100
    """Of the fit."""
    batch_size: int = 32
    """Images a step of the fit."""
    lr: float = 4e-3
    """Peak of the fit's learning rate."""
    seed: int = 0
    """Of the fit."""

    def __post_init__(self) -> None:
        if any(ch % self.norm_num_groups for ch in self.block_out_channels):
            raise ValueError(
                f"block_out_channels {self.block_out_channels} must be multiples of norm_num_groups "
                f"{self.norm_num_groups}"
            )

        if self.likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood is 'bernoulli' or 'gaussian', got {self.likelihood!r}")

    def fit(self, images: ImageSet, device: torch.device, cache: Path) -> Codec:
        """Load the fit from ``cache``, or fit with a progress bar and store it there."""
        key = json.dumps(asdict(self), sort_keys=True) + images.fingerprint()
        file = cache / f"autoencoder-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        channels = images.pixels.shape[1]
        if file.is_file():
            try:
                return self.build(channels, load_tensors(file)[0]).to(device)
            except UserError as error:
                tqdm.write(f"fitting the autoencoder again: {error}")
        network = self._network(channels)
        self._fit(network, images.train, device)
        codec = _Kl(network, self)
        try:
            save_tensors(file, codec.tensors(), {})
        except UserError as error:  # a cache is a convenience: the fit also goes into the run folder
            tqdm.write(f"the autoencoder is not cached: {error}")
        return codec

    def build(self, image_channels: int, tensors: dict[str, Tensor]) -> _Kl:
        """The codec of a stored fit."""
        network = self._network(image_channels)
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"these are not the weights of {self}: {str(error).splitlines()[-1].strip()}") from error
        return _Kl(network, self)

    def _network(self, image_channels: int) -> Any:
        from diffusers import AutoencoderKL  # slow to import

        blocks = len(self.block_out_channels)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            return AutoencoderKL(
                in_channels=image_channels * self.patch**2,
                out_channels=image_channels * self.patch**2,
                down_block_types=("DownEncoderBlock2D",) * blocks,
                up_block_types=("UpDecoderBlock2D",) * blocks,
                block_out_channels=self.block_out_channels,
                layers_per_block=self.layers_per_block,
                latent_channels=self.latent_channels,
                norm_num_groups=self.norm_num_groups,
                mid_block_add_attention=self.attention,
            )

    def _fit(self, network: Any, pixels: Tensor, device: torch.device) -> None:
        network.to(device).train()
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.steps, pct_start=0.05)
        bar = tqdm(range(self.steps), desc="fitting the autoencoder", unit="step")
        for step in bar:
            generator = step_generator(self.seed, step)
            chosen = torch.randint(len(pixels), (min(self.batch_size, len(pixels)),), generator=generator)
            images = to_unit(pixels[chosen]).to(device)
            posterior = network.encode(F.pixel_unshuffle(images, self.patch)).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            output = F.pixel_shuffle(network.decode(posterior.mean + posterior.std * noise).sample, self.patch)
            kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum() / images.numel()
            loss = self._error(output, images) + self.kl_weight * kl
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{float(loss.detach()):.4f}", refresh=False)

    def _error(self, output: Tensor, images: Tensor) -> Tensor:
        if self.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(LOGIT_SCALE * output, (images + 1) / 2)
        return F.mse_loss(output, images)


Autoencoder: TypeAlias = KLAutoencoder | PretrainedAutoencoder | PixelSpace


class _Kl:
    def __init__(self, network: Any, config: KLAutoencoder) -> None:
        self.config = config
        self.network = network.eval().requires_grad_(False)

    def to(self, device: torch.device) -> _Kl:
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.network.encode(F.pixel_unshuffle(images, self.config.patch)).latent_dist.mean
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        output = F.pixel_shuffle(self.network.decode(latents).sample, self.config.patch)
        return torch.tanh(LOGIT_SCALE / 2 * output) if self.config.likelihood == "bernoulli" else output

    def tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict()
