"""`gqa_decode` as a loop over the pages in use, with an online softmax.

The loop's trip count is the longest sequence's, so pages that no sequence has reached are not
read, and the temporaries are a few pages whatever the cache's size. Query heads that share a key
head are rows of one product with it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gqa_decode.reference import NOTHING

PAGES_PER_STEP = 8


def gqa_decode(q_BTNA, k_LXSIA, v_LXSIH, layer, table_BX, length_B, positions_BT, scale):
    """See the package for arguments."""
    b, t, n, a = q_BTNA.shape
    page_size, i, h = v_LXSIH.shape[2:]
    group = n // i
    pages = min(PAGES_PER_STEP, table_BX.shape[1])
    table = jnp.pad(table_BX, ((0, 0), (0, -table_BX.shape[1] % pages)))
    q = (q_BTNA * jnp.asarray(scale, q_BTNA.dtype)).reshape(b, t, i, group, a)

    def step(j, carry):
        acc, top, total = carry
        here = jax.lax.dynamic_slice_in_dim(table, j * pages, pages, axis=1)
        keys = k_LXSIA[layer, here].reshape(b, pages * page_size, i, a)
        values = v_LXSIH[layer, here].reshape(b, pages * page_size, i, h)
        scores = jnp.einsum("btiga,bsia->bitgs", q, keys, preferred_element_type=jnp.float32)
        position = j * pages * page_size + jnp.arange(pages * page_size, dtype=jnp.int32)
        mask = position <= positions_BT[..., None]
        mask = (mask & (position < length_B[:, None, None]))[:, None, :, None, :]
        new_top = jnp.maximum(top, jnp.where(mask, scores, NOTHING).max(-1))
        weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        value = jnp.einsum(
            "bitgs,bsih->bitgh",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return acc * shrink[..., None] + value, new_top, total * shrink + weights.sum(-1)

    start = (
        jnp.zeros((b, i, t, group, h), jnp.float32),
        jnp.full((b, i, t, group), NOTHING, jnp.float32),
        jnp.zeros((b, i, t, group), jnp.float32),
    )
    steps = -(-jnp.max(length_B, initial=0) // (pages * page_size))
    acc, top, total = jax.lax.fori_loop(0, steps, step, start)
    safe = jnp.where(total > 0, total, 1.0)
    out = (acc / safe[..., None]).astype(q.dtype).transpose(0, 2, 1, 3, 4)
    lse = (top + jnp.log(safe)).transpose(0, 2, 1, 3)
    return out.reshape(b, t, n, h), lse.reshape(b, t, n)
