"""Draws every figure of README and docs again.

    python benchmarks/gallery.py [--only ladder heavy] [--out docs]

Without options: all of them, into runs/gallery, to be compared with those in docs; --out docs replaces these. The
default run takes minutes, and so does what the box plots are of; what was done before is not done again. A machine that
rounds differently draws other samples.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from analysis.concepts import CONCEPTS
from reference_trainer.ablation.comparison import Result, draw_comparison
from reference_trainer.ablation.ladder import BASELINE
from reference_trainer.plotting import OWN_PICTURE, save_figure

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "gallery" / "work"
FIRST_SCREEN = 200 * 1024  # of a picture on the README's; tests/test_readme.py
HEAVY = (
    "KLAutoencoder(latent_channels=8, patch=2, block_out_channels=(16,32), attention=True, steps=700, kl_weight=0.1)"
)
BRIEF = ("steps=2000", "network.width=96")
BRIEF_RUNS = (
    ("ilct", *BRIEF, "ilct"),
    (*BRIEF, "objective.teacher_input=None", "not-kept"),
    (*BRIEF, "kept"),
)


@dataclass(frozen=True)
class Drawn:
    """A picture that a command leaves in the folder given to it behind ``--out``."""

    file: str
    """Below docs."""
    words: tuple[str, ...]
    """Behind ``python``."""
    picture: str
    runs: tuple[tuple[str, ...], ...] = ()
    """What is trained first, each as behind ``python -m reference_trainer``, its name last; the folders follow the
    words."""
    most_bytes: int | None = None
    """Larger, it is kept in fewer colours."""

    def commands(self, folder: Path) -> list[list[str]]:
        """The trainings, and the one that draws."""
        roots = [str(folder.parent / name) for *_, name in self.runs]
        trainings = [
            ["-m", "reference_trainer", *words, "--brief", "--out", root]
            for (*words, _), root in zip(self.runs, roots, strict=True)
        ]
        return [*trainings, [*self.words, *roots, "--out", str(folder)]]

    def draw(self, to: Path) -> None:
        folder = WORK / Path(self.file).stem
        for command in self.commands(folder):
            print(f"python {shlex.join(command)}", flush=True)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        to.parent.mkdir(parents=True, exist_ok=True)
        copy(folder / self.picture, to, self.most_bytes)


def copy(picture: Path, to: Path, most_bytes: int | None = None) -> None:
    """As it is, or in 128 colours where it has more than ``most_bytes``."""
    if most_bytes is None or picture.stat().st_size <= most_bytes:
        shutil.copyfile(picture, to)
        return
    text = PngInfo()
    for name, value in OWN_PICTURE.items():
        text.add_text(name, value)
    with Image.open(picture) as drawn:
        drawn.convert("RGB").quantize(128).save(to, optimize=True, pnginfo=text)


@dataclass(frozen=True)
class OfRuns:
    """The picture of an ablation whose runs, hours of training, are kept."""

    file: str
    runs: tuple[str, ...]
    """JSON below docs."""

    def draw(self, to: Path) -> None:
        found = [json.loads((ROOT / "docs" / name).read_text())["runs"] for name in self.runs]
        save_figure(draw_comparison([Result(**run) for runs in found for run in runs], BASELINE), to)


PHOTOGRAPHS = (
    *("photographs", "steps=4000", "autoencoder.steps=1500", "autoencoder.latent_channels=8"),
    "autoencoder.block_out_channels=(16,32)",
)
"""d = 512 of the evidence's table of every set."""

FIGURES = (
    OfRuns("log/ladder.png", ("log/ladder.json", "log/distance_and_c.json")),
    *(Drawn(f"concepts/{name}.png", ("analysis/concepts.py", "--only", name), f"{name}.png") for name in CONCEPTS),
    Drawn(
        "evidence/natural_outliers.png",
        ("analysis/outlier_table.py", "docs/evidence/natural_outliers.json"),
        "outlier_table.png",
    ),
    Drawn("evidence/heavy.png", ("analysis/td_outliers.py", "--autoencoder", HEAVY, "--steps", "0"), "td_outliers.png"),
    Drawn("evidence/variance.png", ("analysis/variance.py",), "variance.png", BRIEF_RUNS),
    *(
        Drawn(f"evidence/photographs_{name}.png", words, "samples.png", most_bytes=FIRST_SCREEN)
        for name, words in (
            ("ours", ("-m", "reference_trainer", *PHOTOGRAPHS)),
            ("ilct", ("-m", "reference_trainer", *PHOTOGRAPHS, "ilct")),
        )
    ),
    Drawn("outliers.png", ("analysis/td_outliers.py",), "td_outliers.png", most_bytes=FIRST_SCREEN),
    Drawn("digits.png", ("-m", "reference_trainer"), "samples.png", most_bytes=FIRST_SCREEN),
)
"""The quick ones first."""


def main() -> int:
    names = {Path(figure.file).stem: figure for figure in FIGURES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gallery", help="default: runs/gallery")
    options = parser.parse_args()
    for name in options.only:
        to = options.out / names[name].file
        names[name].draw(to)
        print(f"look at {to}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
