"""The paged cache: of latents, 576 numbers a token a layer in V3, or of keys and values.

Knows nothing about how attention reads it. L layers of a stack, X pages of S positions,
Z = C + R numbers an entry of MLA (latent first, rope key already rotated), I key/value heads of
widths A and H in grouped-query attention, B sequences, T new positions.
"""

import dataclasses
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import AttentionConfig, MlaConfig, ModelConfig

PAGE_SIZE = 64


class KeysValues(NamedTuple):
    """What grouped-query attention caches; keys already rotated.

    Attributes:
        k_LXSIA: keys.
        v_LXSIH: values.
    """

    k_LXSIA: Array
    v_LXSIH: Array


# Of one block of a stack's pattern, all layers: MLA's latents [L, X, S, Z], or keys and values.
Entries = Array | KeysValues


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
        entries: {stack: latents [L, X, S, Z], or `KeysValues`}.
        pages: the same for every layer.
        fresh: static; nothing is cached for these sequences yet, so the new positions attend to
            each other only, as in training (MLA: in the cheaper expanded form).
    """

    entries: dict[str, Entries]
    pages: Pages
    fresh: bool = dataclasses.field(default=False, metadata={"static": True})


def contiguous_table(batch: int, max_positions: int) -> Int[Array, "B X"]:
    """The identity table: sequence b owns the pages b * n .. b * n + n - 1."""
    pages = -(-max_positions // PAGE_SIZE)
    return jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)


def empty_entries(config: ModelConfig, num_pages: int, dtype: Any) -> dict[str, Entries]:
    """Zeroed cache arrays for every stack of the model; MTP keeps none."""

    def empty(attention: AttentionConfig, layers: int) -> Entries:
        shape = (layers, num_pages, PAGE_SIZE)
        if isinstance(attention, MlaConfig):
            return jnp.zeros((*shape, attention.cache_dim), dtype)
        heads = attention.num_kv_heads
        return KeysValues(
            jnp.zeros((*shape, heads, attention.head_dim), dtype),
            jnp.zeros((*shape, heads, attention.value_dim), dtype),
        )

    return {
        stack.key(i): empty(block.attention, stack.repeats)
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
    cache_LXS: Float[Array, "L X S *_"],
    layer: Int[Array, ""],
    new_BT: Float[Array, "B T *_"],
    slot_BT: Int[Array, "B T"],
) -> Float[Array, "L X S *_"]:
    """Writes new entries of one layer in place (the array is a scan carry).

    What an entry is, the dimensions past S and T, is the caller's: Z, or I and A.
    """
    pages, size = cache_LXS.shape[1:3]
    page_BT = jnp.where(slot_BT < 0, pages, slot_BT // size)  # out of range: dropped
    return cache_LXS.at[layer, page_BT, slot_BT % size].set(
        new_BT.astype(cache_LXS.dtype), mode="drop"
    )
