"""What a run was made from, kept with its latent space, so that a change behind the same names is seen.

The images are told apart by a fingerprint. An autoencoder of the user's is known to the run by name alone: of it the
run keeps what it made of a few images, and compares with a tolerance, since every machine rounds in its own way.

Axes: p = images of the probe, ch, h, w.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.autoencoders import Autoencoder
from reference_trainer.data.codecs import Codec, Foreign, notes_of
from reference_trainer.data.images import ImageSet, to_pixels
from reference_trainer.data.latents import LatentSpace, encode, not_finite, spread
from reference_trainer.errors import UserError
from reference_trainer.files import as_written, check_layout, load_tensors, save_tensors

LATENTS_MAY_DIFFER = 0.03
"""Root mean square over an image, in standard deviations of the probe: several times what bfloat16 rounds away."""
PIXELS_MAY_DIFFER = 3.0
"""Root mean square over an image, in grey levels of 255."""


@dataclass(frozen=True)
class Probe:
    """A few images, spread over the whole set, and what a codec makes of them."""

    pixels: Tensor
    """uint8 ``[p, ch, h, w]``; images whose latents are not finite are left out."""
    latents: Tensor
    """``[p, ch, h, w]``, raw."""
    decoded: Tensor
    """uint8 ``[p, ch, h, w]``."""

    @staticmethod
    def of(codec: Codec, pixels: Tensor, device: torch.device) -> Probe:
        """Try ``codec`` on some of ``pixels [n, ch, h, w]``.

        Raises:
            UserError: it decodes to images of another size, or to NaN.
        """
        chosen = spread(pixels)
        latents = encode(codec, chosen, device)
        bad = not_finite(latents)
        good = torch.tensor([i for i in range(len(chosen)) if i not in bad], dtype=torch.long)
        chosen, latents = chosen[good], latents[good]
        if not len(chosen):  # whoever encodes all of them will say which
            return Probe(chosen, latents, chosen)
        images = codec.decode(latents.to(device))
        if images.shape != chosen.shape:
            raise UserError(
                f"{name_of(codec)} decodes to images {list(images.shape[1:])} where it was given "
                f"{list(chosen.shape[1:])} (channels, height, width): they cannot be compared"
            )
        if bad := not_finite(images):
            raise UserError(f"{name_of(codec)} decodes {len(bad)} of {len(images)} images to NaN or infinite values")
        return Probe(chosen, latents, to_pixels(images).cpu())

    def changes(self, codec: Codec, device: torch.device) -> list[str]:
        """How ``codec`` differs from the one of this probe, in words; nothing if by rounding alone."""
        now = encode(codec, self.pixels, device)
        if now.shape != self.latents.shape:
            return [f"{name_of(codec)} gave latents {list(self.latents.shape[1:])}, now {list(now.shape[1:])}"]
        scale, said = _scale(self.latents), []
        drawn = differs_by(encode(codec, self.pixels, device), now, 0)  # 0, unless it draws its latents at random
        if far := differs_by(now, self.latents, max(LATENTS_MAY_DIFFER * scale, 3 * drawn)):
            by = f"by {far / scale:.2g} standard deviations" if math.isfinite(far) else "NaN or infinite values"
            said.append(f"{name_of(codec)} encodes differently ({by})")
        decoded = codec.decode(self.latents.to(device)).cpu()
        grey = 255 / 2 * decoded.clamp(-1, 1)
        if decoded.shape != self.decoded.shape:
            said.append(f"{name_of(codec)} decoded to {list(self.decoded.shape[1:])}, now {list(decoded.shape[1:])}")
        elif far := differs_by(grey, self.decoded.float() - 255 / 2, PIXELS_MAY_DIFFER):
            by = f"by {far:.2g} of 255 grey levels" if math.isfinite(far) else "NaN values"
            said.append(f"{name_of(codec)} decodes differently ({by})")
        return said


def name_of(codec: Codec) -> str:
    """What a message calls it."""
    return f"autoencoder {codec.name}" if isinstance(codec, Foreign) else "the autoencoder"


def other_weights(notes: Mapping[str, Any], codec: Codec) -> list[str]:
    """That the weights of ``codec`` are not those that ``notes`` (``notes_of``) tell of, in words; nothing if not."""
    then, now = (found.get("weights_sha256") for found in (notes, notes_of(codec)))
    if then is None or now is None or then == now:
        return []
    return [f"{name_of(codec)} has other weights (sha256 {then[:8]} then, {now[:8]} now)"]


def differs_by(now: Tensor, then: Tensor, tolerance: float) -> float:
    """Root mean square difference of the worst image, 0 if within ``tolerance``; what is not finite in both is equal.

    Args:
        now, then: ``[p, ...]``.
    """
    either = now.isfinite() | then.isfinite()
    squares = torch.where(either, now.double() - then.double(), 0).square().flatten(1).mean(1)
    far = math.sqrt(float(squares.nan_to_num(math.inf, math.inf).max())) if len(squares) else 0.0
    return far if far > tolerance else 0.0


def _scale(latents: Tensor) -> float:
    finite = latents[latents.isfinite()].double()
    return max(float(finite.std()) if len(finite) > 1 else 0.0, 1e-30)


@dataclass(frozen=True)
class Origin:
    """Of what images and autoencoder."""

    fingerprint: str
    """Of the images, see ``ImageSet.fingerprint``."""
    train: int
    held_out: int
    size: tuple[int, ...]
    """(ch, h, w) of the images."""
    probe: Probe | None
    """None of a codec that is kept whole with the run."""
    notes: dict[str, Any] = field(default_factory=dict)
    """See ``notes_of``."""

    @staticmethod
    def of(images: ImageSet, probe: Probe, codec: Codec) -> Origin:
        counts = len(images.train_places), len(images.held_out_places)
        kept = probe if isinstance(codec, Foreign) else None
        return Origin(images.fingerprint(), *counts, tuple(images.pixels.shape[1:]), kept, notes_of(codec))

    def changes(self, images: ImageSet | None, codec: Codec, device: torch.device) -> list[str]:
        """What of ``images`` (if given) and ``codec`` is not what it was, in words."""
        said = []
        if images is not None and images.fingerprint() != self.fingerprint:
            now = len(images.train_places), len(images.held_out_places)
            if now == (self.train, self.held_out) and tuple(images.pixels.shape[1:]) == self.size:
                said.append(f"its {self.train} + {self.held_out} images are as many as they were, but other pixels")
            else:
                then = _in_words(self.train, self.held_out, self.size)
                said.append(f"{then} then, {_in_words(*now, tuple(images.pixels.shape[1:]))} now")
        said += other_weights(self.notes, codec)
        return said + (self.probe.changes(codec, device) if self.probe is not None else [])


def _in_words(train: int, held_out: int, size: tuple[int, ...]) -> str:
    return f"{train} training and {held_out} held-out images of {' x '.join(map(str, size))}"


@dataclass(frozen=True)
class KeptSpace:
    """A run's ``autoencoder.safetensors``: the space it is trained in, and what that was made from."""

    space: LatentSpace
    """Its ``recognised_at`` is NaN if the run is of a version that did not measure it."""
    shape: tuple[int, int, int]
    """(ch, h, w) of the latents."""
    image_channels: int
    origin: Origin | None
    """None: the run is of a version that did not keep it."""

    def save(self, file: Path) -> None:
        """See ``save_tensors``."""
        tensors = {f"codec/{name}": tensor for name, tensor in self.space.codec.tensors().items()}
        tensors |= {"mean": self.space.mean, "std": self.space.std}
        about = {"shape": self.shape, "image_channels": self.image_channels, "recognised_at": self.space.recognised_at}
        if (origin := self.origin) is not None:
            names = ("fingerprint", "train", "held_out", "size", "notes")
            about["origin"] = {name: getattr(origin, name) for name in names}
            tensors |= {} if origin.probe is None else {f"probe/{name}": t for name, t in vars(origin.probe).items()}
        save_tensors(file, tensors, about)

    @staticmethod
    def load(file: Path, autoencoder: Autoencoder, device: torch.device) -> KeptSpace:
        """The inverse of ``save``; ``autoencoder`` as the run is configured.

        Raises:
            UserError: the file is missing or damaged, or the autoencoder cannot be built.
        """
        try:
            tensors, about = load_tensors(file)
            with as_written(file):
                ch, h, w, image_channels = map(operator.index, (*about["shape"], about["image_channels"]))
                level = math.nan if about.get("recognised_at") is None else float(about["recognised_at"])
                for name in ("mean", "std"):
                    check_layout({name: tensors[name]}, {name: torch.empty(ch)})
                if not tensors["mean"].isfinite().all() or not (tensors["std"] > 0).all():
                    raise ValueError("mean and std make no sense")
                origin, probe = about.get("origin"), _below("probe/", tensors)
                if origin is not None:
                    size = tuple(origin.pop("size"))
                    origin = Origin(**origin, size=size, probe=Probe(**probe) if probe else None)
        except UserError as error:
            raise UserError(
                f"{error}; the run's weights mean nothing without it: put a copy back, or train anew"
            ) from error
        with as_written(file):
            codec = autoencoder.build(image_channels, _below("codec/", tensors))
        space = LatentSpace(codec.to(device), tensors["mean"], tensors["std"], level)
        return KeptSpace(space, (ch, h, w), image_channels, origin)

    def made_from(self, images: ImageSet, device: torch.device) -> KeptSpace:
        """The same space, with ``images`` and its codec as they are now for its origin."""
        codec = self.space.codec
        return replace(self, origin=Origin.of(images, Probe.of(codec, images.train, device), codec))

    def changes(self, images: ImageSet | None, device: torch.device) -> list[str]:
        """See ``Origin.changes``; nothing where the origin is not known."""
        return [] if self.origin is None else self.origin.changes(images, self.space.codec, device)


def kept_shape(file: Path) -> tuple[int, int, int]:
    """(ch, h, w) of the latents whose space is kept at ``file``; the autoencoder is not built for it.

    Raises:
        UserError: the file is missing or damaged.
    """
    _, about = load_tensors(file)
    with as_written(file):
        ch, h, w = map(operator.index, about["shape"])
    return ch, h, w


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def reopen(
    file: Path, autoencoder: Autoencoder, images: ImageSet | None, device: torch.device, new_data: bool = False
) -> tuple[KeptSpace, tuple[str, ...]]:
    """The space kept at ``file``, and what has changed since of ``images`` (if given) and autoencoder.

    Args:
        new_data: changes are said and accepted; the space is as it was in any case.
    Raises:
        UserError: something has changed; also see ``KeptSpace.load``.
    """
    kept = KeptSpace.load(file, autoencoder, device)
    changes = tuple(kept.changes(images, device))
    if changes and not new_data:
        raise UserError(
            f"{file.parent} was made from something else ({'; '.join(changes)}): bring that back, give a new run "
            "another --out, or add --new-data to train or evaluate to go on with what is there now"
        )
    if changes:
        tqdm.write(f"--new-data: {'; '.join(changes)}")
    if kept.origin is None and images is not None:
        tqdm.write(f"{file.parent} does not say what it was made from (an earlier version): noted what is there now")
        kept = kept.made_from(images, device)
        with suppress(UserError):  # a convenience, and the folder may be read-only
            kept.save(file)
    return kept, changes
