"""The space a model is trained in: a small KL autoencoder fitted once and cached, one of the user's, or the pixels.

Axes: images [n, ch, h, w] in -1 .. 1, latents [n, ch, h, w].
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.codecs import Codec, Foreign, Pixels, check_codec
from reference_trainer.data.fitting import Fit, fit
from reference_trainer.data.from_diffusers import DiffusersAutoencoder
from reference_trainer.data.images import ImageSet, to_unit
from reference_trainer.data.outputs import described
from reference_trainer.data.posterior import need_latents, sampled
from reference_trainer.errors import STOPS, UserError, printable, type_and_message
from reference_trainer.files import as_json, load_tensors, save_tensors
from reference_trainer.networks import MOST_CHANNELS, halvings_fit, need_convolutions
from robustcm.checks import need_real, need_seed, need_whole

HOW_IT_WENT = "fit"
"""Among a fitted autoencoder's tensors: the JSON of its ``Fit``, as uint8."""
LOGIT_SCALE = 3.0  # logits reach +-10 quickly; the network's output stays of order 1


@dataclass(frozen=True, kw_only=True)
class PixelSpace:
    """No autoencoder: consistency training on pixels, which are their own latents."""

    def fit(self, images: ImageSet, device: torch.device, cache: Path) -> Codec:
        return Pixels()

    def build(self, image_channels: int, tensors: dict[str, Tensor]) -> Codec:
        return Pixels()


@dataclass(frozen=True, kw_only=True)
class PretrainedAutoencoder:
    """An autoencoder of the user's, say a published VAE: what ``load``, ``module:function``, returns when called.

    That is a diffusers autoencoder, or any object with ``encode(images [n, ch, h, w] in -1 .. 1) -> [n, ch, h, w]`` and
    ``decode``. What they return may be a tensor or an array, a distribution (the mode or mean is taken), a tuple whose
    first entry is one, or hold one as ``latent_dist``, ``latents``, ``latent`` or ``sample``.

    Its ``scaling_factor`` and ``shift_factor`` need not be known: latents are normalised channel by channel before
    training, and brought back before ``decode``. An ``encode`` that scales and a ``decode`` that undoes it are fine.

    It is not fitted, and not stored with the run: config.json keeps the name, and whoever uses the run imports and
    calls the function of that name from their own ``PYTHONPATH``.
    """

    load: str
    """``module:function``; the function takes nothing and returns the autoencoder."""

    def __post_init__(self) -> None:
        module, colon, function = self.load.partition(":") if isinstance(self.load, str) else ("", "", "")
        if not (module and colon and function):
            raise ValueError(f"load must be module:function, got {self.load!r}")

    def fit(self, images: ImageSet, device: torch.device, cache: Path) -> Codec:
        """Import it, and see that it takes two of the images there and back."""
        codec = self.build(images.pixels.shape[1], {}).to(device)
        check_codec(codec, to_unit(images.train[:2]).to(device))
        return codec

    def build(self, image_channels: int, tensors: dict[str, Tensor]) -> Codec:
        """Import it.

        Raises:
            UserError: no such module or function, or what it returns cannot encode and decode.
        """
        module, _, function = self.load.partition(":")
        try:
            made = getattr(importlib.import_module(module), function)()
            able = all(callable(getattr(made, method, None)) for method in ("encode", "decode"))
            codec = Foreign(self.load, made)
        except STOPS:
            raise
        except BaseException as error:  # whatever the user's code raises, SystemExit included
            raise UserError(
                f"autoencoder {self.load}: expected module:function, importable from PYTHONPATH, that returns an "
                f"object with encode and decode ({type_and_message(error)})"
            ) from error
        if not able:
            raise UserError(f"autoencoder {self.load}: {described(made)} has no encode and decode")
        return codec


def require_elsewhere(autoencoder: Autoencoder, folder: Path) -> None:
    """Refuse to import an autoencoder from ``folder``, a store or a run that names it: code that came with the data.

    Looks where its module lies, without importing it.

    Raises:
        UserError: in that folder, or in a package that holds it.
    """
    if not isinstance(autoencoder, PretrainedAutoencoder):
        return
    top, inside = autoencoder.load.partition(":")[0].partition(".")[0], folder.resolve()
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return  # imported without a file, or not to be had: importing it will say why
    if spec is None:
        return
    packages = [Path(place).resolve() for place in spec.submodule_search_locations or ()]
    file = Path(spec.origin).resolve() if spec.has_location and spec.origin else None
    if (file is not None and file.is_relative_to(inside)) or any(
        package.is_relative_to(inside) or inside.is_relative_to(package) for package in packages
    ):
        raise UserError(
            f"{printable(str(folder))} names the autoencoder {printable(autoencoder.load)}, whose code lies in that "
            "folder or in a package around it, as code does that came with it: keep your own apart from runs and stores"
        )


@dataclass(frozen=True, kw_only=True)
class KLAutoencoder:
    """A small diffusers AutoencoderKL, fitted on the training images: reconstruction error + ``kl_weight`` * KL.

    It sees the image with its ``patch`` x ``patch`` squares laid into channels: full-resolution convolutions are what
    a small autoencoder spends its time on.

    The fit is a function of (this configuration, the images) and is cached
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
    steps: int | None = 1100
    """Of the fit; None (with a folder of images): until the PSNR of held-out images no longer rises, by the rule in
    ``reference_trainer/data/fitting.py``."""
    most_steps: int = 8000
    """At most so many where ``steps`` is None."""
    batch_size: int = 32
    """Images a step of the fit."""
    lr: float = 4e-3
    """Peak of the fit's learning rate."""
    seed: int = 0
    """Of the fit, and of what ``latents='sample'`` draws."""
    latents: Literal["mean", "sample"] = "mean"
    """Of the posterior of each image its mean, or a draw from it: always the same one of the same image and seed."""

    def __post_init__(self) -> None:
        need_convolutions(self)
        need_whole(self, "latent_channels", least=1, most=MOST_CHANNELS)
        need_whole(self, "most_steps", "batch_size", least=1)
        if self.steps is not None:
            need_whole(self, "steps", least=1)
        need_real(self, "kl_weight", least=0)
        need_real(self, "lr", above=0)
        need_seed(self)
        if self.likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood is 'bernoulli' or 'gaussian', got {self.likelihood!r}")
        need_latents(self.latents)

    def fit(self, images: ImageSet, device: torch.device, cache: Path) -> Codec:
        """Load the fit from ``cache``, or fit with a progress bar and store it there."""
        about = asdict(self)
        del about["latents"]  # how they are taken changes nothing of the fit
        key = json.dumps(about, sort_keys=True) + images.fingerprint()
        file = cache / f"autoencoder-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        channels, h, w = images.pixels.shape[1:]
        if not halvings_fit(self, h, w):
            raise UserError(
                f"images of {h}x{w} cannot be patched by autoencoder.patch={self.patch} and halved "
                f"{len(self.block_out_channels) - 1} times: use a smaller patch or fewer block_out_channels"
            )
        if file.is_file():
            try:
                return self.build(channels, load_tensors(file)[0]).to(device)
            except UserError as error:
                tqdm.write(f"fitting the autoencoder again: {error}")
        network = self._network(channels)
        how = self._fit(network, images, device)
        codec = _Kl(network, self, how.as_dict())
        there_and_back = codec.decode(codec.encode(to_unit(images.train[:2]).to(device)))
        if not (_is_finite(network) and there_and_back.isfinite().all()):
            raise UserError(
                f"the autoencoder became NaN or infinite in its fit: lower autoencoder.lr={self.lr:g} or "
                f"autoencoder.kl_weight={self.kl_weight:g}"
            )
        tqdm.write(f"the autoencoder: PSNR {how.in_words()}")
        try:
            save_tensors(file, codec.tensors(), {})
        except UserError as error:  # a cache is a convenience: the fit also goes into the run folder
            tqdm.write(f"the autoencoder is not cached: {error}")
        return codec

    def build(self, image_channels: int, tensors: dict[str, Tensor]) -> _Kl:
        """The codec of a stored fit."""
        network = self._network(image_channels)
        weights = {name: tensor for name, tensor in tensors.items() if name != HOW_IT_WENT}
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"these are not the weights of {self}: {str(error).splitlines()[-1].strip()}") from error
        if not _is_finite(network):
            raise UserError(f"the stored weights of {self} are not all finite")
        how = bytes(tensors[HOW_IT_WENT].tolist()) if HOW_IT_WENT in tensors else b"{}"
        return _Kl(network, self, json.loads(how))

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

    def _fit(self, network: Any, images: ImageSet, device: torch.device) -> Fit:
        return fit(
            network,
            partial(self._loss, network),
            lambda unit: self._decoded(network, self._posterior(network, unit).mean),
            images,
            device,
            steps=self.steps,
            most_steps=self.most_steps,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=self.seed,
        )

    def _loss(self, network: Any, images: Tensor, generator: torch.Generator) -> Tensor:
        posterior = self._posterior(network, images)
        noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
        output = self._output(network, posterior.mean + posterior.std * noise)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum() / images.numel()
        return self._error(output, images) + self.kl_weight * kl

    def _posterior(self, network: Any, images: Tensor) -> Any:
        return network.encode(F.pixel_unshuffle(images, self.patch)).latent_dist

    def _output(self, network: Any, latents: Tensor) -> Tensor:
        """What the decoder gives: pixels, or logits of them."""
        return F.pixel_shuffle(network.decode(latents).sample, self.patch)

    def _decoded(self, network: Any, latents: Tensor) -> Tensor:
        """Images."""
        output = self._output(network, latents)
        return torch.tanh(LOGIT_SCALE / 2 * output) if self.likelihood == "bernoulli" else output

    def _error(self, output: Tensor, images: Tensor) -> Tensor:
        if self.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(LOGIT_SCALE * output, (images + 1) / 2)
        return F.mse_loss(output, images)


Autoencoder: TypeAlias = KLAutoencoder | DiffusersAutoencoder | PretrainedAutoencoder | PixelSpace


def _is_finite(network: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values())


class _Kl:
    def __init__(self, network: Any, config: KLAutoencoder, notes: dict[str, Any]) -> None:
        self.config, self.notes = config, notes
        self.network = network.eval().requires_grad_(False)

    def to(self, device: torch.device) -> _Kl:
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        posterior = self.config._posterior(self.network, images)
        if self.config.latents == "sample":
            return sampled(posterior.mean, posterior.std, images, self.config.seed)
        latents: Tensor = posterior.mean
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.config._decoded(self.network, latents)

    def tensors(self) -> dict[str, Tensor]:
        how = torch.tensor(list(as_json(self.notes).encode()), dtype=torch.uint8)
        return self.network.state_dict() | {HOW_IT_WENT: how}
