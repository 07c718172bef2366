"""A synthetic source for retrieval: lists of names with codes, in which every name comes back.

Knows nothing about tokens or models. It teaches, and tests, what a needle in a haystack asks for:
find the one place where a name was given its code, however far back, and copy the code.
"""

import random
from collections.abc import Iterator

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st")
_VOWELS = ("a", "e", "i", "o", "u")
NAMES = tuple(a + x + b + y for a in _ONSETS for x in _VOWELS for b in _ONSETS for y in _VOWELS)


def line(name: str, code: int) -> str:
    """One fact."""
    return f"{name} {code:03d}\n"


def facts(rng: random.Random, count: int) -> list[tuple[str, int]]:
    """Names, all different, each with a code of three digits."""
    return [(name, rng.randrange(1000)) for name in rng.sample(NAMES, count)]


def documents(count: int = 3000, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yields (name, text).

    A document states facts and then repeats them in random orders, so that from the second time on
    every code can be found further up; how far depends on the number of facts, from 2 to 400.
    """
    for number in range(count):
        rng = random.Random(f"recall {seed} {number}")
        known = facts(rng, int(2 * 200 ** rng.random()))
        lines = []
        while len(lines) < 600:
            lines += [line(*fact) for fact in rng.sample(known, len(known))]
        yield f"builtin:recall/{number:05d}", "".join(lines[:600])
