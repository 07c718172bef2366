"""A synthetic source for retrieval: names with codes among sentences that say nothing.

Knows nothing about tokens or models. It teaches, and tests, what a needle in a haystack asks for:
find the one place where a name was given its code, however far back, and copy the code.
"""

import random
from collections.abc import Iterator

# Few enough that a small vocabulary has a token for each, and each is met often.
NAMES = tuple(a + b + "x" for a in "bdfgklmnprstvz" for b in "aeiou")
CODES = tuple(range(10, 60))
FILLER = ("the grass is green.\n", "the sky is blue.\n", "the sun is yellow.\n", "here we go.\n")


def line(name: str, code: int) -> str:
    """One fact."""
    return f"{name}{code}\n"


def facts(rng: random.Random, count: int) -> list[tuple[str, int]]:
    """Names, all different, each with its code."""
    return [(name, rng.choice(CODES)) for name in rng.sample(NAMES, count)]


def documents(count: int = 4000, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yields (name, text).

    A document repeats a few facts over and over, among more or less filler, so that from the second
    time on each code can be found further up, at distances of 3 to some thousand tokens.
    """
    for number in range(count):
        rng = random.Random(f"recall {seed} {number}")
        known = facts(rng, rng.randint(1, 4))
        filler = rng.choice((0.0, 0.0, 0.5, 0.8, 0.95))
        lines = []
        for i in range(160 if filler < 0.8 else 640):
            lines.append(FILLER[i % 4] if rng.random() < filler else line(*rng.choice(known)))
        yield f"builtin:recall/{number:05d}", "".join(lines)
