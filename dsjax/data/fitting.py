"""Conversations to rows of one length: whole ones side by side, none cut in two.

Knows nothing about files or templates. A row is a function of the conversations' lengths, the
length of a row and a seed, as `dsjax.data.packing`'s are.

Legend: T positions in a row.
"""

import bisect
from typing import Literal

import numpy as np

from dsjax.data.conversations import unmarked
from dsjax.data.packing import Row, Tokens, document_order, pack_row


class FittedRows:
    """The rows of a stream of conversations: by best fit, longest first, each in one row.

    Source: Ding et al. 2024 (arXiv 2404.10830), best-fit packing.

    Attributes:
        num_cut: conversations that are longer than a row, and lose their end.
        num_dropped: those that are left out: longer ones if asked, and those in which nothing
            that is left would be learnt.
    """

    def __init__(
        self,
        stream: Tokens,
        seq_len: int,
        order_seed: int | None,
        too_long: Literal["cut", "drop"] = "cut",
    ):
        """Lays conversations into rows.

        Args:
            stream: of marked tokens (`dsjax.data.conversations`).
            seq_len: T. As the last token of a row is only a target, T + 1 tokens fit.
            order_seed: of the order in which equally long ones are laid; None keeps the stream's.
            too_long: what becomes of longer ones.

        Raises:
            ValueError: if seq_len or order_seed is out of range.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, not {seq_len}")
        self.stream, self.seq_len, self._room = stream, seq_len, seq_len + 1
        lengths = np.diff(stream.offsets)
        order = np.arange(len(lengths))
        if order_seed is not None:
            order = document_order(len(lengths), order_seed)
        long = lengths[order] > self._room
        useful = ~long
        for place in np.flatnonzero(long).tolist():
            useful[place] = self._learns(int(order[place]))
        kept = useful & ~long if too_long == "drop" else useful
        self.num_cut = int((long & kept).sum())
        self.num_dropped = int((~kept).sum())
        order = order[kept]
        self._rows = best_fit(np.minimum(lengths[order], self._room), self._room)
        self._documents = order

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """Row `index`, as `dsjax.data.packing.pack_row` describes it; what is not learnt weighs 0.

        Raises:
            IndexError: if there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        read = [self._read(int(self._documents[place])) for place in self._rows[index]]
        pieces, learnt = zip(*(unmarked(tokens) for tokens in read), strict=True)
        return pack_row(pieces, self.seq_len, self.stream.pad_id, learnt)

    def padding(self) -> Row:
        """A row of padding alone."""
        return pack_row([], self.seq_len, self.stream.pad_id)

    def __repr__(self) -> str:
        return f"FittedRows({len(self)} rows of {self.seq_len} tokens)"

    def _read(self, document: int) -> np.ndarray:
        start, stop = map(int, self.stream.offsets[document : document + 2])
        return self.stream.read(start, min(stop, start + self._room))

    def _learns(self, document: int) -> bool:
        """Whether a row predicts any of it, which it never does the first token."""
        return bool(unmarked(self._read(document))[1][1:].any())


def best_fit(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Lays things into as few bins as best fit by falling length finds.

    Args:
        lengths: none above `room`; of equal ones the first comes first.
        room: of a bin.

    Returns:
        The things of each bin, by their numbers; every thing is in one.
    """
    bins: list[list[int]] = []
    left_of: dict[int, list[int]] = {}  # room that is left -> bins
    lefts: list[int] = []  # its keys, rising
    for thing in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[thing])
        at = bisect.bisect_left(lefts, length)
        if at == len(lefts):
            number, left = len(bins), room
            bins.append([])
        else:
            left = lefts[at]
            number = left_of[left].pop()
            if not left_of[left]:
                del left_of[left], lefts[at]
        bins[number].append(thing)
        left -= length
        if left not in left_of:
            left_of[left] = []
            bisect.insort(lefts, left)
        left_of[left].append(number)
    return bins
