"""Linear layers whose three products run in FP8: forward, input gradient, weight gradient.

Each operand is rounded where it is used, from what is kept wide: activations and gradients in tiles
of 128 along what the product contracts, weights in blocks of 128x128. So an activation is rounded
twice, along its width for the forward product and along the rows for the gradient of the weights,
of which the second is all that is kept for the backward pass. Source: DeepSeek-V3 report, sections
3.3.1 to 3.3.3. Knows nothing about models; where weights come from is a parameter.

M rows (X, sorted by expert, where there are experts), K contracted, N columns, F hidden width.
"""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.grouped_matmul import grouped_fp8_matmul, grouped_fp8_weight_gradient
from pallas_kernels.quantize import (
    quantize,
    quantize_both,
    rms_norm_quantize,
    swiglu_quantize,
)
from pallas_kernels.quantize.reference import rms_norm, swiglu
from pallas_kernels.tiled import ScaleFormat, Tiled, dequantize, transpose


@runtime_checkable
class Source(Protocol):
    """Where the FP8 numbers of a weight come from, and where its gradient goes; hashable."""

    def pull(self, w: Any) -> Tiled:
        """The weight as a matrix [..., K, N] in blocks of 128x128."""
        ...

    def push(self, dw: jax.Array, w: Any) -> Any:
        """The gradient of `w` from that of the matrix, float32 [..., K, N]."""
        ...


@dataclasses.dataclass(frozen=True)
class Here:
    """A weight that is an array [..., K, N] of this device."""

    scale: ScaleFormat = "float32"
    implementation: str | None = None

    def pull(self, w: jax.Array) -> Tiled:
        """Rounds it."""
        how = {"scale": self.scale, "implementation": self.implementation}
        return quantize(w, tile=(128, 128), **how)

    def push(self, dw: jax.Array, w: jax.Array) -> jax.Array:
        """As it is, in the weight's dtype."""
        return dw.astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class How:
    """How the operands of a layer are rounded.

    Attributes:
        scale: of its input.
        gradient_scale: of the gradient of its output.
        kept: `checkpoint_name` of what the backward pass needs of its input, for remat policies.
        implementation: of every op.
    """

    scale: ScaleFormat = "float32"
    gradient_scale: ScaleFormat = "float32"
    kept: str = "fp8_input"
    implementation: str | None = None


def fp8_linear(
    x_MK: jax.Array,
    w: Any,
    tile_expert: jax.Array | None = None,
    *,
    source: Source = Here(),
    how: How = How(),
) -> jax.Array:
    """Multiplies rows with a weight.

    Args:
        x_MK: rows, float32 or bfloat16.
        w: what `source` takes: without one, an array [K, N], or [E, K, N] with `tile_expert`.
        tile_expert: int32, the weight of each tile of rows as in `grouped_matmul`; for gradients, a
            tile has a multiple of 128 rows, so that no scale is shared by two experts.
        source: of the weight.
        how: operands are rounded.

    Returns:
        [M, N] in the dtype of x, summed in float32.
    """
    (y_MN,) = _linears(x_MK, (w,), tile_expert, (source,), how)
    return y_MN


def fp8_linears(
    x_MK: jax.Array,
    weights: tuple[Any, ...],
    *,
    sources: tuple[Source, ...],
    how: How = How(),
) -> tuple[jax.Array, ...]:
    """`fp8_linear` of several weights with one input, which is rounded and kept once."""
    return _linears(x_MK, weights, None, sources, how)


def fp8_norm_linears(
    x_MK: jax.Array,
    norm_K: jax.Array,
    eps: float,
    weights: tuple[Any, ...],
    *,
    sources: tuple[Source, ...],
    how: How = How(),
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """RMSNorm and `fp8_linears` of its result, which is rounded in the pass that makes it.

    Args:
        x_MK: rows.
        norm_K: what the norm multiplies each column with.
        eps: the norm adds to the mean square.
        weights: as in `fp8_linears`.
        sources: of the weights.
        how: the normed rows are rounded.

    Returns:
        (the normed rows, [M, N] of each weight), in the dtype of x.
    """
    return _norm_linears(x_MK, norm_K, weights, eps, sources, how)


def fp8_swiglu_linear(
    gate_up_X2F: jax.Array,
    w: Any,
    gates_X: jax.Array | None = None,
    tile_expert: jax.Array | None = None,
    *,
    source: Source = Here(),
    how: How = How(kept="gate_up"),
) -> jax.Array:
    """Multiplies SwiGLU's hidden vectors, times a number a row, with a weight.

    For the backward pass the input of SwiGLU is kept in FP8 and its output computed from that again
    (DeepSeek-V3 report, section 3.3.3).

    Args:
        gate_up_X2F: gates on the left, ups on the right.
        w: of [F, N], or [E, F, N].
        gates_X: the router's gates; None for 1.
        tile_expert: as in `fp8_linear`.
        source: of the weight.
        how: operands are rounded; `scale` is of the kept input, too.

    Returns:
        [X, N] in the dtype of `gate_up_X2F`.
    """
    return _swiglu_linear(gate_up_X2F, w, gates_X, tile_expert, source, how)


# ---- the three products -------------------------------------------------------------------------


def _product(x: Tiled, w_NK: Tiled, tile_expert, out_dtype, how):
    told = {"out_dtype": out_dtype, "implementation": how.implementation}
    if tile_expert is None:
        return fp8_matmul(x, w_NK, **told)
    return grouped_fp8_matmul(x, w_NK, tile_expert, **told)


def _weight_gradient(x_KM: Tiled, dy_NM: Tiled, tile_expert, num_experts, how):
    if tile_expert is None:
        return fp8_matmul(x_KM, dy_NM, out_dtype=jnp.float32, implementation=how.implementation)
    return grouped_fp8_weight_gradient(
        x_KM, dy_NM, tile_expert, num_experts, implementation=how.implementation
    )


def _no_gradient(tile_expert):
    return None if tile_expert is None else np.zeros(tile_expert.shape, jax.dtypes.float0)


def _like(x):
    """Of an array whose dtype alone the backward pass needs."""
    return jnp.zeros((0,), x.dtype)


# ---- linear -------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linears(x_MK, weights, tile_expert, sources, how):
    x = quantize(x_MK, scale=how.scale, implementation=how.implementation)
    return _forward_products(x, x_MK.dtype, weights, tile_expert, sources, how)


def _forward_products(x, dtype, weights, tile_expert, sources, how):
    return tuple(
        _product(x, transpose(source.pull(w)), tile_expert, dtype, how)
        for w, source in zip(weights, sources, strict=True)
    )


def _linears_forward(x_MK, weights, tile_expert, sources, how):
    x, kept = quantize_both(x_MK, scale=how.scale, implementation=how.implementation)
    kept = Tiled(*(checkpoint_name(part, how.kept) for part in kept))
    y = _forward_products(x, x_MK.dtype, weights, tile_expert, sources, how)
    return y, (kept, weights, tile_expert, _like(x_MK))


def _linears_backward(sources, how, saved, gradients):
    kept, weights, tile_expert, like = saved
    dx_MK, dws = _backward_products(kept, like, weights, tile_expert, gradients, sources, how)
    return dx_MK, dws, _no_gradient(tile_expert)


def _backward_products(kept, like, weights, tile_expert, gradients, sources, how):
    # Parts of a sum stay float32.
    dtype = like.dtype if len(weights) == 1 else jnp.float32
    dx, dws = [], []
    for w, source, dy_MN in zip(weights, sources, gradients, strict=True):
        dy, dy_NM = quantize_both(
            dy_MN, scale=how.gradient_scale, implementation=how.implementation
        )
        w_KN = source.pull(w)
        dx.append(_product(dy, w_KN, tile_expert, dtype, how))
        experts = w_KN.q.shape[0]
        dws.append(source.push(_weight_gradient(kept, dy_NM, tile_expert, experts, how), w))
    dx_MK = functools.reduce(jnp.add, dx).astype(like.dtype)
    return dx_MK, tuple(dws)


_linears.defvjp(_linears_forward, _linears_backward)


# ---- norm and linear ----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm_linears(x_MK, norm_K, weights, eps, sources, how):
    normed_MK = rms_norm(x_MK, norm_K, eps)
    x = quantize(normed_MK, scale=how.scale, implementation=how.implementation)
    return normed_MK, _forward_products(x, x_MK.dtype, weights, None, sources, how)


def _norm_linears_forward(x_MK, norm_K, weights, eps, sources, how):
    normed_MK, x, kept = rms_norm_quantize(
        x_MK, norm_K, eps, scale=how.scale, implementation=how.implementation
    )
    kept = Tiled(*(checkpoint_name(part, how.kept) for part in kept))
    y = _forward_products(x, x_MK.dtype, weights, None, sources, how)
    return (normed_MK, y), (x_MK, norm_K, kept, weights)


def _norm_linears_backward(eps, sources, how, saved, gradients):
    x_MK, norm_K, kept, weights = saved
    dnormed_MK, dys = gradients
    dx_MK, dws = _backward_products(kept, x_MK, weights, None, dys, sources, how)
    _, back = jax.vjp(lambda x, norm: rms_norm(x, norm, eps), x_MK, norm_K)
    return *back(dnormed_MK + dx_MK), dws


_norm_linears.defvjp(_norm_linears_forward, _norm_linears_backward)


# ---- SwiGLU and linear --------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _swiglu_linear(gate_up_X2F, w, gates_X, tile_expert, source, how):
    hidden = swiglu_quantize(
        gate_up_X2F, gates_X, scale=how.scale, implementation=how.implementation
    )
    w_NF = transpose(source.pull(w))
    return _product(hidden, w_NF, tile_expert, gate_up_X2F.dtype, how)


def _swiglu_linear_forward(gate_up_X2F, w, gates_X, tile_expert, source, how):
    kept = quantize(gate_up_X2F, scale=how.scale, implementation=how.implementation)
    kept = Tiled(*(checkpoint_name(part, how.kept) for part in kept))
    y_XN = _swiglu_linear(gate_up_X2F, w, gates_X, tile_expert, source, how)
    return y_XN, (kept, w, gates_X, tile_expert, _like(gate_up_X2F))


def _swiglu_linear_backward(source, how, saved, dy_XN):
    kept, w, gates_X, tile_expert, like = saved
    rounded = {"implementation": how.implementation}
    gate_up_X2F = dequantize(kept, like.dtype)
    hidden_FX = swiglu_quantize(
        gate_up_X2F, gates_X, scale=how.scale, orientation="transposed", **rounded
    )
    dy, dy_NX = quantize_both(dy_XN, scale=how.gradient_scale, **rounded)
    w_FN = source.pull(w)
    dhidden_XF = _product(dy, w_FN, tile_expert, like.dtype, how)
    dw = _weight_gradient(hidden_FX, dy_NX, tile_expert, w_FN.q.shape[0], how)
    if gates_X is None:
        _, back = jax.vjp(lambda gate_up: swiglu(gate_up, None), gate_up_X2F)
        (dgate_up_X2F,), dgates_X = back(dhidden_XF), None
    else:
        _, back = jax.vjp(swiglu, gate_up_X2F, gates_X)
        dgate_up_X2F, dgates_X = back(dhidden_XF)
    return dgate_up_X2F, source.push(dw, w), dgates_X, _no_gradient(tile_expert)


_swiglu_linear.defvjp(_swiglu_linear_forward, _swiglu_linear_backward)
