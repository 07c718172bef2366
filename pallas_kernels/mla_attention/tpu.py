"""`mla_attention` on TPUs, by JAX's splash attention. Compiled, interpreted, not run.

Rows are padded to whole tiles, and which tiles are visited is found from the documents: those of
earlier documents and of padding alone are passed over, in each sequence its own. Knows nothing
about the cache or projections.

B sequences of S rows, T queries that are some or all of the rows, N heads, I key/value heads, A key
width, H value width; t tiles of queries.
"""

import contextlib

import jax
import jax.numpy as jnp

from pallas_kernels import tpu_blocks
from pallas_kernels.choose import Uncovered
from pallas_kernels.mla_attention import tpu_splash
from pallas_kernels.mla_attention.tpu_splash import Table
from pallas_kernels.tiled import TILE

MOST_BYTES = 2048  # of a column of a tile: 1,024 rows in bfloat16; more is too much for VMEM
MOST_TILES = 1 << 16  # pairs of them: two numbers of each are half of a core's scalar memory
NOBODY = -1  # segment of a query of padding, which sees nothing


def forward(
    q_BTNA, k_BSIA, v_BSIH, segments_BS, positions_BS, scale, first_row
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H], log-sum-exp [B, T, N] float32); see the package for arguments.

    Raises:
        Uncovered: for an empty array, or more pairs of tiles than scalar memory has room for.
    """
    del positions_BS  # they rise with the rows
    rows, tiles = _sizes(q_BTNA, k_BSIA)

    def one(sequence):
        q, k, v, segments = sequence
        table = _table(segments, first_row, rows, tiles)
        q_NTA = _heads_first(_scaled(q, scale), tiles[0])
        out_NTH, lse_NT = tpu_splash.forward(
            q_NTA, _heads_first(k, tiles[1]), _heads_first(v, tiles[1]), table, tiles
        )
        seen_T = table.segment_T != NOBODY
        out_NTH = jnp.where(seen_T[:, None], out_NTH, 0)
        lse_NT = jnp.where(seen_T, lse_NT, 0.0)
        return _rows_first(out_NTH.astype(v.dtype), rows[0]), lse_NT[:, : rows[0]].T

    with _precision(q_BTNA):
        return _each(one, (q_BTNA, k_BSIA, v_BSIH, segments_BS))


def backward(
    q_BTNA,
    k_BSIA,
    v_BSIH,
    segments_BS,
    positions_BS,
    scale,
    first_row,
    out_BTNH,
    lse_BTN,
    d_out_BTNH,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v; see the package for arguments.

    Raises:
        Uncovered: as `forward`.
    """
    del positions_BS
    rows, tiles = _sizes(q_BTNA, k_BSIA)

    def one(sequence):
        q, k, v, segments, out, lse, d_out = sequence
        table = _table(segments, first_row, rows, tiles)
        queries = (_heads_first(x, tiles[0]) for x in (_scaled(q, scale), out, d_out))
        q_NTA, out_NTH, d_out_NTH = queries
        lse_NT = jnp.pad(lse.T, ((0, 0), (0, -rows[0] % tiles[0])))
        dq, dk, dv = tpu_splash.backward(
            q_NTA,
            _heads_first(k, tiles[1]),
            _heads_first(v, tiles[1]),
            table,
            tiles,
            out_NTH,
            lse_NT,
            d_out_NTH,
        )
        dq = _rows_first(dq, rows[0]) * jnp.asarray(scale, dq.dtype)
        return dq, _rows_first(dk, rows[1]), _rows_first(dv, rows[1])

    with _precision(q_BTNA):
        return _each(one, (q_BTNA, k_BSIA, v_BSIH, segments_BS, out_BTNH, lse_BTN, d_out_BTNH))


def _sizes(q_BTNA, k_BSIA):
    """((queries, keys), (queries and keys a tile))."""
    rows = q_BTNA.shape[1], k_BSIA.shape[1]
    if q_BTNA.size == 0 or k_BSIA.size == 0:
        raise Uncovered(f"queries {q_BTNA.shape} and keys {k_BSIA.shape}; none may be empty")
    most = MOST_BYTES // q_BTNA.dtype.itemsize
    queries, keys = (tpu_blocks.cut(-(-count // TILE) * TILE, most) for count in rows)
    pairs = -(-rows[0] // queries) * -(-rows[1] // keys)
    if pairs > MOST_TILES:
        raise Uncovered(
            f"{rows[0]} queries of {rows[1]} rows: {pairs} pairs of tiles; "
            f"up to {MOST_TILES} are taken"
        )
    return rows, (queries, keys)


def _table(segments_S, first_row, rows, tiles) -> Table:
    """Which tiles the queries of a sequence visit."""
    queries, length = rows
    row_S = jnp.arange(length, dtype=jnp.int32)

    def of_queries(x_S):
        if first_row is not None:
            x_S = jax.lax.dynamic_slice_in_dim(x_S, first_row, queries)
        return jnp.pad(x_S, (0, -queries % tiles[0]))

    segment_T, row_T = of_queries(segments_S), of_queries(row_S)
    real_tq = (segment_T != 0).reshape(-1, tiles[0])
    row_tq = row_T.reshape(-1, tiles[0])
    head_t = jnp.where(real_tq, row_tq, length).min(axis=1)
    tail_t = jnp.where(real_tq, row_tq, -1).max(axis=1)
    # Documents begin in order, so a tile's first query sees furthest back. A running maximum would
    # say where its document begins, too, but takes seconds to compile at 131,072 rows.
    begins_S = jnp.diff(segments_S, prepend=segments_S[:1] - 1) != 0
    before_tS = begins_S & (row_S <= head_t[:, None])
    start_t = jnp.where(before_tS, row_S, 0).max(axis=1)
    return Table(
        first_t=start_t // tiles[1],
        last_t=tail_t // tiles[1],
        row_T=row_T,
        segment_T=jnp.where(segment_T != 0, segment_T, NOBODY),
        segment_S=jnp.pad(segments_S, (0, -length % tiles[1])),
    )


def _each(one, sequences):
    """`one` of each sequence in turn; copies of one at a time, and a single kernel's code."""
    if sequences[0].shape[0] == 1:
        found = one(tuple(x[0] for x in sequences))
        return tuple(x[None] for x in found)
    return jax.lax.map(one, sequences)


def _scaled(q_TNA, scale):
    return q_TNA * jnp.asarray(scale, q_TNA.dtype)


def _heads_first(x_TNA, tile):
    """[N, T, A] of whole tiles."""
    spare = -x_TNA.shape[0] % tile
    return jnp.swapaxes(jnp.pad(x_TNA, ((0, spare), (0, 0), (0, 0))), 0, 1)


def _rows_first(x_NTA, count):
    return jnp.swapaxes(x_NTA, 0, 1)[:count]


def _precision(x):
    """Float32 operands are not rounded to bfloat16 first; where JAX's kernels name none."""
    if x.dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
