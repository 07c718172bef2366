"""The definition of `mla_decode`: gathers every page and takes one softmax."""

import jax
import jax.numpy as jnp

from pallas_kernels.latents import read_pages
from pallas_kernels.mla_decode import NOTHING


def mla_decode(q_BTNZ, cache_LXSZ, layer, table_BX, length_B, positions_BT, scale, value_dim):
    """See the package for arguments."""
    entries = read_pages(cache_LXSZ, layer, table_BX, q_BTNZ.dtype)
    b, pages, size, z = entries.shape
    in_use = jnp.arange(pages * size) < length_B[:, None]
    keys_BSZ = jnp.where(in_use[..., None], entries.reshape(b, pages * size, z), 0)
    scores = jnp.einsum("btnz,bsz->btns", q_BTNZ, keys_BSZ, preferred_element_type=jnp.float32)
    position_S = jnp.arange(keys_BSZ.shape[1])
    mask = position_S <= positions_BT[..., None]
    mask = (mask & (position_S < length_B[:, None, None]))[:, :, None, :]
    scores = jnp.where(mask, scores * scale, NOTHING)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0.0).astype(q_BTNZ.dtype)
    out = jnp.einsum("btns,bsc->btnc", weights, keys_BSZ[..., :value_dim])
    return out, jnp.maximum(jnp.where(mask.any(-1), lse, NOTHING), NOTHING)
