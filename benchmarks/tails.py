"""How much faster and smaller than matplotlib's box statistics are ours at 1e6 .. 1e8 values, and what does 1e9 cost?

    python benchmarks/tails.py [--quick]

Float32 Gaussian values. Compared in one run, in turns: ``box_statistics`` (quartiles, fences, shares beyond, whiskers,
moments, tail index), ``matplotlib.cbook.boxplot_stats`` (quartiles, whiskers, outliers, mean) and the quartiles of
``numpy.percentile`` alone. The ratio is that of a turn: its median and quartiles over the turns. Memory is the peak
beyond the input, each in a process of its own. The stream adds pieces of 1e7 values to one state. ``--quick`` ends at
1e7 and streams 1e8.
"""

from __future__ import annotations

import argparse
import runpy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import numpy as np
import torch
from _timing import extra_memory, measure_in_turns, peak_beyond, write_json
from matplotlib.cbook import boxplot_stats

from reference_trainer.machine import describe_machine
from robustcm.tails import TailStream, box_statistics

PIECE = 10**7
MATPLOTLIB = "matplotlib boxplot_stats"
CALLS: dict[str, Callable[[np.ndarray], object]] = {
    "box_statistics": box_statistics,
    MATPLOTLIB: boxplot_stats,
    "numpy percentile": lambda x: np.percentile(x, [25, 50, 75]),
}


def values(n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(n, dtype=np.float32)


def exact(sizes: list[int]) -> list[dict[str, Any]]:
    rows = []
    print(
        f"{'':26}{'n':>7}   {'wall':>8} {'IQR':>7} {'cpu':>8}   {'memory':>9}   matplotlib / this: wall (IQR), memory"
    )
    for n in sizes:
        x = values(n)
        timings, ratios = measure_in_turns({name: partial(call, x) for name, call in CALLS.items()}, MATPLOTLIB)
        del x  # the memory is measured in another process and both must fit
        memory = {name: extra_memory(Path(__file__), "--memory-of", name, "--size", str(n)) for name in CALLS}
        for name, t in timings.items():
            q1, ratio, q3 = ratios[name]
            less = memory[MATPLOTLIB] / max(memory[name], 0.1)
            rows.append({"what": name, "n": n, "seconds": t, "extra_mb": memory[name]})
            rows[-1] |= {"matplotlib_wall_over_this": ratios[name], "matplotlib_memory_over_this": less}
            print(
                f"{name:26}{n:7.0e}   {t.median:6.3f} s {t.q3 - t.q1:5.3f} s {t.cpu:6.3f} s   {memory[name]:6.0f} MB   "
                f"{ratio:6.1f}x ({q1:.1f} .. {q3:.1f}) {less:6.1f}x"
            )
    return rows


def streamed(n: int) -> dict[str, Any]:
    """One pass over n values that never lie in memory together; drawing them is not timed."""
    stream, state, seconds, cpu = TailStream(), TailStream().empty(), 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(PIECE)

    def run() -> None:
        nonlocal state, seconds, cpu
        for _ in range(n // PIECE):
            x.normal_(generator=generator)
            start, start_cpu = time.perf_counter(), time.process_time()
            state = stream.update(state, x)
            seconds += time.perf_counter() - start
            cpu += time.process_time() - start_cpu

    x.normal_(generator=generator)
    stream.update(state, x)  # warm-up
    extra = peak_beyond(run)
    b = stream.statistics(state)[0]
    print(
        f"stream of {n:.0e}: {seconds:.1f} s, {n / seconds / 1e6:.0f} M values/s wall, {n / cpu / 1e6:.0f} M/s cpu, "
        f"{extra:.0f} MB beyond one piece; median {b.median:.5f}, q3 {b.q3:.4f} (0.6745), kurtosis {b.kurtosis:.4f}"
    )
    return {"what": "TailStream", "n": n, "wall_s": seconds, "cpu_s": cpu, "extra_mb": extra} | {"found": b.as_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end at 1e7 values, stream 1e8")
    parser.add_argument("--memory-of", choices=CALLS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        x = values(options.size)
        CALLS[options.memory_of](x[:1000])  # what the first call loads is not memory of this one
        print(peak_beyond(lambda: CALLS[options.memory_of](x)))
        return
    about = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = exact([10**6, 10**7] if options.quick else [10**6, 10**7, 10**8])
    rows.append(streamed(10**8 if options.quick else 10**9))
    print(write_json("tails-quick" if options.quick else "tails", rows, about).relative_to(Path(__file__).parent))


if __name__ == "__main__":
    main()
