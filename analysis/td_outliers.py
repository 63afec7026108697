"""Where are the outliers? Box plots of data values and temporal differences, with advice on distance and c (Fig. 1)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from analysis.command import add_common, check_common, run_command
from analysis.drawing import COLOURS, Column, draw_outliers, gaussian_beside, outliers_of
from analysis.values import Space, autoencoder_of, baseline_space, data_in, load_images, normalised, run_space
from reference_trainer.command import Parser
from reference_trainer.data.autoencoders import KLAutoencoder, PixelSpace
from reference_trainer.data.images import Digits, ImageFolder
from reference_trainer.data.latents import RECOGNISED, comparing, some_of
from reference_trainer.errors import UserError
from reference_trainer.files import write_atomically
from reference_trainer.machine import cache_folder, device_of
from reference_trainer.plotting import save_figure
from reference_trainer.run import RunFolder
from robustcm.gates import AboveExplained, explained_below, recognisable_below
from robustcm.tails import BoxStatistics, box_statistics, box_statistics_along, box_statistics_by
from robustcm.tails.advice import Advice, advise
from robustcm.tails.boxes import FEW

EPILOG = """
what it does:
  Takes images, encodes them with an autoencoder, and trains an iLCT baseline (iCT on latents: Pseudo-Huber, constant
  c) for a short time at N noise levels, once on the pixels and once on the latents; both are kept in the cache folder
  ($ROBUSTCM_CACHE) and reused. With --run it looks at that run instead of training baselines.
  Writes OUT/td_outliers.png (look at it) and OUT/td_outliers.json (everything measured: per space, channel and level).

how to read it:
  Beyond the inner fences a Gaussian has 0.70 % of its values, beyond the outer ones 0.0002 %. xi is the extreme-value
  index: above 0 a power law (1/xi moments exist), about 0 Gaussian or exponential, below 0 bounded. Pooled temporal
  differences mix noise levels of different spread and look heavy for that reason alone: see panel (c).

examples:
  python analysis/td_outliers.py                                    the embedded digits, 4 minutes at first
  python analysis/td_outliers.py --run runs/digits                  a trained run, at the N it has reached
  python analysis/td_outliers.py --data photos --resolution 128 --autoencoder 'KLAutoencoder(likelihood=gaussian)'
  python analysis/td_outliers.py --data photos --autoencoder my_vae:load --steps 0     data values only
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(parser(), look, arguments)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, metavar="RUN", help="look at this trained run (default: brief baselines)")
    p.add_argument("--data", metavar="PATH", help="a folder of images (default: the embedded digits, or the run's)")
    p.add_argument("--resolution", type=int, metavar="PX", help="side the images are brought to (default 64)")
    p.add_argument(
        "--autoencoder",
        metavar="NAME_OR_PATH",
        help="KLAutoencoder (default; options in brackets), PixelSpace, a run folder whose autoencoder to use, or "
        "module:function returning an object with encode(images [n, ch, h, w] in -1 .. 1) and decode",
    )
    p.add_argument("--levels", type=int, metavar="N", help="number of noise levels (default 21, or the run's)")
    p.add_argument("--steps", type=int, default=300, help="training steps of a baseline, 0 for none (default 300)")
    add_common(p)
    return p


def look(options: argparse.Namespace) -> int:
    """Measure, write, say."""
    check_options(options)
    spaces = spaces_of(options)
    report = {space.name: measure(space) for space in spaces}
    advice = {space.name: advice_on(space) for space in spaces if space.residuals is not None}
    for name, found in advice.items():
        report[name]["advice"] = found.as_dict()
    files = options.out / "td_outliers.png", options.out / "td_outliers.json"
    save_figure(figure_of(spaces), files[0])
    write_atomically(files[1], (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    for name, entry in report.items():
        print("\n".join(in_words(name, entry)))
    for name, found in advice.items():
        print(
            f"\nadvice for {name}:\n" + "\n".join(f"  - {sentence}" for sentence in (*found.in_words(), *found.notes))
        )
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


def spaces_of(options: argparse.Namespace) -> list[Space]:
    """Pixels, then latents, with what residuals there are."""
    device, cache = device_of(options.device), cache_folder()
    run = None if options.run is None else RunFolder(options.run)
    data: Digits | ImageFolder = Digits() if run is None else run.config().data
    if options.data is not None:
        try:
            data = ImageFolder(path=options.data, resolution=options.resolution or 64)
        except ValueError as error:
            raise UserError(f"--resolution: {error}") from error
    part = KLAutoencoder() if options.autoencoder is None else autoencoder_of(options.autoencoder, device)
    images = load_images(data, options.images)
    if run is not None:
        space = run_space(run, images, num_levels=options.levels, count=options.samples, device=device)
        if space.name == "pixels":
            return [space]
        return [Space("pixels", normalised(data_in(PixelSpace(), images, cache, device))[0], None), space]
    parts = {"pixels": PixelSpace()} | ({} if isinstance(part, PixelSpace) else {"latents": part})
    return [
        baseline_space(
            *(name, part, data, images),
            num_levels=options.levels or 21,
            steps=options.steps,
            count=options.samples,
            cache=cache,
            device=device,
        )
        for name, part in parts.items()
    ]


def measure(space: Space) -> dict[str, Any]:
    """Everything that goes into the JSON about one space."""
    if space.data.numel() < 20:
        raise UserError(f"{space.data.numel()} values in {space.name}: need at least 20 to speak of tails")
    entry: dict[str, Any] = {"note": space.note, "data": described(space.data.numpy())}
    entry["noise_levels"] = recognised_and_explained(space.data)
    if (found := space.residuals) is not None:
        td = described(found.td.numpy())
        levels = box_statistics_by(found.td, found.level)
        entry["td"] = {"origin": found.origin, "num_levels": found.num_levels, "d": found.d} | td
        entry["td"]["by_level"] = [
            {"level": i, "sigma": float(found.sigmas[i]), "samples": int((found.level == i).sum())} | box.as_dict()
            for i, box in levels.items()
        ]
        entry["r"] = box_statistics(found.r).as_dict()
    return entry


def recognised_and_explained(data: Tensor) -> dict[str, float] | None:
    """Noise levels for the second evaluation and the coupling's gate (``data [n, ...]``, std 0.5).

    What the trainer takes for data it normalises itself. None: nothing to compare.
    """
    some = some_of(data)
    if len(some) < 2 or not some.isfinite().all() or bool((some == some[0]).all()):
        return None
    return {
        "recognised": recognisable_below(some, comparing(), share=RECOGNISED),
        "explained": explained_below(some, AboveExplained.share),
    }


def described(values: np.ndarray) -> dict[str, Any]:
    """Box statistics of all the values ``[n, ch, h, w]``, of the Gaussian beside them, and of each channel."""
    box = box_of(values)
    return {
        "all": box.as_dict(),
        "gaussian": box_statistics(gaussian_beside(values, box)).as_dict(),
        "by_channel": [channel.as_dict() for channel in box_statistics_along(values, 1)],
    }


def box_of(values: np.ndarray) -> BoxStatistics:
    """Box statistics, or a ``UserError`` where there is nothing finite."""
    try:
        return box_statistics(values)
    except ValueError as error:
        raise UserError(f"nothing to measure: {error}") from error


def advice_on(space: Space) -> Advice:
    """The advice for the residuals of ``space``."""
    assert space.residuals is not None
    found = space.residuals
    try:
        return advise(found.r, found.level, found.num_levels, found.d, found.td)
    except ValueError as error:
        raise UserError(f"no advice for {space.name} ({found.origin}): {error}") from error


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
    box = box_of(values)
    gaussian = gaussian_beside(values, box)
    gaussian_box = box_statistics(gaussian)
    return [
        Column(name, box, outliers_of(values, box), COLOURS[name]),
        Column("Gaussian", gaussian_box, outliers_of(gaussian, gaussian_box)),
    ]


def in_words(name: str, entry: dict[str, Any]) -> list[str]:
    """A few lines on one space for the terminal."""
    lines = [f"{name}{': ' + entry['note'] if entry['note'] else ''}"]
    for what, title in (("data", "data values"), ("td", "temporal differences")):
        if what not in entry:
            continue
        box = entry[what]["all"]
        origin = f" ({entry[what]['origin']})" if what == "td" else ""
        xi = "" if box["xi"] is None else f", xi {box['xi']:.2f} +- {box['xi_error']:.2f}"
        lines.append(
            f"  {title}{origin}: {box['count']} values, std {box['std']:.3g}, beyond inner / outer fences "
            f"{box['beyond_inner']:.2%} / {box['beyond_outer']:.3%}, max|z| {box['max_z']:.1f}, kurtosis "
            f"{box['kurtosis']:.1f}{xi}"
        )
        if box["iqr"] > 0:
            lines.append(f"    {heaviness(box)}")
        lines += [f"    {note}" for note in box["notes"]]
    if (found := entry["noise_levels"]) is not None:
        lines += [
            f"  second evaluation: at t = {found['recognised']:.3g}, up to which a noisy sample shows which it is "
            f"(weight {RECOGNISED:.0%})",
            f"  coupling: above t = {found['explained']:.3g}, up to which a noisy sample explains "
            f"{AboveExplained.share:.0%} of the variance",
        ]
    return lines


def heaviness(box: dict[str, Any]) -> str:
    """The tails of a box in words, by the share beyond the outer fences (a Gaussian's is 0.0002 %) and xi."""
    if box["beyond_outer"] > 1e-3:
        return "heavy tails: more than 0.1 % are extreme outliers"
    if box["beyond_outer"] > 1e-5 or box["power_law"]:
        return "tails slightly heavier than Gaussian: a few extreme outliers"
    return "light tails: no heavier than Gaussian"


if __name__ == "__main__":
    sys.exit(main())
