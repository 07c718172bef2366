"""The paged cache of latents: 576 numbers a token a layer in V3, whatever the number of heads.

Knows nothing about how attention reads it. L layers of a stack, X pages of S positions,
Z = C + R numbers an entry (latent first, rope key already rotated), B sequences, T new positions.
"""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig

PAGE_SIZE = 64


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Where each sequence's positions lie.

    Attributes:
        table_BX: int32 pages of each sequence, in order; entries past its length are ignored.
        length_B: int32 positions cached once this call has written.
        slot_BT: int32 place of each new position, page * S + offset; -1 writes nothing.
    """

    table_BX: Array
    length_B: Array
    slot_BT: Array


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a forward pass reads and writes; travels through the layers as a scan carry.

    Attributes:
        latent: {stack: [L, X, S, Z]}.
        pages: the same for every layer.
        fresh: static; nothing is cached for these sequences yet, so the new positions attend to
            each other only, in the cheaper expanded form.
    """

    latent: dict[str, Array]
    pages: Pages
    fresh: bool = dataclasses.field(default=False, metadata={"static": True})


def contiguous_table(batch: int, max_positions: int) -> Int[Array, "B X"]:
    """The identity table: sequence b owns the pages b * n .. b * n + n - 1."""
    pages = -(-max_positions // PAGE_SIZE)
    return jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)


def empty_latent(
    config: ModelConfig, num_pages: int, dtype: Any
) -> dict[str, Float[Array, "_L X S _Z"]]:
    """Zeroed cache arrays for every stack of the model; MTP keeps none."""
    return {
        stack.key(i): jnp.zeros(
            (stack.repeats, num_pages, PAGE_SIZE, block.attention.cache_dim), dtype
        )
        for stack in config.stacks
        for i, block in enumerate(stack.blocks)
    }


def advance(
    table_BX: Int[Array, "B X"], cached_B: Int[Array, " B"], new_B: Int[Array, " B"], width: int
) -> tuple[Pages, Int[Array, "B T"]]:
    """Places for the next `new_B` positions of each sequence, padded on the right to `width`.

    Returns:
        (pages, positions_BT int32; -1 past a sequence's own new positions).
    """
    step_T = jnp.arange(width, dtype=jnp.int32)
    position_BT = cached_B[:, None] + step_T
    real_BT = step_T < new_B[:, None]
    page_BT = jnp.take_along_axis(
        table_BX, jnp.minimum(position_BT // PAGE_SIZE, table_BX.shape[1] - 1), axis=1
    )
    slot_BT = jnp.where(real_BT, page_BT * PAGE_SIZE + position_BT % PAGE_SIZE, -1)
    pages = Pages(table_BX, cached_B + new_B, slot_BT)
    return pages, jnp.where(real_BT, position_BT, -1)


def write(
    latent_LXSZ: Float[Array, "L X S Z"],
    layer: Int[Array, ""],
    entries_BTZ: Float[Array, "B T Z"],
    slot_BT: Int[Array, "B T"],
) -> Float[Array, "L X S Z"]:
    """Writes new entries of one layer in place (the array is a scan carry)."""
    pages, size = latent_LXSZ.shape[1:3]
    page_BT = jnp.where(slot_BT < 0, pages, slot_BT // size)  # out of range: dropped
    return latent_LXSZ.at[layer, page_BT, slot_BT % size].set(
        entries_BTZ.astype(latent_LXSZ.dtype), mode="drop"
    )
