"""RMSNorm, the dense gated feed-forward layer, and how parameters are declared.

Knows nothing about attention or experts. D model width, F hidden width, B sequences, T positions.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from dsjax.model import delayed, fp8
from dsjax.model.layout import layout_of
from dsjax.precision import Precision, Quantized, Role
from pallas_kernels.fp8_linear import How
from sharding import island
from sharding.rules import AxisRules, LayoutError


def weight(
    key: PRNGKeyArray,
    shape: Sequence[int],
    axes: tuple[str | None, ...],
    *,
    std: float,
    precision: Precision,
    linear: bool = True,
) -> nnx.Param:
    """Declares a normally distributed parameter with its logical axes (V3 report 4.2: 0.006).

    `linear` says whether it is used by linear layers, which may run in FP8.
    """
    values = (std * jax.random.normal(key, tuple(shape), jnp.float32)).astype(precision.param_dtype)
    return nnx.Param(values, axes=axes, whole=tuple(shape), linear=linear)


class Normed(NamedTuple):
    """Hidden states that a norm is still to be applied to: FP8 rounds them as they are normed.

    Attributes:
        x: [..., D].
        scale_D: of the RMSNorm.
        eps: of it.
    """

    x: Array
    scale_D: Array
    eps: float

    def value(self) -> Array:
        """The normed states."""
        return rms_norm(self.x, self.scale_D, self.eps)


def value(x: Array | Normed) -> Array:
    """What a layer is given, with its norm applied."""
    return x.value() if isinstance(x, Normed) else x


def enter(x: Array | Normed, axes: tuple[str, ...], rules: AxisRules) -> Array | Normed:
    """`island.enter`; a norm, which is of each position by itself, may come after."""
    if isinstance(x, Normed):
        return x._replace(x=island.enter(x.x, axes, rules))
    return island.enter(x, axes, rules)


def read(
    variable: nnx.Variable, rules: AxisRules, precision: Precision, dtype: Any = None
) -> Array | Quantized:
    """A weight for use: whole, but for heads and hidden units that other devices see to.

    Args:
        variable: the weight.
        rules: where its axes go.
        precision: in what it is used.
        dtype: what it is gathered in; None takes the compute dtype.

    Raises:
        LayoutError: for a weight in FP8 of which devices have parts; its scales are of the whole.
    """
    w = variable[...]
    layout, kept = layout_of(variable, rules)
    if isinstance(w, Quantized) and any(layout[-2:]):
        raise LayoutError("a weight kept in FP8 is used whole: lay out experts alone")
    if layout == kept:
        return w
    return island.whole(w, layout, kept, dtype or precision.compute_dtype)


def bias(shape: Sequence[int], axes: tuple[str | None, ...], precision: Precision) -> nnx.Param:
    """Declares what is added to a projection, zeros; the optimizer lets it not decay."""
    zeros = jnp.zeros(tuple(shape), precision.param_dtype)
    return nnx.Param(zeros, axes=axes, whole=tuple(shape), decays=False)


def contract(
    x: Float[Array, "..."] | Normed,
    variable: nnx.Variable,
    spec: str,
    *,
    rules: AxisRules,
    precision: Precision,
    role: Role = "linear",
    parts: int = 1,
    how: How | None = None,
) -> Float[Array, "..."]:
    """`Precision.linear` with a weight of which each device may store a part.

    What is gathered is not kept for the backward pass, which gathers it again: the whole of every
    layer's weights is more than a device has.

    Args:
        x: activations; of one dimension contracted, they may wait for their norm.
        variable: the weight.
        spec: einsum of the two.
        rules: where weights lie.
        precision: the recipe.
        role: as in `Precision.linear`; `linear` alone may run in FP8.
        parts: matrices side by side in the weight's last dimension, as published.
        how: FP8's operands are rounded, other than in most layers.
    """
    if role == "linear" and precision.recipe == "fp8":
        told = {"rules": rules, "precision": precision, "parts": parts, "how": how}
        return fp8.linears(x, [variable], _contracted(spec), **told)[0]
    x = value(x)
    if role == "linear" and precision.recipe == "fp8_per_tensor":
        w, dtype = variable[...], precision.compute_dtype
        return delayed.linear(x, w, _contracted(spec), dtype=dtype)
    dtype = jnp.float32 if role == "router" else None

    def product(x):
        return precision.linear(x, read(variable, rules, precision, dtype), spec, role=role)

    layout, kept = layout_of(variable, rules)
    if layout != kept and not rules.recomputed:
        product = jax.checkpoint(product)
    return product(x)


def contract_all(
    x: Float[Array, "..."] | Normed,
    variables: Sequence[nnx.Variable],
    spec: str,
    *,
    rules: AxisRules,
    precision: Precision,
) -> tuple[Float[Array, "..."], ...]:
    """`contract` of one input with several weights, which FP8 rounds and keeps once."""
    if precision.recipe == "fp8":
        told = {"rules": rules, "precision": precision}
        return fp8.linears(x, variables, _contracted(spec), **told)
    x = value(x)
    told = {"rules": rules, "precision": precision}
    return tuple(contract(x, variable, spec, **told) for variable in variables)


def _contracted(spec: str) -> int:
    """How many dimensions an einsum contracts: the last of the first operand."""
    operands, out = spec.split("->")
    x, w = operands.split(",")
    count = sum(letter not in out for letter in w)
    assert x[-count:] == w[:count], f"{spec} does not contract the last with the first"
    return count


def norm_scale(size: int, axis: str | None, precision: Precision) -> nnx.Param:
    """Declares the scale of an RMSNorm, ones."""
    return nnx.Param(jnp.ones((size,), precision.param_dtype), axes=(axis,))


# Recomputed in the backward pass, not kept: one pass over x costs less than storing its parts.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(
    x: Float[Array, "... D"], scale_D: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """Divides by the root mean square of the last dimension and scales.

    Source: Zhang and Sennrich, arXiv 1910.07467. Numerics: float32 inside, result in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + eps) * scale_D.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate_up: Float[Array, "... F2"]) -> Float[Array, "... F"]:
    """Multiplies SiLU of the first half with the second half (Shazeer, arXiv 2002.05202)."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def swiglu_parts(gate_up: Float[Array, "... F2"], axes: tuple[str, ...]) -> Float[Array, "... F"]:
    """`swiglu` where each device along `axes` has a part of the columns, and then of the result.

    Gates lie left of ups, as published, so a gate and its up lie on different devices: the products
    are gathered. They are few where weights stay in place, in decoding.
    """
    axes = island.inside(axes)
    if not axes:
        return swiglu(gate_up)
    hidden = swiglu(jax.lax.all_gather(gate_up, axes, axis=gate_up.ndim - 1, tiled=True))
    part = hidden.shape[-1] // island.count(axes)
    start = jax.lax.axis_index(axes) * part
    return jax.lax.dynamic_slice_in_dim(hidden, start, part, axis=hidden.ndim - 1)


class SwiGlu(nnx.Module):
    """The dense gated feed-forward layer, gate and up projections fused into one weight."""

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        std: float,
        precision: Precision,
        rules: AxisRules,
        key: PRNGKeyArray,
    ):
        self.precision, self.rules = precision, rules
        key_in, key_down = jax.random.split(key)
        self.w_in_D2F = weight(
            key_in, (embed_dim, 2 * hidden_dim), ("embed", "mlp"), std=std, precision=precision
        )
        self.w_down_FD = weight(
            key_down, (hidden_dim, embed_dim), ("mlp", "embed"), std=std, precision=precision
        )

    @jax.named_scope("dense_ffn")
    def __call__(self, x_BTD: Float[Array, "B T D"] | Normed) -> Float[Array, "B T D"]:
        """Applies the layer; [B, T, D] -> [B, T, D]."""
        rules, how = self.rules, {"rules": self.rules, "precision": self.precision}
        axes = rules.of("act_mlp")
        x_BTD = enter(x_BTD, axes, rules)
        gate_up_BT2F = contract(x_BTD, self.w_in_D2F, "btd,df->btf", parts=2, **how)
        if self.precision.recipe == "fp8" and not island.inside(axes):
            y_BTD = fp8.swiglu_linear(gate_up_BT2F, self.w_down_FD, **how)
        else:
            hidden_BTF = swiglu_parts(checkpoint_name(gate_up_BT2F, "gate_up"), axes)
            y_BTD = contract(hidden_BTF, self.w_down_FD, "btf,fd->btd", **how)
        return island.leave(y_BTD, axes, rules)
