"""The README's Python runs, and its first screen is what it should be; what it shares with the guides: test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(block: str):
    exec(compile(block, "README.md", "exec"), {})


def test_your_own_trainer_takes_four_lines_for_the_loss_and_three_for_the_coupling():
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "# robustcm" in b)
    assert [block.count(f"# robustcm, {part}") for part in ("loss", "coupling")] == [4, 3]
    ours = [line for line in block.splitlines() if "# robustcm" in line]
    names = re.findall(r"\w+", " ".join(line.partition("import ")[2].partition("#")[0] for line in ours))
    theirs = "\n".join(line for line in block.splitlines() if line not in ours)
    assert len(names) > 5
    assert [name for name in names if re.search(rf"\b{name}\b", theirs)] == []  # no other line needs us


def test_the_first_screen_is_a_sentence_the_commands_and_the_pictures():
    first = README[: README.index("\n## ")]
    title, sentence, block, samples, boxes, *_ = first.split("\n\n")
    assert title.startswith("# ")
    assert sentence.count(". ") == 0
    assert re.findall(r"^make (\w+)", block, re.MULTILINE) == ["run", "test"]
    for picture in (samples, boxes):
        (file,) = re.findall(r"^!\[.+\]\((.+)\)$", picture)
        assert (ROOT / file).stat().st_size < 200 * 1024
