"""Features of torch-fidelity's networks: Inception's for FID, KID, precision and recall, DINOv2's for FD-DINOv2.

The package is the extra ``fid``. Its networks bring images to their size themselves, bilinearly as TensorFlow 1 did and
without antialiasing, also DINOv2 (Stein et al. use PIL's bicubic filter): compare figures with torch-fidelity's.
"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from reference_trainer.errors import STOPS, UserError, type_and_message
from reference_trainer.evaluation.features import Imported
from reference_trainer.evaluation.identity import INSIDE, Identity, digest_of

INCEPTION = "inception-v3-compat"
KNOWN_AS = {(INCEPTION, "2048"): "FID; kernel: KID", ("dinov2-vit-l-14", "dinov2"): "FD-DINOv2"}
"""Names by which the literature knows the Frechet distance of an extractor's layer."""
BY_HUB, SCRIPTED = "dinov2-", "clip-"
"""How extractors are called whose weights torch-fidelity has torch.hub load, or reads out of a TorchScript file."""
BATCH = 50
"""Images at a time: the first layers of Inception make 30 MB of numbers of one."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """A feature extractor of torch-fidelity (Obukhov et al. 2020, DOI 10.5281/zenodo.4957738).

    The features of Inception are those of FID (Heusel et al. 2017, arXiv 1706.08500), their kernel distance KID
    (Binkowski et al. 2018, arXiv 1801.01401); the Frechet distance of DINOv2's is FD-DINOv2 (Stein et al. 2023,
    arXiv 2306.04675, with ViT-L/14). Precision and recall are on the first 2000 images of each side, where published
    ones take 10,000 to 50,000: compare them with each other only.
    """

    extractor: str = INCEPTION
    """Its name there: inception-v3-compat, dinov2-vit-s-14, -b-14, -l-14, -g-14; vgg16, which needs ``weights``."""
    weights: str | None = None
    """File of its weights, .pth or .safetensors, for an extractor that takes one: Inception, vgg16; no object is
    unpickled. None: what torch-fidelity keeps in the torch hub's cache, else downloads, of Inception and DINOv2 alone.
    With DINOv2's weights comes the code of their repository, which torch.hub runs, and which unpickles them: use it if
    you trust that."""
    layer: str | None = None
    """Features it provides, by name; None: those of its Frechet distance."""

    def __post_init__(self) -> None:
        if not isinstance(self.extractor, str):
            raise ValueError(f"extractor must be a name, got {self.extractor!r}")
        for name, value in (("weights", self.weights), ("layer", self.layer)):
            if not isinstance(value, str | None):
                raise ValueError(f"{name} must be a text or None, got {value!r}")

    def load(self, name: str, device: torch.device) -> Imported:
        """The extractor on ``device``; ``name``: what the user typed.

        Raises:
            UserError: no package, no such extractor or layer, no weights, or weights that would be unpickled.
        """
        where = f"--features {name}"
        registry = _package(where).FEATURE_EXTRACTORS_REGISTRY
        if self.extractor not in registry:
            raise UserError(f"{where}: torch-fidelity has no extractor {self.extractor}; it has {', '.join(registry)}")
        self._require_safe(where)
        kind = registry[self.extractor]
        layers = tuple(kind.get_provided_features_list())
        layer = self.layer or kind.get_default_feature_layer_for_metric("fid")
        if layer not in layers:
            raise UserError(f"{where}: {self.extractor} has no layer {layer}; it has {', '.join(layers)}")
        network = self._built(kind, layer, where).to(device)
        side = getattr(kind, "INPUT_IMAGE_SIZE", None)
        resize = INSIDE if side is None else f"to {side} px, bilinear as in TensorFlow 1, by torch-fidelity"
        digest = digest_of(network.state_dict(), f"{self.extractor} {layer}")
        known_as = KNOWN_AS.get((self.extractor, layer))
        return Imported(
            name=f"{name} ({known_as})" if known_as else name,
            function=lambda pixels: network(in_colour(pixels).to(device)),
            identity=Identity(digest, resize),
            batch=BATCH,
            scaled=False,
        )

    def _require_safe(self, where: str) -> None:
        """Refuse weights that torch-fidelity would unpickle: whoever can write such a file can run code.

        Raises:
            UserError: just that.
        """
        if self.extractor.startswith(SCRIPTED):
            raise UserError(
                f"{where}: torch-fidelity reads the weights of {self.extractor} by a call that unpickles whatever lies "
                "in its cache: take inception or dinov2, or give the network as a TorchScript file"
            )
        if self.weights is None and self.extractor != INCEPTION and not self.extractor.startswith(BY_HUB):
            raise UserError(
                f"{where}: torch-fidelity would unpickle the weights of {self.extractor}: give their file, "
                f"\"Fidelity(extractor='{self.extractor}', weights='PATH')\", which is read without"
            )

    def _built(self, kind: Any, layer: str, where: str) -> nn.Module:
        """The network; torch-fidelity would unpickle a file of weights, so that it is given one of ours."""
        given = (
            {}
            if self.weights is None
            else {"feature_extractor_weights_path": _repacked(Path(self.weights).expanduser(), where)}
        )
        if self.weights is None and self.extractor == INCEPTION:
            given = {"feature_extractor_weights_path": _own_inception(where)}
        try:
            with redirect_stdout(sys.stderr):
                network: nn.Module = kind(self.extractor, [layer], **given)
        except NotImplementedError as error:
            raise UserError(
                f"{where}: torch-fidelity takes no file for {self.extractor}, it loads it through torch.hub: leave out "
                "weights, or give the network as a TorchScript file"
            ) from error
        except STOPS:
            raise
        except BaseException as error:  # whatever a download, a hub's code or weights that do not fit raise
            what = (
                f"{self.weights} does not fit {self.extractor}" if self.weights else f"{self.extractor} has no weights"
            )
            instead = "give the file of this extractor" if self.weights else _elsewhere(self.extractor)
            raise UserError(f"{where}: {what} ({type_and_message(error)}): {instead}") from error
        return network.eval().requires_grad_(False)


def in_colour(pixels: Tensor) -> Tensor:
    """uint8 ``[n, 1 or 3, h, w] -> [n, 3, h, w]``: grey is repeated.

    Raises:
        ValueError: other channels.
    """
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"images of {pixels.shape[1]} channels; the network takes 3")
    return pixels.expand(-1, 3, -1, -1)


def _package(where: str) -> Any:
    try:
        from torch_fidelity import registry
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "torch_fidelity":
            raise UserError(
                f"{where} needs torch-fidelity, which is not installed: pip install torch-fidelity"
            ) from error
        raise UserError(f"{where}: torch-fidelity needs {error.name}, which is not installed") from error
    except Exception as error:  # torchvision of another torch raises what it likes
        raise UserError(
            f"{where}: torch-fidelity cannot be imported ({type_and_message(error)}): install the torchvision that "
            f"belongs to torch {torch.__version__}"
        ) from error
    return registry


def _own_inception(where: str) -> io.BytesIO:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    file = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(file), hash_prefix=file.stem.rpartition("-")[2])
    except (OSError, RuntimeError) as error:  # no network; a file of another hash
        raise UserError(
            f"{where}: no weights at {file}, and they cannot be downloaded ({type_and_message(error)}): put "
            f"{file.name}, of torch-fidelity's releases, there, or give \"Fidelity(weights='PATH')\""
        ) from error
    return _repacked(file, where)


def _repacked(file: Path, where: str) -> io.BytesIO:
    """The tensors in ``file``, read without unpickling anything else, as a file that torch.load takes."""
    try:
        weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise TypeError("no tensors by name")
    except KeyboardInterrupt:
        raise
    except (Exception, SafetensorError) as error:  # what a damaged file makes them raise is not stated
        raise UserError(
            f"{where}: cannot read weights from {file} ({type_and_message(error)}): give a .safetensors, or a .pth of "
            "tensors by name"
        ) from error
    packed = io.BytesIO()
    torch.save(weights, packed)
    packed.seek(0)
    return packed


def _elsewhere(extractor: str) -> str:
    hub = torch.hub.get_dir()
    return f"run it once where there is a network, or copy its torch hub cache to {hub}, or give a TorchScript file"
