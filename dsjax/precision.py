"""Dtype roles, weights kept in FP8, and the one place where a weight is contracted.

Knows nothing about layers. Every weight contraction of the model goes through `Precision.linear`,
or, where the recipe is FP8, through `dsjax.model.fp8`.
"""

import dataclasses
import math
from types import EllipsisType
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import PrecisionConfig
from pallas_kernels.grouped_matmul import grouped_matmul

Role = Literal["linear", "wide", "router", "head"]
BLOCK = 128  # rows and columns of a weight that share one scale (V3 report, section 3.3.2)


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in FP8 with a scale for every 128x128 block, in the place of a parameter's array.

    The blocks lie on the matrix [in, out] that the weight's dimensions flatten to, as published
    (there transposed); those at the edges are smaller.

    Attributes:
        q: float8_e4m3fn, of the parameter's shape.
        scale: float32 [..., in blocks, out blocks]; what comes before is the parameter's leading
            dimensions (layers, experts).
        in_dims: how many dimensions of the parameter are contracted.
        parts: matrices side by side in the last dimension, each with blocks of its own (2 for a
            fused gate and up).
    """

    q: Array
    scale: Array
    in_dims: int = dataclasses.field(default=1, metadata={"static": True})
    parts: int = dataclasses.field(default=1, metadata={"static": True})

    def __getitem__(self, key: EllipsisType) -> "Quantized":
        """Itself: a Flax variable is read as `variable[...]`."""
        return self

    def dequantize(self, dtype) -> Array:
        """The weight, each element times its block's scale in float32, then in `dtype`."""
        lead = self.scale.ndim - 2
        shape, per_part = self.q.shape, self.scale.shape[-1] // self.parts
        rows = math.prod(shape[lead : lead + self.in_dims])
        q = self.q.reshape(*shape[:lead], rows, self.parts, -1)
        scale = self.scale.reshape(*self.scale.shape[:-1], self.parts, per_part)
        scale = jnp.repeat(jnp.repeat(scale, BLOCK, axis=-1), BLOCK, axis=-3)
        scale = scale[..., :rows, :, : q.shape[-1]]
        return (q.astype(jnp.float32) * scale).astype(dtype).reshape(shape)

    def take(self, index) -> "Quantized":
        """Of the first dimension (experts), those with these numbers."""
        return dataclasses.replace(self, q=self.q[index], scale=self.scale[index])

    def joined(self) -> "Quantized":
        """The first two dimensions (layers, experts) as one."""
        return dataclasses.replace(
            self,
            q=self.q.reshape(-1, *self.q.shape[2:]),
            scale=self.scale.reshape(-1, *self.scale.shape[2:]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """What parameters are stored in and contractions run in; hashable, part of jit's cache key."""

    param_dtype: jnp.dtype
    compute_dtype: jnp.dtype
    recipe: Literal["plain", "fp8", "fp8_per_tensor"] = "plain"
    scale: Literal["float32", "power_of_two"] = "float32"

    @classmethod
    def of(cls, config: PrecisionConfig) -> "Precision":
        """Resolves the dtype names of a configuration."""
        return cls(
            param_dtype=jnp.dtype(config.param_dtype),
            compute_dtype=jnp.dtype(config.compute_dtype),
            recipe=config.recipe,
            scale=config.scale,
        )

    @property
    def attention_kept(self) -> Literal["as_is", "e5m6"]:
        """How attention keeps its result for the backward pass."""
        return "e5m6" if self.recipe == "fp8" else "as_is"

    def dense(self, w: Float[Array, "..."] | Quantized, dtype: jnp.dtype | None = None) -> Array:
        """A weight as an array in `dtype`, or in `compute_dtype`."""
        dtype = dtype or self.compute_dtype
        return w.dequantize(dtype) if isinstance(w, Quantized) else w.astype(dtype)

    def linear(
        self,
        x: Float[Array, "..."],
        w: Float[Array, "..."] | Quantized,
        spec: str,
        *,
        role: Role = "linear",
    ) -> Float[Array, "..."]:
        """Contracts activations with a weight.

        Args:
            x: activations of any shape.
            w: the weight, in `param_dtype` or in FP8.
            spec: einsum of (x, w).
            role: `linear` and `wide` run in `compute_dtype`; `head` too, but returns float32;
                `router` runs and returns float32. FP8 is for `linear` alone (V3 report, section
                3.3), and `dsjax.model.layers.contract` sees to it: here nothing runs in it.

        Returns:
            The contraction, in `compute_dtype` for `linear` and `wide`, in float32 for the others.
        """
        dtype = jnp.dtype(jnp.float32) if role == "router" else self.compute_dtype
        out_dtype = self.compute_dtype if role in ("linear", "wide") else jnp.float32
        return jnp.einsum(
            spec,
            x.astype(dtype),
            self.dense(w, dtype),
            preferred_element_type=out_dtype,
        )

    def grouped_linear(
        self,
        x_XD: Float[Array, "X D"],
        w_EDF: Float[Array, "E D F"] | Quantized,
        tile_expert: Int[Array, " _"],
    ) -> Float[Array, "X F"]:
        """Contracts rows, sorted by expert in whole tiles, each with its expert's weight.

        Args:
            x_XD: rows of the dispatch buffer.
            w_EDF: one weight an expert; of weights in FP8, only the experts named are made wide
                where tiles are fewer than experts.
            tile_expert: int32 expert of each tile of rows.

        Returns:
            [X, F] in `compute_dtype`.
        """
        tiles = tile_expert.shape[0]
        if isinstance(w_EDF, Quantized) and tiles < (experts := w_EDF.q.shape[0]):
            w_EDF = w_EDF.take(jnp.minimum(tile_expert, experts - 1))
            own = jnp.arange(tiles, dtype=tile_expert.dtype)
            tile_expert = jnp.where(tile_expert < experts, own, tiles)
        return grouped_matmul(x_XD.astype(self.compute_dtype), self.dense(w_EDF), tile_expert)
