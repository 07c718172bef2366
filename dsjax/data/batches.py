"""Rows to batches: an endless shuffled stream to train on, a fixed list to evaluate on.

Knows nothing about models or devices. Batches are NumPy arrays with the names of the contract:
`tokens_BT targets_BT segments_BT positions_BT weights_BT`.

Legend: B rows in a batch, T positions in a row.
"""

from typing import Any

import grain
import numpy as np

from dsjax.data.packing import PackedRows
from dsjax.errors import InputError

Batch = dict[str, np.ndarray]


class TrainBatches:
    """An endless iterator over batches that can be stopped and taken up again at any batch.

    Batch n holds the rows n*B .. (n+1)*B - 1 of epoch after epoch, so its state is one number; the
    rest of the state says what the number counts, and is compared when it is restored.
    """

    def __init__(self, rows: PackedRows, batch_size: int, seed: int, shuffle: bool):
        """Builds the Grain pipeline; reads no row yet. See `make_train_batches`."""
        dataset = grain.MapDataset.source(rows)
        if shuffle:
            dataset = dataset.shuffle(seed=seed)  # before `repeat`: another order every epoch
        dataset = dataset.repeat().batch(batch_size).map(_with_batch_names)
        # The rows are in memory: threads would only contend for the interpreter's lock.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._made_of = {
            "rows": rows.fingerprint(),
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
        }

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to go on after the last batch given; fit for JSON.

        A reader that runs ahead of the training step has to keep the state of each batch beside it:
        the state asked for later counts batches that no step has seen.
        """
        return {"next_batch": self._iterator.get_state()["next_index"], "made_of": self._made_of}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called: the next batch is the one that followed.

        Call it before the first batch is drawn by whatever reads ahead of the training step: a
        batch already taken is not taken back.

        Raises:
            InputError: if the state comes from other rows, another batch size, seed or order, in
                which the same number would mean other tokens; or is no state at all.
        """
        try:
            made_of, next_batch = dict(state["made_of"]), state["next_batch"]
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"not the state of a data iterator: {state!r:.80}") from error
        for name, value in self._made_of.items():
            if made_of.get(name) != value:
                why = " (the text is not the one the run was trained on)" if name == "rows" else ""
                raise InputError(
                    f"cannot resume the data: {name} was {made_of.get(name)!r}, is {value!r}{why}"
                )
        if not isinstance(next_batch, int) or next_batch < 0:
            raise InputError(f"cannot resume the data at batch {next_batch!r}")
        self._iterator.set_state({"next_index": next_batch})


def make_train_batches(rows: PackedRows, batch_size: int, seed: int, shuffle: bool) -> TrainBatches:
    """Makes the endless batches of a training run.

    Every row comes once in an epoch; a batch may hold the end of one epoch and the start of the
    next, so that all batches have one shape.

    Args:
        rows: the training rows.
        batch_size: B, the global batch.
        seed: of the rows' order, which differs from epoch to epoch; in [0, 2**32).
        shuffle: False gives the rows in order, for tests.

    Raises:
        InputError: if the seed is out of range.
        ValueError: if the batch size is.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if not 0 <= seed < 2**32:
        raise InputError(f"the data's seed must lie in [0, 2**32), not {seed}")
    return TrainBatches(rows, batch_size, seed, shuffle)


def eval_batches(rows: PackedRows, batch_size: int) -> list[Batch]:
    """All rows, once and in order; the last batch is filled up with rows of padding.

    Raises:
        ValueError: if the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    batches = []
    for start in range(0, len(rows), batch_size):
        chosen = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        chosen += [rows.padding()] * (batch_size - len(chosen))
        stacked = {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}
        batches.append(_with_batch_names(stacked))
    return batches


def _with_batch_names(batch: Batch) -> Batch:
    """`tokens_T`, now of shape [B, T], becomes `tokens_BT`."""
    return {f"{name.removesuffix('_T')}_BT": array for name, array in batch.items()}
