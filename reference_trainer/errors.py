"""The one exception that is the user's to mend, text that every terminal can show, and how a command ends."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message says what, where and what to do, in one line."""


def printable(text: str, encoding: str | None = None) -> str:
    r"""``text`` in one line that can be printed: what is no visible character becomes an escape such as ``\n``.

    A file name may hold a line feed, a colour code of the terminal, or bytes that are no text at all.

    Args:
        encoding: what it will be printed in; None: that of the standard output.
    """
    visible = "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode("ascii") for ch in text)
    encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"  # None in a StringIO, no stdout in a GUI
    return visible.encode(encoding, "backslashreplace").decode(encoding)


def exit_status(work: Callable[[], int]) -> int:
    """What ``work`` returns; 2, and a line, for what the user can mend; 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path in a message must not end the run that it tells of
            stream.reconfigure(errors="backslashreplace")
    try:
        return work()
    except UserError as error:
        print(printable(f"error: {error}", getattr(sys.stderr, "encoding", None)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue from the last checkpoint", file=sys.stderr)
        return 130
