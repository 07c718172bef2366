"""Documents to tokens to rows of one length, several documents in a row.

Knows nothing about models, batches or epochs: a row is a function of the tokens, the length, the
seed and the row's number, so that any process can make any row.

Legend: T positions in a row.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsjax.data.sources import Document
from dsjax.interop.tokenizer import Tokenizer

_DOCUMENTS_AT_ONCE = 64  # encodings take many times the room of their ids


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


def tokenise(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenStream:
    """Encodes documents in the order given and ends each with EOS.

    Raises:
        ValueError: if there is no document.
    """
    if not documents:
        raise ValueError("no documents to tokenise")
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    pieces, lengths = [], []
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
        for ids in tokenizer.encode_batch(texts):
            pieces.append(np.array([*ids, tokenizer.eos_id], dtype))
            lengths.append(len(ids) + 1)
    return TokenStream(
        tokens=np.concatenate(pieces),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        document_bytes=np.array([len(d.text.encode()) for d in documents], np.int64),
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
    )


class PackedRows:
    """The rows of a stream: documents in a random order, end to end, cut every T tokens.

    A document that reaches the end of a row goes on in the next one, as a new segment. The tokens
    of all rows are the tokens of the stream, each once; the last row is filled up with padding.
    """

    def __init__(self, stream: TokenStream, seq_len: int, order_seed: int | None):
        """Takes T and the seed of the documents' order; None leaves them in the stream's order.

        Raises:
            ValueError: if seq_len or order_seed is out of range.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, not {seq_len}")
        if order_seed is not None and order_seed < 0:
            raise ValueError(f"order_seed must not be negative, not {order_seed}")
        self.stream = stream
        self.seq_len = seq_len
        self.order = np.arange(stream.num_documents)
        if order_seed is not None:
            # Raw bits are the same in every version of NumPy, which its permutations are not.
            bits = np.random.PCG64(order_seed).random_raw(stream.num_documents)
            self.order = np.argsort(bits, kind="stable")
        lengths = np.diff(stream.offsets)[self.order]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])  # in the new order

    def __len__(self) -> int:
        return -(-len(self.stream.tokens) // self.seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`.

        Returns:
            tokens_T, targets_T: int32; a target is the token that follows, in the next row if need
                be, and the padding token where nothing follows.
            segments_T: int32, 1, 2, ... for the documents in the row; 0 is padding.
            positions_T: int32, from 0 at the start of each segment in the row; 0 in padding.
            weights_T: float32, 1 where the target belongs to the token's document, else 0: the EOS
                of a document predicts nothing.

        Raises:
            IndexError: if there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row_start = index * self.seq_len
        # One position more than the row, for the last target.
        place = np.arange(row_start, min(row_start + self.seq_len + 1, len(self.stream.tokens)))
        document = np.searchsorted(self._starts, place, side="right") - 1
        source = self.stream.offsets[self.order[document]] + place - self._starts[document]
        token = self.stream.tokens[source].astype(np.int32)
        segment = (document - document[0] + 1).astype(np.int32)
        position = (place - np.maximum(self._starts[document], row_start)).astype(np.int32)
        same_document = (document[1:] == document[:-1]).astype(np.float32)
        return {
            "tokens_T": self._filled(token, self.stream.pad_id),
            "targets_T": self._filled(token[1:], self.stream.pad_id),
            "segments_T": self._filled(segment, 0),
            "positions_T": self._filled(position, 0),
            "weights_T": self._filled(same_document, 0),
        }

    def padding(self) -> dict[str, np.ndarray]:
        """A row of padding alone, which fills the last batch of an evaluation."""
        token, weight = np.zeros(0, np.int32), np.zeros(0, np.float32)
        return {
            "tokens_T": self._filled(token, self.stream.pad_id),
            "targets_T": self._filled(token, self.stream.pad_id),
            "segments_T": self._filled(token, 0),
            "positions_T": self._filled(token, 0),
            "weights_T": self._filled(weight, 0),
        }

    def fingerprint(self) -> str:
        """A hash of all rows: equal if and only if the tokens, their order and T are."""
        digest = hashlib.sha256(f"{self.seq_len} {self.stream.pad_id}".encode())
        for array in (self.stream.tokens, self.stream.offsets, self.order):
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")))
            digest.update(f"{array.dtype.itemsize} {array.size}".encode())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"PackedRows({len(self)} rows of {self.seq_len} tokens)"

    def _filled(self, values: np.ndarray, padding: int) -> np.ndarray:
        """The first T values, filled up to T with `padding`."""
        row = np.full(self.seq_len, padding, values.dtype)
        values = values[: self.seq_len]
        row[: len(values)] = values
        return row
