"""An autoencoder looked at before training pays for it: reconstructions, PSNR, distances, the tails of its latents.

Axes: images uint8 [n, ch, h, w], raw latents [n, ch, h, w], features [n, k].
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.codecs import Codec, notes_of
from reference_trainer.data.encode import Encoding, images_to_fit, split_of
from reference_trainer.data.images import psnr_of_each, to_pixels, to_unit
from reference_trainer.data.latents import not_finite, spread
from reference_trainer.data.reading import Notes, read
from reference_trainer.errors import UserError
from reference_trainer.evaluation.boxes import Column
from reference_trainer.evaluation.features import PooledLatents, pooled, vectors_of
from reference_trainer.evaluation.look_picture import Seen, column_of, draw_look
from reference_trainer.evaluation.metrics import frechet_distance, kernel_distance
from reference_trainer.options import literal
from reference_trainer.plotting import save_figure
from robustcm.tails import BoxStatistics, box_statistics

FEATURES = "latents of this autoencoder, pooled to 4x4, which are blind to fine detail"
MOST_OF_A_SET = 256
"""Images looked at of those trained on, and of those held out."""
MOST_LINES = 16
"""Channels with a line of their own: those whose values reach farthest."""


@dataclass(frozen=True)
class Look:
    """What was seen."""

    sets: tuple[Seen, ...]
    shape: tuple[int, ...]
    """(ch, h, w) of the latents."""
    mean: Tensor
    """``[ch]``, of the raw latents of all sets."""
    std: Tensor
    """``[ch]``."""
    channels: tuple[int, ...]
    """Those that reach farthest, in their order."""
    columns: tuple[Column, ...]
    """Of these, in standard deviations from the mean."""
    distances: str
    """Between images and reconstructions, in words."""
    seconds: tuple[float, float]
    """An image takes to encode, and to decode."""


def look_at(encoding: Encoding, picture: Path, device: torch.device, cache: Path) -> str:
    """Fit or load the autoencoder of ``encoding``, draw ``picture``, and say what was seen; no latents are stored.

    A fit is kept in ``cache``, where the encode that follows finds it.

    Raises:
        UserError: see ``encode_folder``; latents or reconstructions that are not finite.
    """
    files = encoding.source.open()
    split = split_of(encoding, files)
    images = images_to_fit(encoding, files, split)
    codec = encoding.autoencoder.fit(images, device, cache)
    held_out, held_out_files = images.held_out, split[1]
    of_train, of_held_out = map(len, split)
    if not len(held_out):  # of many images only some were read, to train on
        chosen = spread(torch.arange(of_held_out), MOST_OF_A_SET).tolist()
        held_out = read(files, [held_out_files[i] for i in chosen], encoding.source.resolution, Notes())[0]
    parts = (("to train on", spread(images.train, MOST_OF_A_SET), of_train), ("held out", held_out, of_held_out))
    look = seen(codec, [(name, spread(part, MOST_OF_A_SET), of) for name, part, of in parts if len(part)], device)
    title = literal(encoding.autoencoder)
    save_figure(draw_look(look.sets, look.columns, textwrap.fill(title, 150, max_lines=2)), picture)
    return "\n".join([f"autoencoder  {title}", *in_words(look, codec, len(files), encoding), f"look at {picture}"])


def seen(codec: Codec, parts: Sequence[tuple[str, Tensor, int]], device: torch.device) -> Look:
    """Take each of ``parts`` (name, images, of how many) there and back.

    Raises:
        UserError: latents or reconstructions that are not finite.
    """
    sets, latents, spent = list[Seen](), list[Tensor](), [0.0, 0.0]
    count = sum(len(images) for _, images, _ in parts)
    with tqdm(total=count, desc="looking", unit="img", leave=False, delay=1) as bar:
        for name, images, of in parts:
            there = list[Tensor]()
            for part in images.split(32):
                started = time.perf_counter()
                raw = codec.encode(to_unit(part).to(device)).cpu()
                encoded = time.perf_counter()
                back = codec.decode(raw.to(device)).cpu()
                spent = [spent[0] + encoded - started, spent[1] + time.perf_counter() - encoded]
                for what, values in (("latents", raw), ("reconstructions", back)):
                    if bad := not_finite(values):
                        raise UserError(
                            f"{what} of {len(bad)} of {len(part)} images {name} are NaN or infinite: mend the "
                            "autoencoder; if its weights are float16, try bfloat16 or float32"
                        )
                latents.append(raw)
                there.append(to_pixels(back))
                bar.update(len(part))
            sets.append(Seen(name, of, images, torch.cat(there), psnr_of_each(images, torch.cat(there))))
    raw = torch.cat(latents)
    std, mean = torch.std_mean(raw.double(), dim=(0, 2, 3))
    scaled = ((raw.transpose(0, 1).flatten(1) - mean[:, None]) / std.clamp(min=1e-30)[:, None]).float()
    boxes = [box_statistics(values) for values in scaled]
    channels = farthest(boxes)
    return Look(
        sets=tuple(sets),
        shape=tuple(raw.shape[1:]),
        mean=mean,
        std=std,
        channels=channels,
        columns=tuple(column_of(str(i), scaled[i], boxes[i]) for i in channels),
        distances=_distances(codec, sets, raw, device),
        seconds=(spent[0] / len(raw), spent[1] / len(raw)),
    )


def _distances(codec: Codec, sets: Sequence[Seen], latents: Tensor, device: torch.device) -> str:
    """Of reconstructions to images, beside what chance makes of two halves of the images, in the default features.

    Args:
        latents: of the images, ``[n, ch, h, w]``.
    """
    real = pooled(latents)
    fake = vectors_of(torch.cat([one.reconstructed for one in sets]), PooledLatents(codec, device))
    kernel, chance = kernel_distance(real, fake), kernel_distance(real[::2], real[1::2])
    said = f"kernel x1000 {kernel:.2f} (of one half of the images to the other: {chance:.2f})"
    if len(real) > 2 * real.shape[1]:  # else its covariance means little
        said += f", Frechet {frechet_distance(real, fake):.3g}"
    return f"{said}; in {FEATURES}, n = {len(real)}"


def farthest(boxes: Sequence[BoxStatistics], most: int = MOST_LINES) -> tuple[int, ...]:
    """Which channels have the largest |z|, at most so many, in their order."""
    return tuple(sorted(sorted(range(len(boxes)), key=lambda i: boxes[i].max_z, reverse=True)[:most]))


def in_words(look: Look, codec: Codec, files: int, encoding: Encoding) -> list[str]:
    """The figures as lines."""
    size = look.sets[0].images.shape[1:]
    fewer = math.prod(size) / math.prod(look.shape)
    encode, decode = look.seconds
    images = (2 if encoding.flips else 1) * files
    notes = notes_of(codec)
    lines = [
        *([f"weights      {notes['class']}, sha256 {notes['weights_sha256'][:8]}"] if "class" in notes else []),
        *([f"fit          {notes['steps']} steps: {notes['stopped']}"] if "steps" in notes else []),
        f"looked at    {', '.join(f'{len(one.images)} of {one.of} images {one.name}' for one in look.sets)}",
        f"latents      {_by(look.shape)} of images {_by(size)}: {fewer:.3g} times fewer numbers",
        *(f"PSNR         {one.in_words()}" for one in look.sets),
        f"distance     {look.distances}",
        f"time         {1000 * encode:.3g} ms an image to encode, {1000 * decode:.3g} ms to decode; all {images}: "
        f"{_time(encode * images)}",
        "",
        f"{'channel':>9}{'mean':>10}{'std':>10}{'max |z|':>10}{'kurtosis':>10}{'beyond inner':>15}{'outer fences':>15}",
    ]
    for i, column in zip(look.channels, look.columns, strict=True):
        box = column.box
        lines.append(
            f"{i:9d}{look.mean[i]:10.3g}{look.std[i]:10.3g}{box.max_z:10.1f}{box.kurtosis:10.1f}"
            f"{box.beyond_inner:15.2%}{box.beyond_outer:15.3%}"
        )
    if len(look.channels) < len(look.mean):
        lines.append(f"          (of {len(look.mean)} channels the {len(look.channels)} that reach farthest)")
    lines.append(f"{'Gaussian':>9}{'':>30}{3.0:10.1f}{0.00698:15.2%}{2.35e-6:15.3%}")
    return lines


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _time(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {max(1, math.ceil(seconds))} s"
