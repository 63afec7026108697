"""How long does the default run take from nothing to its table, and where does the time go?

    python benchmarks/default_run.py [--times 1] [steps=4000 ...]

`python -m reference_trainer` in a process of its own, in a new folder, with an empty cache: nothing that was fitted or
encoded before is found. The process is watched from inside, phase by phase, by the clock and by the CPU time of all its
threads; what a phase includes is left out of the one around it. Words such as `steps=100` go to the trainer.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

REPORT = "phases.json"


class Phases:
    """Seconds by phase; of nested ones each moment counts for the innermost."""

    def __init__(self, first: str) -> None:
        """``first`` began with the process."""
        self.spent: dict[str, list[float]] = {}
        self._open, self._since = [first], (STARTED, 0.0)

    def go_on(self, phase: str) -> None:
        """From now on it is ``phase``, outside of what is watched."""
        self._settle()
        self._open[0] = phase

    def _settle(self) -> None:
        now = time.perf_counter(), time.process_time()
        found = self.spent.setdefault(self._open[-1], [0.0, 0.0])
        for i, (at, before) in enumerate(zip(now, self._since, strict=True)):
            found[i] += at - before
        self._since = now

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Count calls of ``owner.name`` as ``phase``."""
        inner: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(inner)
        def watched(*given: Any, **named: Any) -> Any:
            self._settle()
            self._open.append(phase)
            try:
                return inner(*given, **named)
            finally:
                self._settle()
                self._open.pop()

        setattr(owner, name, watched)

    def closed(self) -> dict[str, list[float]]:
        self._settle()
        return self.spent


def watched_run(words: list[str], report: Path) -> int:
    """Train as the command line does, in this process, and write down the phases."""
    phases = Phases("imports")
    import reference_trainer.data.images
    import reference_trainer.evaluation.evaluate
    import reference_trainer.training.loop
    import reference_trainer.training.start
    from reference_trainer.__main__ import main as train
    from reference_trainer.data.autoencoders import KLAutoencoder
    from reference_trainer.training.batches import Batches

    phases.go_on("other")
    evaluation = reference_trainer.evaluation.evaluate
    phases.watch(reference_trainer.data.images.Digits, "load", "images")
    phases.watch(KLAutoencoder, "fit", "autoencoder")
    phases.watch(reference_trainer.training.start, "encode_once", "latents")
    phases.watch(reference_trainer.training.loop, "latents_of_run", "latents")
    phases.watch(reference_trainer.training.loop, "train", "training")
    phases.watch(Batches, "__call__", "waiting for the batch")
    phases.watch(evaluation, "evaluate", "evaluation")
    phases.watch(evaluation, "write_report", "pictures")
    status = train(words)
    report.write_text(json.dumps(phases.closed()))
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=[], metavar="WORD", help="path.to.field=value, for the trainer")
    parser.add_argument("--times", type=int, default=1, help="runs, one after the other (default 1)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        return watched_run([*options.words, f"--out={options.inside / 'run'}"], options.inside / REPORT)
    from _timing import write_json

    from reference_trainer.machine import describe_machine

    about, rows = describe_machine(), list[dict[str, Any]]()
    for _ in range(options.times):
        with TemporaryDirectory() as folder:
            environment = os.environ | {"ROBUSTCM_CACHE": str(Path(folder) / "cache")}
            began = time.monotonic()
            words = [sys.executable, __file__, *options.words, f"--inside={folder}"]
            subprocess.run(words, check=True, env=environment)
            whole = time.monotonic() - began
            phases = json.loads((Path(folder) / REPORT).read_text())
        rows.append({"words": options.words, "seconds": whole, "phases": phases})
        print(f"{whole:.1f} s from nothing to the table and its pictures")
        for phase, (wall, cpu) in sorted(phases.items(), key=lambda item: -item[1][0]):
            print(f"  {phase:24} {wall:7.1f} s   {wall / whole:6.1%}   cpu {cpu:7.1f} s", flush=True)
    if not options.words:
        print(f"wrote {write_json('default_run', rows, about).name}")
    return 0


STARTED = time.perf_counter()
if __name__ == "__main__":
    sys.exit(main())
