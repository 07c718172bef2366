r"""Do two mathematical answers say the same? Cheaply where both are numbers, else by math-verify.

Knows nothing of completions: extraction is done before. Numbers are exact: 1/2 is 0.5, but 1.4142
is not \sqrt2, and 0.333 is not 1/3. An answer that is much longer than any such answer is wrong.
"""

import functools
import re
from fractions import Fraction
from typing import Any

MAX_CHARACTERS = 1000  # of an answer, or four times the right one's if that is more
_DIGITS = 400  # of a number that is compared here; Python's own limit on reading one is 4,300

_WRAPPED = (
    re.compile(r"\$\$?([^$]*)\$\$?"),
    re.compile(r"\\\((.*)\\\)", re.DOTALL),
    re.compile(r"\\\[(.*)\\\]", re.DOTALL),
    re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit)\s?\{([^{}]*)\}"),
    re.compile(r"\*\*([^*]*)\*\*"),
)
_THIN_SPACE = re.compile(r"(?<=\d)\\[,!](?=\d{3})")  # between thousands
_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right|quad|qquad|displaystyle)(?![A-Za-z])|~")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z\\])")
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"([+-]?)({_PLAIN})(?:/({_PLAIN}))?")
_FRACTION = re.compile(rf"([+-]?)\\frac\{{({_PLAIN})\}}\{{({_PLAIN})\}}")
_DECIMAL = re.compile(r"(\d*)\.(\d+)")


def same_quickly(gold: str, given: str) -> bool | None:
    """Whether two answers are equal as texts or as numbers; None where that does not decide."""
    gold, given = _plain(gold), _plain(given)
    if gold == given:
        return bool(gold)
    if not given or len(given) > max(MAX_CHARACTERS, 4 * len(gold)):
        return False
    if (left := _number(gold)) is not None and (right := _number(given)) is not None:
        return left == right
    return None


def same(gold: str, given: str) -> bool:
    """Whether an answer equals the right one, by math-verify where `same_quickly` does not decide.

    Bounded neither in time nor in memory: it is to run in a process that may be killed. What fails
    within because of the given answer makes it wrong.

    Raises:
        ValueError: if math-verify cannot read the right answer.
    """
    if (quick := same_quickly(gold, given)) is not None:
        return quick
    from math_verify import verify

    # Decimals as fractions: math-verify rounds floating-point numbers before it compares them.
    if not (wanted := _parsed(_DECIMAL.sub(_as_fraction, _plain(gold)))):
        raise ValueError(f"math-verify cannot read the right answer {gold!r}")
    try:
        answer = _parsed(_DECIMAL.sub(_as_fraction, _plain(given)))
        return bool(answer) and verify(wanted, answer, timeout_seconds=0)
    except (ArithmeticError, MemoryError, RecursionError, TypeError, ValueError):
        return False


@functools.lru_cache
def prepare() -> None:
    """Imports math-verify and has it read a first formula, which takes a second."""
    same("a+b", "b+a")


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    return parse(
        rf"\boxed{{{text}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=0,
    )


def _plain(text: str) -> str:
    """The text without what only changes how it looks."""
    text = text.strip().rstrip(".").strip()
    for pattern in _WRAPPED:
        if match := pattern.fullmatch(text):
            text = match[1].strip()
    text = _SPACING.sub(" ", _THIN_SPACE.sub("", text)).replace("{,}", ",").replace("−", "-")
    text = text.replace(r"\$", "").replace("$", "")
    text = text.replace("dfrac", "frac").replace("tfrac", "frac")
    return _LOOSE_SPACE.sub("", " ".join(text.split()))


def number(text: str) -> Fraction | None:
    """The number that a text is: whole, decimal or a fraction, also with commas at thousands."""
    return _number(_plain(text)) if len(text) <= MAX_CHARACTERS else None


def _number(text: str) -> Fraction | None:
    if len(text) > _DIGITS or not (match := _NUMBER.fullmatch(text) or _FRACTION.fullmatch(text)):
        return None
    sign, above, below = match.groups()
    above, below = (Fraction((part or "1").replace(",", "")) for part in (above, below))
    if below == 0:
        return None
    return (-1 if sign == "-" else 1) * above / below


def _as_fraction(match: re.Match) -> str:
    whole, digits = match.groups()
    return rf"\frac{{{int(whole + digits)}}}{{{10 ** len(digits)}}}"
