"""`export`: a run as a folder of diffusers."""

# What a command needs it imports itself: help and mistakes should not wait for torch.

from __future__ import annotations

import argparse
from typing import Any

from reference_trainer.command import path, real
from reference_trainer.commands.shared import GUIDANCE


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`export` among the commands of the trainer."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="write a run as a folder that diffusers opens",
        description="Network, autoencoder, scheduler, normalisation and a model card, as diffusers keeps them: "
        "safetensors and JSON. Samples of the folder are compared with the run's before it is there.",
    )
    parser.add_argument("run", type=path, metavar="RUN")
    parser.add_argument("--out", type=path, metavar="DIR", required=True, help="folder to make; an empty one may be there")
    parser.add_argument("--average", metavar="AVERAGE", help="of the weights, see evaluate")
    parser.add_argument("--guidance", type=real, metavar="W", help=GUIDANCE)
    parser.set_defaults(run_command=run_export)
    return parser


def run_export(options: argparse.Namespace) -> int:
    """The folder, and how to open it."""
    import torch

    from reference_trainer.averages import read_average
    from reference_trainer.export.folder import export, require_empty
    from reference_trainer.machine import device_of
    from reference_trainer.model import load_model
    from reference_trainer.run import RunFolder

    require_empty(options.out)
    average = None if options.average is None else read_average(options.average)
    model = load_model(RunFolder(options.run), device_of(options.device), average=average)
    torch.set_num_threads(model.config.threads)
    if options.guidance is not None:
        model = model.guided(options.guidance)
    done = export(model, options.out)
    print(f"{options.out}: samples differ from the run's by at most {done.difference:.1e} standard deviations")
    if done.left_out:
        print(done.left_out)
    print(f"open it: DiffusionPipeline.from_pretrained({str(options.out)!r}, trust_remote_code=True); see its README.md")
    return 0
