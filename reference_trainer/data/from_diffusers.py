"""An autoencoder of diffusers, by its name on the Hugging Face hub or from a folder, loaded whole or not at all.

Axes: images [n, ch, h, w] in -1 .. 1, latents [n, ch, h, w].
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reference_trainer.data.codecs import Codec, Foreign, check_codec
from reference_trainer.data.images import ImageSet, to_unit
from reference_trainer.data.posterior import need_latents, sampled
from reference_trainer.errors import UserError, printable, type_and_message
from robustcm.checks import need_seed

CONFIG, WEIGHTS, PIPELINE = "config.json", "diffusion_pytorch_model", "model_index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
OF_A_FOLDER = "give a folder that save_pretrained wrote, DiffusersAutoencoder(name='path/to/folder')"


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
        network = self._network()
        notes = {"class": type(network).__name__, "weights_sha256": weights_sha256(network)}
        config: Any = network.config
        notes |= {name: config.get(name) for name in ("scaling_factor", "shift_factor")}
        whole = Drawing(network, self.seed) if self.latents == "sample" else network
        return Foreign(self._shown, whole, notes)

    @property
    def _shown(self) -> str:
        return printable(self.name + (f"/{self.subfolder}" if self.subfolder else ""))

    def _network(self) -> nn.Module:
        where = f"autoencoder {self._shown}"
        source, options = self._source()
        cls = self._class(source, options)
        try:
            with _quiet():
                network, told = cls.from_pretrained(
                    source,
                    **options,
                    torch_dtype=getattr(torch, self.dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of diffusers, the hub, safetensors: of many types
            raise UserError(
                f"{where}: its weights cannot be loaded as {cls.__name__} from {WEIGHTS}.safetensors: "
                f"{type_and_message(error)}"
            ) from error
        wrong = {kind: told.get(f"{kind}_keys") or [] for kind in ("missing", "unexpected", "mismatched")}
        if any(wrong.values()) or told.get("error_msgs"):
            said = "; ".join(f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in wrong.items() if keys)
            raise UserError(
                f"{where}: its weights are not those of the {cls.__name__} that its {CONFIG} describes: "
                f"{said or told['error_msgs']}; put the config.json and the weights together that belong together"
            )
        made: nn.Module = network
        return made

    def _source(self) -> tuple[str, dict[str, Any]]:
        """What diffusers is to load from: the folder, if there is one, else the name; with the options for it."""
        folder = Path(self.name).expanduser()
        if not folder.is_dir():
            if not HUB_NAME.fullmatch(self.name):
                raise UserError(f"autoencoder {self._shown}: no such folder: {OF_A_FOLDER}, or a name on the hub")
            return self.name, {"subfolder": self.subfolder or None, "revision": self.revision}
        whole, where = folder / self.subfolder, f"autoencoder {self._shown}"
        if not (whole / CONFIG).is_file():
            below = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}") if "vae" in file.parent.name)
            hint = OF_A_FOLDER
            if (folder / PIPELINE).exists() or below:
                name = below[0] if below else "vae"
                hint = f"of a pipeline take a part: DiffusersAutoencoder(name={self.name!r}, subfolder={name!r})"
            raise UserError(f"{where}: no {CONFIG} in that folder: {hint}")
        if not list(whole.glob(f"{WEIGHTS}*.safetensors*")):
            found = sorted(file.name for ending in PICKLES for file in whole.glob(ending))
            if found:
                raise UserError(
                    f"{where}: its weights are a pickle ({printable(found[0])}), which may run code and is never "
                    "loaded: save it as safetensors with save_pretrained(folder), safe_serialization=True"
                )
            raise UserError(f"{where}: no {WEIGHTS}.safetensors in that folder: {OF_A_FOLDER}")
        return str(whole), {}

    def _class(self, source: str, options: dict[str, Any]) -> Any:
        """The class of diffusers that its config.json names."""
        where = f"autoencoder {self._shown}"
        diffusers = importlib.import_module("diffusers")  # slow to import
        try:
            with _quiet():
                config = diffusers.AutoModel.load_config(source, **options)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if not options:
                raise UserError(f"{where}: cannot read its {CONFIG}: {type_and_message(error)}") from error
            raise UserError(
                f"{where}: there is no folder of this name, and from the Hugging Face hub it cannot be had "
                f"({_cause(error)}): mend the name, or {OF_A_FOLDER}"
            ) from error
        name = str(config.get("_class_name"))
        cls = getattr(diffusers, name, None) if name.isidentifier() else None
        able = isinstance(cls, type) and issubclass(cls, nn.Module)
        if not able or not all(callable(getattr(cls, method, None)) for method in ("encode", "decode")):
            raise UserError(
                f"{where}: its {CONFIG} names the class {printable(name)}, which is no autoencoder of diffusers "
                f"{diffusers.__version__}: name an AutoencoderKL, AutoencoderTiny, AutoencoderDC or the like"
            )
        return cls


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


def weights_sha256(network: nn.Module) -> str:
    """A hash of the weights' names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what diffusers and the hub log: what they warn of is made an error."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _first(keys: Sequence[Any], most: int = 2) -> str:
    named = [printable(str(key[0] if isinstance(key, (tuple, list)) else key)) for key in sorted(keys, key=str)]
    return ", ".join(named[:most]) + (", ..." if len(named) > most else "")


def _cause(error: BaseException) -> str:
    """What stands at the beginning of a chain of errors: a hub's error tells of the last attempt."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return printable(type_and_message(error))[:200]
