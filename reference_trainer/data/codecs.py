"""What turns images into latents and back: the protocol, the pixels themselves, and an autoencoder of the user's.

Axes: images [n, ch, h, w] in -1 .. 1, latents [n, ch, h, w].
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from reference_trainer.data.outputs import NAMES, described, tensor_in
from reference_trainer.errors import STOPS, UserError, type_and_message

Method = Literal["encode", "decode"]


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


def notes_of(codec: Codec) -> dict[str, Any]:
    """What an index and a report say of ``codec``: of a fitted one the PSNR, of a loaded one a hash of its weights."""
    return dict(getattr(codec, "notes", {}))


class Pixels:
    """Images as their own latents."""

    def to(self, device: torch.device) -> Pixels:
        return self

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def tensors(self) -> dict[str, Tensor]:
        return {}


USERS_CODE = threading.RLock()
"""Held while code of the user's runs: it may not be made for two threads, or draw from torch's own generators."""


class Foreign:
    """An object of the user's as a codec; a few images at a time, since its network may be large.

    It sees numbers of its own dtype, on its own device, in eval mode and without gradients; what it gives comes back
    as float32 where the values were, NaN included. What it draws from torch it draws from a seed of ours, so that the
    same images give the same latents. If the memory runs out, half as many images are tried, down to one.
    """

    PIXELS = 2**20  # encoded at a time
    ELEMENTS = 2**16  # decoded at a time: 16 images of 256 x 256 where 8 x 8 pixels are 4 numbers

    def __init__(self, name: str, autoencoder: Any, notes: Mapping[str, Any] | None = None) -> None:
        """``notes``: see ``notes_of``."""
        self.name, self.autoencoder, self.notes = name, autoencoder, dict(notes or {})
        self._budget = {"encode": self.PIXELS, "decode": self.ELEMENTS}
        for module in _modules_of(autoencoder):
            module.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Foreign:
        """Move it: by its own ``to`` where it has one, else the modules among its attributes."""
        try:
            if callable(getattr(self.autoencoder, "to", None)):
                moved = self.autoencoder.to(device)
                self.autoencoder = self.autoencoder if moved is None else moved
            else:
                for module in _modules_of(self.autoencoder):
                    module.to(device)
        except STOPS:
            raise
        except BaseException as error:
            raise UserError(
                f"autoencoder {self.name}: cannot be moved to {device}: {type_and_message(error)}"
            ) from error
        return self

    def encode(self, images: Tensor) -> Tensor:
        """See ``Codec``.

        Raises:
            UserError: whatever its own code raises, and what it gives if that is no ``[n, ch, h, w]``.
        """
        return self._apply("encode", images, images[0, 0].numel())

    def decode(self, latents: Tensor) -> Tensor:
        """See ``encode``."""
        return self._apply("decode", latents, latents[0].numel())

    def encode_drawing(self, images: Tensor, seed: int) -> Tensor:
        """As ``encode``, but what it draws from torch comes from another ``seed``."""
        return self._apply("encode", images, images[0, 0].numel(), seed)

    def tensors(self) -> dict[str, Tensor]:
        """None: it is not stored with the run."""
        return {}

    def _apply(self, method: Method, values: Tensor, each: int, seed: int = 0) -> Tensor:
        """``method`` of ``values``, as many at a time as its budget pays for at the price of ``each``."""
        parts: list[Tensor] = []
        done = 0
        with tqdm(total=len(values), desc=f"{method} by {self.name}", unit="img", leave=False, delay=2) as bar:
            while done < len(values):
                part = values[done : done + max(1, self._budget[method] // each)]
                try:
                    with USERS_CODE:
                        out = self._called(method, part, seed + done)
                except MemoryError as error:
                    if len(part) == 1:
                        raise self._failed(method, part, error) from error
                    out = None  # and try again outside: here the failed attempt's tensors are still alive
                if out is None:
                    self._budget[method] = len(part) // 2 * each
                    torch.cuda.empty_cache()
                    continue
                if parts and out.shape[1:] != parts[0].shape[1:]:
                    raise UserError(
                        f"{self._where(method)} gives {list(parts[0].shape[1:])} for some and {list(out.shape[1:])} "
                        "for others of these values, which all have one shape"
                    )
                parts.append(out)
                done += len(part)
                bar.update(len(part))
        return torch.cat(parts)

    def _called(self, method: Method, values: Tensor, seed: int) -> Tensor:
        """
        Raises:
            MemoryError: of whatever device.
            UserError: see ``encode``.
        """
        weight = self._first_weight(method)
        own = values if weight is None else values.to(weight.device, weight.dtype)
        try:
            with torch.no_grad(), torch.random.fork_rng([own.device] if own.device.type == "cuda" else []):
                torch.manual_seed(seed)
                output = getattr(self.autoencoder, method)(own)
                out = tensor_in(output)
        except (*STOPS, UserError):
            raise
        except BaseException as error:  # the user's code, and that of any library below it, SystemExit included
            if _is_out_of_memory(error):
                raise MemoryError(*str(error).splitlines()[:1]) from None
            raise self._failed(method, values, error) from error
        where = self._where(method)
        if out is None:
            raise UserError(
                f"{where} must give a tensor [n, ch, h, w], or hold one as {', '.join(NAMES)}; got {described(output)}"
            )
        if out.dim() != 4 or len(out) != len(values) or not out.numel():
            raise UserError(f"{where} must give [n, ch, h, w], got {list(out.shape)} for {list(values.shape)}")
        if not out.is_floating_point():
            raise UserError(f"{where} must give numbers with a fraction, about -1 .. 1 for images; got {out.dtype}")
        return out.detach().to(values.device, torch.float32)

    def _first_weight(self, method: Method) -> Tensor | None:
        """What says which dtype and device ``method`` computes in: the first weight, or buffer, of its half."""
        half = getattr(self.autoencoder, f"{method}r", None)
        modules = [half] if isinstance(half, nn.Module) else []
        return next(_weights_of([*modules, *_modules_of(self.autoencoder)]), None)

    def _where(self, method: Method) -> str:
        return f"autoencoder {self.name}: {method}()"

    def _failed(self, method: Method, values: Tensor, error: BaseException) -> UserError:
        shape = ", ".join(map(str, values.shape[1:]))
        return UserError(f"{self._where(method)} failed on values [n, {shape}]: {type_and_message(error)}")


def check_codec(codec: Codec, images: Tensor) -> None:
    """Refuse, before anything is paid for, a codec that does not take ``images`` there and back: two are enough.

    A user's encoder that draws random numbers is allowed, and said.

    Args:
        images: ``[n, ch, h, w]`` in -1 .. 1, on the codec's device.
    Raises:
        UserError: it fails, or gives another shape, or images that are not finite.
    """
    try:
        latents = codec.encode(images)
        decoded = codec.decode(latents)
    except UserError as error:
        raise UserError(f"{error}{_about_colours(codec, images)}") from error
    name = codec.name if isinstance(codec, Foreign) else type(codec).__name__
    if decoded.shape != images.shape:
        colours = " (the images are grey)" if images.shape[1] == 1 else ""
        raise UserError(
            f"autoencoder {name}: decode() gives images {list(decoded.shape[1:])} for images "
            f"{list(images.shape[1:])}{colours}: let it give the size and channels that encode() was shown, or change "
            "data.resolution"
        )
    if latents.isfinite().all() and not decoded.isfinite().all():
        raise UserError(
            f"autoencoder {name}: decode() gives NaN or infinite values for latents that are finite; if its weights "
            "are float16, try float32"
        )
    if isinstance(codec, Foreign):
        _say_if_it_draws(codec, images, latents)


def _about_colours(codec: Codec, images: Tensor) -> str:
    """What to do where the other number of channels would have worked."""
    ch = images.shape[1]
    other = images.expand(-1, 3, -1, -1) if ch == 1 else images.mean(1, keepdim=True)
    if not _goes_there_and_back(codec, other):
        return ""
    if ch == 1:
        return (
            "; the images are grey and it takes 3 channels: let encode() take images.expand(-1, 3, -1, -1), and "
            "decode() give the mean over the channels"
        )
    return "; the images have 3 channels and it takes 1: let encode() and decode() take each channel as an image"


def _goes_there_and_back(codec: Codec, images: Tensor) -> bool:
    try:
        codec.decode(codec.encode(images))
    except UserError:
        return False
    return True


def _say_if_it_draws(codec: Foreign, images: Tensor, latents: Tensor) -> None:
    tolerance = 1e-3 * float(latents.nan_to_num(0, 0, 0).abs().max())  # devices may add in another order

    def is_other(again: Tensor) -> bool:
        return not torch.allclose(again, latents, rtol=0, atol=tolerance, equal_nan=True)

    if is_other(codec.encode(images)):
        tqdm.write(
            f"autoencoder {codec.name}: encode() gives the same images other latents each time; each image is encoded "
            "once and stays as it came, but a run cannot be repeated: draw from torch's generator, or take the mean"
        )
    elif is_other(codec.encode_drawing(images, seed=1)):
        tqdm.write(
            f"autoencoder {codec.name}: encode() draws random numbers; each image is encoded once and stays as it came"
        )


def _modules_of(autoencoder: Any) -> list[nn.Module]:
    """The network it is, or the networks among its attributes."""
    if isinstance(autoencoder, nn.Module):
        return [autoencoder]
    return [value for value in getattr(autoencoder, "__dict__", {}).values() if isinstance(value, nn.Module)]


def _weights_of(modules: list[nn.Module]) -> Iterator[Tensor]:
    """Parameters, then buffers, that say what a module computes in: not those stored in 8 bits, nor those elsewhere."""
    computing = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
    return (tensor for tensor in tensors if tensor.dtype in computing and tensor.device.type != "meta")


def _is_out_of_memory(error: BaseException) -> bool:
    told = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    if isinstance(error, RuntimeError):  # torch's, of any device
        return any(part in str(error) for part in told)
    return isinstance(error, MemoryError)
