"""A needle in a haystack: is one fact found again, however far up it stands?

Knows nothing about how a model was made: it asks for scores of token ids.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np

from dsjax.data import recall
from dsjax.interop.tokenizer import Tokenizer


def needle_accuracy(
    logits: Callable[[np.ndarray], np.ndarray],
    tokenizer: Tokenizer,
    *,
    length: int,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    repeats: int = 8,
    seed: int = 0,
) -> dict[float, float]:
    """Share of facts whose code the best-scored tokens give back.

    A haystack is a list of facts (`dsjax.data.recall`), each stated once, that together with the
    question fills `length` tokens; the question is a name from it.

    Args:
        logits: int32 [B, T] ids -> float32 [B, T, V].
        tokenizer: of the model.
        length: T, tokens of a haystack with its question and answer.
        depths: where the needle stands, from 0 (farthest from the question) to 1.
        repeats: haystacks a depth.
        seed: of the facts.

    Returns:
        {depth: share in [0, 1]}.
    """
    found = {}
    for depth in depths:
        cases = [
            _haystack(tokenizer, length, depth, random.Random(f"{seed} {length} {depth} {i}"))
            for i in range(repeats)
        ]
        tokens_BT = np.array([tokens for tokens, _ in cases], np.int32)
        best_BT = np.asarray(logits(tokens_BT)).argmax(axis=-1)
        hits = [
            (best[length - 1 - count : length - 1] == row[length - count :]).all()
            for row, best, (_, count) in zip(tokens_BT, best_BT, cases, strict=True)
        ]
        found[depth] = float(np.mean(hits))
    return found


def _haystack(
    tokenizer: Tokenizer, length: int, depth: float, rng: random.Random
) -> tuple[list[int], int]:
    """(exactly `length` ids that end with the answer, how many ids the answer has)."""
    known = recall.facts(rng, len(recall.NAMES))
    lines = [tokenizer.encode(recall.line(*fact)) for fact in known]
    # The question takes one line's room; a haystack with more names than there are states anew.
    fits = max(2, (length - len(lines[0])) // max(map(len, lines)))
    stated = [i % len(known) for i in range(fits)]
    place = round(depth * (fits - 1))
    asked = stated[place]
    name, code = known[asked]
    question = tokenizer.encode(name)
    answer = tokenizer.encode(recall.line(name, code).removesuffix("\n"))[len(question) :]
    body: list[int] = []
    for i in stated[:place] + stated[place + 1 :]:
        if i != asked:
            body += lines[i]
    room = length - len(lines[asked]) - len(question) - len(answer)
    body = (body * 2)[:0] + body
    # Facts are cut off at the far end, so that the length is exact; the needle keeps its depth.
    body = body[-room:] if len(body) >= room else [tokenizer.pad_id] * (room - len(body)) + body
    at = min(round(depth * room), room)
    while 0 < at < room and body[at - 1] != lines[asked][-1]:
        at += 1  # the needle stands between two lines
    return body[:at] + lines[asked] + body[at:] + question + answer, len(answer)
