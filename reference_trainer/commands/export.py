"""`export`: a run as a folder of diffusers."""

# What a command needs it imports itself: help and mistakes should not wait for torch.

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reference_trainer.command import path, real
from reference_trainer.commands.shared import GUIDANCE, save_picture


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`export` among the commands of the trainer."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="write a run as a folder that diffusers opens",
        description="Network, autoencoder, scheduler, normalisation and a model card, as diffusers keeps them: "
        "safetensors and JSON. Samples of the folder are compared with the run's before it is there.",
    )
    parser.add_argument("run", type=path, metavar="RUN")
    parser.add_argument("--out", type=path, metavar="DIR", required=True, help="folder to make, or an empty one")
    parser.add_argument("--average", metavar="AVERAGE", help="of the weights, see evaluate")
    parser.add_argument("--guidance", type=real, metavar="W", help=GUIDANCE)
    parser.set_defaults(run_command=run_export)
    return parser


def run_export(options: argparse.Namespace) -> int:
    """The folder, its card and its picture."""
    import torch

    from reference_trainer.averages import read_average
    from reference_trainer.export.card import CARD, PICTURE, RECIPE, card, recipe
    from reference_trainer.export.folder import Exported, drawn, export, require_empty
    from reference_trainer.files import write_atomically
    from reference_trainer.machine import device_of
    from reference_trainer.model import load_model
    from reference_trainer.run import RunFolder

    require_empty(options.out)
    average, run = None if options.average is None else read_average(options.average), RunFolder(options.run)
    model = load_model(run, device_of(options.device), average=average)
    torch.set_num_threads(model.config.threads)
    if options.guidance is not None:
        model = model.guided(options.guidance)

    def about(done: Exported, part: Path) -> None:
        if (pixels := drawn(done)) is not None:
            save_picture(pixels, part / PICTURE, called=options.out / PICTURE, columns=len(pixels) // 4)
        name = options.out.resolve().name
        text = card(model, done, run, name, average, drawn=pixels is not None)
        write_atomically(part / RECIPE, recipe(model.config))
        write_atomically(part / CARD, text.encode())

    done = export(model, options.out, about)
    print(f"{options.out}: its samples differ from the run's by at most {done.difference:.1e} of their size")
    if done.left_out:
        print(done.left_out)
    print(f"how to open it, and what it is: {options.out / CARD}")
    return 0
