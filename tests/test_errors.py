"""What the trainer prints fits into one line of any terminal, and the line is never what ends it."""

from __future__ import annotations

import ast
import io
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer import errors
from reference_trainer.data.codecs import Foreign
from reference_trainer.errors import Terminated, UserError, exit_status, printable
from reference_trainer.evaluation.features import Imported
from reference_trainer.evaluation.reference import Broken
from reference_trainer.evaluation.rows import attempt
from reference_trainer.training.loop import _Stopped

ENCODINGS = ("utf-8", "latin-1", "ascii", "cp1252", "utf-16")


@given(st.text(st.characters(exclude_categories=())), st.sampled_from(ENCODINGS))
def test_any_text_becomes_one_line_that_can_be_printed(text: str, encoding: str):
    shown = printable(text, encoding)
    assert shown.isprintable()  # no line feed, no control character, no half of a character
    assert shown.encode(encoding).decode(encoding) == shown
    assert len(shown.splitlines()) <= 1


@given(st.binary(max_size=20))
def test_any_name_on_disk_can_be_printed(name: bytes):
    assert printable(os.fsdecode(name), "ascii").isascii()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_can_be_read_is_left_alone(encoding: str):
    assert printable("photos/a b (1).png", encoding) == "photos/a b (1).png"


@pytest.mark.parametrize(
    ("text", "encoding", "shown"),
    [
        ("a\nb", "utf-8", r"a\nb"),
        ("a\u2028b", "utf-8", r"a\u2028b"),  # a line of its own for some terminals
        ("\x1b[31mred", "utf-8", r"\x1b[31mred"),
        ("\u202egnp.exe", "utf-8", r"\u202egnp.exe"),  # would be shown from right to left
        ("caf\udce9", "utf-8", r"caf\udce9"),  # a name in latin-1 on a disk of utf-8
        ("日本", "utf-8", "日本"),
        ("日本", "latin-1", r"\u65e5\u672c"),
        ("café", "latin-1", "café"),
    ],
)
def test_what_cannot_be_seen_becomes_an_escape(text: str, encoding: str, shown: str):
    assert printable(text, encoding) == shown


def terminal(encoding: str | None) -> io.TextIOBase:
    return io.StringIO() if encoding is None else io.TextIOWrapper(io.BytesIO(), encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", None])
def test_an_error_about_a_strange_name_is_one_line_in_any_terminal(
    encoding: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout", terminal(encoding))
    monkeypatch.setattr(sys, "stderr", terminal(encoding))

    def fails() -> int:
        print("look at 日本\udcff.png")
        raise UserError("no folder 日本\n\udcff: give another")

    assert exit_status(fails) == 2
    assert sys.stderr.seek(0) == 0
    said = sys.stderr.read()
    assert said.startswith("error: no folder ")
    assert said.endswith("\\n\\udcff: give another\n")
    assert said.count("\n") == 1


def test_an_error_is_shown_as_its_own_stream_can(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", terminal("ascii"))  # a pipe
    monkeypatch.setattr(sys, "stderr", terminal("utf-8"))

    def fails() -> int:
        raise UserError("no folder 日本")

    assert exit_status(fails) == 2
    assert sys.stderr.seek(0) == 0
    assert sys.stderr.read() == "error: no folder 日本\n"


def test_the_standard_output_may_be_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert printable("é") == "é"
    assert exit_status(lambda: 7) == 7


class Stopping:
    """A user's autoencoder and features, in the midst of which the command is stopped."""

    def __init__(self, stop: type[BaseException]) -> None:
        self.stop = stop

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        raise self.stop

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise self.stop

    __call__ = encode


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated, Broken, _Stopped])
def test_a_stop_leaves_the_users_code_as_what_it_is(stop: type[BaseException]):
    """Taken for a fault of that code, it would be a row left out, and the command would go on."""
    theirs = Stopping(stop)
    codec, images = Foreign("theirs", theirs), torch.zeros(2, 3, 8, 8)
    for work in (codec.encode, codec.decode, Imported("theirs", theirs)):
        with pytest.raises(stop):
            attempt(partial(work, images))


def test_all_that_catches_whatever_is_raised_lets_a_stop_through():
    """Each `except BaseException` of the trainer that does not raise the same again stands behind one of STOPS."""
    found = 0
    for file in Path(errors.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            kinds = [handler.type for handler in node.handlers] if isinstance(node, ast.Try) else []
            for i, kind in enumerate(kinds):
                if isinstance(kind, ast.Name) and kind.id == "BaseException":
                    found += 1
                    assert any("STOPS" in ast.dump(earlier) for earlier in kinds[:i] if earlier), (
                        f"{file}, {kind.lineno}"
                    )
    assert found >= 10
