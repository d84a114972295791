"""The one exception for a user's mistake."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line that names the flag, file or row, the value found and the fix. The command
    prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one-line reports."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
