"""Where are the outliers? Box plots of data values and temporal differences, with advice on distance and c (Fig. 1)."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).with_name("needed.py")))

import numpy as np

from analysis.baselines import baseline_spaces
from analysis.command import add_common, add_data, check_common, run_command
from analysis.drawing import COLOURS, draw_outliers, gaussian_beside
from analysis.inputs import at_resolution, configuration, load_images, some_of_images
from analysis.stored import run_on_store, stored_space
from analysis.values import NoiseLevels, Residuals, Space, normalised, run_space
from reference_trainer.command import Parser
from reference_trainer.config import Data, TrainConfig
from reference_trainer.data.images import ImageFolder, ImageSet, to_unit
from reference_trainer.data.latents import RECOGNISED
from reference_trainer.data.stored import LatentStore
from reference_trainer.errors import UserError
from reference_trainer.evaluation.boxes import Column, outliers_of
from reference_trainer.files import write_atomically
from reference_trainer.machine import cache_folder, device_of
from reference_trainer.plotting import save_figure
from reference_trainer.presets import on_data
from reference_trainer.run import RunFolder
from robustcm.tails import box_statistics, box_statistics_along, box_statistics_by
from robustcm.tails.advice import Advice, advise
from robustcm.tails.boxes import FEW

EPILOG = """
what it does:
  Takes images, encodes them with the autoencoder that `train` would take, and trains an iLCT baseline (iCT on latents:
  Pseudo-Huber, constant c, nothing clipped) for a short time at N noise levels, once on the pixels and once on the
  latents; both are kept in the cache folder ($ROBUSTCM_CACHE) and reused. With --run it looks at that run instead.
  Writes OUT/td_outliers.png (look at it) and OUT/td_outliers.json (everything measured: per space, channel and level).

how to read it:
  Two things may have outliers. Data values, every number by itself: clipping the latents is against these. Norms r of
  the temporal differences of whole samples, within a noise level: a robust distance is against those.
  Beyond the inner fences a Gaussian has 0.70 % of its values, beyond the outer ones 0.0002 %. xi is the extreme-value
  index: above 0 a power law (1/xi moments exist), about 0 Gaussian or exponential, below 0 bounded. Pooled temporal
  differences mix noise levels of different spread and look heavy for that reason alone: see panel (c).

examples:
  python analysis/td_outliers.py                                    the embedded digits, 4 minutes at first
  python analysis/td_outliers.py --run runs/digits                  a trained run, at the N it has reached
  python analysis/td_outliers.py --data photos --resolution 128      as `train --data photos data.resolution=128` would
  python analysis/td_outliers.py --data photos --autoencoder "KLAutoencoder(latent_channels=8, likelihood='gaussian')"
  python analysis/td_outliers.py --data photos --autoencoder my_vae:load --steps 0     data values only
  python analysis/td_outliers.py --data STORE                       latents that encode wrote, some of them
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(parser(), look, arguments)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, metavar="RUN", help="look at this trained run (default: brief baselines)")
    add_data(p, "a folder of images, a store of latents, or the preset photographs (default: the digits, or the run's)")
    p.add_argument("--levels", type=int, metavar="N", help="number of noise levels (default 21, or the run's)")
    p.add_argument("--steps", type=int, default=300, help="training steps of a baseline, 0 for none (default 300)")
    add_common(p)
    return p


def look(options: argparse.Namespace) -> int:
    """Measure, write, say."""
    check_options(options)
    spaces, lines = spaces_of(options)
    report: dict[str, Any] = {}
    for space in spaces:
        report[space.name] = measure(space)
        advice: Advice | str | None = None
        if space.residuals is not None:
            advice = advice_on(space.residuals)
            report[space.name] |= {"advice": None, "no_advice": advice}
            if isinstance(advice, Advice):
                report[space.name] |= {"advice": advice.as_dict(), "no_advice": None}
        lines += ["", *in_words(space, report[space.name], advice)]
    files = options.out / "td_outliers.png", options.out / "td_outliers.json"
    save_figure(figure_of(spaces), files[0])
    write_atomically(files[1], (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    print("\n".join(lines))
    print(f"\nlook at {files[0]}; all numbers are in {files[1]}")
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is computed."""
    check_common(options)
    if options.run is not None and options.autoencoder is not None:
        raise UserError("--run has its own autoencoder: give one of --run and --autoencoder")
    if options.levels is not None and options.levels < 2:
        raise UserError(f"--levels must be at least 2, got {options.levels}")
    if options.steps < 0:
        raise UserError(f"--steps must be 0 or more, got {options.steps}")
    if options.resolution is not None and options.data is None:
        raise UserError("--resolution is for --data: the embedded digits and a run's data have their own")


def spaces_of(options: argparse.Namespace) -> tuple[list[Space], list[str]]:
    """Pixels, then latents, with what residuals there are; and lines on what they are made of."""
    device, cache, limit = device_of(options.device), cache_folder(), options.images
    if options.run is None:
        config = configuration(options.data, options.resolution, options.autoencoder, device)
        if isinstance(config.data, LatentStore):
            stored = config.data.decoded(config.autoencoder, device)
            space = stored_space(
                *(config, stored, limit),
                num_levels=options.levels or 21,
                steps=options.steps,
                count=options.samples,
                cache=cache,
                device=device,
            )
            return [space], [f"{config.data.path}: a store of latents; training measures on all of them"]
        images = load_images(config.data)
        spaces, left_out = baseline_spaces(
            *(config, images, limit),
            num_levels=options.levels or 21,
            steps=options.steps,
            count=options.samples,
            cache=cache,
            device=device,
        )
        return spaces, [about(images, limit), *left_out]
    run = RunFolder(options.run)
    config = run.config()
    run.require_checkpoint()
    data = data_for(config, options)
    if isinstance(data, LatentStore):
        config = replace(config, data=data)
        space = run_on_store(run, config, limit, options.levels, options.samples, cache, device)
        return [space], [f"{data.path}: a store of latents"]
    images = load_images(data)
    some = some_of_images(images, limit)
    whole = images if data == config.data else None
    space = run_space(run, some, whole=whole, num_levels=options.levels, count=options.samples, device=device)
    if space.name == "pixels":
        return [space], [about(images, limit)]
    x, channels = normalised(to_unit(some.train))
    return [Space("pixels", x, None, channels=channels), space], [about(images, limit)]


def data_for(config: TrainConfig, options: argparse.Namespace) -> Data:
    """What a run of ``config`` is looked at on: its own data, or ``--data``, at the resolution it has for a folder."""
    if options.data is None:
        return config.data
    data = on_data(config, options.data).data
    own = config.data.resolution if isinstance(config.data, ImageFolder) else None
    wanted = options.resolution or own
    return data if wanted is None else at_resolution(data, wanted)


def measure(space: Space) -> dict[str, Any]:
    """Everything that goes into the JSON about one space."""
    channels = space.channels or range(space.data.shape[1])
    entry: dict[str, Any] = {"notes": list(space.notes), "data": described(space.data.numpy(), channels)}
    levels = space.levels
    entry["noise_levels"] = levels.as_dict() if isinstance(levels, NoiseLevels) else None
    if (found := space.residuals) is not None:
        td = described(found.td.numpy(), range(found.td.shape[1]))
        by_level = box_statistics_by(found.td, found.level)
        entry["td"] = {"origin": found.origin, "num_levels": found.num_levels, "d": found.d} | td
        entry["td"]["by_level"] = [
            {"level": i, "sigma": float(found.sigmas[i]), "samples": int((found.level == i).sum())} | box.as_dict()
            for i, box in by_level.items()
        ]
        entry["r"] = box_statistics(found.r).as_dict()
    return entry


def described(values: np.ndarray, channels: Iterable[int]) -> dict[str, Any]:
    """Box statistics of all the values ``[n, ch, h, w]``, of the Gaussian beside them, and of each of ``channels``."""
    box = box_statistics(values)
    by_channel = zip(channels, box_statistics_along(values, 1), strict=True)
    return {
        "all": box.as_dict(),
        "gaussian": box_statistics(gaussian_beside(values, box)).as_dict(),
        "by_channel": [{"channel": i} | channel.as_dict() for i, channel in by_channel],
    }


def advice_on(found: Residuals) -> Advice | str:
    """The advice for these residuals; or why there is none."""
    try:
        return advise(found.r, found.level, found.num_levels, found.d, found.td)
    except ValueError as error:
        return str(error)


def figure_of(spaces: Sequence[Space]) -> Any:
    """Fig. 1 of these spaces."""
    data, td, by_level = [], [], {}
    for space in spaces:
        data += columns(space.name, space.data.numpy())
        if (found := space.residuals) is not None:
            td += columns(space.name, found.td.numpy())
            boxes = box_statistics_by(found.td, found.level)
            by_level[space.name] = [
                (float(found.sigmas[i]), box) for i, box in boxes.items() if box.count >= FEW * found.d
            ]
    return draw_outliers(data, td, by_level)


def columns(name: str, values: np.ndarray) -> list[Column]:
    """The values' column and that of the Gaussian beside them."""
    box = box_statistics(values)
    gaussian = gaussian_beside(values, box)
    gaussian_box = box_statistics(gaussian)
    return [
        Column(name, box, outliers_of(values, box), COLOURS[name]),
        Column("Gaussian", gaussian_box, outliers_of(gaussian, gaussian_box)),
    ]


def about(images: ImageSet, limit: int) -> str:
    """What is looked at, as a line."""
    n, size = len(images.train), " x ".join(map(str, images.pixels.shape[1:]))
    looked = "" if n <= limit else f"; looked at: {limit}, chosen at random (--images), while training measures on all"
    return f"{images.name}: training images of {size}: {n}{looked}"


def in_words(space: Space, entry: dict[str, Any], advice: Advice | str | None) -> list[str]:
    """The report on one space for the terminal: each part says what it is about, the last line concludes."""
    shape = " x ".join(map(str, space.data.shape[1:]))
    lines = [f"== {space.name}: samples of {shape} numbers: {len(space.data)}", *(f"   {note}" for note in space.notes)]
    lines += [
        "   data values, every number by itself, normalised per channel:",
        *_box_lines(entry["data"]["all"]),
    ]
    if (found := space.residuals) is not None:
        lines += [
            f"   temporal differences of {found.origin}: every number of student minus teacher by itself,",
            "   noise levels of different size pooled, which alone makes tails look heavier:",
            *_box_lines(entry["td"]["all"]),
        ]
    if isinstance(advice, Advice):
        lines.append(f"   advice from {advice.count} residual norms r, one a sample, each level by itself:")
        lines += [f"     - {sentence}" for sentence in (*advice.in_words(), *advice.notes)]
    elif advice is not None:
        lines.append(f"   no advice on distance and c: {advice}")
    if space.levels is not None:
        lines += _level_lines(space.levels)
    return [*lines, f"   in short: {in_short(entry['data']['all'], advice)}"]


def _box_lines(box: dict[str, Any]) -> list[str]:
    said = [f"{box['count']} values", f"std {box['std']:.3g}"]
    if box["iqr"] > 0:
        said.append(f"beyond inner / outer fences {box['beyond_inner']:.2%} / {box['beyond_outer']:.3%}")
    said += [f"{title} {box[key]:.1f}" for key, title in (("max_z", "max|z|"), ("kurtosis", "kurtosis")) if box[key]]
    if box["xi"] is not None:
        said.append(f"xi {box['xi']:.2f} +- {box['xi_error']:.2f}")
    return [f"     {', '.join(said)}", f"     {heaviness(box)}", *(f"     {note}" for note in box["notes"])]


def _level_lines(levels: NoiseLevels | str) -> list[str]:
    if isinstance(levels, str):
        return [f"   no noise levels for the second evaluation and the coupling: {levels}"]
    clip = f", behind {levels.clip}, which moves {levels.moved:.2%} of the values" if levels.clip != "None" else ""
    few = ["     no more samples than numbers in one: the level of the coupling is too high if all directions vary"]
    return [
        f"   noise levels that training takes{clip}:",
        f"     second evaluation: at t = {levels.recognised:.3g}, up to which a noisy sample shows which it is "
        f"(weight {RECOGNISED:.0%})",
        f"     coupling: above t = {levels.explained:.3g}, up to which a noisy sample explains {levels.share:.0%} of "
        "the variance",
        *(few if levels.too_few else []),
    ]


def heaviness(box: dict[str, Any]) -> str:
    """The tails of a box in words, by the share beyond the outer fences (a Gaussian's is 0.0002 %) and xi."""
    if box["count"] < FEW:
        return "too few values to speak of tails"
    if not box["iqr"] > 0:
        return "no word on tails: half of the values or more are one"
    if box["beyond_outer"] > 1e-3:
        return "heavy tails: more than 0.1 % are extreme outliers"
    if box["beyond_outer"] > 1e-5 or box["power_law"]:
        return "tails slightly heavier than Gaussian: a few extreme outliers"
    if box["count"] < 1000:
        return f"light tails as far as {box['count']} values tell: no extreme outliers, of 0.1 % there need be none"
    return "light tails: no heavier than Gaussian"


def in_short(data: dict[str, Any], advice: Advice | str | None) -> str:
    """One line on what both mean: outliers among data values are for clipping, among residuals for the distance."""
    values = heaviness(data).partition(":")[0]
    if "heav" in values:
        values += ", which clip= of the trainer is for"
    if advice is None:
        return f"data values: {values}; whether a robust distance helps, only temporal differences tell"
    if isinstance(advice, str):
        return f"data values: {values}; too few residuals that vary to say whether a robust distance helps"
    if advice.matters:
        cause = {"outliers": "whole samples stand out", "spread": "samples of one noise level differ in size"}
        loss = f"{cause[advice.verdict]}, so a robust distance should help ({advice.gain:.2f}x in samples)"
    elif advice.sees_elements:
        loss = (
            "single numbers stand out but no whole samples, so a distance per sample should not help, PerElement might"
        )
    else:
        loss = f"no whole samples stand out, so a robust distance should not help ({advice.gain:.2f}x in samples)"
    return f"data values: {values}; temporal differences: {loss}"


if __name__ == "__main__":
    sys.exit(main())
