"""A needle in a haystack: is one fact found again, however far up it stands?

Knows nothing about how a model was made: it asks for scores of token ids.
"""

import itertools
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

    A haystack is filler with one fact in it (`dsjax.data.recall`) that together with the question,
    the fact's name, fills `length` tokens.

    Args:
        logits: int32 [B, T] ids -> float32 [B, T, V].
        tokenizer: of the model.
        length: T, tokens of a haystack with its question and answer.
        depths: where the needle stands, from 0 (farthest from the question) to 1.
        repeats: haystacks a depth.
        seed: of the facts.

    Returns:
        {depth: share in [0, 1]}.

    Raises:
        ValueError: if `length` is too short for a fact and its question.
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
    ((name, code),) = recall.facts(rng, 1)
    needle = tokenizer.encode(recall.line(name, code))
    question = tokenizer.encode(name)
    answer = tokenizer.encode(recall.line(name, code).removesuffix("\n"))[len(question) :]
    room = length - len(needle) - len(question) - len(answer)
    if room < 1:
        raise ValueError(f"{length} tokens hold no haystack")
    sentences = [tokenizer.encode(sentence) for sentence in recall.FILLER]
    hay: list[int] = []
    ends = [0]  # the needle stands between two sentences
    for i in itertools.count(rng.randrange(len(sentences))):
        hay += sentences[i % len(sentences)]
        if len(hay) > room:
            break
        ends.append(len(hay))
    at = min(ends, key=lambda end: abs(end - depth * room))
    # Cut at its beginning, so that the question stands on a line of its own.
    cut = len(hay) - room
    hay = hay[cut:]
    at = max(at - cut, 0)
    return hay[:at] + needle + hay[at:] + question + answer, len(answer)
