"""The options of `ablate`; what does the work is imported when there is some."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from reference_trainer.command import path, whole

EPILOG = """
examples:
  python -m reference_trainer ablate --list
  python -m reference_trainer ablate --steps 5000 network.width=128
  python -m reference_trainer ablate --arm digits "objective.c=MeasuredC(multiple=2)" --arm digits ema_decay=0.999
  python -m reference_trainer ablate photographs --suites d64 d128 d256 d512 d1024 --arms ours --steps 2000
  python -m reference_trainer ablate --data photos data.resolution=32 --suites d64 d256 --arms ours --steps 2000
  python -m reference_trainer ablate --join runs/photographs runs/faces
  python -m reference_trainer ablate celebahq --data latents --arms paper ours --steps 20000
  python -m reference_trainer ablate --arms paper ours --suites clean outliers-1% outliers-5% --seconds 300
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`ablate` among the commands of the trainer."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "ablate",
        help="compare techniques: arms with paired seeds under one budget",
        description="Train a ladder of arms with paired seeds under one budget and compare them. The same command "
        "again goes on where the last one stopped. Writes ablation.md, .json and .png into OUT.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="WORD",
        help="a preset of data that every arm is built on (default: digits), and path.to.field=value for every arm",
    )
    parser.add_argument(
        "--data", type=path, metavar="PATH", help="a folder of images or a store of latents (default: the digits)"
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="default: all; the baseline always takes part")
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        default=[],
        metavar=("PRESET", "path.to.field=value"),
        help="one more arm, presets and what differs; may be given several times, and alone leaves out the ladder",
    )
    parser.add_argument(
        "--suites",
        nargs="+",
        metavar="SUITE",
        default=["clean"],
        help="other latents: with outliers, or of d elements by an autoencoder fitted to that (default: clean)",
    )
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=whole, default=5000, help="budget of every run in steps (default 5000)")
    budget.add_argument("--seconds", type=float, help="... or in seconds of training: faster arms make more steps")
    parser.add_argument(
        "--stop-above",
        type=float,
        default=math.inf,
        metavar="R",
        help="give an arm no further seed once its first has R times the baseline's distance (default: never)",
    )
    parser.add_argument("--features", metavar="FEATURES", help="feature network for the metrics, see evaluate")
    parser.add_argument("--workers", type=whole, help="runs at a time (default: the cores, or the GPUs)")
    parser.add_argument("--out", type=path, default=Path("runs/ablation"), help="default: runs/ablation")
    parser.add_argument(
        "--join",
        type=path,
        nargs="+",
        metavar="DIR",
        help="print the tables of ablations that are there as one, a set of images each, and stop",
    )
    parser.add_argument("--list", action="store_true", help="print arms and suites and stop")
    return parser
