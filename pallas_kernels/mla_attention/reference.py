"""The definition of `mla_attention`, with the whole [T, T] array of scores."""

import jax
import jax.numpy as jnp


def mla_attention(q_BTNA, k_BTIA, v_BTIH, segments_BT, positions_BT, scale) -> jax.Array:
    """See the package for arguments."""
    b, t, n, a = q_BTNA.shape
    i = k_BTIA.shape[2]
    q = q_BTNA.reshape(b, t, i, n // i, a)  # query heads by the key head that they share
    scores = jnp.einsum("btiga,bsia->bigts", q, k_BTIA, preferred_element_type=jnp.float32)
    segment_T, segment_S = segments_BT[:, :, None], segments_BT[:, None, :]
    earlier = positions_BT[:, :, None] >= positions_BT[:, None, :]
    mask = ((segment_T == segment_S) & (segment_T != 0) & earlier)[:, None, None]
    # A finite mask value keeps the gradient of a row that attends to nothing finite.
    weights = jax.nn.softmax(jnp.where(mask, scores * scale, -1e30), axis=-1)
    weights = jnp.where(mask, weights, 0.0).astype(v_BTIH.dtype)
    out = jnp.einsum("bigts,bsih->btigh", weights, v_BTIH)
    return out.reshape(b, t, n, v_BTIH.shape[-1])
