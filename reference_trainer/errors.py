"""The one exception that is the user's to mend, text that every terminal can show, and how a command ends."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

AGAIN = 75
"""Exit status behind SIGTERM, sysexits.h's EX_TEMPFAIL: the same command again goes on."""


class UserError(Exception):
    """Something the user can mend. The message says what, where and what to do, in one line."""


class Stop(BaseException):
    """Leaves the work wherever it is, through the user's code, too; no fault of that."""


STOPS = (KeyboardInterrupt, Stop)
"""What is raised again where all else that the user's code or a library raises becomes a ``UserError``."""


class Terminated(Stop):
    """SIGTERM, as a scheduler sends it before it kills; what was to be saved is."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM raises ``Terminated`` wherever the work is, as Ctrl-C raises KeyboardInterrupt."""

    def stop(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # who is called there keeps its own handling
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def printable(text: str, encoding: str | None = None) -> str:
    r"""``text`` in one line that can be printed: what is no visible character becomes an escape such as ``\n``.

    A file name may hold a line feed, a colour code of the terminal, or bytes that are no text at all.

    Args:
        encoding: what it will be printed in; None: that of the standard output.
    """
    visible = "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode("ascii") for ch in text)
    encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"  # None in a StringIO, no stdout in a GUI
    return visible.encode(encoding, "backslashreplace").decode(encoding)


def some_of(names: Sequence[str], at_most: int = 3, between: str = ", ") -> str:
    """The first of them, ``printable``, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{between.join(map(printable, names[:at_most]))}{more}"


def exit_status(work: Callable[[], int], debug: bool = False, leads: bool = True) -> int:
    """What ``work`` gives; else a line and 2 for what the user can mend, 1 for a fault, 130 for Ctrl-C, 75 at SIGTERM.

    Args:
        debug: print the traceback, too, with the exceptions behind it.
        leads: False for one of several processes of a command that need not all say that they were stopped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path in a message must not end the run that it tells of
            stream.reconfigure(errors="backslashreplace")
    try:
        with sigterm_raises():
            status = work()
        if sys.stdout is not None:  # as in a GUI
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if leads:
            print("interrupted; run the same command again to continue from the last checkpoint", file=sys.stderr)
        return 130
    except Terminated as stopped:
        if leads:
            print(f"{str(stopped) or 'terminated'}; run the same command again to continue", file=sys.stderr)
        return AGAIN
    except BrokenPipeError:  # who read the output has seen enough, as in `... --fields | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        if isinstance(error, UserError):
            if str(error):  # of a follower: its leader has said it
                _complain(str(error))
            return 2
        _complain(
            f"unexpected {type(error).__name__}: {one_line(error) or 'no message'} (a fault of ours, or of a module of "
            "yours" + ("" if debug else "; the same command with --debug shows where") + ")"
        )
        return 1


def _complain(line: str) -> None:
    print(printable(f"error: {line}", getattr(sys.stderr, "encoding", None)), file=sys.stderr)


def one_line(message: object) -> str:
    """``message`` without its line breaks."""
    return " ".join(str(message).split())


def type_and_message(error: BaseException) -> str:
    """What was raised, and the first line of what it says; and the second, where the first only announces it."""
    lines = str(error).strip().splitlines()
    said = 2 if lines and lines[0].endswith(":") else 1
    return " ".join([type(error).__name__, *(line.strip() for line in lines[:said])])


def require(condition: bool, message: str) -> None:
    """Of the numbers of a configuration.

    Raises:
        ValueError: ``message``, where the condition does not hold.
    """
    if not condition:
        raise ValueError(message)
