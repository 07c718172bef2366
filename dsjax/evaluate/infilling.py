"""How well a model fills a hole in a document, told what stands after it or not.

Knows nothing about how a model was made. Source: fill-in-the-middle by prefix, suffix, middle
(Bavarian et al., arXiv 2207.14255; V3 report, 4.1).
"""

import random
from collections.abc import Callable, Sequence

import numpy as np

from dsjax.data.fim import fim_prompt
from dsjax.interop.tokenizer import Tokenizer


def infilling_loss(
    logits: Callable[[np.ndarray], np.ndarray],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    length: int,
    rows: int = 64,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """Mean nats a token of held-out middles, in two settings over the same middles.

    Args:
        logits: int32 [B, T] ids -> float32 [B, T, V].
        tokenizer: with sentinel tokens.
        texts: documents; those that fit in `length` tokens with their sentinels are used.
        length: T, to which every prompt is padded.
        rows: how many documents.
        batch_size: documents a call of `logits`.
        seed: of the cuts.

    Returns:
        {"with_suffix": after prefix, suffix and sentinels; "prefix_only": after the prefix alone};
        empty if no document fits.
    """
    cases: dict[str, list[tuple[list[int], int]]] = {"with_suffix": [], "prefix_only": []}
    for number, text in enumerate(texts):
        rng = random.Random(f"{seed} {number}")
        first, second = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        prefix_ids, middle_ids = tokenizer.encode(prefix), tokenizer.encode(middle)
        whole = fim_prompt(tokenizer, prefix, suffix) + middle_ids
        if not prefix_ids or not middle_ids or len(whole) > length:
            continue
        cases["with_suffix"].append((whole, len(middle_ids)))
        cases["prefix_only"].append((prefix_ids + middle_ids, len(middle_ids)))
        if len(cases["with_suffix"]) == rows:
            break
    return {
        name: _mean_loss(logits, tokenizer.pad_id, listed, length, batch_size)
        for name, listed in cases.items()
        if listed
    }


def _mean_loss(logits, pad_id: int, cases, length: int, batch_size: int) -> float:
    total = count = 0.0
    for start in range(0, len(cases), batch_size):
        chosen = cases[start : start + batch_size]
        tokens_BT = np.full((batch_size, length), pad_id, np.int32)
        for row, (ids, _) in zip(tokens_BT, chosen, strict=False):
            row[: len(ids)] = ids
        scores_BTV = np.asarray(logits(tokens_BT), np.float64)
        top_BT1 = scores_BTV.max(axis=-1, keepdims=True)
        log_BTV = scores_BTV - top_BT1
        log_BTV -= np.log(np.exp(log_BTV).sum(axis=-1, keepdims=True))
        for row, (ids, middle) in enumerate(chosen):
            places = np.arange(len(ids) - middle, len(ids))
            total -= log_BTV[row, places - 1, np.array(ids)[places]].sum()
            count += middle
    return float(total / count)
