"""RMSNorm, the dense gated feed-forward layer, and how parameters are declared.

Knows nothing about attention or experts. D model width, F hidden width, B sequences, T positions.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from dsjax.precision import Precision
from sharding.rules import AxisRules


def weight(
    key: PRNGKeyArray,
    shape: Sequence[int],
    axes: tuple[str | None, ...],
    *,
    std: float,
    precision: Precision,
) -> nnx.Param:
    """Declares a normally distributed parameter with its logical axes (V3 report 4.2: 0.006)."""
    values = std * jax.random.normal(key, tuple(shape), jnp.float32)
    return nnx.Param(values.astype(precision.param_dtype), axes=axes)


def bias(shape: Sequence[int], axes: tuple[str | None, ...], precision: Precision) -> nnx.Param:
    """Declares what is added to a projection, zeros; the optimizer lets it not decay."""
    return nnx.Param(jnp.zeros(tuple(shape), precision.param_dtype), axes=axes, decays=False)


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
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the layer; [B, T, D] -> [B, T, D]."""
        linear, rules = self.precision.linear, self.rules
        gate_up_BT2F = linear(
            x_BTD,
            self.w_in_D2F[...],
            "btd,df->btf",
            out_sharding=rules("batch", "seq", "act_mlp"),
        )
        return linear(
            swiglu(gate_up_BT2F),
            self.w_down_FD[...],
            "btf,fd->btd",
            out_sharding=rules("batch", "seq", "act_embed"),
        )
