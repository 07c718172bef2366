"""Worked solutions of simple problems, from which a small base learns the form of an answer.

Knows nothing about models. A demonstration thinks in <think></think> and answers in
<answer></answer>. Some work the answer out and are right; others guess. A base that has seen both
knows the form, and does either: rewards alone decide what becomes of it.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsjax.errors import InputError

FAMILIES = ("chain_sum", "spell_backward", "letter_counting")


def worked(record: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation that works a question out, as `experiments.sft` reads it.

    Args:
        record: of one of `FAMILIES` (`dsjax.verify.gym`).

    Raises:
        InputError: for another family.
    """
    question, answer = record["question"], record["answer"]
    return _conversation(question, _thoughts(record["family"], question), answer)


def guessed(record: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """A conversation that answers without a thought.

    Args:
        record: of any family.
        answer: what is said.
    """
    return _conversation(record["question"], "I guess.", answer)


def demonstrations(
    records: Sequence[Mapping[str, Any]], *, worked_share: float, seed: int
) -> list[dict[str, Any]]:
    """Demonstrations of records: a share of them worked out, the others guessed.

    A guess is the answer of another record of the same family.

    Args:
        records: of `FAMILIES`.
        worked_share: in [0, 1].
        seed: of which they are, of the guesses, and of their order.
    """
    draw = random.Random(seed)
    answers: dict[str, list[str]] = {}
    for record in records:
        answers.setdefault(record["family"], []).append(record["answer"])
    found = [
        worked(record)
        if draw.random() < worked_share
        else guessed(record, draw.choice(answers[record["family"]]))
        for record in records
    ]
    draw.shuffle(found)
    return found


def _conversation(question: str, thoughts: str, answer: str) -> dict[str, Any]:
    content = f"<think>{thoughts}</think>\n<answer>{answer}</answer>"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": content},
    ]
    return {"messages": messages}


def _thoughts(family: str, question: str) -> str:
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
