"""The paged cache: of latents, 576 numbers a token a layer in V3, or of keys and values.

Knows nothing about how attention reads it. Pages of a sequence may lie over several devices, every
n-th on each: then all of them share the work of attention to it (`sharding.island.combine_parts`).

L layers of a stack, X pages of S positions,
Z = C + R numbers an entry of MLA (latent first, rope key already rotated), I key/value heads of
widths A and H in grouped-query attention, B sequences, T new positions.
"""

import dataclasses
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import AttentionConfig, CacheKind, MlaConfig, ModelConfig
from dsjax.errors import InputError
from pallas_kernels import choose
from pallas_kernels.latents import Fp8Latents, read_pages, round_latents
from pallas_kernels.mla_decode import sequence_part
from pallas_kernels.tiled import tiles
from sharding import island
from sharding.rules import AxisRules

PAGE_SIZE = 64
FEW = 256  # positions, which are not too many to be written one by one


class KeysValues(NamedTuple):
    """What grouped-query attention caches; keys already rotated.

    Attributes:
        k_LXSIA: keys.
        v_LXSIH: values.
    """

    k_LXSIA: Array
    v_LXSIH: Array


# Of one block of a stack's pattern, all layers: MLA's latents [L, X, S, Z], as they are computed or
# in FP8, or keys and values.
Entries = Array | Fp8Latents | KeysValues


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Where each sequence's positions lie on this device.

    Attributes:
        table_BX: int32 pages of each sequence, in order; entries past its length are ignored.
        length_B: int32 positions cached here once this call has written.
        slot_BT: int32 place of each new position, page * S + offset; -1 writes nothing.
        seen_BT: int32 the last of the positions cached here that each new one attends to, counted
            as they lie here; -1 for none.
        first_row: int32 scalar where the new positions of every sequence that has any begin at one
            place, a multiple of T: in the pieces of a prefill. None where that is not known.
        axes: static; the mesh axes over which pages of a sequence lie.
    """

    table_BX: Array
    length_B: Array
    slot_BT: Array
    seen_BT: Array
    first_row: Array | None = None
    axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})


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


def page_axes(config: ModelConfig, rules: AxisRules) -> tuple[str, ...]:
    """The mesh axes over which pages of a sequence lie.

    Heads that are cut over an axis share latents over it; keys and values go with their heads.
    """
    blocks = [block for stack in config.stacks for block in stack.blocks]
    axes = rules.of("pages")
    if not all(isinstance(block.attention, MlaConfig) for block in blocks):
        axes = tuple(a for a in axes if a not in rules.of("act_heads"))
    return axes


def contiguous_table(batch: int, max_positions: int, parts: int = 1) -> Int[Array, "B X"]:
    """The identity table: sequence b owns the pages b * n .. b * n + n - 1.

    Args:
        batch: sequences.
        max_positions: of each.
        parts: devices over which a sequence's pages lie.
    """
    pages = -(-max_positions // (PAGE_SIZE * parts))
    return jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)


def empty_entries(
    config: ModelConfig, num_pages: int, dtype: Any, kind: CacheKind = "computed"
) -> dict[str, Entries]:
    """Zeroed cache arrays for every stack of the model; MTP keeps none.

    Args:
        config: the model.
        num_pages: of each layer, X.
        dtype: that the model computes in.
        kind: "computed" keeps entries in it, "fp8" latents in FP8.

    Raises:
        InputError: for FP8 of other than latents.
    """

    def empty(attention: AttentionConfig, layers: int) -> Entries:
        shape = (layers, num_pages, PAGE_SIZE)
        if kind == "fp8":
            if not isinstance(attention, MlaConfig):
                raise InputError("an FP8 cache is of latents; this model caches keys and values")
            c, r = attention.kv_latent_dim, attention.rope_dim
            return Fp8Latents(
                jnp.zeros((*shape, c), jnp.float8_e4m3fn),
                jnp.zeros((layers, num_pages, tiles(c), PAGE_SIZE), jnp.float32),
                jnp.zeros((*shape, r), dtype),
            )
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
    table_BX: Int[Array, "B X"],
    cached_B: Int[Array, " B"],
    new_B: Int[Array, " B"],
    width: int,
    axes: tuple[str, ...] = (),
) -> tuple[Pages, Int[Array, "B T"]]:
    """Places for the next `new_B` positions of each sequence, padded on the right to `width`.

    Args:
        table_BX: int32 pages of each sequence on this device.
        cached_B: int32 positions cached before, on all devices.
        new_B: int32.
        width: T.
        axes: mesh axes over which pages of a sequence lie.

    Returns:
        (pages, positions_BT int32; -1 past a sequence's own new positions).
    """
    step_T = jnp.arange(width, dtype=jnp.int32)
    position_BT = cached_B[:, None] + step_T
    real_BT = step_T < new_B[:, None]
    part, parts = island.place(axes), island.count(axes)
    number_BT = position_BT // PAGE_SIZE
    place_BT = jnp.minimum(number_BT // parts, table_BX.shape[1] - 1)
    page_BT = jnp.take_along_axis(table_BX, place_BT, axis=1)
    slot_BT = page_BT * PAGE_SIZE + position_BT % PAGE_SIZE
    slot_BT = jnp.where(real_BT & (number_BT % parts == part), slot_BT, -1)
    position_BT = jnp.where(real_BT, position_BT, -1)
    length_B, seen_BT = cached_B + new_B, position_BT
    if parts > 1:
        length_B = sequence_part(length_B, part, parts, PAGE_SIZE)
        seen_BT = sequence_part(position_BT + 1, part, parts, PAGE_SIZE) - 1
    return Pages(table_BX, length_B, slot_BT, seen_BT, axes=axes), position_BT


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


def write_latents(
    entries: Array | Fp8Latents,
    layer: Int[Array, ""],
    new_BTZ: Float[Array, "B T Z"],
    slot_BT: Int[Array, "B T"],
) -> Array | Fp8Latents:
    """As `write`, of latents, which are rounded where the cache keeps them in FP8."""
    if not isinstance(entries, Fp8Latents):
        return write(entries, layer, new_BTZ, slot_BT)
    latent, rope = round_latents(new_BTZ, entries.q_LXSC.shape[-1])
    pages, size = entries.q_LXSC.shape[1:3]
    by_page = choose.target() == "tpu" and slot_BT.size <= FEW
    write_q = _write_by_page if by_page else write
    page_BT = jnp.where(slot_BT < 0, pages, slot_BT // size)  # out of range: dropped
    scale_LXcS = entries.scale_LXcS.at[layer, page_BT, :, slot_BT % size].set(
        latent.scale, mode="drop"
    )
    return Fp8Latents(
        write_q(entries.q_LXSC, layer, latent.q, slot_BT),
        scale_LXcS,
        write(entries.rope_LXSR, layer, rope, slot_BT),
    )


def _write_by_page(cache_LXSC, layer, new_BTC, slot_BT):
    """As `write`, one position after the other, each with the page around it.

    XLA for TPUs lays an FP8 array out for a scatter, or for an update narrower than its tiles, in
    another way than a program gets it: around each such write it copies the whole cache twice.
    """
    size, width = cache_LXSC.shape[2:]
    slot_U, new_UC = slot_BT.reshape(-1), new_BTC.reshape(-1, width)

    def one(i, cache_LXSC):
        slot = slot_U[i]
        place = layer, jnp.maximum(slot, 0) // size, 0, 0
        page = jax.lax.dynamic_slice(cache_LXSC, place, (1, 1, size, width))
        here_S1 = (jnp.arange(size) == slot % size)[:, None] & (slot >= 0)
        page = jnp.where(here_S1, new_UC[i], page)
        return jax.lax.dynamic_update_slice(cache_LXSC, page, place)

    return jax.lax.fori_loop(0, slot_U.size, one, cache_LXSC)


def read_rows(
    entries: Array | Fp8Latents, layer: Int[Array, ""], pages: Pages, dtype: Any
) -> Float[Array, "B S Z"]:
    """The latents of one layer of all positions that the table has room for, in their order.

    What lies over several devices is brought together. Past a sequence's length there is anything.
    """
    found = read_pages(entries, layer, pages.table_BX, dtype)
    if axes := island.inside(pages.axes):  # page i of part d is page i * parts + d
        found = jax.lax.all_gather(found, axes, axis=2)
    return found.reshape(found.shape[0], -1, found.shape[-1])
