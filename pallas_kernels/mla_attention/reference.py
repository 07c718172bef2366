"""The definition of `mla_attention`, with the whole [T, T] array of scores."""

import jax
import jax.numpy as jnp


def mla_attention(q_BTNA, k_BTNA, v_BTNH, segments_BT, positions_BT, scale) -> jax.Array:
    """See the package for arguments."""
    scores_BNTS = jnp.einsum("btna,bsna->bnts", q_BTNA, k_BTNA, preferred_element_type=jnp.float32)
    segment_T, segment_S = segments_BT[:, None, :, None], segments_BT[:, None, None, :]
    earlier = positions_BT[:, None, :, None] >= positions_BT[:, None, None, :]
    mask = (segment_T == segment_S) & (segment_T != 0) & earlier
    # A finite mask value keeps the gradient of a row that attends to nothing finite.
    weights_BNTS = jax.nn.softmax(jnp.where(mask, scores_BNTS * scale, -1e30), axis=-1)
    weights_BNTS = jnp.where(mask, weights_BNTS, 0.0).astype(v_BTNH.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BTNH)
