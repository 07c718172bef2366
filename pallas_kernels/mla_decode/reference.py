"""The definition of `mla_decode`: gathers every page and takes one softmax."""

import jax
import jax.numpy as jnp

NOTHING = -1e30  # log-sum-exp of no key; finite, so that combining shards never gives NaN


def mla_decode(q_BTNZ, cache_LXSZ, layer, table_BX, length_B, positions_BT, scale, value_dim):
    """See the package for arguments."""
    b, pages = table_BX.shape
    entries = cache_LXSZ[layer, table_BX]
    keys_BSZ = entries.reshape(b, pages * entries.shape[2], entries.shape[3])
    scores = jnp.einsum("btnz,bsz->btns", q_BTNZ, keys_BSZ, preferred_element_type=jnp.float32)
    position_S = jnp.arange(keys_BSZ.shape[1])
    mask = position_S <= positions_BT[..., None]
    mask = (mask & (position_S < length_B[:, None, None]))[:, :, None, :]
    scores = jnp.where(mask, scores * scale, NOTHING)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0.0).astype(q_BTNZ.dtype)
    out = jnp.einsum("btns,bsc->btnc", weights, keys_BSZ[..., :value_dim])
    return out, jnp.maximum(jnp.where(mask.any(-1), lse, NOTHING), NOTHING)
