"""Who reads which pages: the work of `mla_decode` cut into shares as even as whole pages allow.

The pages of all sequences are laid in one line, and the line is cut into as many equal shares as
there are CTAs, wherever that falls. So one long sequence among short ones, or a lone one, still
keeps every multiprocessor busy, which no fixed number of splits a sequence does; FlashMLA's
scheduler has the same aim. Where a sequence has more rows of queries than fit a tile, a team of
CTAs goes through the same pages at the same time, a tile each: all but one find them in the L2.
What is cut gives parts, a CTA at most two, that `hopper_combine` joins. Knows nothing about
kernels, or what is in a page.

B sequences, T queries of N heads each, R = T * N rows; G tiles of r = `ROWS` of them, all of one
sequence; H groups of as many tiles as a team has CTAs; c teams.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ROWS = 64  # queries that share a page once it is read: as many as a WGMMA has rows
PAGE = 64  # positions
TEAMS = (4, 3, 2, 1)  # CTAs of one: more share less, for they drift apart


class Schedule(NamedTuple):
    """Shares of the line, all int32.

    A group without a page counts as one of a page, so that somebody writes its result.

    Attributes:
        limit_Gr: the last position that each row attends to; negative for none.
        pages_G: pages that a tile reads, the first ones of its sequence.
        start_H1: where on the line each group begins, and where the last one ends.
        first_c: the group that each team begins in.
        last_c: the one it ends in; less than the first if the line is over.
        share_1: length of every team's share.
    """

    limit_Gr: jax.Array
    pages_G: jax.Array
    start_H1: jax.Array
    first_c: jax.Array
    last_c: jax.Array
    share_1: jax.Array


def team_of(rows: int, ctas: int) -> int:
    """How many CTAs go through the pages of a sequence together: as divides its tiles of rows."""
    tiles = -(-rows // ROWS)
    return next(team for team in TEAMS if tiles % team == 0 and team <= ctas)


def make_schedule(
    length_B: jax.Array, positions_BT: jax.Array, *, heads: int, ctas: int
) -> Schedule:
    """Cuts the line.

    Args:
        length_B: int32 positions cached.
        positions_BT: int32 position of each query; a negative one attends to nothing.
        heads: N.
        ctas: that run at once; those that are too few for a team have nothing to do.
    """
    limit_BT = jnp.minimum(positions_BT, length_B[:, None] - 1)
    limit_BR = jnp.repeat(limit_BT, heads, axis=1)
    team = team_of(limit_BR.shape[1], ctas)
    teams = ctas // team
    limit_BR = jnp.pad(limit_BR, ((0, 0), (0, -limit_BR.shape[1] % ROWS)), constant_values=-1)
    limit_Gr = limit_BR.reshape(-1, ROWS)
    pages_G = jnp.maximum(limit_Gr.max(axis=1), -1) // PAGE + 1
    end_H = jnp.cumsum(jnp.maximum(pages_G.reshape(-1, team).max(axis=1), 1))
    share = -(-end_H[-1] // teams)
    begin_c = jnp.arange(teams) * share
    stop_c = jnp.minimum(begin_c + share, end_H[-1])
    first_c = jnp.searchsorted(end_H, begin_c, side="right")
    last_c = jnp.where(begin_c < stop_c, jnp.searchsorted(end_H, stop_c, side="left"), -1)
    found = limit_Gr, pages_G, jnp.pad(end_H, (1, 0)), first_c, last_c, share[None]
    return Schedule(*(x.astype(jnp.int32) for x in found))
