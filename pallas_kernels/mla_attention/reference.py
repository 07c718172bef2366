"""The definition of `mla_attention`, with the whole [T, S] array of scores."""

import jax
import jax.numpy as jnp


def mla_attention(
    q_BTNA, k_BSIA, v_BSIH, segments_BS, positions_BS, scale, first_row=None
) -> jax.Array:
    """See the package for arguments."""
    b, t, n, a = q_BTNA.shape
    i = k_BSIA.shape[2]

    def of_queries(x_BS):
        if first_row is None:
            return x_BS
        return jax.lax.dynamic_slice_in_dim(x_BS, first_row, t, axis=1)

    q = q_BTNA.reshape(b, t, i, n // i, a)  # query heads by the key head that they share
    scores = jnp.einsum("btiga,bsia->bigts", q, k_BSIA, preferred_element_type=jnp.float32)
    segment_T, segment_S = of_queries(segments_BS)[:, :, None], segments_BS[:, None, :]
    earlier = of_queries(positions_BS)[:, :, None] >= positions_BS[:, None, :]
    mask = ((segment_T == segment_S) & (segment_T != 0) & earlier)[:, None, None]
    # A finite mask value keeps the gradient of a row that attends to nothing finite.
    weights = jax.nn.softmax(jnp.where(mask, scores * scale, -1e30), axis=-1)
    weights = jnp.where(mask, weights, 0.0).astype(v_BSIH.dtype)
    out = jnp.einsum("bigts,bsih->btigh", weights, v_BSIH)
    return out.reshape(b, t, n, v_BSIH.shape[-1])
