"""`mla_attention` by tokamax's Mosaic GPU kernels, where tokamax is installed; to be named only.

Its public function takes neither packed documents without a mask of [T, S] nor gives what its
gradient needs, so that its ops are called: private of it, seen in tokamax 0.0.17. Traced and
compiled for an H100, not run. Knows nothing about its kernels.

B sequences of S rows, T queries that are some or all of the rows, N heads, I heads of keys and
values, A key and H value width.
"""

from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choose import Uncovered
from pallas_kernels.mla_attention import hopper_spans


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
        Uncovered: where tokamax is not installed, or does not take what it is given.
    """
    del positions_BS  # they rise with the row
    base, gpu = _modules()
    mask = _mask(base, segments_BS, q_BTNA.shape[1], first_row)
    # Not the faster softmax without a largest score, which may overflow.
    attend = gpu.PallasMosaicGpuFlashAttention(use_stable_softmax=True)
    out_BTNH, (top_BNT, total_BNT) = _run(
        attend, q_BTNA, k_BSIA, v_BSIH, mask=mask, logits_scale=scale, return_residuals=True
    )
    sees_BNT = total_BNT > 0
    lse_BNT = jnp.where(sees_BNT, top_BNT + jnp.log(jnp.where(sees_BNT, total_BNT, 1.0)), 0.0)
    return out_BTNH, jnp.swapaxes(lse_BNT, 1, 2)


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
    base, gpu = _modules()
    mask = _mask(base, segments_BS, q_BTNA.shape[1], first_row)
    lse_BNT = jnp.swapaxes(lse_BTN, 1, 2)
    residuals = lse_BNT, jnp.ones_like(lse_BNT)  # as if the total had been brought to the top
    attend = gpu.PallasMosaicGpuFlashAttention()
    asked = attend.bind(q_BTNA, k_BSIA, v_BSIH, mask=mask, logits_scale=scale)
    options = {name: x for name, x in asked.kwargs.items() if name != "return_residuals"}
    d_out_BTNH = d_out_BTNH.astype(v_BSIH.dtype)
    got = _run(attend.vjp, residuals, out_BTNH, d_out_BTNH, *asked.args, **options)
    return got["q"], got["k"], got["v"]


def _modules() -> tuple[Any, ...]:
    package = "tokamax._src.ops.attention"
    try:
        return tuple(import_module(f"{package}.{name}") for name in ("base", "pallas_mosaic_gpu"))
    except ImportError as error:
        raise Uncovered("tokamax is not installed") from error


def _run(op, *arguments, **options):
    try:
        return op(*arguments, **options)
    except NotImplementedError as error:
        raise Uncovered(f"tokamax: {error}") from error


def _mask(base, segments_BS, queries, first_row):
    """The rows that each query sees, as a range; none for padding."""
    spans = hopper_spans.find_spans(segments_BS, queries, first_row, 1)
    row_BT = spans.first_row + jnp.broadcast_to(jnp.arange(queries), spans.start_BT.shape)
    past_BT = (row_BT + 1).astype(jnp.int32)
    start_BT = jnp.minimum(spans.start_BT, past_BT)
    if first_row is None:
        # Its backward pass leaves out what is above the diagonal only where it knows of one.
        return base.Mask(k_start=start_BT[:, None], is_causal=True)
    return base.Mask(k_start=start_BT[:, None], k_end=past_BT[:, None])
