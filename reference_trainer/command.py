"""A parser that takes its words and options in any order, and whose complaints are one line."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from reference_trainer.errors import UserError, one_line, printable

COMMANDS = ("train", "sample", "evaluate", "encode", "export", "ablate")
MODULE, INSTALLED = "python -m reference_trainer", "robustcm"
"""The trainer's two names, for one that is installed and one that lies in a folder; help is written with the first."""

ASSIGNMENT = re.compile(r"[a-z_][\w.]*=")
"""How a word begins that gives a field a value."""


def program() -> str:
    """How the trainer was called."""
    return INSTALLED if Path(sys.argv[0]).stem == INSTALLED else MODULE


class Parser(argparse.ArgumentParser):
    """argparse's, with three differences.

    The positional argument ``words``, if there is one (``nargs="*"``), is what stands between, before and behind the
    options: argparse would take the first group alone. A mistake is a ``UserError`` with the nearest name there is.
    Of a value given twice the last one counts, and that is said.
    """

    def __init__(self, *, fields: Sequence[str] = (), **kwargs: Any) -> None:
        """``fields``: names that ``words`` give a value, as NAME=VALUE, to suggest where --NAME was written."""
        super().__init__(allow_abbrev=False, **kwargs)
        self.fields = fields
        self.register("action", None, _StoreLast)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Nothing stays unknown: words are collected, options refused."""
        given = sys.argv[1:] if args is None else list(args)
        options, rest = super().parse_known_args(self._assignments_first(given), namespace)
        rest = [word for word in rest if word != "--"]
        for word in rest:
            if word.startswith("-"):
                self.error(f"unknown option {word.partition('=')[0]}{self._instead_of(word)}")
        takes_words = any(action.dest == "words" for action in self._actions)
        if rest and not takes_words:
            self.error(f"no place for the word {rest[0]!r}")
        if takes_words:
            options.words = [*options.words, *rest]
            paths = [word.partition("=")[0] for word in options.words if "=" in word]
            for twice in dict.fromkeys(name for name in paths if paths.count(name) > 1):
                _say_the_last_counts(twice)
        return options, []

    def _assignments_first(self, given: list[str]) -> list[str]:
        """``given`` with each NAME=VALUE among the values of an option moved to the front: `--seeds 0 1 steps=9`.

        Not from an option that may be given several times: its values are such words.
        """
        appending = argparse._AppendAction
        several = [action for action in self._actions if action.nargs == "+" and not isinstance(action, appending)]
        lists = {name for action in several for name in action.option_strings}
        moved, left, inside = list[str](), list[str](), False
        for word in given:
            inside = word in lists if word.startswith("-") else inside
            (moved if inside and ASSIGNMENT.match(word) else left).append(word)
        return [*moved, *left]

    def error(self, message: str) -> NoReturn:
        """One line, not the usage and a line."""
        raise UserError(f"{message}; see {self.prog} --help")

    def format_help(self) -> str:
        """The help, its examples as the program was called."""
        return super().format_help().replace(MODULE, program())

    def _instead_of(self, word: str) -> str:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        known = {option.lstrip("-").replace("-", "_"): option for option in self._option_string_actions}
        for field in reversed(self.fields):  # of two of one last name the first is suggested
            known |= {field.rpartition(".")[2]: f"{field}=VALUE", field: f"{field}=VALUE"}
        return did_you_mean(name, known)


class _StoreLast(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string and getattr(namespace, self.dest) is not self.default:
            _say_the_last_counts(option_string)
        setattr(namespace, self.dest, values)


def _say_the_last_counts(name: str) -> None:
    print(one_line(f"{name} is given more than once: the last one counts"), file=sys.stderr)


def did_you_mean(name: str, known: Iterable[str] | dict[str, str]) -> str:
    """``", did you mean X?"`` with the nearest of ``known`` (of a dictionary what stands there), or nothing."""
    shown = {key.lower(): known[key] if isinstance(known, dict) else key for key in known}
    near = difflib.get_close_matches(name.lower(), shown, 1)
    return f", did you mean {shown[near[0]]}?" if near else ""


def path(text: str) -> Path:
    """A path as typed, ``~`` expanded (a shell does not do it behind ``--out=``)."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        found = Path(text).expanduser()
    except RuntimeError:  # nobody of that name
        found = Path(text)
    try:
        found.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # too long, or with a null character: no file can have it
        why = (isinstance(error, OSError) and error.strerror) or error
        raise argparse.ArgumentTypeError(f"{printable(text)[:60]!r} is no path: {why}") from error
    return found


def real(text: str) -> float:
    """A finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.inf
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a number, got {text[:40]!r}")
    return number


def whole(text: str) -> int:
    """A whole number that fits 64 bits, as torch needs it."""
    try:
        number = int(text)
    except ValueError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text[:40]!r}")
    return number
