"""The one exception that is the user's to mend, and how a command ends: in a line and a status, without a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message says what, where and what to do, in one line."""


def exit_status(work: Callable[[], int], debug: bool = False) -> int:
    """What ``work`` returns; else a line and 2 for what the user can mend, 1 for a fault, 130 for Ctrl-C.

    Args:
        debug: print the traceback, too, with the exceptions behind it.
    """
    try:
        status = work()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output has seen enough, as in `... --fields | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        if isinstance(error, UserError):
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 2
        print(
            f"error: unexpected {type(error).__name__}: {one_line(error) or 'no message'} (a fault of ours, or of a "
            "module of yours" + ("" if debug else "; the same command with --debug shows where") + ")",
            file=sys.stderr,
        )
        return 1


def one_line(message: object) -> str:
    """``message`` without its line breaks."""
    return " ".join(str(message).split())
