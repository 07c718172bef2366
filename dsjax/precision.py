"""Dtype roles, and the one place where a weight is contracted.

Knows nothing about layers. Every weight contraction of the model goes through `Precision.linear`,
so that a recipe (BF16, later FP8 with block scales) is a change here and nowhere else.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import PrecisionConfig
from pallas_kernels.grouped_matmul import grouped_matmul

Role = Literal["linear", "router", "head"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """What parameters are stored in and contractions run in; hashable, part of jit's cache key."""

    param_dtype: jnp.dtype
    compute_dtype: jnp.dtype

    @classmethod
    def of(cls, config: PrecisionConfig) -> "Precision":
        """Resolves the dtype names of a configuration."""
        return cls(
            param_dtype=jnp.dtype(config.param_dtype), compute_dtype=jnp.dtype(config.compute_dtype)
        )

    def linear(
        self,
        x: Float[Array, "..."],
        w: Float[Array, "..."],
        spec: str,
        *,
        role: Role = "linear",
        out_sharding: jax.sharding.PartitionSpec | None = None,
    ) -> Float[Array, "..."]:
        """Contracts activations with a weight.

        Args:
            x: activations of any shape.
            w: the weight, in `param_dtype`.
            spec: einsum of (x, w).
            role: `linear` runs in `compute_dtype`; `head` too, but returns float32; `router` runs
                and returns float32. A low-precision recipe leaves the last two alone (V3 report,
                section 3.3).
            out_sharding: needed on an explicit mesh where the contracted dimension is sharded.

        Returns:
            The contraction, in `compute_dtype` for `linear` and in float32 for the other roles.
        """
        dtype = jnp.float32 if role == "router" else self.compute_dtype
        out_dtype = self.compute_dtype if role == "linear" else jnp.float32
        return jnp.einsum(
            spec,
            x.astype(dtype),
            w.astype(dtype),
            preferred_element_type=out_dtype,
            out_sharding=out_sharding,
        )

    def grouped_linear(
        self,
        x_XD: Float[Array, "X D"],
        w_EDF: Float[Array, "E D F"],
        tile_expert: Int[Array, " _"],
    ) -> Float[Array, "X F"]:
        """Contracts rows, sorted by expert in whole tiles, each with its expert's weight.

        Args:
            x_XD: rows of the dispatch buffer.
            w_EDF: one weight an expert.
            tile_expert: int32 expert of each tile of rows.

        Returns:
            [X, F] in `compute_dtype`.
        """
        dtype = self.compute_dtype
        return grouped_matmul(x_XD.astype(dtype), w_EDF.astype(dtype), tile_expert)
