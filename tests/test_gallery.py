"""The gallery draws every picture of the documents, each by a command that parses, and puts it where it belongs."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from analysis import concepts, outlier_table, td_outliers, variance
from reference_trainer.__main__ import parser as trainer_parser
from reference_trainer.commands.train import configuration
from reference_trainer.data.squares import open_square

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gallery

    monkeypatch.setattr(gallery, "WORK", tmp_path / "work")
    return gallery


def size_of(picture: Path) -> tuple[int, ...]:
    """Of a PNG."""
    head = picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return struct.unpack(">II", head[16:])


def test_every_picture_of_the_documents_is_in_the_gallery(gallery: Any):
    there = {picture.relative_to(ROOT / "docs").as_posix() for picture in (ROOT / "docs").rglob("*.png")}
    assert there
    assert {figure.file for figure in gallery.FIGURES} == there


def test_no_two_are_of_one_name(gallery: Any):
    assert len({Path(figure.file).stem for figure in gallery.FIGURES}) == len(gallery.FIGURES)


def test_each_command_parses(gallery: Any):
    drawn = [figure for figure in gallery.FIGURES if isinstance(figure, gallery.Drawn)]
    commands = [command for figure in drawn for command in figure.commands(Path("work"))]
    assert len(commands) == 10 + len(concepts.CONCEPTS)
    for command in commands:
        if command[:2] == ["-m", "reference_trainer"]:
            configuration(trainer_parser().parse_args(["train", *command[2:]]))
        elif command[0] == "analysis/td_outliers.py":
            td_outliers.check_options(td_outliers.parser().parse_args(command[1:]))
        elif command[0] == "analysis/variance.py":
            assert variance.parser().parse_args(command[1:]).runs == [Path(n) for n in ("ilct", "not-kept", "kept")]
        elif command[0] == "analysis/outlier_table.py":
            (table,) = outlier_table.parser().parse_args(command[1:]).measured
            assert (ROOT / table).is_file()
        else:
            assert command[0] == "analysis/concepts.py"
            concepts.parser().parse_args(command[1:])


def test_the_heavy_latents_are_those_of_the_suite(gallery: Any):
    from reference_trainer.ablation.ladder import heavy_tailed
    from reference_trainer.options import autoencoder_option, override
    from reference_trainer.presets import digits

    assert override(digits(), autoencoder_option(gallery.HEAVY)).autoencoder == heavy_tailed(digits()).autoencoder


@pytest.mark.usefixtures("drawn_pictures")
def test_the_ladder_is_drawn_of_the_runs_that_are_kept(gallery: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--only", "ladder", "--out", str(tmp_path)])
    assert gallery.main() == 0
    wide, high = size_of(tmp_path / "log" / "ladder.png")
    before = size_of(ROOT / "docs" / "log" / "ladder.png")
    assert (wide, high) == pytest.approx(before, rel=0.02)  # as many panels, and as many arms below each other
    (figure,) = (figure for figure in gallery.FIGURES if figure.file == "log/ladder.png")
    arms = {run["arm"] for name in figure.runs for run in json.loads((ROOT / "docs" / name).read_text())["runs"]}
    table = (ROOT / "docs" / "log.md").read_text()
    assert len(arms) == 14
    assert len(re.findall(r"!\[.*\]\(log/ladder\.png\)", table)) == 1


def test_what_a_command_draws_goes_where_the_document_looks(
    gallery: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def run(command: list[str], **_: object) -> None:
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "td_outliers.png").write_bytes(folder.name.encode())

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--only", "heavy", "outliers", "--out", str(tmp_path / "docs")])
    assert gallery.main() == 0
    assert (tmp_path / "docs" / "evidence" / "heavy.png").read_bytes() == b"heavy"
    assert (tmp_path / "docs" / "outliers.png").read_bytes() == b"outliers"


def test_a_picture_too_large_for_the_readme_is_kept_in_fewer_colours(gallery: Any, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > gallery.FIRST_SCREEN
    gallery.copy(tmp_path / "large.png", tmp_path / "small.png", gallery.FIRST_SCREEN)
    assert size_of(tmp_path / "small.png") == (300, 300)
    assert (tmp_path / "small.png").stat().st_size < gallery.FIRST_SCREEN
    assert open_square(tmp_path / "small.png") is None  # still known as a picture of the trainer's
