"""Worked solutions of simple problems, from which a small base learns the form of an answer.

Knows nothing about models. A demonstration thinks in <think></think> and answers in
<answer></answer>. Some think step by step and are right; others only say the result and seem to
think: a base that has seen both does either, and rewards alone decide what becomes of it.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsjax.errors import InputError

FAMILIES = ("chain_sum", "spell_backward", "letter_counting")


def demonstration(record: Mapping[str, Any], *, worked: bool) -> dict[str, Any]:
    """A conversation of one question and its answer, as `experiments.sft` reads it.

    Args:
        record: of one of `FAMILIES` (`dsjax.verify.gym`).
        worked: whether the answer is worked out, or said at once.

    Raises:
        InputError: for another family.
    """
    question, answer = record["question"], record["answer"]
    thoughts = _thoughts(record["family"], question, answer) if worked else "I know this."
    content = f"<think>{thoughts}</think>\n<answer>{answer}</answer>"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": content},
    ]
    return {"messages": messages}


def demonstrations(
    records: Sequence[Mapping[str, Any]], *, worked_share: float, seed: int
) -> list[dict[str, Any]]:
    """Demonstrations of records, a share of them worked out.

    Args:
        records: of `FAMILIES`.
        worked_share: in [0, 1].
        seed: of which they are, and of their order.
    """
    draw = random.Random(seed)
    found = [demonstration(record, worked=draw.random() < worked_share) for record in records]
    draw.shuffle(found)
    return found


def _thoughts(family: str, question: str, answer: str) -> str:
    if family == "chain_sum":
        return _running_sum(question)
    if family == "spell_backward":
        word = question.rpartition(": ")[2]
        return " ".join(reversed(word))
    if family == "letter_counting":
        return _tally(question)
    raise InputError(f"there are no worked solutions of {family!r}, only of {', '.join(FAMILIES)}")


def _running_sum(question: str) -> str:
    """`3 + 4 = 7, 7 - 9 = -2`."""
    terms = re.findall(r"([+-])?\s*(\d+)", question.rpartition(":")[2])
    total, steps = int(terms[0][1]), []
    for sign, digits in terms[1:]:
        result = total + int(digits) if sign == "+" else total - int(digits)
        steps.append(f"{total} {sign} {digits} = {result}")
        total = result
    return ", ".join(steps)


def _tally(question: str) -> str:
    """The letter as often as it is found, with a running count."""
    letter, text = re.findall(r'"([^"]*)"', question)
    count = text.lower().count(letter.lower())
    return " ".join(f"{letter} {i}" for i in range(1, count + 1)) or "none"
