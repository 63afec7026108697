"""Does every hostile input get one clear line, and is nothing executed or overwritten?

    python benchmarks/faults/fuzz.py [--n 500] [--seed 0] [--kind KIND ...] [--keep DIR]

Draws inputs of the kinds of hostile.py (damaged images, stores, configurations and checkpoints, pickles under every
name that is read, command lines, zips with a dataset.json) and gives each to the command line, in this process. Each
has to end with status 2 and one line; files that were there stay as they are, to the byte; what a pickle, an option or
a value in a JSON file would have executed leaves a file, which must not be there. A change that turns out harmless ends
well, writes into its own copy alone and is not counted. A row a kind; exit status 1, and the files in DIR with their
command, if one broke the rule.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import runpy
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[2] / "analysis" / "needed.py"))

import torch
from hostile import KINDS, Case, Good, make_good
from tqdm import tqdm

from reference_trainer.__main__ import main as command_line
from reference_trainer.data.squares import extensions

SECONDS = 120
"""In which a case has to end."""
INTERRUPTED = 130
"""Status of a command that Ctrl-C ended."""
COLUMNS = ("cases", "one line", "status 2", "executed", "overwritten", "harmless")


def digests(*roots: Path) -> dict[Path, str]:
    """Of all regular files below ``roots``."""
    found = {}
    for path in (path for root in roots for path in root.rglob("*")):
        if stat.S_ISREG(path.lstat().st_mode):
            found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class OutOfTimeError(BaseException):
    """Not an Exception: what is tried here may catch those."""


def out_of_time(number: int, frame: FrameType | None) -> None:
    raise OutOfTimeError("not done in time")


def run(words: list[str], seconds: int = SECONDS) -> tuple[int, str]:
    """Status of a command and what it said; -1: it raised, or took longer."""
    said, began = io.StringIO(), time.monotonic()
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(seconds)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            status = command_line(words)
    except SystemExit as left:  # of --help
        status = int(left.code or 0)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        status = -1
        said.write(f"raised {error!r}")
    finally:
        signal.alarm(0)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if seconds and time.monotonic() - began > seconds:  # whatever became of the alarm
        status = -1
        said.write("not done in time")
    return status, said.getvalue()


def judged(case: Case, good: Good, folder: Path) -> tuple[Counter[str], str]:
    """What the case adds to the columns, and what it said."""
    before = digests(good.root, folder)
    status, said = run(case.words)
    executed = good.witness.exists()
    good.witness.unlink(missing_ok=True)
    after = digests(good.root, folder)
    changed = [path for path, digest in before.items() if after.get(path) != digest]
    ended_well = status == 0 and not case.must_fail and not executed  # it may write into the folder of the case
    if ended_well and not any(path.is_relative_to(good.root) for path in changed):
        return Counter(harmless=1), said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    return Counter(
        {
            "cases": 1,
            "one line": int(len(errors) == 1 and errors[0].isprintable() and "Traceback" not in said),
            "status 2": int(status == 2),
            "executed": int(executed),
            "overwritten": int(bool(changed)),
        }
    ), f"status {status}\n{said}"


def at_fault(row: Counter[str]) -> bool:
    return (
        any(row[name] != row["cases"] for name in ("one line", "status 2")) or row["executed"] + row["overwritten"] > 0
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="for cases at fault (default %(default)s)")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is none is not looked for on the hub
    torch.set_num_threads(1)
    rows: dict[str, Counter[str]] = {kind: Counter() for kind in options.kind}
    rng, kept = random.Random(options.seed), 0
    assert extensions()  # Pillow's plugins are loaded
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=options.n, desc="hostile inputs", unit="case") as bar:
        os.environ["ROBUSTCM_CACHE"] = f"{scratch}/cache"
        good = make_good(Path(scratch) / "good", lambda words: run(words, seconds=0))  # 0: all it needs
        try:
            while bar.n < options.n:
                kind = min(rows, key=lambda name: rows[name]["cases"])
                folder = Path(scratch) / "case"
                folder.mkdir()
                case = KINDS[kind](good, folder, rng)
                row, said = judged(case, good, folder)
                rows[kind] += row
                bar.update(row["cases"])
                if at_fault(row):
                    kept += 1
                    place = options.keep / f"{kept:03}-{kind.replace(' ', '-')}"
                    shutil.copytree(folder, place, dirs_exist_ok=True, symlinks=True, ignore=no_pipes)
                    (place / "said.txt").write_text(f"{shlex.join(case.words)}\n{said}", errors="backslashreplace")
                    tqdm.write(f"{kind}, {case.about!r}: {said.strip()[-300:]}; see {place}")
                shutil.rmtree(folder)
        except KeyboardInterrupt:
            print("interrupted")
    print(f"{'':24}" + "".join(f"{name:>13}" for name in COLUMNS))
    for kind, row in [*rows.items(), ("all", sum(rows.values(), Counter()))]:
        print(f"{kind:24}" + "".join(f"{row[name]:13}" for name in COLUMNS))
    return int(any(map(at_fault, rows.values())))


def no_pipes(folder: str, names: list[str]) -> list[str]:
    """A copy would wait for somebody to write into them."""
    return [name for name in names if stat.S_ISFIFO(Path(folder, name).lstat().st_mode)]


if __name__ == "__main__":
    sys.exit(main())
