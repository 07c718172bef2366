"""The definition of `gqa_decode`: gathers every page and takes one softmax."""

import jax
import jax.numpy as jnp

NOTHING = -1e30  # log-sum-exp of no key; finite, so that combining shards never gives NaN


def gqa_decode(q_BTNA, k_LXSIA, v_LXSIH, layer, table_BX, length_B, positions_BT, scale):
    """See the package for arguments."""
    b, t, n, a = q_BTNA.shape
    i, h = v_LXSIH.shape[3:]
    keys = k_LXSIA[layer, table_BX].reshape(b, -1, i, a)
    values = v_LXSIH[layer, table_BX].reshape(b, -1, i, h)
    q = q_BTNA.reshape(b, t, i, n // i, a)  # query heads by the key head that they share
    scores = jnp.einsum("btiga,bsia->btigs", q, keys, preferred_element_type=jnp.float32)
    position_S = jnp.arange(keys.shape[1])
    mask = position_S <= positions_BT[..., None]
    mask = (mask & (position_S < length_B[:, None, None]))[:, :, None, None, :]
    scores = jnp.where(mask, scores * scale, NOTHING)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0.0).astype(q.dtype)
    out = jnp.einsum("btigs,bsih->btigh", weights, values)
    lse = jnp.maximum(jnp.where(mask.any(-1), lse, NOTHING), NOTHING)
    return out.reshape(b, t, n, h), lse.reshape(b, t, n)
