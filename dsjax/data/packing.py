"""Documents to tokens to rows of one length, several documents in a row.

Knows nothing about models or batches. A row of `PackedRows` is a function of the tokens, the
length, the seed and the row's number, so that any process can make any row.

Legend: T positions in a row.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from dsjax.data.fim import encode_documents
from dsjax.interop.tokenizer import Tokenizer

_DOCUMENTS_AT_ONCE = 64
Row = dict[str, np.ndarray]


@runtime_checkable
class Tokens(Protocol):
    """Documents' tokens laid end to end, in memory (`TokenStream`) or in files (`TokenFiles`)."""

    @property
    def offsets(self) -> np.ndarray:
        """[documents + 1] int64: document i is tokens `offsets[i]` to `offsets[i + 1] - 1`."""
        ...

    @property
    def pad_id(self) -> int:
        """The token that fills a row's end."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop - 1`."""
        ...


@runtime_checkable
class Rows(Protocol):
    """Rows of one length, to be had in any order: `PackedRows`, `dsjax.data.fitting.FittedRows`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """Row `index`, as `pack_row` describes it."""
        ...

    def padding(self) -> Row:
        """A row of padding alone, which fills the last batch of an evaluation."""
        ...


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Documents' tokens laid end to end, each document ended by EOS.

    Attributes:
        tokens: [tokens] uint16, or uint32 where the vocabulary needs it.
        offsets: [documents + 1] int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
        document_bytes: [documents] int64, the length of each text in UTF-8.
        vocab_size: every token is below it.
        pad_id: the token that fills a row's end.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    document_bytes: np.ndarray
    vocab_size: int
    pad_id: int

    @property
    def num_documents(self) -> int:
        """How many documents there are, empty ones (an EOS alone) included."""
        return len(self.document_bytes)

    @property
    def num_targets(self) -> int:
        """How many tokens are predicted: all, EOS included, but the first of each document."""
        return len(self.tokens) - self.num_documents

    @property
    def num_bytes(self) -> int:
        """The UTF-8 bytes of all documents: what bits per byte are divided by."""
        return int(self.document_bytes.sum())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop - 1`."""
        return self.tokens[start:stop]


def encode(
    texts: Iterable[str], tokenizer: Tokenizer, fim_rate: float = 0.0
) -> Iterator[np.ndarray]:
    """Yields each document's tokens, EOS at the end, as uint16, or uint32 where ids need it."""
    dtype = token_dtype(tokenizer)
    for some in itertools.batched(texts, _DOCUMENTS_AT_ONCE):
        for ids in encode_documents(tokenizer, some, fim_rate):
            yield np.array([*ids, tokenizer.eos_id], dtype)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The narrowest type that holds all ids."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def tokenise(texts: Iterable[str], tokenizer: Tokenizer, fim_rate: float = 0.0) -> TokenStream:
    """Encodes documents in the order given and ends each with EOS.

    Raises:
        ValueError: if there is no document.
    """
    sizes = []

    def counted() -> Iterator[str]:
        for text in texts:
            sizes.append(len(text.encode()))
            yield text

    pieces = list(encode(counted(), tokenizer, fim_rate))
    if not pieces:
        raise ValueError("no documents to tokenise")
    return TokenStream(
        tokens=np.concatenate(pieces),
        offsets=np.concatenate([[0], np.cumsum([len(p) for p in pieces], dtype=np.int64)]),
        document_bytes=np.array(sizes, np.int64),
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
    )


def document_order(num_documents: int, seed: int, epoch: int = 0) -> np.ndarray:
    """A random order of documents, the same on every machine and with every version of NumPy.

    Raises:
        ValueError: if the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"order_seed must not be negative, not {seed}")
    # Raw bits are the same in every version of NumPy, which its permutations are not. The epoch
    # stands before the seed because NumPy takes [seed, 0] for seed.
    bits = np.random.PCG64(seed if epoch == 0 else [epoch, seed]).random_raw(num_documents)
    return np.argsort(bits, kind="stable")


def pack_row(
    pieces: Sequence[np.ndarray],
    seq_len: int,
    pad_id: int,
    learnt: Sequence[np.ndarray] | None = None,
) -> Row:
    """One row from the documents, or parts of documents, that lie in it.

    Args:
        pieces: the tokens of each; T + 1 in all, of which the last is only a target, or fewer where
            nothing follows.
        seq_len: T.
        pad_id: the token that fills the row's end.
        learnt: for each piece, which of its tokens are learnt; None learns all.

    Returns:
        tokens_T, targets_T: int32; a target is the token that follows, in the next row if need be,
            and the padding token where nothing follows.
        segments_T: int32, 1, 2, ... for the documents in the row; 0 is padding.
        positions_T: int32, from 0 at the start of each segment in the row; 0 in padding.
        weights_T: float32, 1 where the target belongs to the token's document and is learnt, else
            0: the EOS of a document predicts nothing.
    """
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *pieces]).astype(np.int32)
    segments = np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), lengths)
    positions = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    predicted = segments[1:] == segments[:-1]
    if learnt is not None:
        predicted &= np.concatenate(learnt)[1:]

    return {
        "tokens_T": _filled(tokens, seq_len, pad_id),
        "targets_T": _filled(tokens[1:], seq_len, pad_id),
        "segments_T": _filled(segments, seq_len, 0),
        "positions_T": _filled(positions.astype(np.int32), seq_len, 0),
        "weights_T": _filled(predicted.astype(np.float32), seq_len, 0),
    }


class PackedRows:
    """The rows of a stream: documents in a random order, end to end, cut every T tokens.

    A document that reaches the end of a row goes on in the next one, as a new segment. The tokens
    of all rows are the tokens of the stream, each once; the last row is filled up with padding.
    """

    def __init__(self, stream: Tokens, seq_len: int, order_seed: int | None):
        """Takes T and the seed of the documents' order; None leaves them in the stream's order.

        Raises:
            ValueError: if seq_len or order_seed is out of range.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, not {seq_len}")
        self.stream = stream
        self.seq_len = seq_len
        num_documents = len(stream.offsets) - 1
        if order_seed is None:
            self.order = np.arange(num_documents)
        else:
            self.order = document_order(num_documents, order_seed)
        lengths = np.diff(stream.offsets)[self.order]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])  # in the new order

    def __len__(self) -> int:
        return -(-int(self._starts[-1]) // self.seq_len)

    def __getitem__(self, index: int) -> Row:
        """Row `index`, as `pack_row` describes it.

        Raises:
            IndexError: if there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        begin = index * self.seq_len
        end = min(begin + self.seq_len + 1, int(self._starts[-1]))  # one more, for the last target
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left")) - 1
        pieces = []
        for place in range(first, last + 1):
            shift = int(self.stream.offsets[self.order[place]]) - int(self._starts[place])
            start = max(begin, int(self._starts[place])) + shift
            stop = min(end, int(self._starts[place + 1])) + shift
            pieces.append(self.stream.read(start, stop))
        return pack_row(pieces, self.seq_len, self.stream.pad_id)

    def padding(self) -> Row:
        """A row of padding alone, which fills the last batch of an evaluation."""
        return pack_row([], self.seq_len, self.stream.pad_id)

    def __repr__(self) -> str:
        return f"PackedRows({len(self)} rows of {self.seq_len} tokens)"


def _filled(values: np.ndarray, length: int, padding: int) -> np.ndarray:
    """The first `length` values, filled up with `padding`."""
    row = np.full(length, padding, values.dtype)
    values = values[:length]
    row[: len(values)] = values
    return row
