"""Errors that are told in one line: what a person gave is wrong, or a run cannot go on.

Knows nothing of any room. Command lines print the first and exit with code 2, the second with code
1; every other exception is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

_MOST_CHARACTERS = 2000


def _one_line(message: str) -> str:
    """What a file or a person wrote, fit for a terminal: nothing steers it, nothing is endless."""
    if len(message) > _MOST_CHARACTERS:
        message = f"{message[:_MOST_CHARACTERS]}..."
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


class InputError(ValueError):
    """A value, file or folder given by the caller cannot be used; `str(error)` is one line."""

    def __str__(self) -> str:
        return _one_line(super().__str__())


class RunError(RuntimeError):
    """Work in progress cannot go on, through its numbers, its files or its disk; one line.

    What was saved is still there.
    """

    def __str__(self) -> str:
        return _one_line(super().__str__())


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest of `known`, or all if none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(known))}" if known else ""
