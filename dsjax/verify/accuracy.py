r"""Is the answer in a completion the right one? Each record names the verifier that knows.

Knows nothing of processes: `quickly` is bounded by construction, `slowly` is to run in a worker.
"""

import functools
import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from dsjax.errors import InputError, nearest
from dsjax.verify import extract, gym, maths

# What a record has to have for each verifier, and the package that it needs.
VERIFIERS = {
    "choice": (("answer",), None),
    "code": (("tests",), None),
    "exact": (("answer",), None),
    "math": (("answer",), "math_verify"),
    "reasoning_gym": (("family", "entry"), "reasoning_gym"),
}

_DRESS = re.compile(r"\\(?:text(?:bf|rm)?|math(?:bf|rm))|[${}*\s]")
_LETTER = re.compile(r"(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z]))[.:)]?")


def check_record(record: Mapping[str, Any]) -> None:
    """Refuses a record that no verifier could judge; for data, before anything is trained on it.

    Raises:
        InputError: for an unknown verifier, a missing field, or a package that is not installed.
    """
    name = _verifier(record)
    fields, package = VERIFIERS[name]
    for field in fields:
        if record.get(field) is None:
            raise InputError(f"a record for the verifier {name!r} has no {field!r}")
    if name == "choice" and choice(str(record["answer"])) is None:
        raise InputError(f"the answer {record['answer']!r} of a record is no letter of a choice")
    if name == "reasoning_gym" and "answer" not in record["entry"]:
        raise InputError("the 'entry' of a record for reasoning_gym has no 'answer'")
    if package and not _installed(package):
        raise InputError(f"the verifier {name!r} needs {package}: pip install 'dsjax[rl]'")


def quickly(prompt: str, completion: str, record: Mapping[str, Any]) -> float | None:
    """1.0 or 0.0 where comparing texts and numbers decides, in linear time; otherwise None.

    Raises:
        InputError: as `check_record`.
    """
    check_record(record)
    name = _verifier(record)
    if name == "code":
        return 0.0 if extract.final_part(prompt, completion) is None else None
    if (given := _given(prompt, completion, name)) is None:
        return 0.0
    if name == "reasoning_gym":
        return gym.score_quickly(given, record)
    gold = str(record["answer"])
    if name == "math":
        right = maths.same_quickly(gold, given)
        return None if right is None else float(right)
    return float(given == gold.strip() if name == "exact" else choice(given) == choice(gold))


def prepare(record: Mapping[str, Any]) -> None:
    """Imports what `slowly` needs for such a record, so that no sample's time is spent on it."""
    name = _verifier(record)
    if name == "math":
        maths.prepare()
    elif name == "reasoning_gym":
        gym.prepare(record)
    elif name == "code":
        from dsjax.verify import sandbox

        sandbox.unavailable()  # it remembers


def slowly(
    prompt: str, completion: str, record: Mapping[str, Any], *, allow_unsafe_code: bool = False
) -> float:
    """The score, in [0, 1], whatever it takes.

    Args:
        prompt: the text that was continued.
        completion: what the model wrote.
        record: names its verifier in `verify`, "math" otherwise; with a true `partial`, puzzles and
            programs may get a part of the score.
        allow_unsafe_code: runs programs without a sandbox where there is none.

    Raises:
        InputError: as `check_record`.
        ValueError: if the right answer cannot be read.
    """
    if (quick := quickly(prompt, completion, record)) is not None:
        return quick
    name = _verifier(record)
    if name == "code":
        from dsjax.verify import code

        partial = record.get("partial", False)
        return code.check(completion, record, partial=partial, allow_unsafe=allow_unsafe_code)
    given = _given(prompt, completion, name)
    assert given is not None  # or it would have been 0.0
    if name == "reasoning_gym":
        return gym.score(given, record)
    return float(maths.same(str(record["answer"]), given))


def slowly_and_unsafe(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
    """`slowly`, with programs run without a sandbox where there is none."""
    return slowly(prompt, completion, record, allow_unsafe_code=True)


def boxed(prompt: str, completion: str) -> float:
    r"""1.0 where a complete `\boxed{...}` follows the thinking, and all that do agree."""
    part = extract.final_part(prompt, completion)
    if not part or not extract.boxes(part):
        return 0.0
    return float(extract.answer(prompt, completion, _agree) is not None)


def choice(text: str) -> str | None:
    r"""The letter that a text is: `C`, `c`, `(C)`, `C.`, `\text{(C)}`; None for anything else."""
    if len(text) > 100:
        return None
    match = _LETTER.fullmatch(_DRESS.sub("", text).upper())
    return match and next(letter for letter in match.groups() if letter)


@functools.lru_cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _given(prompt: str, completion: str, name: str) -> str | None:
    return extract.answer(prompt, completion, _agree if name == "math" else str.__eq__)


def _agree(one: str, other: str) -> bool:
    return maths.same_quickly(one, other) is True


def _verifier(record: Mapping[str, Any]) -> str:
    name = record.get("verify", "math")
    if name not in VERIFIERS:
        raise InputError(f"unknown verifier {name!r}{nearest(str(name), VERIFIERS)}")
    return name
