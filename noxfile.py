"""The matrix: all tests on each Python with the oldest and the newest of what the pins allow, and the wheel by itself.

    nox                       # `make matrix`; a Python that is not at hand is named and passed over
    nox --list
    nox -s "tests-3.12(pins='oldest')"

Linter, formatter and types are checked once, by `make test`. Packages come from wherever pip is set to look: on a
machine without a GPU let it look for torch's builds for CPUs.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nox

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
FIRST = {
    "3.12": {"pot": "0.9.2"},
    "3.13": {"torch": "2.6", "numpy": "2.1", "scipy": "1.14", "pot": "0.9.6"},
    "3.14": {"torch": "2.10", "numpy": "2.3", "scipy": "1.16", "pot": "0.9.7"},
}
"""Of a Python that is younger than the oldest of a package allowed: the first wheels that were released for it."""
NO_QUALITY = "--ignore=tests/test_quality.py"

nox.options.sessions = ["tests", "wheel"]


def oldest(python: str) -> list[str]:
    """Constraints: of every requirement with a lower bound, that version."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds = (re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for group in groups for line in group)
    floors = {bound[1]: bound[2] for bound in bounds if bound}
    floors |= FIRST.get(python, {})
    return [f"{name}=={floor}.*" for name, floor in sorted(floors.items())]


@nox.session(python=PYTHONS)
@nox.parametrize("pins", ["oldest", "newest"])
def tests(session: nox.Session, pins: str) -> None:
    """The whole suite."""
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(oldest(str(session.python)) if pins == "oldest" else []) + "\n")
    session.install("-c", str(constraints), "-e", ".[dev]")
    session.run("python", "-m", "pytest", "-n", "2", NO_QUALITY, *session.posargs)


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Built, installed where nothing else is, and run from another folder."""
    folder = Path(session.create_tmp()).resolve()
    dist = folder / "dist"
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(dist))
    (built,) = dist.glob("*.whl")
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "build", "pyproject_hooks")
    session.install(f"{built}[trainer]")
    session.chdir(folder)
    session.run("robustcm", "--version")
    session.run("robustcm", "steps=20", "autoencoder.steps=20", "--brief", "--out", "run")
