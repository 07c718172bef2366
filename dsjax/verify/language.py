"""How much of a chain of thought is in the language that was asked for, by its script.

Knows nothing of grammar or dictionaries: languages that share a script count as the same.
"""

import functools
import re
import unicodedata
from collections.abc import Mapping
from types import MappingProxyType

from dsjax.errors import InputError, nearest
from dsjax.verify.extract import thinking

# The first words of Unicode's names of letters.
SCRIPTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("cs", "de", "en", "es", "fr", "id", "it", "nl", "pl", "pt", "sv", "tr", "vi"),
            frozenset({"LATIN"}),
        ),
        **dict.fromkeys(("bg", "ru", "uk"), frozenset({"CYRILLIC"})),
        **dict.fromkeys(("ar", "fa", "ur"), frozenset({"ARABIC"})),
        "el": frozenset({"GREEK"}),
        "he": frozenset({"HEBREW"}),
        "hi": frozenset({"DEVANAGARI"}),
        "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}),
        "ko": frozenset({"HANGUL"}),
        "th": frozenset({"THAI"}),
        "zh": frozenset({"CJK"}),
    }
)
# Written without spaces, so that each letter counts as a word.
_UNSPACED = frozenset(
    {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "KHMER", "LAO", "MYANMAR", "THAI"}
)
_NOT_PROSE = (("```", "```"), ("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"))
_IN_A_LINE = (("`", "`"), ("$", "$"))
_MARKUP = re.compile(
    r"\b(?:https?://|www\.)\S+|</?[a-z]{1,16}>|\\(?:begin|end)\{[a-z*]{0,16}\}|\\[A-Za-z]+"
)
_LETTERS = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def consistency(prompt: str, completion: str, language: str = "en") -> float:
    """The share of the thought's words that are in the script of a language, in [0, 1].

    Code, formulas, LaTeX commands, links, numbers and single letters of alphabets, which are mostly
    variables, are no words. A run of letters is a word; in scripts without spaces, such as Han,
    each letter is. Without any word the share is 1.0. Time is linear in the text.

    Source: DeepSeek-R1, equation (7).

    Args:
        prompt: the text that was continued; it may end with `<think>`.
        completion: what the model wrote; all of it counts as thought where nothing is tagged.
        language: a key of `SCRIPTS`.

    Raises:
        InputError: for an unknown language.
    """
    if language not in SCRIPTS:
        raise InputError(f"unknown language {language!r}{nearest(language, SCRIPTS)}")
    wanted, right, total = SCRIPTS[language], 0, 0
    for word in _LETTERS.findall(_prose(thinking(prompt, completion))):
        for script, count in _words(word):
            total += count
            right += count if script in wanted else 0
    return right / total if total else 1.0


def _prose(text: str) -> str:
    for opening, closing in _NOT_PROSE:
        text = _without(text, opening, closing)
    lines = text.split("\n")
    for opening, closing in _IN_A_LINE:
        lines = [_without(line, opening, closing) if opening in line else line for line in lines]
    return _MARKUP.sub(" ", "\n".join(lines))


def _without(text: str, opening: str, closing: str) -> str:
    """The text without what stands between such marks; an opening mark alone changes nothing."""
    kept, place = [], 0
    while (start := text.find(opening, place)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            break
        kept.append(text[place:start])
        place = end + len(closing)
    return " ".join([*kept, text[place:]])


def _words(letters: str) -> list[tuple[str, int]]:
    """(script, number of words) of the pieces of a run of letters."""
    pieces: list[list] = []
    for letter in letters:
        script = _script(letter)
        if script and pieces and pieces[-1][0] == script:
            pieces[-1][1] += 1
        elif script:
            pieces.append([script, 1])
    return [
        (script, count if script in _UNSPACED else 1)
        for script, count in pieces
        if count > 1 or script in _UNSPACED or script not in ("LATIN", "GREEK")
    ]


@functools.lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    """The script of a letter; nothing for apostrophes and for letters of mathematics."""
    if not letter.isalpha():
        return ""
    script = unicodedata.name(letter, "").partition(" ")[0]
    return "" if script in ("MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT") else script
