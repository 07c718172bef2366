"""Joins the parts of tiles that `mla_decode` on Hopper computed in several CTAs.

A kernel, because only the device knows how many parts a tile has, and most slots for parts are
empty: it reads those that are there, once. Knows nothing about pages or queries. Compiled for an
H100 and interpreted, not run.

G tiles of r rows in H groups, c teams of CTAs, S slots for parts, two a CTA; J groups that may be
cut, I tiles of these; C latent width.
"""

import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mla_decode import NOTHING
from pallas_kernels.mla_decode.hopper_schedule import Schedule

AT_ONCE = 8  # parts that are asked for before the first is there
THREADS = 128


class _Cuts(NamedTuple):
    """Groups that are cut, int32; no two of them begin in the same team's share.

    Attributes:
        group_J: which; H where there is none.
        team_J: the team that has its first part; the next ones have the others.
        tail_J: whether that lies in its CTAs' second slots; others lie in the first.
        count_J: of parts; 0 where there is none.
    """

    group_J: jax.Array
    team_J: jax.Array
    tail_J: jax.Array
    count_J: jax.Array


def combine_parts(
    schedule: Schedule,
    out_GrC: jax.Array,
    part_SrC: jax.Array,
    lse_Gr: jax.Array,
    part_lse_Sr: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Puts the tiles that were cut, joined as by `mla_decode.combine`, among those that were not.

    Args:
        schedule: by which they were computed.
        out_GrC: bfloat16 outputs of tiles that no cut falls in; of others anything.
        part_SrC: float32; the slots of a CTA hold its part of the first tile it visits, and of the
            last one if that is another; anything where there is no such part.
        lse_Gr: log-sum-exps, float32.
        part_lse_Sr: those of parts.
    """
    cuts = _find_cuts(schedule)
    groups, tiles = len(schedule.start_H1) - 1, len(lse_Gr)
    team = tiles // groups
    joined_IrC, joined_lse_Ir = _join(cuts, part_SrC, part_lse_Sr, team)
    tile_I = (cuts.group_J[:, None] * team + jnp.arange(team)).reshape(-1)
    return (
        out_GrC.at[tile_I].set(joined_IrC, mode="drop"),
        lse_Gr.at[tile_I].set(joined_lse_Ir, mode="drop"),
    )


def _find_cuts(schedule: Schedule) -> _Cuts:
    begin_H, end_H = schedule.start_H1[:-1], schedule.start_H1[1:]
    first_H, last_H = begin_H // schedule.share_1, (end_H - 1) // schedule.share_1  # the teams
    groups, teams = len(begin_H), len(schedule.first_c)
    number_H = jnp.arange(groups, dtype=jnp.int32)
    place_H = jnp.where(first_H != last_H, number_H if groups <= teams else first_H, teams)
    group_J = jnp.full((min(groups, teams),), groups, jnp.int32)
    group_J = group_J.at[place_H].set(number_H, mode="drop")
    group = jnp.minimum(group_J, groups - 1)
    team_J = first_H[group]
    tail_J = (schedule.first_c[team_J] != group).astype(jnp.int32)
    count_J = jnp.where(group_J < groups, last_H[group] - team_J + 1, 0)
    return _Cuts(group_J, team_J, tail_J, count_J)


def _join(
    cuts: _Cuts, part_SrC: jax.Array, lse_Sr: jax.Array, team: int
) -> tuple[jax.Array, jax.Array]:
    """Outputs [I, r, C] in bfloat16 and log-sum-exps [I, r]; a CTA a row."""
    _, rows, width = part_SrC.shape
    # Up to 16 bytes a thread.
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // THREADS, 4))

    def kernel(team_J, tail_J, count_J, part, lse, out, lse_out):
        tile, row, size = lax.axis_index("tile"), lax.axis_index("row"), jnp.int32(team)
        j, member = lax.div(tile, size), lax.rem(tile, size)
        count = count_J[j]

        def add_some(i, carry):
            top, total, out = carry
            found = []
            for k in range(AT_ONCE):
                p = i * AT_ONCE + k
                safe = lax.min(p, count - 1)
                tail = lax.select(safe == 0, tail_J[j], jnp.int32(0))
                slot = 2 * ((team_J[j] + safe) * size + member) + tail
                values = plgpu.load(part.at[slot, row], layout=layout, optimized=False)
                found.append((lax.select(p < count, lse[slot, row], NOTHING), values))
            new_top = top
            for one, _ in found:
                new_top = lax.max(new_top, one)
            shrink = jnp.exp(top - new_top)
            total, out = total * shrink, out * shrink
            for one, values in found:
                weight = jnp.exp(one - new_top)
                total, out = total + weight, out + values * weight
            return new_top, total, out

        @pl.when(count > 0)
        def _some():
            zeros = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
            steps = lax.div(count + AT_ONCE - 1, jnp.int32(AT_ONCE))
            start = jnp.float32(NOTHING), jnp.float32(0), zeros
            top, total, sums = lax.fori_loop(0, steps, add_some, start)
            out[tile, row] = (sums / total).astype(out.dtype)
            lse_out[tile, row] = lax.max(top + jnp.log(total), jnp.float32(NOTHING))

    joined = len(cuts.group_J) * team
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((joined, rows, width), jnp.bfloat16),
            jax.ShapeDtypeStruct((joined, rows), jnp.float32),
        ),
        grid=(joined, rows),
        grid_names=("tile", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="mla_decode_combine",
    )(cuts.team_J, cuts.tail_J, cuts.count_J, part_SrC, lse_Sr)
