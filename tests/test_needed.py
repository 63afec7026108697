"""A script called by a Python that lacks what it needs says so in a line, from whatever folder it is called."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from reference_trainer import __main__ as trainer

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    str(file.relative_to(ROOT))
    for folder in ("analysis", "benchmarks", "benchmarks/faults")
    for file in (ROOT / folder).glob("*.py")
    if re.search(r'^if __name__ == "__main__":\n    (sys\.exit\()?main\(', file.read_text(), re.MULTILINE)
)


def test_there_are_scripts_of_both_folders():
    assert {Path(script).parent.name for script in SCRIPTS} == {"analysis", "benchmarks", "faults"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_torch_is_told_in_one_line_which_to_call(script: str, tmp_path: Path):
    bare = [sys.executable, "-E", "-S"]  # as one that nothing was installed into
    ran = subprocess.run([*bare, str(ROOT / script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert re.fullmatch(r"error: \S+ has no torch: in a clone call \.venv/bin/python, .*\n", ran.stderr)


def test_what_is_looked_for_is_what_the_trainer_needs_and_the_packages():
    found = runpy.run_path(str(ROOT / "analysis" / "needed.py"))["NEEDED"]  # here nothing is lacking
    packages = {"robustcm", "reference_trainer", "analysis"}
    assert set(found) == {*trainer.OF_THE_CORE, *trainer.OF_THE_EXTRA, *packages}
