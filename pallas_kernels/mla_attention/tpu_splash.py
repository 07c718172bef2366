"""JAX's splash attention for TPUs, with a mask that may depend on data.

What it exports makes its table of tiles on the host, from a mask of every pair of rows: 3 s at
32,768 rows and sixteen times that at 131,072, for one that is the same whatever the documents, so
that no tile of another document is passed over. Its kernels take any table. The two functions that
do, forward and backward, are private in jax 0.11.2, and are called from this file alone. Knows
nothing about documents.

N heads, I key/value heads, T queries, S rows, A key width, H value width; t tiles of queries, s of
keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info

COMPUTED = 512  # keys that are multiplied at a time, of a tile's that are in memory


class Table(NamedTuple):
    """Which pairs of tiles are visited, and what is seen in them: earlier rows of one segment.

    Attributes:
        first_t: int32, the first tile of keys that each tile of queries visits; more than `last_t`
            where there is none.
        last_t: int32, the last one.
        row_T: int32, each query's row.
        segment_T: int32, of each query.
        segment_S: int32, of each key.
    """

    first_t: jax.Array
    last_t: jax.Array
    row_T: jax.Array
    segment_T: jax.Array
    segment_S: jax.Array


def forward(
    q_NTA: jax.Array, k_ISA: jax.Array, v_ISH: jax.Array, table: Table, tiles: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Attention of scaled queries.

    Args:
        q_NTA: queries.
        k_ISA: keys.
        v_ISH: values.
        table: what is seen. A query that sees nothing gets anything, NaN too, for both.
        tiles: queries and keys of one; they divide T and S and are multiples of 128.

    Returns:
        (out [N, T, H] in the queries' dtype; log-sum-exp [N, T] float32).
    """
    info, _ = _info(table, tiles, k_ISA.shape[1])
    out_NTH, (lse_NT,) = splash._splash_attention_forward(
        info,
        q_NTA,
        k_ISA,
        v_ISH,
        splash.SegmentIds(table.segment_T, table.segment_S),
        None,
        mask_value=splash.DEFAULT_MASK_VALUE,
        is_mqa=False,
        block_sizes=_blocks(tiles),
        residual_checkpoint_name=None,
        save_residuals=True,
        mask_function=_earlier,
    )
    return out_NTH, lse_NT


def backward(
    q_NTA: jax.Array,
    k_ISA: jax.Array,
    v_ISH: jax.Array,
    table: Table,
    tiles: tuple[int, int],
    out_NTH: jax.Array,
    lse_NT: jax.Array,
    d_out_NTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of what `forward` took, in its dtypes.

    Where a query sees nothing its output and log-sum-exp must be finite.
    """
    by_query, by_key = _info(table, tiles, k_ISA.shape[1])
    segments = splash.SegmentIds(table.segment_T, table.segment_S)
    *_, dq, dk, dv, _, _ = splash._splash_attention_bwd(
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        is_mqa=False,
        block_sizes=_blocks(tiles),
        residual_checkpoint_name=None,
        mask_function=_earlier,
        attn_logits_soft_cap=None,
        interpret=False,
        res=(q_NTA, k_ISA, v_ISH, segments, None, out_NTH, lse_NT, by_query, by_key),
        do=d_out_NTH,
    )
    return dq, dk, dv


def _earlier(query_row, key_row):
    return query_row >= key_row


def _blocks(tiles: tuple[int, int]) -> splash.BlockSizes:
    queries, keys = tiles
    computed = COMPUTED if keys % COMPUTED == 0 else keys
    # The kernel for all three gradients at once keeps a dq for every tile of keys: S / s times the
    # queries. Two kernels compute the scores twice, and their memory is linear.
    return splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=computed,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=computed,
        block_q_dq=queries,
        block_kv_dq=keys,
    )


def _info(table: Table, tiles: tuple[int, int], length: int):
    """Splash's form of a table, for kernels that go through keys, and those through queries."""
    query_tiles, key_tiles = table.first_t.size, length // tiles[1]
    query, key = jnp.arange(query_tiles)[:, None], jnp.arange(key_tiles)[None]
    first, last = table.first_t[:, None], table.last_t[:, None]
    visited = (first <= key) & (key <= last)
    # For a pair that is passed over, the tile to fetch is one that is in memory, or is needed next.
    key_next = jnp.clip(jnp.minimum(jnp.maximum(key, first), last), 0, key_tiles - 1)
    begin = jnp.argmax(visited, axis=0, keepdims=True)
    end = jnp.max(jnp.where(visited, query, 0), axis=0, keepdims=True)
    query_next = jnp.minimum(jnp.maximum(query, begin), end)

    def info(following):
        return splash_attention_mask_info.MaskInfo(
            data_next=following.astype(jnp.int32)[None],
            mask_next=None,
            block_mask=visited.astype(jnp.int32)[None],
            partial_mask_blocks=None,
            q_sequence=table.row_T,  # pyrefly: ignore[bad-argument-type]
        )

    return info(key_next), info(query_next)
