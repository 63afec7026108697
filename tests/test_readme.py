"""The README's Python runs, its links lead somewhere, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from reference_trainer.__main__ import COMMANDS, configuration, parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(block: str):
    exec(compile(block, "README.md", "exec"), {})


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_training_commands_resolve():
    commands = re.findall(r"^python -m reference_trainer *(.*?) *(?:#.*)?$", README, re.MULTILINE)
    assert len(commands) > 5
    for command in commands:
        words = shlex.split(command)
        if not words or words[0] not in COMMANDS:
            words.insert(0, "train")
        options = parser().parse_args(words)
        if words[0] == "train":
            configuration(options)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
