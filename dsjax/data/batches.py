"""Rows to batches: an endless mixed stream to train on, a fixed list to evaluate on.

Knows nothing about models or devices. Batches are NumPy arrays with the names of the contract:
`tokens_BT targets_BT segments_BT positions_BT weights_BT`.

Legend: B rows in a batch, T positions in a row.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from dsjax.data.mixing import deal
from dsjax.data.on_the_fly import Encoder, Stream
from dsjax.data.packing import Row, Rows
from dsjax.data.workers import Workers
from dsjax.errors import InputError

Batch = dict[str, np.ndarray]

_AHEAD = 2  # batches, or chunks of documents, that each worker is asked for at a time


@runtime_checkable
class Reader(Protocol):
    """Gives one process its part of micro-batch after micro-batch."""

    def start(self, batch: int, streams: Any) -> None:
        """Goes to a micro-batch; `streams` is what `streams()` returned there."""
        ...

    def next(self) -> Batch:
        """The next one's rows."""
        ...

    def streams(self) -> list[list[int]] | None:
        """What it takes, besides the number, to go on from here; fit for JSON."""
        ...

    def close(self) -> None:
        """Ends processes, if there are any; `start` begins anew."""
        ...


class TrainBatches:
    """An endless iterator over micro-batches that can be stopped and taken up again at any.

    Its state is how many it has given, and what that number counts, which is compared when it is
    restored.
    """

    def __init__(self, reader: Reader, made_of: dict[str, Any], sources: Sequence[str] = ()):
        """Reads nothing yet, and starts no process.

        Args:
            reader: what makes the batches.
            made_of: what decides them; fit for JSON. `text` holds a fingerprint for each source.
            sources: their names.
        """
        self._reader, self._made_of, self._sources = reader, made_of, sources
        self._next = 0
        reader.start(0, None)

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        """Raises DataError if the text, its tokens or a worker process is no longer there."""
        batch = self._reader.next()
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to go on after the last batch given; fit for JSON.

        A reader that runs ahead of the training step has to keep the state of each batch beside it:
        the state asked for later counts batches that no step has seen.
        """
        streams = self._reader.streams()
        state = {"next": self._next, "made_of": self._made_of}
        return state if streams is None else state | {"streams": streams}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called: the next batch is the one that followed.

        Raises:
            InputError: if the state comes from another text, tokenizer, seed, order or size of
                batch, in which the same number would mean other tokens; or is no state at all.
        """
        try:
            made_of, number, streams = dict(state["made_of"]), state["next"], state.get("streams")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"not the state of a data iterator: {state!r:.80}") from error
        for name, value in self._made_of.items():
            if name == "micro_batch_size" and isinstance(number, int) and number >= 0:
                # Rows have numbers of their own, so others may be taken together.
                rows = number * int(made_of.get(name, value))
                if rows % value:
                    raise InputError(
                        f"cannot resume the data: {rows} rows were seen, which are no whole "
                        f"micro-batches of {value}"
                    )
                number = rows // value
            elif made_of.get(name) != value:
                raise InputError(f"cannot resume the data: {self._difference(name, made_of)}")
        if not isinstance(number, int) or number < 0:
            raise InputError(f"cannot resume the data at batch {number!r}")
        self._reader.close()
        self._reader.start(number, streams)
        self._next = number

    def close(self) -> None:
        """Ends the processes that read ahead."""
        self._reader.close()

    def _difference(self, name: str, made_of: dict[str, Any]) -> str:
        """One line on what is not as it was."""
        was, now = made_of.get(name), self._made_of[name]
        if name == "text" and isinstance(was, list) and len(was) == len(now):
            source = next(i for i, old in enumerate(was) if old != now[i])
            return f"the text of {self._sources[source]!r} is not what the run was trained on"
        return f"{name} was {was!r}, is {now!r}"


class RowBatches:
    """Micro-batches of rows that can be drawn in any order: a function of their number.

    Row n of the training stream is dealt to a source by its share; a source gives its rows once an
    epoch, in another order each.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        shares: Sequence[int],
        seeds: Sequence[int],
        shuffle: bool,
        rows: range,
        micro_batch_size: int,
    ):
        """Takes the sources' rows, and which rows of each micro-batch are this process's."""
        self._sources, self._shares, self._seeds, self._shuffle = sources, shares, seeds, shuffle
        self._rows, self._micro_batch_size = rows, micro_batch_size
        self._numbers: list[Any] = []  # MapDatasets of each source's row numbers

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_numbers": []}

    def __call__(self, batch: int) -> Batch:
        """This process's rows of micro-batch `batch`."""
        start = batch * self._micro_batch_size
        return _stacked([self._row(start + row) for row in self._rows])

    def _row(self, row: int) -> Row:
        if not self._numbers:
            for rows, seed in zip(self._sources, self._seeds, strict=True):
                numbers = grain.MapDataset.range(len(rows))
                # Before `repeat`: another order every epoch.
                numbers = numbers.shuffle(seed=seed) if self._shuffle else numbers
                self._numbers.append(numbers.repeat())
        source, index = deal(row, self._shares)
        return self._sources[source][int(self._numbers[source][index])]


class DirectReader:
    """Draws micro-batches from token files, with or without workers."""

    def __init__(self, batches: RowBatches, num_workers: int):
        """Starts no process before the first batch."""
        self._batches, self._num_workers = batches, num_workers
        self._next = 0
        self._workers: Workers | None = None
        self._asked: list[int] = []

    def start(self, batch: int, streams: Any) -> None:
        """Goes to a micro-batch."""
        self._next = batch

    def next(self) -> Batch:
        """The next one's rows."""
        self._next += 1
        if not self._num_workers:
            return self._batches(self._next - 1)
        if self._workers is None:
            self._workers = Workers(self._batches, self._num_workers)
        while len(self._asked) < _AHEAD * self._num_workers:
            self._asked.append(self._workers.ask(self._next - 1 + len(self._asked)))
        return self._workers.answer(self._asked.pop(0))

    def streams(self) -> None:
        """The number is enough."""
        return None

    def close(self) -> None:
        """Ends the workers."""
        if self._workers is not None:
            self._workers.close()
        self._workers, self._asked = None, []


class StreamReader:
    """Makes micro-batches on the fly; workers only read and encode, so they change no order."""

    def __init__(
        self,
        encoder: Encoder,
        shares: Sequence[int],
        seeds: Sequence[int],
        shuffle: bool,
        rows: range,
        micro_batch_size: int,
        seq_len: int,
        num_workers: int,
    ):
        """As `RowBatches`; every process makes all rows, because each begins where one ends."""
        self._encoder, self._shares, self._seeds, self._shuffle = encoder, shares, seeds, shuffle
        self._rows, self._micro_batch_size, self._seq_len = rows, micro_batch_size, seq_len
        self._num_workers = num_workers
        self._workers: Workers | None = None
        self._next = 0
        self._streams: list[Stream] = []

    def start(self, batch: int, streams: Any) -> None:
        """Goes to a micro-batch; the first needs no `streams`."""
        self._next = batch
        self._streams = [self._stream(source, seed) for source, seed in enumerate(self._seeds)]
        if streams is None and batch == 0:
            return
        try:
            for stream, state in zip(self._streams, streams or [], strict=True):
                epoch, document, token = map(int, state)
                stream.state = (epoch, document, token)
        except (TypeError, ValueError) as error:
            raise InputError(f"cannot resume the data: streams are {streams!r:.80}") from error

    def next(self) -> Batch:
        """The next one's rows."""
        start = self._next * self._micro_batch_size
        rows = []
        for row in range(self._micro_batch_size):
            source, _ = deal(start + row, self._shares)
            rows.append(next(self._streams[source]))
        self._next += 1
        return _stacked([rows[row] for row in self._rows])

    def streams(self) -> list[list[int]]:
        """Where the next row of each source begins."""
        return [list(stream.state) for stream in self._streams]

    def close(self) -> None:
        """Ends the workers; what they were asked for is forgotten."""
        if self._workers is not None:
            self._workers.close()
        self._workers = None
        self.start(self._next, self.streams())

    def _stream(self, source: int, seed: int) -> Stream:
        def ask(numbers: list[int]) -> Callable[[], list[np.ndarray]]:
            question = (source, numbers)
            if not self._num_workers:
                return functools.partial(self._encoder, question)
            if self._workers is None:
                self._workers = Workers(self._encoder, self._num_workers)
            return functools.partial(self._workers.answer, self._workers.ask(question))

        return Stream(
            num_documents=len(self._encoder.sources[source]),
            seq_len=self._seq_len,
            pad_id=self._encoder.tokenizer.pad_id,
            seed=seed,
            shuffle=self._shuffle,
            ask=ask,
            ahead=_AHEAD * self._num_workers,
        )


def eval_batches(parts: Sequence[Rows], batch_size: int) -> list[Batch]:
    """All rows of all parts, once and in order; the last batch is filled with rows of padding.

    Raises:
        ValueError: if the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    rows = (part[i] for part in parts for i in range(len(part)))
    batches = []
    for some in itertools.batched(rows, batch_size):
        padding = [parts[0].padding()] * (batch_size - len(some))
        batches.append(_stacked([*some, *padding]))
    return batches


def _stacked(rows: Sequence[Row]) -> Batch:
    """`tokens_T` of each row becomes `tokens_BT` of shape [B, T]."""
    return {
        f"{name.removesuffix('_T')}_BT": np.stack([row[name] for row in rows]) for name in rows[0]
    }
