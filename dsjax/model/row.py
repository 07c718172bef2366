"""Where this device's tokens stand in their rows, known once for all layers.

Knows nothing about layers. Without a mesh the device's own tokens are the whole rows.

B sequences, T positions of this device, S of the whole row, N heads, I key/value heads, A key and H
value width.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import RopeConfig
from dsjax.model import rope
from pallas_kernels.mla_attention import mla_attention
from sharding import island
from sharding.rules import AxisRules

Turns = dict[tuple[RopeConfig, int], rope.Rotation]


class Row(NamedTuple):
    """What layers ask about tokens' places.

    Attributes:
        positions_BT: int32 positions of this device's tokens; negative ones attend to nothing.
        segments_BT: int32 documents of a packed row; 0 is padding.
        turns: the rotation of these positions, for each rope and width of the model.
        query_turns: of all positions that this device attends for: where attention is cut by
            heads, devices bring together what of the row they have.
        positions_BS: of the whole row.
        segments_BS: of the whole row.
    """

    positions_BT: Array
    segments_BT: Array
    turns: Turns
    query_turns: Turns
    positions_BS: Array
    segments_BS: Array


def row(
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    ropes: Iterable[tuple[RopeConfig, int]],
    rules: AxisRules,
) -> Row:
    """Finds out where tokens stand."""
    turns = {key: rope.rotation(positions_BT, key[1], key[0]) for key in ropes}
    if island.row_devices(rules) == 1:
        return Row(positions_BT, segments_BT, turns, turns, positions_BT, segments_BT)
    queries_BT = island.enter(positions_BT, rules.of("act_heads"), rules)
    query_turns = {key: rope.rotation(queries_BT, key[1], key[0]) for key in turns}
    positions_BS = island.whole_row(positions_BT, rules)
    segments_BS = island.whole_row(segments_BT, rules)
    return Row(positions_BT, segments_BT, turns, query_turns, positions_BS, segments_BS)


def attend(
    q_BTNA: Float[Array, "B T N A"],
    k_BSIA: Float[Array, "B S I A"],
    v_BSIH: Float[Array, "B S I H"],
    where: Row,
    scale: float,
    rules: AxisRules,
    kept: Literal["as_is", "e5m6"],
) -> Float[Array, "B T N H"]:
    """Attends from what this device has of the rows to all of them.

    Where rows are cut over `context`, the queries here are two chunks, one from either end, which
    makes causal attention as much work on each device. `kept` is how the result is kept for the
    backward pass (`mla_attention`).
    """
    segments_BS, positions_BS = where.segments_BS, where.positions_BS
    if q_BTNA.shape[1] == k_BSIA.shape[1]:
        return mla_attention(q_BTNA, k_BSIA, v_BSIH, segments_BS, positions_BS, scale, kept=kept)
    length = q_BTNA.shape[1] // 2
    halves = q_BTNA[:, :length], q_BTNA[:, length:]
    out = [
        mla_attention(
            *(half, k_BSIA, v_BSIH, segments_BS, positions_BS, scale),
            first_row=chunk * length,
            kept=kept,
        )
        for half, chunk in zip(halves, island.context_chunks(), strict=True)
    ]
    return jnp.concatenate(out, axis=1)
