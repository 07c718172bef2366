"""Rows made as they are drawn: documents are read, encoded and packed in turn; nothing is kept.

Knows nothing about batches. An epoch is the source's documents in a random order, end to end, cut
every T tokens: the rows of `PackedRows` for the same seed. They come in that order, because the
number of tokens before a document is not known without encoding it, so that what is shuffled from
epoch to epoch is the documents, where rows from token files are shuffled themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dsjax.data.index import Documents
from dsjax.data.packing import Row, document_order, encode, pack_row
from dsjax.interop.tokenizer import Tokenizer

CHUNK = 16  # documents that are encoded at a time


@dataclass(frozen=True, eq=False)
class Encoder:
    """Reads and encodes chunks of documents; a function that workers can apply."""

    sources: Sequence[Documents]
    tokenizer: Tokenizer
    fim_rate: float

    def __call__(self, question: tuple[int, list[int]]) -> list[np.ndarray]:
        """The tokens of the documents (source, numbers), EOS included."""
        source, numbers = question
        texts = [self.sources[source].read(number) for number in numbers]
        return list(encode(texts, self.tokenizer, self.fim_rate))


class Stream:
    """The endless rows of one source, one after another.

    Its state is where the next row begins: (epoch, document in the epoch's order, token in it).
    """

    def __init__(
        self,
        num_documents: int,
        seq_len: int,
        pad_id: int,
        seed: int,
        shuffle: bool,
        ask: Callable[[list[int]], Callable[[], list[np.ndarray]]],
        ahead: int,
    ):
        """Begins with the first epoch; without `shuffle` all are in its order.

        Args:
            num_documents: at least 1.
            seq_len: T.
            pad_id: the token that fills the last row of an epoch.
            seed: of the documents' order.
            shuffle: whether it differs from epoch to epoch.
            ask: takes numbers of documents, and returns a function that waits for their tokens.
            ahead: chunks that are asked for before they are needed.
        """
        self._num_documents, self._seq_len, self._pad_id = num_documents, seq_len, pad_id
        self._seed, self._shuffle = seed, shuffle
        self._ask, self._ahead = ask, ahead
        self._chunks_an_epoch = -(-num_documents // CHUNK)
        self._orders: dict[int, np.ndarray] = {}
        # By the chunk's number, counted through all epochs.
        self._asked: dict[int, Callable[[], list[np.ndarray]]] = {}
        self._chunks: dict[int, list[np.ndarray]] = {}
        self.state = (0, 0, 0)

    def __next__(self) -> Row:
        epoch, document, token = self.state
        self._forget(epoch * self._chunks_an_epoch + document // CHUNK)
        pieces, room = [], self._seq_len + 1  # one more, for the last target
        while room and document < self._num_documents:
            tokens = self._tokens(epoch, document)
            pieces.append(tokens[token : token + room])
            room -= len(pieces[-1])
            token += len(pieces[-1])
            if room and token == len(tokens):
                document, token = document + 1, 0
        # The next row begins with this one's last target.
        self.state = (epoch, document, token - 1) if room == 0 else (epoch + 1, 0, 0)
        return pack_row(pieces, self._seq_len, self._pad_id)

    def _tokens(self, epoch: int, document: int) -> np.ndarray:
        chunk, number = divmod(document, CHUNK)
        chunk += epoch * self._chunks_an_epoch
        for later in range(chunk, chunk + 1 + self._ahead):
            if later not in self._asked:
                self._asked[later] = self._ask(self._numbers(later))
        if chunk not in self._chunks:
            self._chunks[chunk] = self._asked[chunk]()
        return self._chunks[chunk][number]

    def _numbers(self, chunk: int) -> list[int]:
        epoch, chunk = divmod(chunk, self._chunks_an_epoch)
        shuffled_by = epoch if self._shuffle else 0
        if shuffled_by not in self._orders:
            self._orders[shuffled_by] = document_order(self._num_documents, self._seed, shuffled_by)
        return self._orders[shuffled_by][chunk * CHUNK : (chunk + 1) * CHUNK].tolist()

    def _forget(self, chunk: int) -> None:
        """Drops what lies before a chunk."""
        for earlier in [known for known in self._asked if known < chunk]:
            del self._asked[earlier]
            self._chunks.pop(earlier, None)
        epoch = chunk // self._chunks_an_epoch
        for earlier in [known for known in self._orders if known < epoch and self._shuffle]:
            del self._orders[earlier]
