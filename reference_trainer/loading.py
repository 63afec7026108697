"""Models of diffusers, by name on the Hugging Face hub or from a folder: whole or not at all, safetensors only."""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reference_trainer.errors import STOPS, UserError, printable, type_and_message

CONFIG, WEIGHTS, PIPELINE = "config.json", "diffusion_pytorch_model", "model_index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Kind:
    """What sort of model is loaded, in the words of its error messages."""

    noun: str
    """What it is: an autoencoder, a network."""
    option: str
    """The part of a configuration that names one."""
    subfolder: str
    """Where a pipeline has one."""
    methods: tuple[str, ...]
    """What its class must have."""
    such_as: str
    """Classes to name, in words."""
    only: tuple[str, ...] = ()
    """Names of the only classes that will do; none: any."""

    @property
    def of_a_folder(self) -> str:
        """What to do."""
        return f"give a folder that save_pretrained wrote, {self.option}(name='path/to/folder')"


@dataclass(frozen=True)
class Place:
    """Where a model lies."""

    kind: Kind
    name: str
    """On the hub, or a folder."""
    subfolder: str = ""
    revision: str | None = None
    """On the hub."""

    @property
    def shown(self) -> str:
        """As a message calls it."""
        return printable(self.name + (f"/{self.subfolder}" if self.subfolder else ""))

    def load(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """By diffusers' own loader of the class that its config.json names.

        Raises:
            UserError: it cannot be had, is of another kind, or its weights do not fit it.
        """
        where = f"{self.kind.noun} {self.shown}"
        source, options = self._source()
        cls = self._class(source, options)
        try:
            with quiet():
                network, told = cls.from_pretrained(
                    source, **options, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
                )
        except STOPS:
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
        folder, where = Path(self.name).expanduser(), f"{self.kind.noun} {self.shown}"
        if not folder.is_dir():
            if not HUB_NAME.fullmatch(self.name):
                raise UserError(f"{where}: no such folder: {self.kind.of_a_folder}, or a name on the hub")
            return self.name, {"subfolder": self.subfolder or None, "revision": self.revision}
        whole = folder / self.subfolder
        if not (whole / CONFIG).is_file():
            below = sorted(
                file.parent.name for file in folder.glob(f"*/{CONFIG}") if self.kind.subfolder in file.parent.name
            )
            hint = self.kind.of_a_folder
            if (folder / PIPELINE).exists() or below:
                name = below[0] if below else self.kind.subfolder
                hint = f"of a pipeline take a part: {self.kind.option}(name={self.name!r}, subfolder={name!r})"
            raise UserError(f"{where}: no {CONFIG} in that folder: {hint}")
        if not list(whole.glob(f"{WEIGHTS}*.safetensors*")):
            found = sorted(file.name for ending in PICKLES for file in whole.glob(ending))
            if found:
                raise UserError(
                    f"{where}: its weights are a pickle ({printable(found[0])}), which may run code and is never "
                    "loaded: save it as safetensors with save_pretrained(folder), safe_serialization=True"
                )
            raise UserError(f"{where}: no {WEIGHTS}.safetensors in that folder: {self.kind.of_a_folder}")
        return str(whole), {}

    def _class(self, source: str, options: dict[str, Any]) -> Any:
        """The class of diffusers that its config.json names."""
        where = f"{self.kind.noun} {self.shown}"
        diffusers = importlib.import_module("diffusers")  # slow to import
        try:
            with quiet():
                config = diffusers.AutoModel.load_config(source, **options)
        except STOPS:
            raise
        except BaseException as error:
            if not options:
                raise UserError(f"{where}: cannot read its {CONFIG}: {type_and_message(error)}") from error
            raise UserError(
                f"{where}: there is no folder of this name, and from the Hugging Face hub it cannot be had "
                f"({_cause(error)}): mend the name, or {self.kind.of_a_folder}"
            ) from error
        name = str(config.get("_class_name"))
        cls = getattr(diffusers, name, None) if name.isidentifier() else None
        able = isinstance(cls, type) and issubclass(cls, nn.Module)
        able = able and (not self.kind.only or name in self.kind.only)
        if not able or not all(callable(getattr(cls, method, None)) for method in self.kind.methods):
            raise UserError(
                f"{where}: its {CONFIG} names the class {printable(name)}, which is no {self.kind.noun} of "
                f"diffusers {diffusers.__version__}: name {self.kind.such_as}"
            )
        return cls


def weights_sha256(network: nn.Module) -> str:
    """A hash of the weights' names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
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
