"""`mla_attention` in blocks with an online softmax, and a backward pass that recomputes.

Milakov and Gimelshein (arXiv 1805.02867) for the online softmax, Dao et al. (arXiv 2205.14135)
for the recomputation. Memory is linear in S: no [T, S] array is built. Blocks above the diagonal
and blocks that hold only earlier documents are never visited, so packing saves time.

Query heads that share a key head are more rows of its tile: a tile of queries is [g * block, A],
head by head, and keys and values are never repeated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import e5m6

MASKED = -1e30


def mla_attention(
    q_BTNA,
    k_BSIA,
    v_BSIH,
    segments_BS,
    positions_BS,
    scale,
    first_row=None,
    *,
    kept: str = "as_is",
    block: int | None = None,
) -> jax.Array:
    """See the package for arguments; `block` is the number of queries and of keys a tile.

    With `first_row` it is the most of them: a tile holds the largest divisor of T up to that.
    """
    queries, length = q_BTNA.shape[1], k_BSIA.shape[1]
    if block is None:
        # Measured on two CPU cores, forward and backward: at 512 positions 128 and 256 take the
        # same time, at 4,096 256 takes three quarters of it.
        block = 128 if length <= 1024 else 256
    block = min(block, queries)
    if first_row is None:
        first_tile = None
    else:
        # A part begins at a multiple of T, so it begins with a tile, and nothing needs padding.
        block = next(size for size in range(block, 0, -1) if queries % size == 0)
        first_tile = jnp.asarray(first_row, jnp.int32) // block
    pad = -length % block

    def padded(x):
        return jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))

    def heads_first(x_BTNA):  # [tiles, B, N, block, A]
        b, t, n, a = x_BTNA.shape
        return x_BTNA.reshape(b, t // block, block, n, a).transpose(1, 0, 3, 2, 4)

    def tiles(x_BS):  # [tiles, B, block]
        return x_BS.reshape(x_BS.shape[0], -1, block).transpose(1, 0, 2)

    q = heads_first(padded(q_BTNA * jnp.asarray(scale, q_BTNA.dtype)))
    k, v = heads_first(padded(k_BSIA)), heads_first(padded(v_BSIH))
    segments, positions = tiles(padded(segments_BS)), tiles(padded(positions_BS))
    tile_count, b, n, _, a = q.shape
    h = v.shape[-1]
    q = q.reshape(tile_count, b, k.shape[2], -1, a)
    out = _attend(*_alike((q, k, v, segments, positions, first_tile)), kept)
    out = out.reshape(tile_count, b, n, block, h)
    return out.transpose(1, 0, 3, 2, 4).reshape(b, tile_count * block, n, h)[:, :queries]


def _alike(arrays):
    """In `shard_map`, which checks it: what differs by device along an axis for one, does for all.

    Outside of one nothing changes. The gradient of what was the same everywhere is then a sum.
    """
    varying = [jax.typeof(x).mat.varying for x in jax.tree.leaves(arrays)]
    axes = frozenset().union(*varying)

    def mark(x):
        missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, arrays)


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


def _forward_tiles(q, k, v, segments, positions, first_tile):
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
        acc, top, total = jax.lax.fori_loop(first_i, tile + 1, key_tile, _alike((start, q_i))[0])
        safe = jnp.where(total > 0, total, 1.0)  # a padding row attends to nothing and gives zero
        return None, ((acc / safe[..., None]).astype(v.dtype), top + jnp.log(safe))

    tile = jnp.arange(tile_count, dtype=jnp.int32)
    if first_tile is not None:
        tile = tile + first_tile
    segments_q, positions_q = (
        _of_queries(x, first_tile, tile_count) for x in (segments, positions)
    )
    return jax.lax.scan(query_tile, None, (tile, q, segments_q, positions_q, first))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, segments, positions, first_tile, kept):
    out = _forward_tiles(q, k, v, segments, positions, first_tile)[0]
    return e5m6.rounded(out) if kept == "e5m6" else out


def _forward(q, k, v, segments, positions, first_tile, kept):
    out, lse = _forward_tiles(q, k, v, segments, positions, first_tile)
    # By these names a remat policy keeps what attention has found, and not its inputs.
    lse = checkpoint_name(lse, "attention_lse")
    held = e5m6.pack(out) if kept == "e5m6" else out
    held = jax.tree.map(lambda part: checkpoint_name(part, "attention_out"), held)
    # What comes after sees what is kept, so that nothing else of it need be.
    out = e5m6.unpack(held, v.shape[-1], v.dtype) if kept == "e5m6" else held
    return out, (q, k, v, segments, positions, first_tile, held, lse)


def _backward(kept, saved, d_out):
    q, k, v, segments, positions, first_tile, held, lse = saved
    out = e5m6.unpack(held, v.shape[-1], v.dtype) if kept == "e5m6" else held
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
        zeros, _ = _alike((zeros, q))
        dq, dk, dv = jax.lax.fori_loop(begin_j, last_j, query_tile, (dq, *zeros))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))  # stacked as they are returned

    begin = jnp.arange(key_tiles, dtype=jnp.int32)
    if first_tile is not None:
        begin = jnp.maximum(begin - first_tile, 0)
    zeros, _ = _alike((jnp.zeros(q.shape, jnp.float32), q))
    dq, (dk, dv) = jax.lax.scan(key_tile, zeros, (begin, k, v, segments, positions, last))
    no_gradient = np.zeros(segments.shape, jax.dtypes.float0)
    of_tile = None if first_tile is None else np.zeros((), jax.dtypes.float0)
    of_integers = no_gradient, no_gradient, of_tile
    return dq.astype(q.dtype), dk, dv, *of_integers


_attend.defvjp(_forward, _backward)
