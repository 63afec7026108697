"""Several ablations as one: a set of images each, say, with the tables of all of them and one line a suite on top."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reference_trainer.ablation.comparison import Result
from reference_trainer.errors import UserError, printable


def joined(folders: Sequence[Path]) -> list[Result]:
    """The runs of the ablations in ``folders``, each suite called ``FOLDER, SUITE``.

    Raises:
        UserError: a folder without an ablation, two of one name.
    """
    names = [folder.resolve().name for folder in folders]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--join: two folders are called {printable(twice)}: rename one, the tables go by it")
    return [
        replace(run, suite=f"{name}, {run.suite}")
        for folder, name in zip(folders, names, strict=True)
        for run in _runs(folder)
    ]


def _runs(folder: Path) -> list[Result]:
    file = folder / "ablation.json"
    try:
        return [Result(**run) for run in json.loads(file.read_text())["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--join: no ablation in {printable(str(folder))} ({type(error).__name__}): give folders that ablate --out "
            "wrote"
        ) from error
