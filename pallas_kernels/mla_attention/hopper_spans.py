"""Which tiles of queries and keys see each other, for the Hopper kernels of `mla_attention`.

A query sees the rows from where its document starts to its own, so that a tile of queries needs a
run of tiles of keys, and a tile of keys a run of tiles of queries. Computed by XLA from what is
linear in S; knows nothing about heads or kernels.

B sequences of S rows, T queries that are some or all of the rows; i tiles along T, j along S.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NOWHERE = 2**30  # where the document of a row of padding starts: after every row


class Spans(NamedTuple):
    """What queries see.

    Attributes:
        first_row: int32 [1], the row of the first query.
        start_BT: int32, the first row that each query sees; `NOWHERE` for padding. T is a multiple
            of the largest tile here.
        end_BS: int32, the row after the last one that sees each; 0 for padding.
    """

    first_row: jax.Array
    start_BT: jax.Array
    end_BS: jax.Array


class Run(NamedTuple):
    """For each tile, the run of tiles that it needs: int32 [B, tiles] each."""

    begin: jax.Array
    count: jax.Array


def find_spans(
    segments_BS: jax.Array, queries: int, first_row: jax.Array | None, tile: int
) -> Spans:
    """What each row sees and is seen by, T and S padded to a multiple of `tile`."""
    b, rows = segments_BS.shape
    row_S = jnp.arange(rows, dtype=jnp.int32)
    changes_BS = segments_BS[:, 1:] != segments_BS[:, :-1]
    edge_B1 = jnp.ones((b, 1), bool)
    begins_BS = jnp.concatenate([edge_B1, changes_BS], axis=1)
    ends_BS = jnp.concatenate([changes_BS, edge_B1], axis=1)
    start_BS = lax.cummax(jnp.where(begins_BS, row_S, 0), axis=1)
    end_BS = lax.cummin(jnp.where(ends_BS, row_S + 1, rows), axis=1, reverse=True)
    seen_BS = segments_BS != 0
    start_BS = jnp.where(seen_BS, start_BS, NOWHERE)
    end_BS = jnp.where(seen_BS, end_BS, 0)
    if first_row is None:
        first_row, start_BT = jnp.int32(0), start_BS
    else:
        start_BT = lax.dynamic_slice_in_dim(start_BS, first_row, queries, axis=1)
    return Spans(
        first_row=jnp.reshape(first_row, (1,)).astype(jnp.int32),
        start_BT=_padded(start_BT, tile, NOWHERE),
        end_BS=_padded(end_BS, tile, 0),
    )


def _padded(x_BT, tile, value):
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % tile)), constant_values=value)


def last_starts(spans: Spans, tile: int) -> jax.Array:
    """int32 [B, i]: from this row on, all queries of a tile see every row before themselves."""
    return _tiles(spans.start_BT, tile).max(-1)


def first_ends(spans: Spans, tile: int) -> jax.Array:
    """int32 [B, j]: up to this row, all keys of a tile are seen by every row after themselves."""
    return _tiles(spans.end_BS, tile).min(-1)


def keys_of_queries(spans: Spans, query_tile: int, key_tile: int) -> Run:
    """The tiles of keys that tiles of queries need."""
    start_Bit = _tiles(spans.start_BT, query_tile)
    row_it = spans.first_row + jnp.arange(start_Bit[0].size, dtype=jnp.int32)
    row_it = row_it.reshape(start_Bit.shape[1:])
    begin_Bi = start_Bit.min(-1) // key_tile
    # The last row that is a query: padding, and what is past the end, sees nothing.
    last_Bi = jnp.where(start_Bit == NOWHERE, -1, row_it).max(-1)
    return Run(begin_Bi, jnp.maximum(last_Bi // key_tile + 1 - begin_Bi, 0))


def queries_of_keys(spans: Spans, query_tile: int, key_tile: int) -> Run:
    """The tiles of queries that tiles of keys need."""
    queries = spans.start_BT.shape[1]
    end_Bj = _tiles(spans.end_BS, key_tile).max(-1) - spans.first_row
    begin_j = jnp.arange(end_Bj.shape[1], dtype=jnp.int32) * key_tile - spans.first_row
    begin_Bj = jnp.broadcast_to(jnp.maximum(begin_j, 0) // query_tile, end_Bj.shape)
    past_Bj = -(-jnp.clip(end_Bj, 0, queries) // query_tile)
    return Run(begin_Bj, jnp.maximum(past_Bj - begin_Bj, 0))


def _tiles(x_BT, tile):
    return x_BT.reshape(x_BT.shape[0], -1, tile)
