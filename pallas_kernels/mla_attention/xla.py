"""`mla_attention` in blocks with an online softmax, and a backward pass that recomputes.

Milakov and Gimelshein (arXiv 1805.02867) for the online softmax, Dao et al. (arXiv 2205.14135)
for the recomputation. Memory is linear in S: no [T, S] array is built. Blocks above the diagonal
and blocks that hold only earlier documents are never visited, so packing saves time.

Query heads that share a key head are more rows of its tile: a tile of queries is [g * block, A],
head by head, and keys and values are never repeated.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.varying import alike

MASKED = -1e30


class _Tiles(NamedTuple):
    """The operands cut into tiles of t queries and as many keys, g query heads a key head.

    Attributes:
        q: [tiles, B, I, g * t, A], times the scale.
        k: [tiles of the rows, B, I, t, A].
        v: [tiles of the rows, B, I, t, H].
        segments: [tiles of the rows, B, t].
        positions: as segments.
        first_tile: int32, of the rows; None where the queries are those of every row.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    segments: jax.Array
    positions: jax.Array
    first_tile: jax.Array | None


def block_rows(length: int) -> int:
    """Queries and keys a tile, for rows of a length."""
    # Measured on two CPU cores, forward and backward: at 512 positions 128 and 256 take the
    # same time, at 4,096 256 takes three quarters of it.
    return 128 if length <= 1024 else 256


def forward(
    q_BTNA, k_BSIA, v_BSIH, segments_BS, positions_BS, scale, first_row
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H], log-sum-exp [B, T, N] float32); see the package for arguments."""
    at = _cut(q_BTNA, k_BSIA, v_BSIH, segments_BS, positions_BS, scale, first_row)
    out, lse = _forward_tiles(at)
    return _by_row(out, q_BTNA), _by_row(lse[..., None], q_BTNA)[..., 0]


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
    """The gradients of q, k and v; see the package for arguments."""
    at = _cut(q_BTNA, k_BSIA, v_BSIH, segments_BS, positions_BS, scale, first_row)
    out, d_out = _of_group(out_BTNH, at), _of_group(d_out_BTNH, at)
    dq, dk, dv = _backward_tiles(at, out, _of_group(lse_BTN[..., None], at)[..., 0], d_out)
    dq_BTNA = _by_row((dq * scale).astype(q_BTNA.dtype), q_BTNA)
    return dq_BTNA, _by_row(dk, k_BSIA), _by_row(dv, v_BSIH)


def _cut(q_BTNA, k_BSIA, v_BSIH, segments_BS, positions_BS, scale, first_row) -> _Tiles:
    queries, length = q_BTNA.shape[1], k_BSIA.shape[1]
    block = min(block_rows(length), queries)
    if first_row is None:
        first_tile = None
    else:
        # A part begins at a multiple of T, so it begins with a tile, and nothing needs padding.
        block = next(size for size in range(block, 0, -1) if queries % size == 0)
        first_tile = first_row // block

    def tiles(x_BS):  # [tiles, B, block]
        x_BS = _padded(x_BS, block)
        return x_BS.reshape(x_BS.shape[0], -1, block).transpose(1, 0, 2)

    q = _heads_first(q_BTNA * jnp.asarray(scale, q_BTNA.dtype), block)
    k, v = _heads_first(k_BSIA, block), _heads_first(v_BSIH, block)
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    return _Tiles(q, k, v, tiles(segments_BS), tiles(positions_BS), first_tile)


def _padded(x_BT: jax.Array, block: int) -> jax.Array:
    spare = -x_BT.shape[1] % block
    return jnp.pad(x_BT, [(0, 0), (0, spare)] + [(0, 0)] * (x_BT.ndim - 2))


def _heads_first(x_BTNA: jax.Array, block: int) -> jax.Array:
    """[tiles, B, N, block, A]."""
    b, t, n, a = (x_BTNA := _padded(x_BTNA, block)).shape
    return x_BTNA.reshape(b, t // block, block, n, a).transpose(1, 0, 3, 2, 4)


def _of_group(x_BTNH: jax.Array, at: _Tiles) -> jax.Array:
    """What there is for each query, as queries lie: [tiles, B, I, g * t, H]."""
    x = _heads_first(x_BTNH, at.k.shape[3])
    return x.reshape(*at.q.shape[:4], x.shape[-1])


def _by_row(x: jax.Array, like_BTNA: jax.Array) -> jax.Array:
    """The way back, [B, T, N, H] of as many rows and heads as `like_BTNA`."""
    _, rows, n, _ = like_BTNA.shape
    tile_count, b, _, _, h = x.shape
    x = x.reshape(tile_count, b, n, -1, h).transpose(1, 0, 3, 2, 4)
    return x.reshape(b, -1, n, h)[:, :rows]


def _first_tiles(segments: jax.Array) -> jax.Array:
    """For each tile of queries, the first tile of keys that any sequence still needs; rising."""
    _, b, block = segments.shape
    row = segments.transpose(1, 0, 2).reshape(b, -1)
    index = jnp.arange(row.shape[1], dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones((b, 1), bool), row[:, 1:] != row[:, :-1]], axis=1)
    start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)[:, ::block]
    return jnp.min(start, axis=0) // block


def _of_queries(x: jax.Array, first_tile: jax.Array | None, tile_count: int) -> jax.Array:
    """Of one entry a tile of rows, those of the tiles that have queries."""
    if first_tile is None:
        return x
    return jax.lax.dynamic_slice_in_dim(x, first_tile, tile_count)


def _scores(q, k, segment_q, segment_k, position_q, position_k):
    """Float32 scores [B, I, g * t, s] of a pair of tiles, and the mask of the pairs that count."""
    group = q.shape[2] // segment_q.shape[1]  # query heads a key head
    segment_q, position_q = jnp.tile(segment_q, group), jnp.tile(position_q, group)
    scores = jnp.einsum("bita,bisa->bits", q, k, preferred_element_type=jnp.float32)
    same = (segment_q[:, :, None] == segment_k[:, None, :]) & (segment_q[:, :, None] != 0)
    mask = same & (position_q[:, :, None] >= position_k[:, None, :])
    return scores, mask[:, None]


def _forward_tiles(at: _Tiles):
    q, k, v, segments, positions, first_tile = at
    tile_count, b, i, rows, _ = q.shape
    first = _of_queries(_first_tiles(segments), first_tile, tile_count)

    def query_tile(_, x):
        tile, q_i, segment_i, position_i, first_i = x

        def key_tile(j, carry):
            acc, top, total = carry
            scores, mask = _scores(q_i, k[j], segment_i, segments[j], position_i, positions[j])
            new_top = jnp.maximum(top, jnp.where(mask, scores, MASKED).max(-1))
            weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            value = jnp.einsum(
                "bits,bish->bith",
                weights.astype(v.dtype),
                v[j],
                preferred_element_type=jnp.float32,
            )
            return (
                acc * shrink[..., None] + value,
                new_top,
                total * shrink + weights.sum(-1),
            )

        start = (
            jnp.zeros((b, i, rows, v.shape[-1]), jnp.float32),
            jnp.full((b, i, rows), MASKED, jnp.float32),
            jnp.zeros((b, i, rows), jnp.float32),
        )
        acc, top, total = jax.lax.fori_loop(first_i, tile + 1, key_tile, alike((start, q_i))[0])
        safe = jnp.where(total > 0, total, 1.0)  # a padding row attends to nothing and gives zero
        return None, ((acc / safe[..., None]).astype(v.dtype), top + jnp.log(safe))

    tile = jnp.arange(tile_count, dtype=jnp.int32)
    if first_tile is not None:
        tile = tile + first_tile
    segments_q, positions_q = (
        _of_queries(x, first_tile, tile_count) for x in (segments, positions)
    )
    return jax.lax.scan(query_tile, None, (tile, q, segments_q, positions_q, first))[1]


def _backward_tiles(at: _Tiles, out, lse, d_out):
    q, k, v, segments, positions, first_tile = at
    query_tiles, key_tiles = q.shape[0], k.shape[0]
    segments_q, positions_q = (
        _of_queries(x, first_tile, query_tiles) for x in (segments, positions)
    )
    delta = jnp.einsum("jbith,jbith->jbit", d_out, out, preferred_element_type=jnp.float32)
    # Query tile i needs the tiles of keys from first[i] to its own, and first rises, so key tile j
    # is needed by a range; by nobody where it comes after the last query.
    first = _of_queries(_first_tiles(segments), first_tile, query_tiles)
    last = jnp.searchsorted(first, jnp.arange(key_tiles), side="right", method="compare_all")
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def key_tile(dq, x):
        begin_j, k_j, v_j, segment_j, position_j, last_j = x

        def query_tile(i, carry):
            dq, dk, dv = carry
            scores, mask = _scores(q[i], k_j, segments_q[i], segment_j, positions_q[i], position_j)
            weights = jnp.where(mask, jnp.exp(scores - lse[i][..., None]), 0.0)
            dv = dv + product("bits,bith->bish", weights.astype(v.dtype), d_out[i])
            d_weights = product("bith,bish->bits", d_out[i], v_j)
            d_scores = (weights * (d_weights - delta[i][..., None])).astype(q.dtype)
            dk = dk + product("bits,bita->bisa", d_scores, q[i])
            dq = dq.at[i].add(product("bits,bisa->bita", d_scores, k_j))
            return dq, dk, dv

        zeros = jnp.zeros(k_j.shape, jnp.float32), jnp.zeros(v_j.shape, jnp.float32)
        zeros, _ = alike((zeros, q))
        dq, dk, dv = jax.lax.fori_loop(begin_j, last_j, query_tile, (dq, *zeros))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))  # stacked as they are returned

    begin = jnp.arange(key_tiles, dtype=jnp.int32)
    if first_tile is not None:
        begin = jnp.maximum(begin - first_tile, 0)
    zeros, _ = alike((jnp.zeros(q.shape, jnp.float32), q))
    dq, (dk, dv) = jax.lax.scan(key_tile, zeros, (begin, k, v, segments, positions, last))
    return dq, dk, dv
