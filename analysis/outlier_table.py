"""Which latents have outliers by nature? What td_outliers.py measured on several sets, beside each other."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).with_name("needed.py")))

from matplotlib.figure import Figure

from analysis.command import add_out, run_command
from analysis.drawing import draw_side_by_side
from reference_trainer.command import Parser
from reference_trainer.errors import UserError
from reference_trainer.files import write_atomically
from reference_trainer.plotting import save_figure

EXTREME = 1e-3
"""Share of the values beyond the outer fences from which there are outliers, as td_outliers.py has it."""
HEADS = (
    *("set", "values", "beyond 1.5 IQR", "beyond 3 IQR", "kurtosis", "of channels", "furthest, IQR"),
    *("TD beyond 1.5 IQR", "TD beyond 3 IQR", "gain", "premise"),
)
BOX = ("min", "q1", "median", "q3", "max", "iqr", "inner_fences", "outer_fences", "whiskers")

EPILOG = f"""
how to read it:
  Values: the latents, each channel at standard deviation 0.5; of channels: the least and the largest kurtosis of one (a
  Gaussian has 3); furthest: how many IQR the outermost value lies from the box, of which 1.5 and 3 are the fences.
  TD: single numbers of temporal differences of a brief baseline, each noise level by itself, mean over the levels. A
  Gaussian has 0.70 % beyond 1.5 IQR and 0.0002 % beyond 3. Gain: what a robust distance should save in samples, as the
  advice of td_outliers.py has it. Premise: the paper's, that latents have outliers: more than {EXTREME:.1%} of the
  values, of the TD, of both, or of none lie beyond 3 IQR.

  Writes OUT/outlier_table.png and OUT/outlier_table.json.

examples:
  python analysis/td_outliers.py --data photographs --out runs/outliers/photographs
  python analysis/td_outliers.py --out runs/outliers/digits
  python analysis/outlier_table.py runs/outliers/photographs runs/outliers/digits
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(parser(), look, arguments)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "measured",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="an --out of td_outliers.py: a set with the folder's name; or the JSON of an earlier table",
    )
    add_out(p)
    return p


def look(options: argparse.Namespace) -> int:
    """Read, draw, say."""
    found = [one for path in options.measured for one in sets_of(path)]
    sets = dict(found)
    if len(sets) < len(found):
        raise UserError("two sets have one name: rename a folder")
    files = options.out / "outlier_table.png", options.out / "outlier_table.json"
    save_figure(figure_of(sets), files[0])
    write_atomically(files[1], (json.dumps(sets, indent=1, allow_nan=False) + "\n").encode())
    print("\n".join(table(sets)))
    print(f"look at {files[0]}; all numbers are in {files[1]}")
    return 0


def sets_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and figures of the set measured in the folder ``path``, or of those of an earlier table."""
    if path.is_file():
        try:
            sets: dict[str, dict[str, Any]] = json.loads(path.read_text())
            for found in sets.values():
                _ = [found["box"][name] for name in BOX]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no table of this script: give folders of td_outliers.py") from error
        return list(sets.items())
    return [(path.resolve().name, figures_of(path))]


def figures_of(folder: Path) -> dict[str, Any]:
    """What the table and the picture say of the set in ``folder``.

    Raises:
        UserError: nothing was measured there.
    """
    file = folder / "td_outliers.json"
    if not file.is_file():
        raise UserError(f"no td_outliers.json in {folder}: python analysis/td_outliers.py --out {folder}")
    report = json.loads(file.read_text())
    space = report["latents" if "latents" in report else "pixels"]
    box, channels = space["data"]["all"], space["data"]["by_channel"]
    kurtoses = [channel["kurtosis"] for channel in channels if channel["kurtosis"] is not None]
    found = {
        "values": box["count"],
        "channels": len(channels),
        "beyond_inner": box["beyond_inner"],
        "beyond_outer": box["beyond_outer"],
        "kurtosis": box["kurtosis"],
        "kurtosis_of_channels": [min(kurtoses), max(kurtoses)] if kurtoses else None,
        "furthest": max(box["max"] - box["q3"], box["q1"] - box["min"]) / box["iqr"] if box["iqr"] else None,
        "box": {name: box[name] for name in BOX},
    }
    return found | {
        "td": td_of(space["td"]) if "td" in space else None,
        "gain": (space.get("advice") or {}).get("gain"),
    }


def td_of(td: Mapping[str, Any]) -> dict[str, float]:
    """Shares beyond the fences of each level's own box, mean over all values."""
    levels = [level for level in td["by_level"] if level["iqr"]]
    count = sum(level["count"] for level in levels)
    return {
        name: sum(level["count"] * level[name] for level in levels) / count for name in ("beyond_inner", "beyond_outer")
    }


def premise(found: Mapping[str, Any]) -> str:
    """Where there are outliers."""
    of = {"values": found, "TD": found["td"] or {"beyond_outer": 0.0}}
    return " and ".join(name for name, shares in of.items() if shares["beyond_outer"] > EXTREME) or "no"


def table(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    for name, found in sets.items():
        low, high = found["kurtosis_of_channels"] or (None, None)
        td = found["td"] or {}
        cells = [
            *(name, str(found["values"]), *(_percent(found[of]) for of in ("beyond_inner", "beyond_outer"))),
            *(_number(found["kurtosis"]), f"{_number(low)} .. {_number(high)}", _number(found["furthest"])),
            *(_percent(td.get("beyond_inner")), _percent(td.get("beyond_outer"))),
            *(_number(found["gain"], 2), premise(found)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %" if share >= 1e-3 or share == 0 else f"{100 * share:.4f} %"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def figure_of(sets: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The boxes of all, in their own IQR."""
    return draw_side_by_side({name: found["box"] for name, found in sets.items() if found["box"]["iqr"]})


if __name__ == "__main__":
    sys.exit(main())
