"""`sample`: images from a run."""

# What a command needs it imports itself: help and mistakes should not wait for torch.

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reference_trainer.command import path, real, whole
from reference_trainer.commands.shared import GUIDANCE, MATCH_MOMENTS, require_writable, save_picture
from reference_trainer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.model import TrainedModel


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`sample` among the commands of the trainer."""
    parser: argparse.ArgumentParser = commands.add_parser("sample", help="draw images from a run")
    parser.add_argument("run", type=path, metavar="RUN")
    parser.add_argument("--n", type=whole, default=64, help="number of images (default 64)")
    parser.add_argument("--evaluations", type=whole, default=1, help="network evaluations an image (default 1)")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument(
        "--label", metavar="CLASS", help="of a run trained by class: name or number of one (default: a row for each)"
    )
    parser.add_argument("--guidance", type=real, metavar="W", help=GUIDANCE)
    parser.add_argument("--average", metavar="AVERAGE", help="of the weights, see evaluate")
    parser.add_argument(
        "--match-moments",
        action="store_true",
        help=f"{MATCH_MOMENTS}; evaluate --match-moments has to measure it first",
    )
    parser.add_argument("--out", type=path, help="PNG to write (default: RUN/samples-N-NFE-SEED[-...].png)")
    parser.set_defaults(run_command=run_sample)
    return parser


def run_sample(options: argparse.Namespace) -> int:
    """One PNG of samples."""
    import torch

    from reference_trainer.averages import in_file_name, read_average
    from reference_trainer.machine import device_of
    from reference_trainer.matching import with_kept_moments
    from reference_trainer.model import load_model
    from reference_trainer.run import RunFolder

    if os.environ.get("RANK", "0") != "0":
        return 0  # one picture, drawn by one process
    if options.n < 1:
        raise UserError(f"--n must be at least 1, got {options.n}")
    average = None if options.average is None else read_average(options.average)
    run = RunFolder(options.run)
    model = load_model(run, device_of(options.device), average=average)
    torch.set_num_threads(model.config.threads)
    if options.guidance is not None:
        model = model.guided(options.guidance)
    if options.match_moments:
        model = with_kept_moments(run, model)
    rows = asked_rows(model, options.n, options.label)
    named = f"-class{rows[0][0]}" if options.label is not None else ""
    named += f"-w{options.guidance:g}" if options.guidance is not None else ""
    named += "" if average is None else f"-{in_file_name(average)}"
    named += "-matched" if options.match_moments else ""
    file = options.out or options.run / f"samples-{options.n}-{options.evaluations}-{options.seed}{named}.png"
    require_writable(file)
    labels = torch.cat([torch.full((count,), label) for label, count in rows]) if rows else None
    pixels = model.images(options.n, model.sigmas(options.evaluations), options.seed, labels=labels)
    if len(rows) > 1 and rows[0][1] > 1:
        save_picture(in_rows(pixels, [count for _, count in rows]), file, columns=rows[0][1])
    else:
        save_picture(pixels, file)
    of = f" of {len(rows)} classes" if len(rows) > 1 else f" of class {options.label}" if rows else ""
    matched = ", moments matched" if options.match_moments else ""
    print(f"{options.n} images{of}, NFE {options.evaluations}{model.average and f', {model.average}'}{matched}: {file}")
    return 0


def asked_rows(model: TrainedModel, n: int, label: str | None) -> list[tuple[int, int]]:
    """Labels and how many images of each: of the class asked for, else of all; none of a run without classes.

    Raises:
        UserError: there is no such class.
    """
    if model.classes is not None:
        return [(model.classes.label(label), n)] if label is not None else model.classes.rows(n)
    if label is not None:
        raise UserError("the run was trained without classes: leave --label out, or train with classes=ByClass")
    return []


def in_rows(pixels: Tensor, counts: Sequence[int]) -> Tensor:
    """``pixels [n, ...]``, of each class so many, the first the most, with white images where a row is short."""
    import torch

    parts = pixels.split(list(counts))
    white = [part.new_full((counts[0] - len(part), *part.shape[1:]), 255) for part in parts]
    return torch.cat([part for pair in zip(parts, white, strict=True) for part in pair])
