"""Causal attention over packed documents, keys wider than values: MLA's expanded form.

Knows nothing about latents or projections. B sequences, T queries = keys in row order, N heads,
A key width, H value width.
"""

import jax

from pallas_kernels.mla_attention import reference, xla


def mla_attention(
    q_BTNA: jax.Array,
    k_BTNA: jax.Array,
    v_BTNH: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    scale: float,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Attends to the positions of the same segment that are not later.

    Args:
        q_BTNA: queries.
        k_BTNA: keys.
        v_BTNH: values.
        segments_BT: int32; each document is one contiguous run of a number of its own in its row,
            0 is padding.
        positions_BT: int32, rising along the row inside a segment.
        scale: multiplies the scores.
        implementation: "xla" (blocks with an online softmax, memory linear in T), "reference"
            (builds [T, T]), or None, which takes the best one known for the backend.

    Returns:
        [B, T, N, H] in the values' dtype; padding rows are zero. Softmax in float32.

    Raises:
        ValueError: for an unknown implementation.
    """
    match implementation:
        case "xla" | None:
            return xla.mla_attention(q_BTNA, k_BTNA, v_BTNH, segments_BT, positions_BT, scale)
        case "reference":
            return reference.mla_attention(q_BTNA, k_BTNA, v_BTNH, segments_BT, positions_BT, scale)
    raise ValueError(f"unknown implementation {implementation!r}; known: xla, reference")
