"""Attention of new positions over a paged latent cache: MLA's absorbed form.

Knows nothing about projections. B sequences, T new positions each, N heads, Z = C + R latent and
rope widths, L layers, X pages of S positions.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import choose
from pallas_kernels.latents import Fp8Latents, Latents

KNOWN = ("reference", "hopper", "tpu", "xla")
NOTHING = -1e30  # log-sum-exp of no key; finite, so that combining never gives NaN


def mla_decode(
    q_BTNZ: jax.Array,
    cache_LXSZ: Latents,
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
        cache_LXSZ: the whole cache; entry `[l, x, s]` is latent then rotated rope key. In FP8 an
            entry is made wide in the queries' dtype.
        layer: int32 scalar, which layer to read.
        table_BX: int32 pages of each sequence in order; past its length there may be anything.
            What a page in use holds past the length must be finite.
        length_B: int32 positions cached, this call's included.
        positions_BT: int32 position of each query; a negative one attends to nothing.
        scale: multiplies the scores; a Python number.
        value_dim: C; the values are the first C numbers of an entry.
        implementation: "hopper", "tpu", "xla" (a loop over pages in use, online softmax),
            "reference" (gathers every page), or None, which takes the best one for the target.

    Returns:
        (out [B, T, N, C] in the queries' dtype, log-sum-exp [B, T, N] float32). A query that
        attends to nothing gives zero and -1e30.

    Raises:
        ValueError: for shapes that do not go together, or an implementation that is unknown or
            (`choose.Uncovered`) does not take them.
    """
    width = q_BTNZ.shape[-1]
    if isinstance(cache_LXSZ, Fp8Latents):
        latent, rope = cache_LXSZ.q_LXSC.shape[-1], cache_LXSZ.rope_LXSR.shape[-1]
        if latent != value_dim:
            raise ValueError(f"values of {value_dim} from FP8 latents of {latent}")
        entry = latent + rope
    else:
        entry = cache_LXSZ.shape[-1]
    if width != entry:
        raise ValueError(f"queries of {width} and cached entries of {entry}")
    arguments = q_BTNZ, cache_LXSZ, layer, table_BX, length_B, positions_BT, scale, value_dim
    return choose.run(__name__, "mla_decode", implementation, *arguments, known=KNOWN)


def combine(out_PBTNC: jax.Array, lse_PBTN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What attention over all keys gives, from what it gives over each of P parts of them.

    Args:
        out_PBTNC: outputs of each part, any dtype.
        lse_PBTN: their log-sum-exps, float32; -1e30 of a part without a key.

    Returns:
        (out [B, T, N, C] float32, log-sum-exp [B, T, N]).
    """
    top_BTN = jnp.max(lse_PBTN, axis=0)
    weight_PBTN = jnp.exp(lse_PBTN - top_BTN)
    total_BTN = jnp.sum(weight_PBTN, axis=0)
    out = jnp.einsum("pbtn,pbtnc->btnc", weight_PBTN / total_BTN, out_PBTNC.astype(jnp.float32))
    return out, jnp.maximum(top_BTN + jnp.log(total_BTN), NOTHING)


def sequence_part(count: jax.Array, part: jax.Array | int, parts: int, page: int) -> jax.Array:
    """How many of a sequence's first positions lie in one of its parts.

    A part has every `parts`-th page, beginning with page `part`: so parts grow together, and in
    each the order of positions is kept. A mask by length or position is then one of this count.

    Args:
        count: int32 positions, any shape.
        part: which part.
        parts: how many there are.
        page: positions a page, S.
    """
    count = jnp.maximum(count, 0)
    whole = count // page
    pages = jnp.maximum(whole - part + parts - 1, 0) // parts
    return pages * page + jnp.where(whole % parts == part, count % page, 0)
