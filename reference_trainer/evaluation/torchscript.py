"""Features of a TorchScript file: a network with its weights, without the code it was written in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from reference_trainer.data.images import to_unit
from reference_trainer.errors import UserError, type_and_message
from reference_trainer.evaluation.features import Imported
from reference_trainer.evaluation.fidelity import BATCH, in_colour
from reference_trainer.evaluation.identity import INSIDE, Identity, digest_of_file

SUFFIXES = (".pt", ".ts")


@dataclass(frozen=True, kw_only=True)
class TorchScript:
    """What torch.jit.save wrote, such as the Inception of StyleGAN and EDM (inception-2015-12-05.pt).

    It is called with ``[n, 3, h, w]``, grey repeated, at the size of the images; a forward that has an argument
    ``return_features``, as that Inception's, is called with True. Nothing is unpickled: a TorchScript file is a program
    for torch's own interpreter. It is a program all the same: use files of people you trust.
    """

    path: str
    """The file."""
    images: Literal["uint8", "unit"] = "uint8"
    """What the network takes: uint8 0 .. 255, or unit: float32 -1 .. 1."""
    scaled: bool = True
    """False: kernel distances are KID, of the features as they are, see ``Imported.scaled``."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise ValueError(f"path must be that of a file, got {self.path!r}")
        if self.images not in ("uint8", "unit"):
            raise ValueError(f"images must be uint8 or unit, got {self.images!r}")
        if not isinstance(self.scaled, bool):
            raise ValueError(f"scaled must be True or False, got {self.scaled!r}")

    def load(self, name: str, device: torch.device) -> Imported:
        """The network on ``device``; ``name``: what the user typed.

        Raises:
            UserError: no such file, or none that torch.jit.save wrote.
        """
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise UserError(f"--features {name}: no file {file}")
        try:
            network = torch.jit.load(str(file), map_location=device).eval()
            names = [argument.name for argument in network.forward.schema.arguments]
            digest = digest_of_file(file)
        except Exception as error:  # damaged files raise many things, of several lines
            raise UserError(
                f"--features {name}: {file} is no TorchScript ({type_and_message(error)[:200]}): write it with "
                "torch.jit.script(network).save(FILE) or torch.jit.trace(network, images).save(FILE)"
            ) from error
        options: dict[str, Any] = {"return_features": True} if "return_features" in names else {}

        def features(pixels: torch.Tensor) -> Any:
            images = in_colour(pixels)
            return network((images if self.images == "uint8" else to_unit(images)).to(device), **options)

        # The options are part of what it is: the same file on other numbers gives other features.
        return Imported(name, features, Identity(f"{digest}-{self.images}", INSIDE), BATCH, self.scaled)
