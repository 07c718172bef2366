"""Linear layers in FP8 over parameters as they lie: flattened, fused, cut over devices, resident.

What `layers.contract` and the experts call when the recipe is `fp8`. Knows nothing about layers.
Source: DeepSeek-V3 report, section 3.3.

K rows and N columns of the matrix that a weight's dimensions flatten to, k and n of this device.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.model.layout import layout_of
from dsjax.precision import Precision, Quantized
from pallas_kernels.fp8_linear import (
    How,
    fp8_linear,
    fp8_linears,
    fp8_norm_linears,
    fp8_swiglu_linear,
)
from pallas_kernels.quantize import quantize
from pallas_kernels.quantize.exact import as_float, divide, divisor
from pallas_kernels.quantize.reference import choose_scale, magnitude_bits
from pallas_kernels.tiled import LARGEST, TILE, ScaleFormat, Tiled, dequantize, tiles
from sharding import island
from sharding.dispatch import Codec
from sharding.rules import AxisRules, Layout, LayoutError

# What crosses to experts, and what attention gives, has power-of-two scales (V3 report, 3.3.3): to
# be rounded again, along the other dimension too, then loses nothing but what is too small.
CROSSING = How(scale="power_of_two")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """The source of a weight that is a parameter: `pallas_kernels.fp8_linear.Source`.

    Weights travel between devices in FP8: the largest magnitudes of blocks that a border cuts are
    compared first. Their gradients travel in float32.

    Attributes:
        lead: dimensions before the matrix's (experts).
        in_dims: dimensions of the parameter that are contracted.
        parts: matrices side by side in the last dimension, with blocks of their own, as published;
            1 where each has whole blocks, so that they lie like those of one matrix.
        layout: mesh axes of each dimension.
        kept: those over which it stays apart.
        scale: of its blocks.
    """

    lead: int
    in_dims: int
    parts: int
    layout: Layout
    kept: Layout
    scale: ScaleFormat

    def pull(self, w: Any) -> Tiled:
        """The whole matrix, but for what other devices see to; parts are filled up to whole blocks.

        Raises:
            LayoutError: for a weight in FP8 of which devices have parts, or blocks that a border
                between devices would cut for good.
        """
        if isinstance(w, Quantized):
            if any(self.layout[self.lead :]):
                raise LayoutError("a weight kept in FP8 is used whole: lay out experts alone")
            return Tiled(_filled(self._matrix(w.q), self.parts), w.scale)
        self._check(w)
        cut = self._cut()
        if cut is None:  # borders in the middle of a row or column: gathered wide
            whole = island.gather(w, self.layout, self.kept, w.dtype)
            return quantize(self._parts(whole), tile=(TILE, TILE), scale=self.scale)
        if not any(cut):
            return quantize(self._parts(w), tile=(TILE, TILE), scale=self.scale)
        return _gather_blocks(self._parts(w), *cut, self.scale)

    def push(self, dw: Array, w: Any) -> Any:
        """The gradient in the parameter's shape, summed over devices, of what this one stores."""
        if isinstance(w, Quantized):
            return jax.tree.map(jnp.zeros_like, w)  # of numbers that no gradient moves
        shape = list(w.shape)
        for dim, axes in enumerate(self._gathered()):
            shape[dim] *= island.count(axes)
        dw = _unfilled(dw, self.parts, shape[-1] // self.parts).reshape(shape)
        return island.scatter(dw, self.layout, self.kept).astype(w.dtype)

    def _matrix(self, w):
        shape = w.shape[: self.lead]
        rows = math.prod(w.shape[self.lead : self.lead + self.in_dims])
        return w.reshape(*shape, rows, -1)

    def _parts(self, w):
        return _filled(self._matrix(w), self.parts)

    def _gathered(self):
        return tuple(
            island.inside(tuple(a for a in axes if a not in stay))
            for axes, stay in zip(self.layout, self.kept, strict=True)
        )

    def _cut(self):
        """Mesh axes of the matrix's rows and columns, gathered; None if not in one piece each."""
        gathered = self._gathered()
        first_out = self.lead + self.in_dims
        inner = (*gathered[self.lead + 1 : first_out], *gathered[first_out + 1 :])
        columns = gathered[first_out]
        misfit = columns and self.parts > 1  # gates and ups do not lie on the same devices
        if any(gathered[: self.lead]) or any(inner) or misfit:
            return None
        return gathered[self.lead], columns

    def _check(self, w):
        """Where the rows or columns of a matrix stay apart for good, blocks must lie whole."""
        first_out, gathered = self.lead + self.in_dims, self._gathered()
        for name, dims in (
            ("rows", range(self.lead, first_out)),
            ("columns", range(first_out, w.ndim)),
        ):
            apart = tuple(a for dim in dims for a in island.inside(self.kept[dim]))
            size = math.prod(w.shape[dim] * island.count(gathered[dim]) for dim in dims)
            if apart:
                _check_whole(name, size, apart, self.parts if name == "columns" else 1)


def _check_whole(name: str, size: int, apart: tuple[str, ...], parts: int) -> None:
    if size % TILE:
        raise LayoutError(
            f"over {', '.join(apart)} a device has {size} {name} of a weight; FP8 needs whole "
            f"blocks of {TILE}"
        )
    if parts > 1:
        raise LayoutError(
            f"over {', '.join(apart)} a device has {size} {name} of two weights side by side; FP8 "
            f"needs each to have whole blocks of {TILE}"
        )


def _filled(w: Array, parts: int) -> Array:
    """Each part's columns filled up with zeros to whole blocks."""
    width = w.shape[-1] // parts
    if parts == 1 or width % TILE == 0:
        return w
    w = w.reshape(*w.shape[:-1], parts, width)
    edges = [(0, 0)] * (w.ndim - 1) + [(0, -width % TILE)]
    return jnp.pad(w, edges).reshape(*w.shape[:-2], -1)


def _unfilled(y: Array, parts: int, width: int) -> Array:
    """The way back from `_filled`, to parts of the given width."""
    if parts == 1 or width % TILE == 0:
        return y
    y = y.reshape(*y.shape[:-1], parts, -1)[..., :width]
    return y.reshape(*y.shape[:-2], -1)


def _gather_blocks(w, row_axes, column_axes, scale) -> Tiled:
    """Rounds this device's part with the scales of whole blocks, and gathers the FP8 numbers."""
    *lead, k, n = w.shape
    axes = (row_axes, column_axes)
    counts = tuple(island.count(a) for a in axes)
    firsts = tuple(island.place(a) * size for a, size in zip(axes, (k, n), strict=True))
    # A part that does not begin with a block touches one more.
    touched = tuple(
        tiles(size) + (count > 1 and size % TILE != 0)
        for size, count in zip((k, n), counts, strict=True)
    )
    inner = tuple(first % TILE for first in firsts)
    outer = tuple(first // TILE for first in firsts)
    zeros = (0,) * len(lead)
    placed = jnp.zeros((*lead, touched[0] * TILE, touched[1] * TILE), jnp.float32)
    placed = jax.lax.dynamic_update_slice(placed, w.astype(jnp.float32), (*zeros, *inner))
    placed = placed.reshape(*lead, touched[0], TILE, touched[1], TILE)
    blocks = tuple(tiles(size * count) for size, count in zip((k, n), counts, strict=True))
    room = jnp.zeros((*lead, blocks[0] + 1, blocks[1] + 1), jnp.int32)
    room = jax.lax.dynamic_update_slice(room, magnitude_bits(placed, (-3, -1)), (*zeros, *outer))
    room = jax.lax.pmax(room, (*row_axes, *column_axes))
    scales = choose_scale(as_float(room), scale)
    own = jax.lax.dynamic_slice(scales, (*zeros, *outer), (*lead, *touched))
    # The kernels' division, so that a weight has the same bits however many devices round it.
    quotient = divide(placed, divisor(own[..., :, None, :, None]))
    q = jnp.clip(quotient, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)
    bits = jax.lax.bitcast_convert_type(q, jnp.uint8)
    bits = bits.reshape(*lead, touched[0] * TILE, touched[1] * TILE)
    bits = jax.lax.dynamic_slice(bits, (*zeros, *inner), (*lead, k, n))
    for dim, over in ((len(lead), row_axes), (len(lead) + 1, column_axes)):
        if over:
            bits = jax.lax.all_gather(bits, over, axis=dim, tiled=True)
    q = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)
    return Tiled(q, scales[..., : blocks[0], : blocks[1]])


# ---- what layers call ---------------------------------------------------------------------------


def parameter(
    variable: nnx.Variable,
    in_dims: int,
    *,
    rules: AxisRules,
    precision: Precision,
    lead: int = 0,
    parts: int = 1,
) -> Parameter:
    """The source of a variable."""
    layout, kept = layout_of(variable, rules)
    whole = variable.get_metadata()["whole"][lead + in_dims :]
    parts = parts if math.prod(whole) // parts % TILE else 1
    return Parameter(lead, in_dims, parts, layout, kept, precision.scale)


def linears(
    x: Any,
    variables: Sequence[nnx.Variable],
    in_dims: int,
    *,
    rules: AxisRules,
    precision: Precision,
    how: How | None = None,
    parts: int = 1,
) -> tuple[Array, ...]:
    """Contracts the last `in_dims` dimensions of x with the first of each weight.

    Args:
        x: activations, or `layers.Normed`, of whose last dimension alone contractions are.
        variables: the weights.
        in_dims: how many dimensions are contracted.
        rules: where the weights lie.
        precision: the recipe.
        how: operands are rounded; None as the recipe has it for most layers.
        parts: of every weight.

    Returns:
        Of each weight x's other dimensions and then the weight's.
    """
    norm = None if isinstance(x, jax.Array) else (x.scale_D, x.eps)
    x = x if norm is None else x.x
    assert norm is None or in_dims == 1, "a norm is of one dimension"
    lead = x.shape[: x.ndim - in_dims]
    x_MK = x.reshape(math.prod(lead), -1).astype(precision.compute_dtype)
    told = {"rules": rules, "precision": precision, "parts": parts}
    sources = tuple(parameter(v, in_dims, **told) for v in variables)
    weights = tuple(v[...] for v in variables)
    how = how or How(precision.scale, precision.scale)
    if norm is None:
        results = fp8_linears(x_MK, weights, sources=sources, how=how)
    else:
        _, results = fp8_norm_linears(x_MK, *norm, weights, sources=sources, how=how)
    return tuple(
        _columns(y, source, variable).reshape(*lead, *_out_shape(source, variable))
        for y, source, variable in zip(results, sources, variables, strict=True)
    )


def _out_shape(source: Parameter, variable: nnx.Variable):
    """The dimensions of what comes out, of this device."""
    w = variable[...]
    shape = list(w.q.shape if isinstance(w, Quantized) else w.shape)
    for dim, axes in enumerate(source._gathered()):
        shape[dim] *= island.count(axes)
    return shape[source.lead + source.in_dims :]


def _columns(y, source, variable):
    """Without the columns that fill parts up to whole blocks."""
    width = math.prod(_out_shape(source, variable)) // source.parts
    return _unfilled(y, source.parts, width)


def swiglu_linear(
    gate_up: Float[Array, "... F2"],
    variable: nnx.Variable,
    *,
    rules: AxisRules,
    precision: Precision,
) -> Float[Array, "... D"]:
    """SwiGLU and the projection behind it; keeps its input in FP8 for the backward pass."""
    source = parameter(variable, 1, rules=rules, precision=precision)
    how = How(precision.scale, precision.scale, kept="gate_up")
    rows = gate_up.reshape(-1, gate_up.shape[-1]).astype(precision.compute_dtype)
    y = fp8_swiglu_linear(rows, variable[...], source=source, how=how)
    return y.reshape(*gate_up.shape[:-1], -1)


def experts(
    x_XD: Float[Array, "X D"],
    gates_X: Float[Array, " X"],
    tile_expert: Int[Array, " _"],
    w_in: nnx.Variable,
    w_down: nnx.Variable,
    *,
    rules: AxisRules,
    precision: Precision,
) -> Float[Array, "X D"]:
    """The routed experts; rows arrive in FP8's values, and so do gradients of what is returned."""
    told = {"rules": rules, "precision": precision, "lead": 1}
    source = parameter(w_in, 1, parts=2, **told)
    how = dataclasses.replace(CROSSING, gradient_scale=precision.scale)
    x_XD = x_XD.astype(precision.compute_dtype)
    gate_up = fp8_linear(x_XD, w_in[...], tile_expert, source=source, how=how)
    gate_up = _columns(gate_up, source, w_in)
    how = How(precision.scale, CROSSING.scale, kept="expert_gate_up")
    source = parameter(w_down, 1, **told)
    return fp8_swiglu_linear(gate_up, w_down[...], gates_X, tile_expert, source=source, how=how)


def few_experts(
    x_XD: Float[Array, "X D"],
    gates_X: Float[Array, " X"],
    tile_expert: Int[Array, " _"],
    w_in: Float[Array, "E D F2"] | Quantized,
    w_down: Float[Array, "E F D"] | Quantized,
    *,
    precision: Precision,
) -> Float[Array, "X D"]:
    """`experts` of rows in fewer tiles than there are experts, without gradients.

    Only the weights that are named are rounded.
    """
    experts = jax.tree.leaves(w_in)[0].shape[0]
    taken = jnp.minimum(tile_expert, experts - 1)
    own = jnp.arange(tile_expert.size, dtype=tile_expert.dtype)
    tile_expert = jnp.where(tile_expert < experts, own, tile_expert.size)
    w_in, w_down = (w.take(taken) if isinstance(w, Quantized) else w[taken] for w in (w_in, w_down))
    width = jax.tree.leaves(w_in)[0].shape[-1] // 2
    apart = ((),) * 3
    into = Parameter(1, 1, 2 if width % TILE else 1, apart, apart, precision.scale)
    x_XD = x_XD.astype(precision.compute_dtype)
    gate_up = fp8_linear(x_XD, w_in, tile_expert, source=into, how=CROSSING)
    gate_up = _unfilled(gate_up, into.parts, width)
    down = Parameter(1, 1, 1, apart, apart, precision.scale)
    how = How(precision.scale)
    return fp8_swiglu_linear(gate_up, w_down, gates_X, tile_expert, source=down, how=how)


def rounded(
    variable: nnx.Variable, in_dims: int, *, rules: AxisRules, precision: Precision
) -> Array:
    """A weight's values in FP8, as training uses them, in the compute dtype and its own shape."""
    source = parameter(variable, in_dims, rules=rules, precision=precision)
    w = variable[...]
    shape = (w.q if isinstance(w, Quantized) else w).shape[: source.lead + in_dims]
    wide = dequantize(source.pull(w), precision.compute_dtype)
    return wide.reshape(*shape, *_out_shape(source, variable))


# ---- what crosses between devices ---------------------------------------------------------------


# FP8 travels as bytes: XLA:CPU was seen to garble it in an all-to-all.


def _encode(x):
    q, scale = quantize(x, scale="power_of_two")
    return jax.lax.bitcast_convert_type(q, jnp.uint8), scale


def _decode(arrays, dtype):
    bits, scale = arrays
    return dequantize(Tiled(jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), scale), dtype)


def _as_computed(x):
    return (x,)


def _back(arrays, dtype):
    return arrays[0].astype(dtype)


# V3 report, 3.3.2: FP8 on the way to the experts, both ways; sums come back as they are.
TO_EXPERTS = Codec("fp8", _encode, _decode, _as_computed, _back)
FROM_EXPERTS = Codec("fp8 gradients", _as_computed, _back, _encode, _decode)


@jax.custom_vjp
def as_sent(x: Float[Array, "U D"]) -> Float[Array, "U D"]:
    """The values that reach the experts, whether they cross to another device or not."""
    return _decode(_encode(x), x.dtype)


as_sent.defvjp(lambda x: (as_sent(x), None), lambda _, dx: (dx,))


@jax.custom_vjp
def gradient_as_sent(y: Float[Array, "U D"]) -> Float[Array, "U D"]:
    """The same of the gradient that comes back."""
    return y


gradient_as_sent.defvjp(lambda y: (y, None), lambda _, dy: (_decode(_encode(dy), dy.dtype),))
