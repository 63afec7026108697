"""The one exception that is the user's to mend: shown as a single line, without a traceback."""


class UserError(Exception):
    """Something the user can mend. The message says what, where and what to do, in one line."""
