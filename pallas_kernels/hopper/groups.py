"""Which part of a contraction over rows each expert has, and in which order experts come.

Knows nothing about kernels, but that they deal out the tiles of one expert's product after another.

E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Groups(NamedTuple):
    """Which steps of the contraction each group has, the longest group first.

    Tiles are dealt out in turn: in this order no CTA has more to do than another by more than one
    tile of the longest group.

    Attributes:
        group_E: int32, which group.
        first_E: int32, its first step.
        steps_E: int32, how many it has, perhaps none.
    """

    group_E: jax.Array
    first_E: jax.Array
    steps_E: jax.Array


def find_groups(tile_expert: jax.Array, num_experts: int, steps: int) -> Groups:
    """The groups of rows that lie sorted by expert.

    Args:
        tile_expert: int32, the expert of each tile of rows; E or more for none, those last.
        num_experts: E.
        steps: of the contraction in a tile.
    """
    border = jnp.searchsorted(tile_expert, jnp.arange(num_experts + 1), method="compare_all")
    border = border.astype(jnp.int32) * steps
    steps_E = jnp.diff(border)
    longest_first_E = jnp.argsort(-steps_E).astype(jnp.int32)
    return Groups(longest_first_E, border[longest_first_E], steps_E[longest_first_E])
