"""The command line. `python -m reference_trainer` trains, reports, and continues what was interrupted."""

# What a command needs it imports itself: help and mistakes should not wait for torch.

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from reference_trainer.ablation.command import add_parser as add_ablate
from reference_trainer.command import COMMANDS, Parser, program
from reference_trainer.commands import encode, evaluate, export, sample, train
from reference_trainer.errors import UserError, exit_status
from robustcm import __version__

OF_THE_EXTRA = (
    "diffusers",
    "einops",
    "matplotlib",
    "mlxtend",
    "PIL",
    "safetensors",
    "tensorboard",
    "torchmetrics",
    "tqdm",
)
"""Modules of the extra ``trainer``; who installs the core alone has this command, too."""
OF_THE_CORE = ("numpy", "ot", "scipy", "torch")
"""Missing where a Python is called that nothing was installed into, as in a clone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--debug"]
    work: Callable[[], int]
    work, leads = partial(run, words), os.environ.get("RANK", "0") == "0"
    if not leads:  # of several processes one talks
        from reference_trainer.ranks import following

        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (to the end of the process)
        work = partial(following, work)
    return exit_status(work, debug=words != given, leads=leads)


def run(words: list[str]) -> int:
    """Do what the words say; without a command: train."""
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    elif not words or words[0] not in (*COMMANDS, "-h", "--help", "--version"):
        words = ["train", *words]
    options = parser().parse_args(words)
    try:
        from reference_trainer.machine import keep_freed_memory

        keep_freed_memory()
        return int(options.run_command(options))
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in OF_THE_CORE:
            raise UserError(
                f"{sys.executable} has no {module}: in a clone call .venv/bin/python, which `make install` makes, or "
                "pip install -e '.[trainer]' there"
            ) from error
        if module not in OF_THE_EXTRA:
            raise
        raise UserError(
            f"the trainer needs {error.name}: the extra trainer brings it, in a clone pip install -e '.[trainer]'"
        ) from error


def parser() -> Parser:
    """The parser, with a help that teaches."""
    top = Parser(
        prog=program(),
        description=__doc__,
        epilog="Without a command: train. `python -m reference_trainer train --help` shows presets and options. "
        "Exit status: 0 done; 2 something of yours to mend, said in one line; 1 a fault; 130 Ctrl-C; 75 SIGTERM, as a "
        "scheduler sends it. After Ctrl-C and SIGTERM what was done is saved: the same command again goes on.",
    )
    top.add_argument("--version", action="version", version=f"robustcm {__version__}")
    commands = top.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")

    each = [part.add_parser(commands) for part in (train, sample, evaluate, encode, export)]
    ablating = add_ablate(commands)
    ablating.set_defaults(run_command=run_ablate)
    for command in (*each, ablating):
        command.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    return top


def run_ablate(options: argparse.Namespace) -> int:
    """Compare the arms."""
    from reference_trainer.ablation import ablate

    return ablate.run_ablate(options)


if __name__ == "__main__":
    sys.exit(main())
