"""A store of latents as the data of a run, and the autoencoder that is kept with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.autoencoders import (
    Autoencoder,
    KLAutoencoder,
    PixelSpace,
    PretrainedAutoencoder,
    require_elsewhere,
)
from reference_trainer.data.codecs import Codec, notes_of
from reference_trainer.data.from_diffusers import DiffusersAutoencoder
from reference_trainer.data.images import ImageSet, to_pixels
from reference_trainer.data.index import CODEC, INDEX, Index
from reference_trainer.data.latents import Latents, not_finite, some_indices
from reference_trainer.data.moments import Moments
from reference_trainer.data.origin import Probe, other_weights
from reference_trainer.data.shards import FLIPPED, LATENTS, shown
from reference_trainer.data.store import Store, StoredLatents, in_pieces
from reference_trainer.errors import UserError
from reference_trainer.files import as_written, load_tensors, save_tensors

AUTOENCODERS: dict[str, Any] = {
    part.__name__: part for part in (KLAutoencoder, DiffusersAutoencoder, PretrainedAutoencoder, PixelSpace)
}


def autoencoder_to_dict(autoencoder: Autoencoder) -> dict[str, Any]:
    """Its configuration for an index.json."""
    return {"part": type(autoencoder).__name__} | asdict(autoencoder)


def autoencoder_from_dict(found: dict[str, Any]) -> Autoencoder:
    """The inverse.

    Raises:
        UserError: it is none of this version.
    """
    try:
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        made: Autoencoder = AUTOENCODERS[str(given.pop("part"))](**given)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the store names an autoencoder that this version does not have: {error}") from error
    return made


def save_codec(root: Path, codec: Codec, probe: Probe, image_channels: int, recipe: str) -> None:
    """Keep ``codec`` with the store at ``root``, and what it makes of a few images; ``recipe``: of the encode."""
    tensors = {f"codec/{name}": tensor for name, tensor in codec.tensors().items()}
    tensors |= {f"probe/{name}": tensor for name, tensor in vars(probe).items()}
    about = {"image_channels": image_channels, "recipe": recipe, "notes": notes_of(codec)}
    save_tensors(root / CODEC, tensors, about)


def load_codec(root: Path, autoencoder: Autoencoder, device: torch.device) -> tuple[Codec, str]:
    """The codec of the store at ``root`` on ``device``, and the recipe it was kept with.

    Raises:
        UserError: it cannot be read or built, or an autoencoder of the user's no longer makes of a few images what it
            made of them.
    """
    require_elsewhere(autoencoder, root)
    tensors, about = load_tensors(root / CODEC)
    weights = {name.removeprefix("codec/"): tensor for name, tensor in tensors.items() if name.startswith("codec/")}
    with as_written(root / CODEC):
        recipe, notes = str(about["recipe"]), dict(about.get("notes", {}))
        probe = Probe(**{name: tensors[f"probe/{name}"] for name in ("pixels", "latents", "decoded")})
        codec = autoencoder.build(about["image_channels"], weights).to(device)
        changes = [*other_weights(notes, codec), *probe.changes(codec, device)]
    if changes:
        raise UserError(
            f"{shown(root)} was encoded by another autoencoder ({'; '.join(changes)}): bring that back, or encode "
            "again into another folder"
        )
    return codec, recipe


@dataclass(frozen=True, kw_only=True)
class StoredImages(ImageSet):
    """Some images of a store, decoded to compare samples with; what is trained on stays on disk."""

    store: Store
    codec: Codec
    flips: bool

    @property
    def latents(self) -> StoredLatents:
        """Of all training images, raw."""
        return self.store.latents("train", self.flips)

    @property
    def moments(self) -> Moments:
        """Of ``latents``."""
        found = self.store.index.moments
        return found[LATENTS].merged(found[FLIPPED]) if self.flips else found[LATENTS]

    @property
    def num_train(self) -> int:
        """Not only those decoded."""
        return len(self.latents)

    @property
    def train_labels(self) -> Tensor | None:
        """int64, in the order of ``latents``."""
        return self.store.labels_of("train", self.flips)

    def latents_at(self, places: Tensor) -> Tensor:
        """The raw latents that ``pixels[places]`` are decoded from, ``places [m]``: ``[m, ch, h, w]``."""
        shown = int((~self.is_held_out).sum())
        out = torch.empty(len(places), *self.store.index.shape)
        for latents, own, first in (
            (self.store.latents("train"), places < shown, 0),
            (self.store.latents("held_out"), places >= shown, shown),
        ):
            if own.any():
                out[own] = latents.take(some_indices(len(latents), latents.shape)[places[own] - first])
        return out

    def not_decoded(self) -> Tensor:
        """Which latents of the store's training images ``train`` does not show, int64 ``[m]``."""
        latents = self.store.latents("train")
        hidden = torch.ones(len(latents), dtype=torch.bool)
        hidden[some_indices(len(latents), latents.shape)] = False
        return torch.nonzero(hidden).squeeze(1)

    def decoded_at(self, indices: Tensor, device: torch.device) -> Tensor:
        """What the store's training latents of these ``indices [m]`` decode to: uint8 ``[m, ch, h, w]``.

        Args:
            device: where the codec is.
        """
        return _decoded(self.codec, self.store.latents("train"), indices, device)

    def fingerprint(self) -> str:
        """Of the store: decoded pixels are rounded differently on every machine."""
        return f"{self.store.fingerprint()}{'+flips' * self.flips}"


@dataclass(frozen=True, kw_only=True)
class LatentStore:
    """Latents that ``encode`` wrote, or the extraction of LightningDiT and its descendants; read as they are needed.

    Samples are compared with images that the store's autoencoder decodes from its latents, at most 5000 of those
    trained on and as many held out.
    """

    path: str
    """The folder with the shards; empty in a preset that waits for ``--data``."""
    flips: bool = False
    """Train on the mirrored images, too; the store must have their latents."""

    def autoencoder(self) -> Autoencoder | None:
        """That the latents are of; None where the store does not say."""
        root = Path(self.path)
        found = Index.read(root).autoencoder if (root / INDEX).exists() else None
        return None if found is None else autoencoder_from_dict(found)

    def images(self) -> int:
        """How many images are trained on, not counting their mirrored ones.

        Raises:
            UserError: see ``Store.open`` and ``Index.read``.
        """
        root = Path(self.path)
        index = Index.read(root) if (root / INDEX).exists() else Store.open(root).index
        return index.count - index.held_out

    def load(self) -> StoredImages:
        """As ``decoded``, by the store's own autoencoder on the CPU."""
        return self.decoded(self.autoencoder(), torch.device("cpu"))

    def decoded(self, autoencoder: Autoencoder | None, device: torch.device) -> StoredImages:
        """Open the store, check it, decode some of it.

        Args:
            autoencoder: the run's.
        Raises:
            UserError: see ``Store.open`` and ``load_codec``; the store is of another autoencoder, or of one that the
                run does not name; the autoencoder does not take its latents.
        """
        if not self.path:
            raise UserError("the data are latents of a store, and none is named: give its folder with --data")
        root = Path(self.path)
        store = Store.open(root)
        store.latents("train", self.flips)  # refuses flips that are not there
        codec = self._codec(autoencoder, device)
        parts, labels = [], []
        for part in ("train", "held_out"):
            latents = store.latents(part)
            chosen = some_indices(len(latents), latents.shape)
            parts.append(_decoded(codec, latents, chosen, device))
            own = store.labels_of(part)
            labels += [] if own is None else [own[chosen]]
        self._require_same_shape(codec, parts[0], store, device)
        return StoredImages(
            name=f"{root.name}, decoded from its latents (reconstructions)",
            pixels=torch.cat(parts),
            labels=torch.cat(labels) if labels else None,
            is_held_out=torch.arange(sum(map(len, parts))) >= len(parts[0]),
            label_names=store.index.label_names or tuple(map(str, range(store.index.classes))),
            store=store,
            codec=codec,
            flips=self.flips,
        )

    def _codec(self, autoencoder: Autoencoder | None, device: torch.device) -> Codec:
        root, own = Path(self.path), self.autoencoder()
        if own is not None:
            if own != autoencoder:
                raise UserError(
                    f"{shown(root)} is of the autoencoder {own}, the configuration says {autoencoder}: leave the "
                    "autoencoder to --data"
                )
            return load_codec(root, own, device)[0]
        if autoencoder is None or isinstance(autoencoder, KLAutoencoder):
            raise UserError(
                f"{shown(root)} does not say which autoencoder its latents are of: name it with "
                "autoencoder=\"PretrainedAutoencoder(load='my_vae:load')\""
            )
        return autoencoder.build(3, {}).to(device)

    def _require_same_shape(self, codec: Codec, images: Tensor, store: Store, device: torch.device) -> None:
        encoded = codec.encode(images[:2].to(device).float() / 127.5 - 1)
        if (now := tuple(encoded.shape[1:])) != store.index.shape:
            raise UserError(
                f"{shown(store.root)} has latents {list(store.index.shape)}, the autoencoder makes {list(now)}: "
                "name the one that they are of"
            )


def _decoded(codec: Codec, latents: Latents, indices: Tensor, device: torch.device) -> Tensor:
    """uint8 ``[n, ch, h, w]`` of raw latents."""
    parts = []
    for part in tqdm(list(in_pieces(len(indices), 250)), desc="decoding", unit="batch", leave=False, delay=2):
        images = codec.decode(latents.take(indices[part]).to(device))
        if not_finite(images):
            raise UserError("the autoencoder decodes latents of the store to NaN or infinite values: mend it")
        parts.append(to_pixels(images).cpu())
    return torch.cat(parts)
