"""Errors that are told in one line: what a person gave is wrong, or a run cannot go on.

Knows nothing of any room. Command lines print the first and exit with code 2, the second with code
1; every other exception is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A value, file or folder given by the caller cannot be used; `str(error)` is one line."""


class RunError(RuntimeError):
    """Work in progress cannot go on, through its numbers, its files or its disk; one line.

    What was saved is still there.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest of `known`, or all if none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(known))}" if known else ""
