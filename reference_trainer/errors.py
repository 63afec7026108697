"""The one exception that is the user's to mend, and how a command ends: in a line and a status, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message says what, where and what to do, in one line."""


def exit_status(work: Callable[[], int]) -> int:
    """What ``work`` returns; 2, and a line, for what the user can mend; 130 for Ctrl-C."""
    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue from the last checkpoint", file=sys.stderr)
        return 130
