"""Attention of new positions over a paged latent cache: MLA's absorbed form.

Knows nothing about projections. B sequences, T new positions each, N heads, Z = C + R latent and
rope widths, L layers, X pages of S positions.
"""

import jax

from pallas_kernels.mla_decode import reference, xla


def mla_decode(
    q_BTNZ: jax.Array,
    cache_LXSZ: jax.Array,
    layer: jax.Array,
    table_BX: jax.Array,
    length_B: jax.Array,
    positions_BT: jax.Array,
    scale: float,
    *,
    value_dim: int,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the cached positions of the same sequence that are not later.

    Args:
        q_BTNZ: queries taken into the latent space, latent part first.
        cache_LXSZ: the whole cache; entry `[l, x, s]` is latent then rotated rope key.
        layer: int32 scalar, which layer to read.
        table_BX: int32 pages of each sequence in order; entries past the length are never read
            for their value, but must be valid page numbers.
        length_B: int32 positions cached, this call's included.
        positions_BT: int32 position of each query; a negative one attends to nothing.
        scale: multiplies the scores.
        value_dim: C; the values are the first C numbers of an entry.
        implementation: "xla" (a loop over pages in use, online softmax), "reference" (gathers
            every page), or None, which takes the best one known for the backend.

    Returns:
        (out [B, T, N, C] in the queries' dtype, log-sum-exp [B, T, N] float32). A query that
        attends to nothing gives zero and -1e30.

    Raises:
        ValueError: for an unknown implementation.
    """
    arguments = (q_BTNZ, cache_LXSZ, layer, table_BX, length_B, positions_BT, scale, value_dim)
    match implementation:
        case "xla" | None:
            return xla.mla_decode(*arguments)
        case "reference":
            return reference.mla_decode(*arguments)
    raise ValueError(f"unknown implementation {implementation!r}; known: xla, reference")
