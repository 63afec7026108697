"""How long does a person wait for help, and for the library, in units of `import torch`?

    python benchmarks/start_up.py [--quick]

Processes of their own, in turns: `python -c "import torch"`, the same with the library and with a name of it,
`python -m reference_trainer --help`, `train --help`, and for comparison what has to import the trainer: `train --show`.
Wall time; the ratio is that of a turn, its median and quartiles over the turns.
"""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

from _timing import Timing, measure_in_turns, write_json

from reference_trainer.machine import describe_machine

TORCH = "import torch"
TRAINER = ["-m", "reference_trainer"]
COMMANDS: dict[str, list[str]] = {
    TORCH: ["-c", TORCH],
    "import robustcm": ["-c", "import torch, robustcm"],
    "RobustLoss": ["-c", "from robustcm import RobustLoss, cauchy"],
    "--help": [*TRAINER, "--help"],
    "train --help": [*TRAINER, "train", "--help"],
    "train --show": [*TRAINER, "train", "--show"],
}


def run(words: list[str]) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three turns, nothing written")
    quick = parser.parse_args().quick
    about = describe_machine()
    calls = {name: partial(run, words) for name, words in COMMANDS.items()}
    least = {"min_seconds": 0.0, "min_rounds": 3} if quick else {"min_seconds": 60.0, "min_rounds": 10}
    timings, torch_over = measure_in_turns(calls, TORCH, **least)
    rows = [row_of(name, timings[name], torch_over[name]) for name in COMMANDS]
    print(f"{'':17}{'wall':>9}{'IQR':>9}   times import torch (IQR)")
    for row in rows:
        q1, ratio, q3 = row["over_import_torch"]
        wall = row["seconds"]
        print(f"{row['what']:17}{wall.median:7.2f} s{wall.q3 - wall.q1:7.2f} s   {ratio:.2f} ({q1:.2f} .. {q3:.2f})")
    if not quick:
        print(write_json("start_up", rows, about))


def row_of(name: str, wall: Timing, torch_over_this: tuple[float, float, float]) -> dict[str, Any]:
    q1, median, q3 = torch_over_this
    return {"what": name, "seconds": wall, "over_import_torch": (1 / q3, 1 / median, 1 / q1)}


if __name__ == "__main__":
    main()
