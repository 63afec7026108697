"""Temporal differences whose tails are known, and how often the rule of ``robustcm.tails.advice`` errs on them.

`python tests/synthetic_tails.py 2000 100` (n, repeats; ten minutes) prints the numbers of the docstring there.
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np

from robustcm.tails.advice import advise

LEVELS = 20
LAWS = ("Gaussian", "Student t 2", "Student t 3", "Student t 5", "0.1 % x10", "1 % x10", "5 % x10")


def synthetic(law: str, where: str, n: int, d: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Temporal differences ``[n, d]`` and their levels ``[n]``, each level of another size.

    ``where`` is "whole" (one scale a sample) or "elements" (one an element).
    """
    level = np.arange(n) % LEVELS
    shape = (n, 1) if where == "whole" else (n, d)
    kind, number = law.split()[0], law.split()
    scale = np.ones(shape)
    if kind == "Student":
        df = int(number[-1])
        scale = np.sqrt(df / rng.chisquare(df, shape))
    elif kind != "Gaussian":
        scale = np.where(rng.random(shape) < float(kind) / 100, 10.0, 1.0)
    return rng.standard_normal((n, d)) * scale * np.geomspace(0.01, 1, LEVELS)[level, None], level


def verdicts(law: str, where: str, n: int, d: int, repeats: int) -> tuple[Counter, Counter, float, float]:
    """Verdicts, names of distances, median gain and median element gain over ``repeats`` samples."""
    rng = np.random.default_rng(0)
    found, names, gains, element_gains = Counter(), Counter(), [], []
    for repeat in range(repeats):
        td, level = synthetic(law, where, n, d, rng)
        a = advise(np.linalg.norm(td, axis=1), level, 21, d, td if repeat < 10 else None)
        found[a.verdict] += 1
        names[a.distance.__name__] += 1
        gains.append(a.gain)
        if repeat < 10:
            element_gains.append(a.element_gain)
    return found, names, float(np.median(gains)), float(np.median(element_gains))


def main(n: int = 2000, repeats: int = 100) -> None:
    """Print the table."""
    print(f"{'':12} {'where':9} {'d':>5} {'outliers':>9} {'spread':>7} {'none':>5} {'gain':>6} {'elements':>9}")
    for where in ("whole", "elements"):
        for law in LAWS if where == "whole" else LAWS[1:]:
            for d in (64, 1024):
                found, names, gain, element_gain = verdicts(law, where, n, d, repeats)
                share = [round(100 * found[v] / repeats) for v in ("outliers", "spread", "none")]
                print(
                    f"{law:12} {where:9} {d:5} {share[0]:9} {share[1]:7} {share[2]:5} {gain:6.2f} {element_gain:9.2f}",
                    dict(names),
                    flush=True,
                )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
