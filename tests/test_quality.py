"""The linter, the formatter and the type checker have nothing to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def passes(*command: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", *command], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_linter_has_nothing_to_say():
    passes("ruff", "check")


def test_the_formatter_has_nothing_to_change():
    passes("ruff", "format", "--check")


def test_the_types_are_right():
    passes("mypy")
