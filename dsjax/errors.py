"""The one error a person can cause: what they gave is wrong, and the message says what to change.

Knows nothing of any room. Command lines print such an error as one line and exit with code 2;
every other exception is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A value, file or folder given by the caller cannot be used; `str(error)` is one line."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest of `known`, or all if none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(known))}" if known else ""
