"""`mla_decode` as a loop over the pages in use, with an online softmax.

The loop's trip count is the longest sequence's, so pages that no sequence has reached are not
read, and the temporaries are a few pages whatever the cache's size.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.latents import page_size, read_pages
from pallas_kernels.mla_decode import NOTHING

PAGES_PER_STEP = 8


def mla_decode(q_BTNZ, cache_LXSZ, layer, table_BX, length_B, positions_BT, scale, value_dim):
    """See the package for arguments."""
    b, t, n, _ = q_BTNZ.shape
    size = page_size(cache_LXSZ)
    pages = min(PAGES_PER_STEP, table_BX.shape[1])
    # A page of no sequence may hold anything: in its place comes one that is in use.
    used_B1 = -(-length_B[:, None] // size)
    in_use = jnp.arange(table_BX.shape[1], dtype=jnp.int32) < used_B1
    table = jnp.where(in_use, table_BX, jnp.where(used_B1 > 0, table_BX[:, :1], 0))
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages)), mode="edge")
    q = q_BTNZ * jnp.asarray(scale, q_BTNZ.dtype)

    def step(i, carry):
        acc, top, total = carry
        here = jax.lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        keys = read_pages(cache_LXSZ, layer, here, q.dtype).reshape(b, pages * size, -1)
        scores = jnp.einsum("btnz,bsz->btns", q, keys, preferred_element_type=jnp.float32)
        position = i * pages * size + jnp.arange(pages * size, dtype=jnp.int32)
        mask = position <= positions_BT[..., None]
        mask = (mask & (position < length_B[:, None, None]))[:, :, None, :]
        new_top = jnp.maximum(top, jnp.where(mask, scores, NOTHING).max(-1))
        weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        value = jnp.einsum(
            "btns,bsc->btnc",
            weights.astype(keys.dtype),
            keys[..., :value_dim],
            preferred_element_type=jnp.float32,
        )
        return acc * shrink[..., None] + value, new_top, total * shrink + weights.sum(-1)

    start = (
        jnp.zeros((b, t, n, value_dim), jnp.float32),
        jnp.full((b, t, n), NOTHING, jnp.float32),
        jnp.zeros((b, t, n), jnp.float32),
    )
    steps = -(-jnp.max(length_B, initial=0) // (pages * size))
    acc, top, total = jax.lax.fori_loop(0, steps, step, start)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.where(total[..., None] > 0, acc / safe[..., None], 0.0)
    return out.astype(q_BTNZ.dtype), top + jnp.log(safe)
