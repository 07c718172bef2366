"""The bar for the smallest model: an interpolated, modified Kneser-Ney trigram over tokens.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998),
section 4. It scores exactly the tokens that a model is trained on: all but the first of each
document, EOS included, given the two before them in the document (a start mark stands before the
first). Its discounts are fitted on a tenth of the training documents, with the counts of the
rest, and the counts are then taken over all of them; nothing is fitted on what is scored.
"""

from dataclasses import dataclass

import numpy as np
import scipy.optimize

from dsjax.data.packing import PackedRows, TokenStream

# What is subtracted from counts of 1, 2, and 3 or more, for unigrams, bigrams and trigrams.
# The unigrams' are not fitted: they matter only for tokens never seen, which are too few.
_FIRST_GUESS = np.array([[0.6, 0.9, 1.2], [0.7, 1.1, 1.4], [0.8, 1.3, 1.6]])
_FIT_EVERY = 10  # one document in so many is kept aside to fit the discounts
_MAX_FIT_TOKENS = 200_000  # enough for six numbers


def bits_per_byte(train: TokenStream, held_out: TokenStream) -> float:
    """Bits of the held-out stream's targets over its documents' bytes, trained on `train`."""
    log_probs = fit(train).log_probs(held_out)
    return float(-log_probs.sum() / np.log(2) / held_out.num_bytes)


def first_tokens(rows: PackedRows, num_tokens: int) -> TokenStream:
    """The documents that a model meets in its first tokens, in packing order; the last is cut."""
    stream = rows.stream
    tokens, lengths, sizes = [], [], []
    for document in rows.order:
        if num_tokens <= 0:
            break
        begin, end = stream.offsets[document : document + 2]
        kept = stream.tokens[begin : min(end, begin + num_tokens)]
        tokens.append(kept)
        lengths.append(len(kept))
        sizes.append(stream.document_bytes[document] * len(kept) // (end - begin))
        num_tokens -= len(kept)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return TokenStream(
        np.concatenate(tokens), offsets, np.array(sizes), stream.vocab_size, stream.pad_id
    )


def fit(train: TokenStream) -> "Trigram":
    """Counts the stream's trigrams and fits the discounts."""
    trigrams, document = _trigrams(train)
    aside = document % _FIT_EVERY == _FIT_EVERY - 1
    discounts = _FIRST_GUESS
    if aside.any() and not aside.all():
        partial = Trigram(trigrams[~aside], train.vocab_size, discounts)
        stride = -(-int(aside.sum()) // _MAX_FIT_TOKENS)  # of all documents, not of the first ones
        discounts = _fitted_discounts(partial, trigrams[aside][::stride])
    return Trigram(trigrams, train.vocab_size, discounts)


class Trigram:
    """p(c | a, b), interpolated over trigrams, bigrams, unigrams and the uniform distribution."""

    def __init__(self, trigrams: np.ndarray, vocab_size: int, discounts: np.ndarray):
        """Takes [n, 3] tokens (a, b, c), where `a` may be the start mark `vocab_size`."""
        self.vocab_size = vocab_size
        self.discounts = discounts
        base = self._base = vocab_size + 1
        keys = (trigrams[:, 0] * base + trigrams[:, 1]) * base + trigrams[:, 2]
        trigram_keys, trigram_counts = np.unique(keys, return_counts=True)
        # Below the highest order a gram counts once for every different token before it.
        bigram_keys, bigram_counts = np.unique(trigram_keys % base**2, return_counts=True)
        unigram_keys, unigram_counts = np.unique(bigram_keys % base, return_counts=True)
        self._orders = [
            _Order.of(unigram_keys, unigram_counts, base),
            _Order.of(bigram_keys, bigram_counts, base),
            _Order.of(trigram_keys, trigram_counts, base),
        ]

    def log_probs(self, stream: TokenStream) -> np.ndarray:
        """The natural logarithms of the probabilities of the stream's targets, [targets]."""
        trigrams, _ = _trigrams(stream)
        return np.log(self.probabilities(trigrams))

    def probabilities(self, trigrams: np.ndarray) -> np.ndarray:
        """p(c | a, b) for each row (a, b, c) of [n, 3]."""
        return self.interpolate(self.look_up(trigrams), self.discounts)

    def look_up(self, trigrams: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """For each order: the gram's count, and its context's total and numbers of counts."""
        a, b, c = trigrams.T
        keys = [c, b * self._base + c, (a * self._base + b) * self._base + c]
        return [
            order.look_up(key, self._base) for order, key in zip(self._orders, keys, strict=True)
        ]

    def interpolate(
        self, statistics: list[tuple[np.ndarray, ...]], discounts: np.ndarray
    ) -> np.ndarray:
        """The probabilities that `look_up`'s statistics give under these discounts [3, 3]."""
        p = np.full(len(statistics[0][0]), 1 / self.vocab_size)
        for (count, total, numbers), discount in zip(statistics, discounts, strict=True):
            taken = np.where(count > 0, discount[np.clip(count, 1, 3) - 1], 0)
            seen = total > 0
            total = np.where(seen, total, 1)
            p = np.where(seen, (count - taken + numbers @ discount * p) / total, p)
        return p


@dataclass(frozen=True)
class _Order:
    """Sorted grams with their counts, and sorted contexts with what follows them."""

    keys: np.ndarray  # [grams]
    counts: np.ndarray  # [grams]
    contexts: np.ndarray  # [contexts]
    totals: np.ndarray  # [contexts], the sum of the counts
    numbers: np.ndarray  # [contexts, 3], how many grams have count 1, 2, and 3 or more

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray, base: int) -> "_Order":
        contexts, first = np.unique(keys // base, return_index=True)
        kinds = np.stack([counts == 1, counts == 2, counts >= 3], axis=1).astype(np.int64)
        return cls(
            keys, counts, contexts, np.add.reduceat(counts, first), np.add.reduceat(kinds, first)
        )

    def look_up(self, keys: np.ndarray, base: int) -> tuple[np.ndarray, ...]:
        place, found = _search(self.keys, keys)
        count = np.where(found, self.counts[place], 0)
        place, found = _search(self.contexts, keys // base)
        total = np.where(found, self.totals[place], 0)
        return count, total, np.where(found[:, None], self.numbers[place], 0)


def _search(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return place, keys[place] == wanted


def _trigrams(stream: TokenStream) -> tuple[np.ndarray, np.ndarray]:
    """The stream's targets with the two tokens before, [targets, 3], and each one's document."""
    tokens = stream.tokens.astype(np.int64)
    lengths = np.diff(stream.offsets)
    document = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(tokens)) - stream.offsets[document]
    target = np.flatnonzero(place > 0)
    before = np.where(place[target] > 1, tokens[target - 2], stream.vocab_size)
    return np.stack([before, tokens[target - 1], tokens[target]], axis=1), document[target]


def _fitted_discounts(model: Trigram, trigrams: np.ndarray) -> np.ndarray:
    """The discounts under which the model gives these trigrams the most probability."""
    statistics = model.look_up(trigrams)
    limits = np.array([1.0, 2.0, 3.0])  # a count below zero is no count

    def discounts(x: np.ndarray) -> np.ndarray:
        return np.concatenate([_FIRST_GUESS[:1], limits / (1 + np.exp(-x.reshape(2, 3)))])

    def cost(x: np.ndarray) -> float:
        return -float(np.log(model.interpolate(statistics, discounts(x))).mean())

    start = -np.log(limits / _FIRST_GUESS[1:] - 1)
    found = scipy.optimize.minimize(cost, start.ravel(), method="L-BFGS-B", options={"maxiter": 30})
    return discounts(found.x)
