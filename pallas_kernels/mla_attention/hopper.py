"""`mla_attention` on Hopper's tensor cores. Compiled for an H100 and interpreted, not run.

Makes operands fit the kernels (`hopper_forward`, `hopper_query_gradient`, `hopper_key_gradients`).
No gradient is summed across CTAs, so that the same ones come every time; the price is that scores
and the gradients of weights are made twice, seven products where five would do. Knows nothing about
who asks for gradients.

B sequences of S rows, T queries that are some or all of the rows, N heads, I heads of keys and
values, A key and H value width.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.choose import Uncovered
from pallas_kernels.mla_attention import hopper_spans
from pallas_kernels.mla_attention import hopper_tiles as tiles
from pallas_kernels.mla_attention.hopper_forward import attend
from pallas_kernels.mla_attention.hopper_key_gradients import key_gradients
from pallas_kernels.mla_attention.hopper_query_gradient import query_gradient
from pallas_kernels.mla_attention.hopper_ring import Operands

KEY_WIDTH, VALUE_WIDTH = 192, 128  # the most that the gradients of 64 keys have registers for
GRAIN = 8  # rows of a swizzled tile: TMA takes whole ones
MOST_ROWS = 2**24  # their numbers are float32 where keys are masked


def forward(
    q_BTNA: jax.Array,
    k_BSIA: jax.Array,
    v_BSIH: jax.Array,
    segments_BS: jax.Array,
    positions_BS: jax.Array,
    scale: float,
    first_row: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H], log-sum-exp [B, T, N] float32); see the package for arguments.

    Raises:
        Uncovered: for a dtype other than bfloat16, widths beyond 192 and 128, 2^24 rows or more, a
            scale that is not positive, or nothing to attend to.
    """
    del positions_BS  # they rise with the row, by which the kernels order
    _check(q_BTNA, k_BSIA, v_BSIH, scale)
    t, h = q_BTNA.shape[1], v_BSIH.shape[-1]
    spans = hopper_spans.find_spans(segments_BS, t, first_row, tiles.ROWS)
    out, lse_BNT = attend(_fit(q_BTNA), _fit(k_BSIA), _fit(v_BSIH), spans, scale)
    return out[:, :t, :, :h], jnp.swapaxes(lse_BNT, 1, 2)[:, :t] / tiles.LOG2E


def backward(
    q_BTNA: jax.Array,
    k_BSIA: jax.Array,
    v_BSIH: jax.Array,
    segments_BS: jax.Array,
    positions_BS: jax.Array,
    scale: float,
    first_row: jax.Array | None,
    out_BTNH: jax.Array,
    lse_BTN: jax.Array,
    d_out_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v; see the package for arguments, and `forward` for errors."""
    del positions_BS
    _check(q_BTNA, k_BSIA, v_BSIH, scale)
    t, s = q_BTNA.shape[1], k_BSIA.shape[1]

    def by_head(x_BTN):
        return jnp.pad(jnp.swapaxes(x_BTN, 1, 2), ((0, 0), (0, 0), (0, -t % tiles.ROWS)))

    delta_BTN = jnp.einsum(
        "btnh,btnh->btn", d_out_BTNH, out_BTNH, preferred_element_type=jnp.float32
    )
    operands = Operands(
        q=_fit(q_BTNA),
        k=_fit(k_BSIA),
        v=_fit(v_BSIH),
        d_out=_fit(d_out_BTNH.astype(v_BSIH.dtype)),
        lse=by_head(lse_BTN * tiles.LOG2E),
        delta=by_head(delta_BTN),
        spans=hopper_spans.find_spans(segments_BS, t, first_row, tiles.ROWS),
    )
    dq = query_gradient(operands, scale)
    dk, dv = key_gradients(operands, scale)
    a, h = q_BTNA.shape[-1], v_BSIH.shape[-1]
    return dq[:, :t, :, :a], dk[:, :s, :, :a], dv[:, :s, :, :h]


def _check(q_BTNA, k_BSIA, v_BSIH, scale):
    dtypes = {str(x.dtype) for x in (q_BTNA, k_BSIA, v_BSIH)}
    if dtypes != {"bfloat16"}:
        raise Uncovered(f"attention in {', '.join(sorted(dtypes))}: bfloat16 only")
    a, h = q_BTNA.shape[-1], v_BSIH.shape[-1]
    if a > KEY_WIDTH or h > VALUE_WIDTH:
        raise Uncovered(
            f"keys {a} and values {h} wide; up to {KEY_WIDTH} and {VALUE_WIDTH} are taken"
        )
    if k_BSIA.shape[1] >= MOST_ROWS:
        raise Uncovered(f"{k_BSIA.shape[1]} rows; fewer than {MOST_ROWS} are taken")
    if 0 in (*q_BTNA.shape, *k_BSIA.shape, h):
        raise Uncovered(f"nothing to attend to: queries {q_BTNA.shape}, keys {k_BSIA.shape}")
    if scale <= 0:
        raise Uncovered(f"a scale of {scale}; positive ones are taken")


def _fit(x_BTNA):
    """With zeros up to rows that TMA takes, and to widths that WGMMA does."""
    rows, width = -x_BTNA.shape[1] % GRAIN, -x_BTNA.shape[3] % tiles.CHUNK
    if not rows and not width:
        return x_BTNA
    return jnp.pad(x_BTNA, ((0, 0), (0, rows), (0, 0), (0, width)))
